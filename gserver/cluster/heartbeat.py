"""Sends this server's heartbeats to Redis, in one greenlet.

It puts what the replies say of the other servers on the scoreboard. It runs in the agent, so no
client waits for it. Any failure means that Redis is away: the last known values stand, and the next
heartbeat tries again.
"""

import logging
import random
from time import monotonic, monotonic_ns

import gevent
from gevent.event import Event

from gserver import logs
from gserver.cluster.changes import Changes
from gserver.cluster.duplicate_id import DuplicateIdDetector
from gserver.cluster.membership import LEAVE, Heartbeat, Known, Membership, Reply
from gserver.cluster.redis_link import RedisLink, kind_of
from gserver.config import Config
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
#: The cells of the fields of `Known`, in their order.
KNOWN_CELLS = {
    "hold_until": "hold_until",
    "remote_clients": "remote_clients",
    "servers": "cluster_servers",
    "last_clock": "lease_clock",
    "lost_at": "data_lost_at",
    "last_sent_monotonic": "lease_clock_at",
    "confirmed_monotonic": "cluster_confirmed_at",
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


class HeartbeatSender:
    """The membership of one server.

    It survives on the scoreboard: an agent that replaces another one continues with the same
    incarnation.
    """

    def __init__(self, config: Config, scoreboard: Scoreboard) -> None:
        self._config = config
        self._scoreboard = scoreboard
        self._incarnation = f"{scoreboard.get('incarnation'):x}"
        self._link = RedisLink(config)
        self._ttl_ms = round(config.member_ttl_seconds * 1000)
        self._interval_ms = round(config.heartbeat_interval_seconds * 1000)
        known = Known(**{name: scoreboard.get(cell) for name, cell in KNOWN_CELLS.items()})
        self._membership = Membership(self._ttl_ms, known)
        self._schedule_renewal()
        self._changes = Changes(config)
        self._has_begun = False
        self._duplicate_id = DuplicateIdDetector(self._incarnation, self._interval_ms)
        self._is_member = self._membership.servers > 0
        self._acked_sequence = scoreboard.get("acked_sequence")
        #: When the last answered heartbeat was sent, on the monotonic clock.
        self._sent_at_ms = 0
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
        servers, ttl = self._membership.servers, self._config.member_ttl_seconds
        seconds = max(ttl, servers / MAX_RENEWALS_PER_SECOND)
        self._renew_at = monotonic() + seconds * random.uniform(0.8, 1.2)  # noqa: S311 - no secret

    def _leave(self) -> None:
        try:
            self._send(LEAVE)
        except Exception as error:  # noqa: BLE001 - a stop never fails because of Redis
            reason = self._link.explain(error)
            logs.warn_ratelimited(
                "cluster.not_left",
                f"cannot report the stop to Redis, so this server expires after the TTL: {reason}",
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
            self._membership.last_clock,
            last_sent_sequence or sequence,
            self._config.admin_url,
            sequence // 1000 - self._membership.last_sent_monotonic,
            told_clock,
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
        self._sent_at_ms = sequence // 1000
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
            return backoff_seconds(self._config, self._failures, self._membership.servers)
        if not self.id_is_known.is_set():
            return interval / WATCHES_PER_INTERVAL
        return interval * random.uniform(*JITTER)  # noqa: S311 - no secret

    def _handle_reply(self, reply: Reply, own_clients: int) -> None:
        membership = self._membership
        last_servers = membership.servers
        is_member = reply.holder == self._incarnation
        self._log_changes(reply, is_member)
        self._link.forget_previous()
        if is_member:
            membership.apply(reply, own_clients, self._sent_at_ms)
        else:
            membership.apply_rejected(reply, self._sent_at_ms)
        self.has_duplicate_id = self._duplicate_id.observe(reply)
        self._is_member = is_member
        if is_member or self.has_duplicate_id:
            self.id_is_known.set()
        self._publish()
        if is_member and not self._has_begun:
            self._has_begun = True
            self._changes.begin()
        if membership.servers != last_servers:
            self._changes.note(last_servers, membership.servers, membership.remote_clients)

    def _publish(self) -> None:
        """Put all that is known on the scoreboard."""
        scoreboard, known = self._scoreboard, self._membership.known
        for name, cell in KNOWN_CELLS.items():
            scoreboard.put(cell, getattr(known, name))
        scoreboard.put("acked_sequence", self._acked_sequence)
        scoreboard.put("cluster_updated_at", monotonic_ns())

    def _log_changes(self, reply: Reply, is_member: bool) -> None:
        if self._failures:
            seconds = monotonic() - self._failing_since
            message = f"Redis is back after {seconds:.1f} s and {self._failures} failed heartbeats"
            logs.event(logging.INFO, "cluster.regained", message)
            self._failures = 0
            self._outages.clear()
        if self._is_member and self._membership.has_lost_data(reply):
            self._log_other_data()
        elif self._is_member and self._membership.was_dropped(reply):
            message = (
                "this server had expired in Redis (or a lagging replica took over); it has rejoined"
            )
            logs.event(logging.WARNING, "cluster.expired", message)
        elif is_member and not self._is_member:
            message = f"joined the cluster {self._config.cluster_name} at {self._link}"
            logs.event(logging.INFO, "cluster.joined", message, {"gserver.servers": reply.servers})

    def _log_other_data(self) -> None:
        hold = "WHO keeps the last known count until the other servers have reported"
        if self._link.has_moved(self._membership.lost_at):
            message = f"{self._link} leads to another Redis than before; {hold}"
            logs.event(logging.WARNING, "cluster.moved", message)
        else:
            message = f"Redis has lost the cluster's data; {hold}"
            logs.event(logging.WARNING, "cluster.reset", message)

    def _handle_failure(self, error: Exception) -> None:
        kind, now = kind_of(error), monotonic()
        self._scoreboard.add(f"heartbeat_errors.{kind}", 1)
        if not self._failures:
            self._failing_since = now
        self._failures += 1
        if self._outages.setdefault(kind, logs.Outage()).note_failure(now):
            self._log_failure(error, kind)
        self.id_is_known.set()

    def _log_failure(self, error: Exception, kind: str) -> None:
        reason = self._link.explain(error)
        consequence = "WHO keeps the last known count of the other servers"
        if not self._is_member:
            consequence += ", and it is not known whether another server has this id"
        message = f"Redis at {self._link} is unavailable ({kind}); {consequence}: {reason}"
        fields = {"error.type": type(error).__name__, "error.message": reason, "gserver.kind": kind}
        logs.event(logging.WARNING, "cluster.lost", message, fields)
