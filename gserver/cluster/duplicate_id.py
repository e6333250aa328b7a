"""Whether the server id is in use by another live server.

Pure: no Redis, no clock. Moments are milliseconds on the lease clock, which heartbeat.lua explains.
"""

from gserver.cluster.membership import LATE_AFTER_INTERVALS, Reply

#: A single renewal may be a heartbeat that was sent before its server died, and arrived late.
RENEWALS_OF_A_LIVE_SERVER = 2


class DuplicateIdDetector:
    """Watches the lease of another incarnation that holds the id of this server.

    A lease that is renewed belongs to a live server: the id is a duplicate. A lease that is not
    renewed belongs to a dead one: `replaceable_incarnation` names it, and this server may take its
    place.
    """

    def __init__(self, incarnation: str, interval_ms: int) -> None:
        self._incarnation = incarnation
        self._dead_after_ms = LATE_AFTER_INTERVALS * interval_ms
        self._holder = ""
        self._lease_end = 0
        self._renewed_at = 0
        self._renewals = 0
        self.replaceable_incarnation = ""

    def observe(self, reply: Reply) -> bool:
        """Take a reply; return whether another live server holds the id."""
        self.replaceable_incarnation = ""
        if reply.holder in ("", self._incarnation):
            self._holder = ""
        elif reply.holder != self._holder:
            self._holder = reply.holder
            self._note_lease(reply, renewals=0)
        elif reply.lease_end != self._lease_end:
            self._note_lease(reply, renewals=self._renewals + 1)
        elif reply.clock - self._renewed_at >= self._dead_after_ms:
            self.replaceable_incarnation = reply.holder
        return self._holder != "" and self._renewals >= RENEWALS_OF_A_LIVE_SERVER

    def _note_lease(self, reply: Reply, renewals: int) -> None:
        self._lease_end = reply.lease_end
        self._renewed_at = reply.clock
        self._renewals = renewals
