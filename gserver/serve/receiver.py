"""How a greenlet waits for its client's bytes.

gevent's own `recv` first tries, fails, and starts a watcher for each call. Here the read watcher
stays started: a call switches to the loop, and the loop switches back when there are bytes to read,
for half the CPU. While the client's greenlet is busy elsewhere the watcher is stopped at its first
idle report, so a client that sends on cannot make the loop spin.
"""

import _socket
import sys
from collections import deque
from fcntl import ioctl
from functools import cached_property
from termios import FIONREAD
from time import monotonic
from typing import Any

import gevent
from greenlet import getcurrent

from gserver.serve.connection import PartialRecord

READ = 1
#: Bytes taken at once. It bounds what one client gets done before the others have their turn.
BURST_BYTES = 4096
#: Bytes taken apart at once, whatever came with them (a record of TLS may be 16 KB): a hundred
#: lines or so. What they take is what others wait in the worst case, however much is sent: 0.1 ms.
PIECE_BYTES = 512
#: In so many bursts is a whole record of TLS.
RECORD_BURSTS = 5


class _Queue:
    """Greenlets that have more to do than is done at once: one of them goes on in each turn of the
    event loop.

    Between two, the loop looks who has spoken; it does not do that for each `gevent.sleep(0)`.
    """

    def __init__(self) -> None:
        self._waiting: deque[Any] = deque()

    @cached_property
    def _timer(self) -> Any:
        return gevent.get_hub().loop.timer(0)

    def wait(self) -> None:
        """Return when it is this greenlet's turn."""
        self._waiting.append(getcurrent())
        if len(self._waiting) == 1:
            self._timer.start(self._next)
        gevent.get_hub().switch()

    def _next(self) -> None:
        following = self._waiting.popleft()
        if self._waiting:
            self._timer.start(self._next)
        following.switch()


_queue = _Queue()


class Receiver:
    """Receives from one non-blocking socket, for one greenlet."""

    __slots__ = ("_rest", "_sock", "_waiting", "_watcher", "heard_at")

    def __init__(self, sock: _socket.socket) -> None:
        self._sock = sock
        self._watcher: Any = gevent.get_hub().loop.io(sock.fileno(), READ)
        self._waiting: Any = None
        self._rest = b""
        #: When a part of a record came last.
        self.heard_at = 0.0

    def receive(self, timeout_seconds: float | None) -> bytes | None:
        """Wait for bytes and return them; b"" at the end of input; None after the timeout or
        `interrupt`.

        Raises OSError when the connection is broken. A timeout of 0 or less takes what is there,
        after everybody else has had a turn. Without one, None too when part of a record of TLS has
        come: a line may have begun.
        """
        if self._rest:
            _queue.wait()
            return self.piece(self._rest)
        if timeout_seconds is not None and timeout_seconds <= 0:
            gevent.sleep(0)
            return self.piece(self._receive_now())
        timer, heard_at = None, self.heard_at
        if not self._watcher.active:
            self._watcher.start(self._on_readable)
        hub = gevent.get_hub()
        self._waiting = getcurrent()
        try:
            if timeout_seconds is not None:
                timer = hub.loop.timer(timeout_seconds)
                timer.start(
                    self.interrupt, update=True
                )  # from now, not from when the loop last looked
            while True:
                hub.switch()
                # Even after a timeout: a loop that was held up finds timer and bytes due at once,
                # and the bytes came in time. Readable, and yet nothing: a part of a TLS record,
                # which is not the end of a silence, and from which on the caller may have to set a
                # timeout.
                data = self._receive_now()
                if (
                    data is not None
                    or self._waiting is None
                    or (timer is None and self.heard_at != heard_at)
                ):
                    return self.piece(data)
        finally:
            self._waiting = None
            if timer is not None:
                timer.stop()
                timer.close()

    def piece(self, data: bytes | None) -> bytes | None:
        """Return the beginning of what has been received; `receive` returns the rest of it."""
        if data is None or len(data) <= PIECE_BYTES:
            self._rest = b""
            return data
        self._rest = data[PIECE_BYTES:]
        return data[:PIECE_BYTES]

    @property
    def unread(self) -> int:
        """How many bytes have come by now that `receive` has not returned (of TLS, as they came)."""
        return len(self._rest) + int.from_bytes(
            ioctl(self._sock.fileno(), FIONREAD, bytes(4)), sys.byteorder
        )

    @property
    def is_waiting(self) -> bool:
        """Whether a `receive` waits now."""
        return self._waiting is not None

    def interrupt(self) -> None:
        """Make a `receive` that waits return None soon; without one, do nothing."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            gevent.get_hub().loop.run_callback(waiting.switch)

    def close(self) -> None:
        """Let go of the event loop; the socket is the caller's."""
        self._watcher.stop()
        self._watcher.close()

    def _on_readable(self) -> None:
        waiting = self._waiting
        if waiting is None:
            self._watcher.stop()
        else:
            waiting.switch()

    def _receive_now(self) -> bytes | None:
        for _ in range(RECORD_BURSTS):
            try:
                return self._sock.recv(BURST_BYTES)
            except PartialRecord as part:
                self.heard_at = monotonic()
                if part.data:
                    return part.data
            except BlockingIOError:
                break
        return None
