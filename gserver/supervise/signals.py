"""Signals for a loop that waits in a selector.

A handler only takes note, and makes `fd` readable.
"""

import contextlib
import os
import signal
from time import monotonic
from typing import NamedTuple

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
#: A stop signal that comes this soon after the first one is the same request: a process runner that
#: shares our terminal has got its Ctrl-C too, and passes it on. Some runners send the other of the
#: two signals, and some send the same one within a few milliseconds.
PASSED_ON_SECONDS = 0.5
PASSED_ON_SAME_SECONDS = 0.1


class PendingSignal(NamedTuple):
    """A signal, and whether it ends the server: SIGHUP does if our terminal has been closed."""

    number: signal.Signals
    is_stop: bool


class PendingSignals:
    """The signals that have come and were not taken yet. SIGCHLD only makes `fd` readable."""

    def __init__(self, *numbers: signal.Signals) -> None:
        self.fd, write_fd = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(write_fd, False)
        signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        self._pending: list[PendingSignal] = []
        self._first_stop: tuple[signal.Signals, float] | None = None
        self._had_terminal = os.isatty(0)
        self._numbers = numbers
        for number in numbers:
            signal.signal(number, lambda number, _frame: self._note(signal.Signals(number)))
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        self.unblock()

    def try_block(self) -> bool:
        """Let signals wait, also for a program that takes the place of this one.

        Returns False, and blocks nothing, if one has come that was not taken yet.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, [*self._numbers, signal.SIGCHLD])
        if self._pending:
            self.unblock()
        return not self._pending

    def unblock(self) -> None:
        """Take signals again. The parent may have blocked some, too."""
        signal.pthread_sigmask(signal.SIG_SETMASK, [])

    def take(self) -> list[PendingSignal]:
        """Return the signals since the last call, in order, without those that were passed on."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 4096)
        pending, self._pending = self._pending, []
        return pending

    def ignore(self) -> None:
        """Ignore signals from now on: at its exit, Python would let them end the process."""
        for number in self._numbers:
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: signal.Signals) -> None:
        # A terminal that is closed sends SIGHUP, more than once. It is no terminal any more then.
        is_hangup = number == signal.SIGHUP and self._had_terminal and not os.isatty(0)
        is_stop = number in STOP_SIGNALS or is_hangup
        if not (is_stop and self._is_passed_on(number)):
            self._pending.append(PendingSignal(number, is_stop))

    def _is_passed_on(self, number: signal.Signals) -> bool:
        """Return whether a stop signal repeats the first one. The first one is remembered.

        A terminal that is closed is never a second request.
        """
        now = monotonic()
        if self._first_stop is None:
            self._first_stop = number, now
            return False
        if number == signal.SIGHUP:
            return True
        first, since = self._first_stop
        limit = PASSED_ON_SAME_SECONDS if number == first else PASSED_ON_SECONDS
        return now - since < limit
