"""Turns values of the lease clock into moments of this machine's clock.

The lease clock pauses while no heartbeat arrives, so a lease says nothing about real time. The
moments of this server's own heartbeats do. Pure: no Redis, no clock. Times are milliseconds.
"""

from bisect import bisect_left
from collections import deque


class ClockHistory:
    """The lease clock in the last replies, and when the heartbeats before them were sent."""

    def __init__(self, ttl_ms: int, clock: int = 0, sent_at: int = 0) -> None:
        """`clock` and `sent_at` are of the last reply; 0 if there was none."""
        self._ttl_ms = ttl_ms
        self._replies: deque[tuple[int, int]] = deque([(clock, sent_at)] if clock else [])

    def note(self, clock: int, sent_at: int) -> None:
        """Note a reply."""
        while self._replies and self._replies[-1][0] > clock:  # The clock of other data.
            self._replies.pop()
        self._replies.append((clock, sent_at))
        while len(self._replies) > 1 and self._replies[1][0] <= clock - self._ttl_ms:
            self._replies.popleft()

    def moment_of(self, clock: int) -> int:
        """Return when the lease clock had this value: the earliest moment at which it may have.

        For a value before all that are known, it is assumed that the clock did not pause.
        """
        later = bisect_left(self._replies, clock, key=lambda reply: reply[0])
        later = min(later, len(self._replies) - 1)
        known, sent_at = self._replies[later]
        if known > clock and later:
            # The lease clock is never faster than time, except when Redis's clock is set forward.
            known, earlier = self._replies[later - 1]
            return min(earlier + clock - known, sent_at)
        return sent_at + min(0, clock - known)
