"""A heartbeat, the reply to it, and what a server concludes about the others from the replies.

Pure: no Redis, no clock. Times are milliseconds; moments are on the lease clock, which
heartbeat.lua explains, or on the monotonic clock of this machine if their names say so.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from gserver.cluster.clock_history import ClockHistory
from gserver.cluster.union import End, Share

#: A live server renews its lease at least once in a heartbeat interval. After this many intervals
#: without a renewal it counts as late, and its id may be taken over.
LATE_AFTER_INTERVALS = 2
#: In place of the number of clients: the server leaves the cluster.
LEAVE = "leave"
#: Above every sequence number, so heartbeat.lua takes no entry for that of a copy.
UNKNOWN_SEQUENCE = 10**15
#: Above every pause between two heartbeats: heartbeat.lua takes none for one that was held up.
UNKNOWN_PAUSE = 10**12


#: A listed server: id, end of the lease, and the entry, whose URL does not matter here.
LISTED = re.compile(rb"([!-~]{1,128}) (\d{1,15}) (\d{1,15}) (\d{1,18}) ([!-~]+)(?: [!-~]+)?")


#: A server that has gone, the lease clock when it was dropped, and its last heartbeat there.
GONE = re.compile(rb"([!-~]{1,128}) (left|lost) (\d{1,15}) (\d{1,18}) ([!-~]+)")


def base_of(incarnation: str) -> str:
    """Return the incarnation of a server without the number of the engine."""
    return incarnation.rstrip("*").partition(".")[0]


class Heartbeat(NamedTuple):
    """The arguments of heartbeat.lua, in its order. It explains each of them."""

    server_id: str
    incarnation: str
    sequence: int
    clients: int | str
    ttl_ms: int
    interval_ms: int
    replaced_incarnation: str = ""
    acked_sequence: int = 0
    last_clock: int = 0
    last_sent_sequence: int = UNKNOWN_SEQUENCE
    admin_url: str = ""
    last_clock_age_ms: int = UNKNOWN_PAUSE
    told_clock: int = 0
    max_listed: int = 0
    ends_known_until: int = 0


class Reply(NamedTuple):
    """The reply to a heartbeat, in the order of heartbeat.lua."""

    total_clients: int
    servers: int
    returned_servers: int
    clock: int
    lost_at: int
    holder: str
    lease_end: int
    was_missing: int
    oldest_lease_end: int
    is_late: int
    listed: Sequence[bytes] = ()
    gone: bytes = b""


class Known(NamedTuple):
    """What a server knows of the others. The scoreboard keeps it for the next agent.

    `servers` includes this one; it is 0 until this server has been a member. While `hold_until` is
    not 0, `remote_clients` is an older number than that of the last reply. Each share in it was
    confirmed by its server at `confirmed_monotonic` or later. `last_clock` and `lost_at` are from
    the last reply, and its heartbeat was sent at `last_sent_monotonic`. Heartbeats after
    `data_known_from`, on the lease clock, are not from a backup.
    """

    # These come first, so that the next agent never finds a loss without its hold.
    hold_until: int = 0
    data_known_from: int = 0
    remote_clients: int = 0
    servers: int = 0
    last_clock: int = 0
    lost_at: int = 0
    last_sent_monotonic: int = 0
    confirmed_monotonic: int = 0


class Membership:
    """What this server knows of the others: the fields of `Known`."""

    def __init__(self, ttl_ms: int, known: Known) -> None:
        self._ttl_ms = ttl_ms
        # On the lease clock, so that time in which no server can report does not count.
        self.hold_until = known.hold_until
        self.remote_clients = self._held_clients = known.remote_clients
        self.servers = known.servers
        self.last_clock = known.last_clock
        self.lost_at = known.lost_at
        self.last_sent_monotonic = known.last_sent_monotonic
        self.confirmed_monotonic = known.confirmed_monotonic
        self.data_known_from = known.data_known_from
        self._clock_history = ClockHistory(ttl_ms, known.last_clock, known.last_sent_monotonic)

    @property
    def known(self) -> Known:
        """All that it knows."""
        return Known(*(getattr(self, name) for name in Known._fields))

    def has_lost_data(self, reply: Reply) -> bool:
        """Whether Redis has lost data since the last reply."""
        return self.servers > 0 and reply.lost_at != self.lost_at

    def was_dropped(self, reply: Reply) -> bool:
        """Whether Redis had no entry of this server: its lease had ended, or a replica lagged."""
        return self.servers > 0 and reply.was_missing > 0

    def apply(self, reply: Reply, own_clients: int, sent_monotonic: int) -> None:
        """Update from the reply to a heartbeat that was sent then, and reported `own_clients`.

        After a loss of data, or after this server was dropped, the total lacks the servers that
        have not reported since. Until they have, the last known number is held, unless the new one
        is higher.
        """
        remote_clients = max(0, reply.total_clients - own_clients)
        if self.has_lost_data(reply) or self.was_dropped(reply):
            self._begin_hold(reply)
        # This may be the lease clock of another Redis than the one on which the hold began.
        self.hold_until = min(self.hold_until, reply.clock + self._ttl_ms)
        if self.has_lost_data(reply):
            self._clock_history = ClockHistory(self._ttl_ms)
        if not self._knows_data(reply, sent_monotonic):
            self.data_known_from = reply.clock
        self.last_clock, self.lost_at = reply.clock, reply.lost_at
        self.last_sent_monotonic = sent_monotonic
        self._clock_history.note(reply.clock, sent_monotonic)
        if reply.clock < self.hold_until and self._reported_servers(reply) < self.servers:
            self.remote_clients = max(self._held_clients, remote_clients)
        else:
            self.hold_until = 0
            self.remote_clients, self.servers = remote_clients, reply.servers
            self.confirmed_monotonic = self._confirmed_at(reply.oldest_lease_end, sent_monotonic)

    def apply_rejected(self, reply: Reply, sent_monotonic: int) -> None:
        """Update from the reply to a heartbeat that was rejected: another incarnation has the id.

        Such a total does not include the own clients. It is used only until this server has been a
        member; later, the last known number is better.
        """
        if self.servers == 0:
            self.remote_clients = reply.total_clients
            self._clock_history.note(reply.clock, sent_monotonic)
            lease_ends = filter(None, (reply.lease_end, reply.oldest_lease_end))
            oldest = min(lease_ends, default=0)  # That of this id is in the total, too.
            self.confirmed_monotonic = self._confirmed_at(oldest, sent_monotonic)

    def ends(self, reply: Reply) -> dict[str, End]:
        """Return how the servers have gone that a reply names, without what is invalid."""
        found: dict[str, End] = {}
        for line in reply.gone.split(b"\n"):
            if parts := GONE.fullmatch(line):
                server_id, how, clock, sequence, incarnation = (
                    part.decode() for part in parts.groups()
                )
                has_left = how == "left"
                # A lease ends a TTL after the last heartbeat.
                sent = self._clock_history.moment_of(int(clock) - self._ttl_ms * (not has_left))
                end = End(has_left, int(sequence), base_of(incarnation), sent)
                found.setdefault(server_id, end)
        return found

    def shares(self, reply: Reply) -> dict[str, Share]:
        """Return the other servers that a reply lists, without what is invalid.

        Their incarnations are without the number of the engine.
        """
        found = {}
        for line in zip(reply.listed[::3], reply.listed[1::3], reply.listed[2::3], strict=True):
            if parts := LISTED.fullmatch(b" ".join(line)):
                server_id, lease_end, clients, sequence, incarnation = (
                    part.decode() for part in parts.groups()
                )
                reported = int(lease_end) - self._ttl_ms
                found[server_id] = Share(
                    int(clients),
                    int(sequence),
                    base_of(incarnation),
                    self._clock_history.moment_of(reported),
                    is_proven=0 < self.data_known_from < reported,
                )
        return found

    def _confirmed_at(self, lease_end: int, sent_monotonic: int) -> int:
        """Return when the server with this lease has reported, on this machine's clock.

        0 stands for no server.
        """
        if not lease_end:
            return sent_monotonic
        return self._clock_history.moment_of(lease_end - self._ttl_ms)

    def _knows_data(self, reply: Reply, sent_monotonic: int) -> bool:
        """Whether the data are those of the last reply, or were lost since, so all are newer."""
        is_of_another_redis = self.has_lost_data(reply) and reply.lost_at <= self.last_clock
        was_away = sent_monotonic - self.last_sent_monotonic > self._ttl_ms
        return 0 < self.data_known_from <= reply.clock and not (is_of_another_redis or was_away)

    def _begin_hold(self, reply: Reply) -> None:
        self._held_clients = self.remote_clients
        # If only this server was dropped, then the servers that were cut off with it are back
        # within a third of the TTL, which bounds their backoff.
        hold_ms = self._ttl_ms if self.has_lost_data(reply) else self._ttl_ms // 3
        self.hold_until = max(self.hold_until, reply.clock + hold_ms)

    def _reported_servers(self, reply: Reply) -> int:
        """Return how many of the servers that were known have reported since the hold began."""
        if reply.clock < reply.lost_at + self._ttl_ms:
            return reply.returned_servers
        return reply.servers
