"""What a server makes of the answers to its beats: how many clients the others have, and whether it has a twin.

Pure: knows no Redis and no clock of its own. Leases are milliseconds of the lease clock, which gserver/cluster.lua
explains; other times are monotonic seconds.
"""

from typing import NamedTuple

#: Kinds of failed beats, by their names in metrics and logs.
BEAT_ERRORS = (
    "auth",
    "connection",
    "loading",
    "name",
    "no_primary",
    "other",
    "out_of_memory",
    "read_only",
    "timeout",
    "tls",
)
#: A live server's lease is renewed every beat interval; one that stands still for so many is dead.
STILL_INTERVALS = 2


class Reply(NamedTuple):
    """The answer to one beat, in the order of gserver/cluster.lua."""

    total: int
    servers: int
    fresh: int
    was_missing: int
    clock: int
    lost_at: int
    holder: str
    lease: int


class Membership:
    """What is known of the others. `servers` counts this one too, and is 0 as long as it has never been a member."""

    def __init__(self, ttl_ms: int, remote: int, servers: int, clock: int, lost_at: int, hold_until: int) -> None:
        self._ttl_ms = ttl_ms
        self.remote = self._held = remote
        self.servers = servers
        self.clock = clock
        self.lost_at = lost_at
        #: Of the lease clock, so that the time in which nobody can beat does not count; 0 = nothing is held.
        self.hold_until = hold_until

    def take(self, reply: Reply, count: int) -> None:
        """Take the answer to a beat that has reported `count` own clients.

        When Redis has lost what it knew, or has dropped this server, the total lacks who has not beaten since. So
        the last known number is held, unless the new one is higher, until as many servers have beaten as were known,
        or whoever can must have done so.
        """
        remote = max(0, reply.total - count)
        if self.servers and (reply.lost_at != self.lost_at or reply.was_missing):
            self._held = self.remote
            if reply.lost_at != self.lost_at:
                self.hold_until = reply.clock + self._ttl_ms
            else:
                # Redis went on without this server: who was cut off with it is back within a third of the TTL.
                self.hold_until = max(self.hold_until, reply.clock + self._ttl_ms // 3)
        self.clock, self.lost_at = reply.clock, reply.lost_at
        if reply.clock < self.hold_until and reply.fresh < self.servers:
            self.remote = max(self._held, remote)
        else:
            self.hold_until = 0
            self.remote, self.servers = remote, reply.servers


class Rivalry:
    """Whether another incarnation that holds the own id is alive: then its lease is renewed while one watches."""

    def __init__(self, beat_interval_seconds: float) -> None:
        self._patience = STILL_INTERVALS * beat_interval_seconds
        self._seen = ("", 0)
        self._since = 0.0
        self._renewals = 0
        #: The holder, once it is known to be dead: this server may take its place.
        self.replaceable = ""

    def watch(self, reply: Reply, incarnation: str, now: float) -> bool:
        """Take an answer; return whether the holder is a live twin. One renewal may be a late beat of a dead one."""
        self.replaceable = ""
        holder, lease = self._seen
        if reply.holder in ("", incarnation):
            self._seen = ("", 0)
        elif reply.holder != holder:
            self._seen, self._since, self._renewals = (reply.holder, reply.lease), now, 0
        elif reply.lease != lease:
            self._seen, self._since, self._renewals = (reply.holder, reply.lease), now, self._renewals + 1
        elif now - self._since >= self._patience:
            self.replaceable = reply.holder
        return bool(self._seen[0]) and self._renewals >= 2
