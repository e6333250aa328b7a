"""Membership in the cluster: this server beats, and puts what it learns of the others on the
scoreboard.

Runs in the agent; no client ever waits for it. Whatever goes wrong with a beat means that Redis is
away: what was last known stands, and the next beat tries again.
"""

import logging
import random
from time import monotonic, monotonic_ns

import gevent
from gevent.event import Event

from gserver import logs
from gserver.cluster.membership import Membership, Reply, Rivalry
from gserver.cluster.redis_link import RedisLink, kind_of
from gserver.config import Config
from gserver.scoreboard import Scoreboard

#: How often to look whether the own count has changed. A change is told at once, but so long after
#: the beat before.
LOOK_SECONDS = 0.05
LEAST_PAUSE_SECONDS = 0.1
#: A beat follows the one before after such a part of the interval, so that servers do not keep
#: step.
JITTER = (0.75, 0.95)
#: While watching whether the holder of the own id is alive: beats in an interval.
WATCHES = 4
#: How long one try to reach Redis may take in all; less in proportion where the TTL is below 5 s.
TRY_SECONDS = 2.0
FIRST_BACKOFF_SECONDS = 0.05
#: A Redis that is away is tried about as often as one that is there, but not more often than this a
#: second by all servers together; and each one comes back within a third of the TTL, since the
#: others hold its count so long.
RETRIES_PER_SECOND = 1000
#: While Redis stays away, it is said again so often.
REMIND_SECONDS = 60.0


class Member:
    """One server's membership. The scoreboard carries it from one agent to the next, under the same incarnation."""

    def __init__(self, config: Config, scoreboard: Scoreboard) -> None:
        self._config = config
        self._scoreboard = scoreboard
        self._incarnation = f"{scoreboard.get('incarnation'):x}"
        self._own = config.server_id, self._incarnation
        self._link = RedisLink(config)
        known = [
            scoreboard.get(name)
            for name in (
                "remote_clients",
                "cluster_servers",
                "lease_clock",
                "data_lost_at",
                "hold_until",
            )
        ]
        self._ttl_ms = round(config.member_ttl_seconds * 1000)
        self._interval_ms = round(config.heartbeat_interval_seconds * 1000)
        self._membership = Membership(self._ttl_ms, *known)
        self._rivalry = Rivalry(self._interval_ms)
        self._is_member = self._membership.servers > 0
        self._answered = scoreboard.get("acked_sequence")
        self._sent = 0
        self._failures = 0
        self._away_since = self._said_at = 0.0
        self._said_kinds: set[str] = set()
        self.should_stop = Event()
        #: Set when this server is a member, or has a twin, or cannot know since Redis is away.
        self.is_settled = Event()
        self.has_twin = False

    def run(self) -> None:
        """Beat until told to stop, or until a live twin is found; at a stop of the whole server, leave the cluster."""
        while not (self.should_stop.is_set() or self.has_twin):
            began, count = monotonic(), self._scoreboard.clients()
            self._beat(count)
            self._pause(began, count)
        # Not at a reload, though the server may accept no more by now: it counts to its last
        # client.
        if self._scoreboard.get("draining") and not self._scoreboard.clients():
            try:
                self._call("leave")
            except Exception as error:
                logs.warn_ratelimited(
                    "cluster.not_left",
                    f"cannot tell the others of the stop: {self._link.explain(error)}",
                )
        self._link.drop()

    def _call(self, count: int | str) -> Reply:
        stamp = monotonic_ns() // 1000
        limit = TRY_SECONDS * min(1.0, self._ttl_ms / 5000)
        times, before = (self._ttl_ms, self._interval_ms), self._sent
        told = self._answered, self._membership.clock, before or stamp
        self._sent = stamp  # It may be carried out, whether answered or not.
        # Over all of a try: its look-ups of names, its Sentinels, and answers that come byte by
        # byte.
        try:
            with gevent.Timeout(
                limit
            ):  # Not an OSError, which would pass for that of one Sentinel, or one address.
                reply = self._link.call(
                    *self._own, stamp, count, *times, self._rivalry.replaceable, *told
                )
        except gevent.Timeout:
            raise TimeoutError(f"no answer within {limit:.1f} s") from None
        if reply.holder == self._incarnation:
            self._answered = stamp
        else:
            self._answered, self._sent = 0, before
        return reply

    def _beat(self, count: int) -> None:
        began = monotonic_ns()
        try:
            reply = self._call(count)
        except Exception as error:
            self._note_failure(error)
        else:
            self._scoreboard.add("heartbeats", 1)
            self._scoreboard.add("heartbeat_ns", monotonic_ns() - began)
            self._note(reply, count)

    def _pause(self, began: float, count: int) -> None:
        config = self._config
        seconds = config.heartbeat_interval_seconds * random.uniform(*JITTER)
        if self._failures:
            most = max(
                config.heartbeat_interval_seconds, self._membership.servers / RETRIES_PER_SECOND
            )
            backoff = FIRST_BACKOFF_SECONDS * 2 ** min(self._failures - 1, 20)
            seconds = min(backoff, most, config.member_ttl_seconds / 3) * random.uniform(0.8, 1.0)
            began = monotonic()
        elif not self.is_settled.is_set():
            seconds = config.heartbeat_interval_seconds / WATCHES
        while (left := began + seconds - monotonic()) > 0 and not self.should_stop.wait(
            min(left, LOOK_SECONDS)
        ):
            is_news = self._scoreboard.clients() != count and not self._failures
            if is_news and monotonic() - began >= LEAST_PAUSE_SECONDS:
                break

    def _note(self, reply: Reply, count: int) -> None:
        scoreboard, membership, known = self._scoreboard, self._membership, self._membership.servers
        is_member = reply.holder == self._incarnation
        self._note_changes(reply, is_member)
        if is_member:
            membership.take(reply, count)
        elif not membership.servers:
            membership.remote = reply.total  # Without the own clients, since another holds the id.
        self.has_twin = self._rivalry.watch(reply, self._incarnation)
        self._is_member = is_member
        if is_member or self.has_twin:
            self.is_settled.set()
        # In this order, so that the next agent never finds a loss noted and no hold.
        scoreboard.put("hold_until", membership.hold_until)
        scoreboard.put("remote_clients", membership.remote)
        scoreboard.put("cluster_servers", membership.servers)
        scoreboard.put("lease_clock", membership.clock)
        scoreboard.put("data_lost_at", membership.lost_at)
        scoreboard.put("acked_sequence", self._answered)
        scoreboard.put("cluster_updated_at", monotonic_ns())
        if membership.servers != known:
            fields = {
                "gserver.servers": membership.servers,
                "gserver.remote_clients": membership.remote,
            }
            message = f"servers in the cluster: {membership.servers} (before: {known})"
            logs.event(logging.INFO, "cluster.servers", message, fields)

    def _note_changes(self, reply: Reply, is_member: bool) -> None:
        if self._failures:
            message = f"Redis is back after {monotonic() - self._away_since:.1f} s and {self._failures} failed beats"
            logs.event(logging.INFO, "cluster.regained", message)
            self._failures = 0
            self._said_kinds.clear()
        if self._is_member and self._membership.has_lost(reply):
            message = "Redis has lost the cluster's state: the last known count stands until the others are back"
            logs.event(logging.WARNING, "cluster.reset", message)
        elif self._is_member and self._membership.was_dropped(reply):
            message = "Redis had dropped this server (it could not beat for the TTL), or has not yet heard of it: it is back"
            logs.event(logging.WARNING, "cluster.expired", message)
        elif not self._is_member and is_member:
            message = f"joined the cluster {self._config.cluster_name} at {self._link}"
            logs.event(logging.INFO, "cluster.joined", message, {"gserver.servers": reply.servers})

    def _note_failure(self, error: Exception) -> None:
        kind, now = kind_of(error), monotonic()
        self._scoreboard.add(f"heartbeat_errors.{kind}", 1)
        if not self._failures:
            self._away_since = now
        self._failures += 1
        if kind not in self._said_kinds or now - self._said_at >= REMIND_SECONDS:
            self._said_kinds.add(kind)
            self._said_at = now
            reason = self._link.explain(error)
            unsure = (
                ""
                if self._is_member
                else ", and whether another server has this id is not known yet"
            )
            message = f"Redis at {self._link} is away ({kind}): WHO has the others as last known{unsure}: {reason}"
            fields = {
                "error.type": type(error).__name__,
                "error.message": reason,
                "gserver.kind": kind,
            }
            logs.event(logging.WARNING, "cluster.lost", message, fields)
        self.is_settled.set()
