"""Signals for a loop that waits in a selector: a handler only takes note, and makes `fd` readable."""

import contextlib
import os
import signal
from time import monotonic

#: SIGTERM so soon after SIGINT, or the other way round, is the same request once more: a runner
#: that got our terminal's Ctrl-C too passes it on. Some pass on the same signal, within a few
#: milliseconds.
PASS_ON_SECONDS = 0.5
PASS_ON_SAME_SECONDS = 0.1
STOPS = (signal.SIGTERM, signal.SIGINT)


class SignalNotes:
    """Notes of the signals that have come. SIGCHLD makes `fd` readable too, and is not noted."""

    def __init__(self, *numbers: signal.Signals) -> None:
        self.fd, write_fd = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(write_fd, False)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])  # Who has started us may have blocked some.
        signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        self._noted: list[signal.Signals] = []
        self._first_stop: tuple[signal.Signals, float] | None = None
        for number in numbers:
            signal.signal(number, lambda number, _frame: self._note(signal.Signals(number)))
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)

    def take(self) -> list[signal.Signals]:
        """Return what has come since the last time, in order, without what was only passed on."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 4096)
        noted, self._noted = self._noted, []
        return noted

    def _note(self, number: signal.Signals) -> None:
        if number in STOPS:
            now = monotonic()
            if self._first_stop is None:
                self._first_stop = number, now
            elif now - self._first_stop[1] < (
                PASS_ON_SAME_SECONDS if number == self._first_stop[0] else PASS_ON_SECONDS
            ):
                return
        self._noted.append(number)
