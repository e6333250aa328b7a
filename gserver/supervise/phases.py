"""What signals have asked of a server so far: to reload, to retire, to stop, to end now.

Retiring is to be a lame duck: no new clients, full service for those who are connected, and a stop
when they have gone.
"""

import logging
import math
import os
import signal
from time import monotonic

from gserver import logs
from gserver.supervise.signals import STOPS

#: How long after the end of the drain timeout a stop waits for processes that were killed.
GIVE_UP_SECONDS = 3.0


class Orders:
    """All of it. Moments are monotonic seconds, infinity for what nobody has asked for."""

    def __init__(self, drain_delay_seconds: float, drain_timeout_seconds: float) -> None:
        self._delay = drain_delay_seconds
        self._timeout = drain_timeout_seconds
        self._had_terminal = os.isatty(0)
        self._was_told_to_stop = False
        #: The generation of workers that there is to be, and the last one that was complete.
        self.reloads = self.reloaded = 0
        #: Why what the last SIGHUP asked for was given up; "" if it was not.
        self.reload_failure = ""
        #: When to accept no more, and when to let everybody go.
        self.retire_at = self.drain_at = math.inf
        #: When to stop waiting even for who was killed: one who waits for a disk, say, cannot end.
        self.over_at = math.inf
        self.is_forced = False

    @property
    def is_stopping(self) -> bool:
        """Whether the server is to end, now or later."""
        return self.drain_at < math.inf

    @property
    def is_reloading(self) -> bool:
        """Whether the workers are being replaced."""
        return self.reloaded < self.reloads

    def end_reload(self) -> None:
        """Take the workers for replaced."""
        self.reloaded = self.reloads
        logs.event(logging.INFO, "server.reloaded", "reloaded: every worker is a new one")

    def give_up_reload(
        self, generation: int, failure: str, fields: dict[str, object] | None = None
    ) -> None:
        """Go back to that generation, whose own reload goes on if it is not complete."""
        self.reloads, self.reload_failure = generation, failure
        rest = "the one before it goes on" if self.is_reloading else "the old workers stay"
        logs.event(
            logging.ERROR, "server.reload_failed", f"reload given up, {rest}: {failure}", fields
        )

    def heed(self, number: signal.Signals, now: float) -> None:
        """Take in a signal, and say in the log what follows from it, if anything does."""
        # A terminal that is closed sends SIGHUP too, more than once: then it is no terminal any
        # more.
        has_lost_terminal = number == signal.SIGHUP and self._had_terminal > os.isatty(0)
        if number in STOPS or (has_lost_terminal and not self.is_stopping):
            self._stop(number.name, now)
        elif self.is_stopping:
            return
        elif number == signal.SIGHUP:
            self.reloads += 1
            self.reload_failure = ""
            logs.event(logging.INFO, "server.reloading", "SIGHUP: replacing the workers one by one")
        elif number == signal.SIGUSR2:
            self.retire_at = now + self._delay
            self.drain(self.retire_at + self._timeout)
            message = f"SIGUSR2: no new clients, and a stop when the others have gone, or after {self._timeout:g} s"
            logs.event(logging.INFO, "server.retiring", message)

    def drain(self, at: float) -> None:
        """Let everybody go at that moment, unless that is to be earlier."""
        self.drain_at = min(self.drain_at, at)
        self.over_at = min(self.over_at, max(at, monotonic()) + self._timeout + GIVE_UP_SECONDS)

    def _stop(self, name: str, now: float) -> None:
        if self._was_told_to_stop:
            self.is_forced = True
            logs.event(logging.WARNING, "server.forced", f"{name} again: ending now")
        else:
            self.drain(now if self.is_stopping else now + self._delay)
            self._was_told_to_stop = True
            logs.event(logging.INFO, "server.draining", f"{name}: draining")
