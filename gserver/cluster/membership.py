"""What a server makes of the answers to its beats: how many clients the others have, and whether it
has a twin.

Pure: knows no Redis and no clock. All times are milliseconds of the lease clock, which
heartbeat.lua explains.
"""

from typing import NamedTuple

#: A live server's lease is renewed every beat interval; one that stands still for so many is dead.
STILL_INTERVALS = 2


class Reply(NamedTuple):
    """The answer to one beat, in the order of heartbeat.lua."""

    total: int
    servers: int
    back: int
    clock: int
    lost_at: int
    holder: str
    lease: int
    was_missing: int


class Membership:
    """What is known of the others. `servers` counts this one too, and is 0 as long as it has never been a member."""

    def __init__(
        self, ttl_ms: int, remote: int, servers: int, clock: int, lost_at: int, hold_until: int
    ) -> None:
        self._ttl_ms = ttl_ms
        self.remote = self._held = remote
        self.servers = servers
        self.clock = clock
        self.lost_at = lost_at
        #: How long `remote` is an older number; 0 = it is not. By the lease clock, so that the time
        #: in which nobody can beat does not count.
        self.hold_until = hold_until

    def has_lost(self, reply: Reply) -> bool:
        """Whether Redis has lost data since the last answer."""
        return bool(self.servers) and reply.lost_at != self.lost_at

    def was_dropped(self, reply: Reply) -> bool:
        """Whether Redis had this server no more: its lease was over, or a replica that lagged took over."""
        return bool(self.servers) and reply.was_missing > 0

    def take(self, reply: Reply, count: int) -> None:
        """Take the answer to a beat that has reported `count` own clients.

        When Redis has lost data, or has dropped this server, the total lacks who has not beaten
        since. So the last known number is held, unless the new one is higher, until as many servers
        are back as were known, or whoever can be must be.
        """
        remote = max(0, reply.total - count)
        if self.has_lost(reply) or self.was_dropped(reply):
            self._held = self.remote
            # Where Redis went on without this server, who was cut off with it is back within a
            # third of the TTL.
            wait = self._ttl_ms if self.has_lost(reply) else self._ttl_ms // 3
            self.hold_until = max(self.hold_until, reply.clock + wait)
        # Not for longer than that: this may be another Redis' lease clock than when the hold began.
        self.hold_until = min(self.hold_until, reply.clock + self._ttl_ms)
        self.clock, self.lost_at = reply.clock, reply.lost_at
        are_back = reply.back if reply.clock < reply.lost_at + self._ttl_ms else reply.servers
        if reply.clock < self.hold_until and are_back < self.servers:
            self.remote = max(self._held, remote)
        else:
            self.hold_until = 0
            self.remote, self.servers = remote, reply.servers


class Rivalry:
    """Whether another incarnation that holds the own id is alive: then its lease is renewed while one watches."""

    def __init__(self, interval_ms: int) -> None:
        self._patience_ms = STILL_INTERVALS * interval_ms
        self._seen = ("", 0)
        self._since = 0
        self._renewals = 0
        #: The holder, once it is known to be dead: this server may take its place.
        self.replaceable = ""

    def watch(self, reply: Reply, incarnation: str) -> bool:
        """Take an answer; return whether the holder is a live twin. One renewal may be a late beat of a dead one."""
        self.replaceable = ""
        holder, lease = self._seen
        if reply.holder in ("", incarnation):
            self._seen = ("", 0)
        elif reply.holder != holder:
            self._seen, self._since, self._renewals = (reply.holder, reply.lease), reply.clock, 0
        elif reply.lease != lease:
            self._seen, self._since, self._renewals = (
                (reply.holder, reply.lease),
                reply.clock,
                self._renewals + 1,
            )
        elif reply.clock - self._since >= self._patience_ms:
            self.replaceable = reply.holder
        return bool(self._seen[0]) and self._renewals >= 2
