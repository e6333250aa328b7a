"""Sends this server's heartbeats to one Redis, in one greenlet.

It runs in the agent, so no client waits for it. Any failure means that Redis is away: the last
known values stand, and the next heartbeat tries again.
"""

import logging
import random
from time import monotonic, monotonic_ns
from typing import Protocol

import gevent
from gevent.event import Event

from gserver import logs
from gserver.cluster.duplicate_id import DuplicateIdDetector
from gserver.cluster.membership import LEAVE, Heartbeat, Known, Membership, Reply
from gserver.cluster.redis_link import RedisLink, kind_of
from gserver.cluster.union import View
from gserver.config import Config
from gserver.metrics import ENGINES
from gserver.redis_url import RedisUrl
from gserver.scoreboard import Scoreboard

#: How often to check whether the number of own clients has changed.
COUNT_CHECK_SECONDS = 0.05
#: A change is reported early, but not sooner than this after the heartbeat before.
MIN_PAUSE_SECONDS = 0.1
#: The pause between heartbeats, as a part of the interval: random, so servers do not synchronise.
JITTER = (0.75, 0.95)
#: Heartbeats in an interval, while another incarnation that holds the id is watched.
WATCHES_PER_INTERVAL = 4
#: Limit on one attempt to reach Redis, name look-ups and Sentinels included; less in proportion
#: if the TTL is below 5 s.
ATTEMPT_SECONDS = 2.0
MIN_BACKOFF_SECONDS = 0.05
#: While Redis is away, attempts of all servers together, without and with TLS: a handshake costs
#: Redis a millisecond. They spread the attempts of a large cluster.
MAX_ATTEMPTS_PER_SECOND, MAX_TLS_ATTEMPTS_PER_SECOND = 1000, 400
#: The pauses for that, as parts of their mean.
SPREAD_RANGE = 0.5, 1.5
#: Connections that all servers together replace, so that they do not move at once.
MAX_RENEWALS_PER_SECOND = 20
#: The cells of the fields of `Known`, in their order. Each engine has its own.
KNOWN_CELLS = {
    "hold_until": "hold_until",
    "data_known_from": "data_known_from",
    "remote_clients": "engine_clients",
    "servers": "engine_servers",
    "last_clock": "lease_clock",
    "lost_at": "data_lost_at",
    "last_sent_monotonic": "lease_clock_at",
    "confirmed_monotonic": "engine_confirmed_at",
}


def backoff_seconds(config: Config, failures: int, servers: int) -> float:
    """Return the pause after so many failed heartbeats, in a cluster of so many servers."""
    ttl, interval = config.member_ttl_seconds, config.heartbeat_interval_seconds
    has_tls = RedisUrl.parse(config.redis_url).has_tls
    rate = MAX_TLS_ATTEMPTS_PER_SECOND if has_tls else MAX_ATTEMPTS_PER_SECOND
    backoff = min(MIN_BACKOFF_SECONDS * 2.0 ** min(failures - 1, 20), interval, ttl / 3)
    # Another attempt fits in before a lease ends. Its servers are awaited for a third of the TTL.
    longest = min(ttl / 3, ttl - 2 * interval - attempt_seconds(config))
    spread = min(servers / rate, max(0.0, longest - backoff) / SPREAD_RANGE[1])
    if failures == 1 and not has_tls:
        spread = min(spread, interval / SPREAD_RANGE[1])  # It is not late by that.
    # The random numbers are no secret.
    return backoff * random.uniform(0.8, 1.0) + spread * random.uniform(*SPREAD_RANGE)  # noqa: S311


def attempt_seconds(config: Config) -> float:
    """Return the limit on one attempt to reach Redis, name look-ups and Sentinels included."""
    return ATTEMPT_SECONDS * min(1.0, config.member_ttl_seconds / 5)


class Group(Protocol):
    """The senders of one server, each to its Redis."""

    def note(self, sender: "HeartbeatSender") -> None:
        """Take in that a sender has had a reply, or has failed."""

    def should_give_way(self, sender: "HeartbeatSender", holder: str) -> bool:
        """Whether this server ends, because `holder`, a live incarnation, has its id there."""

    def is_another_answering(self, sender: "HeartbeatSender") -> bool:
        """Whether another Redis answers, and holds nothing."""


class SameRedisError(Exception):
    """Two URLs lead to one Redis, where another sender of this server has an entry."""


class HeartbeatSender:
    """The membership of one server at one Redis, which is called an engine.

    It survives on the scoreboard: an agent that replaces another one continues with the same
    incarnation.
    """

    def __init__(
        self, config: Config, scoreboard: Scoreboard, engine: int, max_listed: int, group: "Group"
    ) -> None:
        """Replies list the other servers one by one if there are at most `max_listed`."""
        self._config = config
        self._scoreboard = scoreboard
        self.engine = engine
        self._max_listed = max_listed
        self._group = group
        # One for each engine: two URLs that lead to the same Redis are noticed by that.
        base = f"{scoreboard.get('incarnation'):x}"
        self._own_incarnations = [f"{base}.{number}" for number in ENGINES]
        self._incarnation = self._own_incarnations[engine]
        self._link = RedisLink(config)
        self._ttl_ms = round(config.member_ttl_seconds * 1000)
        self._interval_ms = round(config.heartbeat_interval_seconds * 1000)
        known = {name: scoreboard.get(f"{cell}.{engine}") for name, cell in KNOWN_CELLS.items()}
        self.membership = Membership(self._ttl_ms, Known(**known))
        #: The servers one by one; without the list if there are too many.
        self.view = View()
        self.is_listed = False
        #: In a hold that began before this agent, the list has only a part of the servers.
        self.is_list_awaited = False
        #: The lease clock of the last reply, whose ends of servers are in the view.
        self._ends_known_until = 0
        #: When it last answered, on the monotonic clock; 0 = never.
        self.answered_at_ms = 0
        #: Since when it has neither failed nor lost data; 0 = it is failing.
        self.steady_since_ms = 0
        self._schedule_renewal()
        self._duplicate_id = DuplicateIdDetector(self._incarnation, self._interval_ms)
        self.is_member = self.membership.servers > 0
        self._acked_sequence = scoreboard.get(f"acked_sequence.{engine}")
        #: When the last answered heartbeat was sent, on the monotonic clock.
        self.sent_at_ms = 0
        #: Of the last heartbeat that Redis has run, or may have run; 0 = none of this agent's.
        self._last_sent_sequence = 0
        self._failures = 0
        self._failing_since = 0.0
        #: While Redis is away: the failures of each kind.
        self._outages: dict[str, logs.Outage] = {}
        #: Set it to end `run`.
        self.should_stop = Event()
        #: Set when it is known whether the id is a duplicate, or cannot be known because Redis is
        #: away.
        self.id_is_known = Event()
        self.has_duplicate_id = False

    def run(self) -> None:
        """Send heartbeats until `should_stop`, or until a live server with the same id is found.

        When the whole server stops, leave the cluster at the end.
        """
        while not (self.should_stop.is_set() or self.has_duplicate_id):
            started_at = monotonic()
            own_clients = self._scoreboard.settled_clients()
            self._report(own_clients)
            self._pause(started_at, own_clients)
        # Not at a reload. And a server that drains counts until its last client has gone.
        if self._scoreboard.get("port_closed") and not self._scoreboard.settled_clients():
            self._leave()
        self._link.drop()

    def _report(self, own_clients: int) -> None:
        began = monotonic_ns()
        try:
            reply = self._send(own_clients)
            if reply.is_late:
                reply = self._send(own_clients, told_clock=reply.clock)
        except Exception as error:  # noqa: BLE001 - any failure means that Redis is away
            self._handle_failure(error)
        else:
            self._scoreboard.add("heartbeats", 1)
            self._scoreboard.add("heartbeat_ns", monotonic_ns() - began)
            self._handle_reply(reply, own_clients)
            self._renew_if_due()

    def _renew_if_due(self) -> None:
        """Replace the connection now and then: the address may lead to another Redis by now."""
        if monotonic() >= self._renew_at:
            self._link.renew()
            self._schedule_renewal()

    def _schedule_renewal(self) -> None:
        servers, ttl = self.membership.servers, self._config.member_ttl_seconds
        seconds = max(ttl, servers / MAX_RENEWALS_PER_SECOND)
        self._renew_at = monotonic() + seconds * random.uniform(0.8, 1.2)  # noqa: S311 - no secret

    def _leave(self) -> None:
        try:
            self._send(LEAVE)
        except Exception as error:  # noqa: BLE001 - a stop never fails because of Redis
            reason = self._link.explain(error)
            logs.warn_ratelimited(
                "cluster.not_left",
                f"cannot report the stop to Redis at {self._link}, so this server expires there"
                f" after the TTL: {reason}",
            )

    def _send(self, clients: int | str, told_clock: int = 0) -> Reply:
        sequence = monotonic_ns() // 1000
        last_sent_sequence = self._last_sent_sequence
        heartbeat = Heartbeat(
            self._config.server_id,
            self._incarnation,
            sequence,
            clients,
            self._ttl_ms,
            self._interval_ms,
            self._duplicate_id.replaceable_incarnation,
            self._acked_sequence,
            self.membership.last_clock,
            last_sent_sequence or sequence,
            self._config.admin_url,
            sequence // 1000 - self.membership.last_sent_monotonic,
            told_clock,
            self._max_listed,
            self._ends_known_until,
        )
        self._last_sent_sequence = sequence  # Redis may run it even if no reply arrives.
        limit = attempt_seconds(self._config)
        try:
            # Not a TimeoutError, which would be taken for the failure of one Sentinel or of one
            # address, and the next one would be tried.
            with gevent.Timeout(limit):
                reply = self._link.send(heartbeat)
        except gevent.Timeout:
            raise TimeoutError(f"no reply within {limit:.1f} s") from None
        if reply.holder != self._incarnation and reply.holder in self._own_incarnations:
            self._link.drop()  # The next attempt looks the address up again.
            raise SameRedisError("it is the same Redis as at another URL of --redis-url")
        self.sent_at_ms = sequence // 1000
        if reply.holder == self._incarnation:
            self._acked_sequence = sequence
        elif not reply.is_late:
            self._acked_sequence = 0
            self._last_sent_sequence = last_sent_sequence
        return reply

    def _pause(self, started_at: float, own_clients: int) -> None:
        """Wait until the next heartbeat is due. A changed number of clients makes it due early."""
        if self._failures:
            started_at = monotonic()
        end = started_at + self._pause_seconds()
        earliest = started_at + MIN_PAUSE_SECONDS
        while (remaining := end - monotonic()) > 0:
            if self.should_stop.wait(min(remaining, COUNT_CHECK_SECONDS)):
                return
            has_changed = self._scoreboard.settled_clients() != own_clients
            if has_changed and not self._failures and monotonic() >= earliest:
                return

    def _pause_seconds(self) -> float:
        interval = self._config.heartbeat_interval_seconds
        if self._failures:
            return backoff_seconds(self._config, self._failures, self.membership.servers)
        if not self.id_is_known.is_set():
            return interval / WATCHES_PER_INTERVAL
        return interval * random.uniform(*JITTER)  # noqa: S311 - no secret

    def _handle_reply(self, reply: Reply, own_clients: int) -> None:
        membership = self.membership
        is_member = reply.holder == self._incarnation
        self._log_changes(reply, is_member)
        self._failures = 0
        self._outages.clear()
        self._link.forget_previous()
        self.answered_at_ms = monotonic_ns() // 1_000_000
        self._ends_known_until = 0 if membership.has_lost_data(reply) else reply.clock
        if self._is_disturbed(reply):
            self.steady_since_ms = self.answered_at_ms
        if is_member:
            membership.apply(reply, own_clients, self.sent_at_ms)
        else:
            membership.apply_rejected(reply, self.sent_at_ms)
        self._note_listed(reply)
        is_duplicate = self._duplicate_id.observe(reply)
        self.has_duplicate_id = is_duplicate and self._group.should_give_way(self, reply.holder)
        self.is_member = is_member
        self._keep()
        if is_member or self.has_duplicate_id:
            self.id_is_known.set()
        self._group.note(self)

    def _is_disturbed(self, reply: Reply) -> bool:
        return (
            not self.steady_since_ms
            or self.membership.has_lost_data(reply)
            or self.membership.was_dropped(reply)
        )

    def _note_listed(self, reply: Reply) -> None:
        is_held = self.membership.hold_until > 0
        is_short = 0 < reply.servers <= self._max_listed
        # In a hold, a list has a part of the servers: the others must be known from before.
        self.is_listed = is_short and (self.is_listed or not is_held)
        self.is_list_awaited = is_short and not self.is_listed
        self.view.note_ends(self.membership.ends(reply))
        if self.is_listed:
            self.view.apply(self.membership.shares(reply), is_held=is_held)

    def _keep(self) -> None:
        """Keep what is known on the scoreboard, for the next agent."""
        known = self.membership.known
        for name, cell in KNOWN_CELLS.items():
            self._scoreboard.put(f"{cell}.{self.engine}", getattr(known, name))
        self._scoreboard.put(f"acked_sequence.{self.engine}", self._acked_sequence)
        self._scoreboard.put(f"engine_updated_at.{self.engine}", self.answered_at_ms * 1_000_000)

    def _log_changes(self, reply: Reply, is_member: bool) -> None:
        if self._failures:
            seconds = monotonic() - self._failing_since
            message = (
                f"Redis at {self._link} is back after {seconds:.1f} s and {self._failures} failed"
                " heartbeats"
            )
            logs.event(logging.INFO, "cluster.regained", message)
        if self.is_member and self.membership.has_lost_data(reply):
            self._log_other_data()
        elif self.is_member and self.membership.was_dropped(reply):
            message = (
                f"this server had expired in Redis at {self._link} (or a lagging replica took"
                " over); it has rejoined"
            )
            logs.event(logging.WARNING, "cluster.expired", message)
        elif is_member and not self.is_member:
            message = f"joined the cluster {self._config.cluster_name} at {self._link}"
            logs.event(logging.INFO, "cluster.joined", message, {"gserver.servers": reply.servers})

    def _log_other_data(self) -> None:
        hold = "WHO keeps the last known count until the other servers have reported"
        if self._group.is_another_answering(self):
            hold = "WHO keeps the servers that another Redis lists"
        if self._link.has_moved(self.membership.lost_at):
            message = f"{self._link} leads to another Redis than before; {hold}"
            logs.event(logging.WARNING, "cluster.moved", message)
        else:
            message = f"Redis at {self._link} has lost the cluster's data; {hold}"
            logs.event(logging.WARNING, "cluster.reset", message)

    def _handle_failure(self, error: Exception) -> None:
        kind, now = kind_of(error), monotonic()
        self._scoreboard.add(f"heartbeat_errors.{kind}", 1)
        if not self._failures:
            self._failing_since = now
        self._failures += 1
        if self._outages.setdefault(kind, logs.Outage()).note_failure(now):
            self._log_failure(error, kind)
        self.steady_since_ms = 0
        self.id_is_known.set()
        self._group.note(self)

    def _log_failure(self, error: Exception, kind: str) -> None:
        reason = self._link.explain(error)
        consequence = "WHO keeps the last known count of the other servers"
        if self._group.is_another_answering(self):
            consequence = "WHO goes on with another Redis"
        elif not self.is_member:
            consequence += ", and it is not known whether another server has this id"
        message = f"Redis at {self._link} is unavailable ({kind}); {consequence}: {reason}"
        fields = {"error.type": type(error).__name__, "error.message": reason, "gserver.kind": kind}
        logs.event(logging.WARNING, "cluster.lost", message, fields)
