"""Every Redis of the cluster (an *engine*), and the count that they give together.

Each has its own greenlet and connection, so one that is slow or away costs the others nothing.
"""

from time import monotonic_ns

import gevent
from gevent.event import Event

from gserver.cluster.changes import Changes
from gserver.cluster.heartbeat import HeartbeatSender
from gserver.cluster.membership import LATE_AFTER_INTERVALS, base_of
from gserver.cluster.union import Sum, Total, choose, merge
from gserver.config import Config
from gserver.scoreboard import Scoreboard

#: With several engines, the shares of so many servers are merged one by one. Above that, the best
#: total is shown: each list is as long as the cluster is large.
MAX_LISTED = 100
#: An engine that was disturbed is steady again after so many TTLs.
STEADY_TTLS = 2


class Engines:
    """The membership of one server in its cluster."""

    def __init__(self, config: Config, scoreboard: Scoreboard) -> None:
        self._scoreboard = scoreboard
        self._incarnation = f"{scoreboard.get('incarnation'):x}"
        self._ttl_ms = round(config.member_ttl_seconds * 1000)
        self._late_ms = round(LATE_AFTER_INTERVALS * config.heartbeat_interval_seconds * 1000)
        max_listed = MAX_LISTED if len(config.engines) > 1 else 0
        self.senders = [
            HeartbeatSender(each, scoreboard, number, max_listed, self)
            for number, each in enumerate(config.engines)
        ]
        self._changes = Changes(config)
        self._has_begun = False
        self._servers = scoreboard.get("cluster_servers")
        #: What is on the scoreboard.
        self._last = Total(
            scoreboard.get("remote_clients"),
            max(0, self._servers - 1),
            scoreboard.get("cluster_confirmed_at"),
            scoreboard.get("cluster_doubtful_at"),
        )
        #: Senders without a first result, although their Redis has answered the agent before this
        #: one. Until there are none, nothing is published: the count on the scoreboard is better
        #: than a part of it.
        self._unknown = {sender for sender in self.senders if self._has_answered_lately(sender)}
        #: Engines that have answered an earlier agent, while a server was doubtful for long. Until
        #: they answer this one, that server may still be alive.
        self._doubting = {
            sender
            for sender in self.senders
            if self._answered_ns(sender)
            and self._last.confirmed - self._last.doubtful > self._ttl_ms + self._late_ms
        }
        self._doubtful_before = self._last.doubtful
        #: Set when it is known whether the id is a duplicate, or cannot be known because Redis is
        #: away.
        self.id_is_known = Event()

    @property
    def has_duplicate_id(self) -> bool:
        """Whether another live server has the id of this one."""
        return any(sender.has_duplicate_id for sender in self.senders)

    def run(self) -> None:
        """Send heartbeats to every Redis until `stop`.

        A sender that finds a live server with the same id ends by itself.
        """
        running = [gevent.spawn(sender.run) for sender in self.senders]
        gevent.joinall(running, raise_error=True)

    def stop(self) -> None:
        """End `run`. When the whole server stops, it leaves the cluster."""
        for sender in self.senders:
            sender.should_stop.set()

    def should_give_way(self, sender: HeartbeatSender, holder: str) -> bool:
        """Whether this server ends, because `holder`, a live incarnation, has its id there.

        Two servers may each hold the id at one Redis. Exactly one of them must end.
        """
        if not self.id_is_known.is_set():
            return True  # It has only started.
        now = monotonic_ns() // 1_000_000
        others = [other for other in self.senders if other is not sender]
        is_copy = base_of(holder) == self._incarnation
        if is_copy:  # Its URLs are in the same order: the first one decides.
            others = self.senders[: self.senders.index(sender)]
        is_member = any(other.is_member and self._is_current(other, now) for other in others)
        return not is_member or (not is_copy and self._incarnation > base_of(holder))

    def is_another_answering(self, sender: HeartbeatSender) -> bool:
        """Whether another Redis answers, and holds nothing."""
        now = monotonic_ns() // 1_000_000
        others = [other for other in self.senders if other is not sender]
        return any(
            self._is_current(other, now) and not other.membership.hold_until for other in others
        )

    def note(self, sender: HeartbeatSender) -> None:
        """Take in that a sender has had a reply, or has failed."""
        self._unknown.discard(sender)
        if sender.answered_at_ms:
            self._doubting.discard(sender)
        if self.has_duplicate_id or all(each.id_is_known.is_set() for each in self.senders):
            self.id_is_known.set()
        is_waiting = bool(self._unknown) and self._servers > 0
        if not is_waiting and any(each.answered_at_ms for each in self.senders):
            self._publish()

    def _publish(self) -> None:
        """Put the count of the others on the scoreboard."""
        total, has_joined = self._total(), any(each.membership.servers for each in self.senders)
        if self._doubting:
            total = total._replace(doubtful=min(total.doubtful, self._doubtful_before))
        self._last = total
        servers = total.servers + 1 if has_joined else 0
        answered_at_ms = max(sender.answered_at_ms for sender in self.senders)
        self._scoreboard.put("remote_clients", total.clients)
        self._scoreboard.put("cluster_servers", servers)
        self._scoreboard.put("cluster_confirmed_at", total.confirmed)
        self._scoreboard.put("cluster_doubtful_at", total.doubtful)
        self._scoreboard.put("cluster_updated_at", answered_at_ms * 1_000_000)
        if has_joined and not self._has_begun:
            self._has_begun = True
            self._changes.begin()
        if servers != self._servers:
            self._changes.note(self._servers, servers, total.clients)
            self._servers = servers

    def _total(self) -> Total:
        now = monotonic_ns() // 1_000_000
        views = [sender.view for sender in self.senders]
        for sender in self.senders:
            sender.view.is_steady = sender.is_listed and self._is_steady(sender, now)
            sender.view.is_away = not self._is_current(sender, now)
        for view in views:
            others = (other for other in views if other is not view)
            view.forget_ends({key for other in others for key in (*other.listed, *other.held)})
        # A Redis that has not answered this agent is left out.
        are_listed = all(each.is_listed or not each.answered_at_ms for each in self.senders)
        if len(self.senders) > 1 and are_listed:
            latest = max(sender.sent_at_ms for sender in self.senders)
            return merge(views, self._late_ms, latest)
        return self._best_total(now)

    def _best_total(self, now: int) -> Total:
        """Return the total of the best engine, or the last one if that is better."""
        best = choose(self._sum_of(sender, now) for sender in self.senders)
        current = [sender for sender in self.senders if self._is_current(sender, now)]
        # Each Redis holds the total that it had itself: a part of the count, or an old one.
        is_held = all(sender.membership.hold_until for sender in current)
        is_partial = is_held or any(sender.is_list_awaited for sender in current)
        is_older = best.confirmed < self._last.confirmed - self._ttl_ms
        if len(self.senders) > 1 and is_partial and (best.clients < self._last.clients or is_older):
            return self._last
        return best

    def _answered_ns(self, sender: HeartbeatSender) -> int:
        """When this Redis answered an agent of this server last; 0 = never."""
        return self._scoreboard.get(f"engine_updated_at.{sender.engine}")

    def _has_answered_lately(self, sender: HeartbeatSender) -> bool:
        """Whether this Redis still answered when any Redis answered last.

        After the agent has hung, that was long ago for all of them.
        """
        answer, last = self._answered_ns(sender), max(map(self._answered_ns, self.senders))
        return answer > 0 and last - answer <= self._late_ms * 1_000_000

    def _is_current(self, sender: HeartbeatSender, now: int) -> bool:
        return now - sender.answered_at_ms <= self._late_ms

    def _is_steady(self, sender: HeartbeatSender, now: int) -> bool:
        since = sender.steady_since_ms
        is_current = self._is_current(sender, now)
        return is_current and since > 0 and now - since > STEADY_TTLS * self._ttl_ms

    def _sum_of(self, sender: HeartbeatSender, now: int) -> Sum:
        known = sender.membership
        return Sum(
            is_current=self._is_current(sender, now),
            is_steady=self._is_steady(sender, now),
            is_held=known.hold_until > 0,
            servers=known.servers,
            answered=sender.answered_at_ms,
            clients=known.remote_clients,
            confirmed=known.confirmed_monotonic,
        )
