"""Signals for a loop that waits in a selector: a handler only takes note, and makes `fd` readable."""

import contextlib
import os
import signal


class SignalNotes:
    """Notes of the signals that have come. SIGCHLD makes `fd` readable too, and is not noted."""

    def __init__(self, *numbers: signal.Signals) -> None:
        self.fd, write_fd = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(write_fd, False)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])  # Who has started us may have blocked some.
        signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        self._noted: list[signal.Signals] = []
        for number in numbers:
            signal.signal(number, lambda number, _frame: self._noted.append(signal.Signals(number)))
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)

    def take(self) -> list[signal.Signals]:
        """Return what has come since the last time, in order."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 4096)
        noted, self._noted = self._noted, []
        return noted
