"""The TLS handshakes of one worker.

A client whose handshake is not done is none yet: it is not counted, has a deadline of its own, and
holds nobody up.
"""

import _socket
import contextlib
import logging
import math
import socket
import ssl
from collections.abc import Callable
from time import monotonic
from typing import Any

import gevent
from gevent.lock import Semaphore
from gevent.socket import wait_read, wait_write

from gserver import logs
from gserver.protocol import PLAIN_TEXT, TLS_FAILED
from gserver.serve.connection import HELD_UP_SECONDS, close
from gserver.serve.conversation import DRAIN_GRACE_SECONDS, linger
from gserver.serve.limits import Limits
from gserver.serve.receiver import BURST_BYTES
from gserver.serve.tls import TlsSocket

#: Handshakes under way in one worker, at most, and at most a quarter of its open files: for one
#: more the oldest ends, since an honest one takes milliseconds.
MAX_HANDSHAKES = 1024
#: What a client that speaks TLS begins with (RFC 8446, 5.1).
HANDSHAKE_RECORD = b"\x16"


class Handshakes:
    """Those under way.

    `on_done` is called when one has succeeded, with the socket, the address, and whether the client
    has said something already; `on_close` when one has ended otherwise.
    """

    def __init__(
        self,
        context: ssl.SSLContext,
        max_handshakes: int,
        limits: Limits,
        on_done: Callable[[Any, Any, bool], None],
        on_close: Callable[[], None],
    ) -> None:
        self._context = context
        self._max_handshakes = min(max_handshakes, MAX_HANDSHAKES)
        self._timeout_seconds = limits.config.tls_handshake_timeout_seconds or math.inf
        self._limits = limits
        self._on_done = on_done
        self._on_close = on_close
        #: Each takes up to a millisecond of CPU: one has its turn, then everybody else.
        self._turn = Semaphore()
        #: By descriptor, the oldest first, without those that are to end.
        self._under_way: dict[int, _socket.socket] = {}
        #: How many sockets there are.
        self.open = 0

    def begin(self, sock: _socket.socket, address: Any) -> None:
        """Begin one with a client that has connected."""
        if len(self._under_way) >= self._max_handshakes:
            self.end_oldest()
        self._under_way[sock.fileno()] = sock
        self.open += 1
        gevent.spawn_raw(self._meet, sock, address)

    def end_oldest(self) -> None:
        """Make room for another one, if there is any to end."""
        oldest = next(iter(self._under_way), None)
        if oldest is not None:
            self._cut_off(oldest)

    def drain(self) -> None:
        """Let those that are under way end soon."""
        gevent.spawn_later(DRAIN_GRACE_SECONDS, self._cut_off_all)

    def _cut_off_all(self) -> None:
        for fd in list(self._under_way):
            self._cut_off(fd)

    def _cut_off(self, fd: int) -> None:
        with contextlib.suppress(OSError):  # It has gone.
            self._under_way.pop(fd).shutdown(socket.SHUT_RDWR)

    def _meet(self, sock: _socket.socket, address: Any) -> None:
        """The greenlet of one."""
        fd, met = sock.fileno(), None
        try:
            met = self._shake_hands(sock)
        except OSError as error:
            self._limits.refuse(TLS_FAILED)
            if logging.root.isEnabledFor(logging.DEBUG):
                fields = {
                    "client.address": address[0],
                    "client.port": address[1],
                    **logs.error_fields(error),
                }
                logs.event(
                    logging.DEBUG, "client.tls_failed", f"no TLS with {address[0]}: {error}", fields
                )
        finally:
            self._under_way.pop(fd, None)
            self.open -= 1
            if met:
                self._on_done(met, address, met.early is not None)
            else:
                self._limits.leave(fd)
                close(sock)
                self._on_close()

    def _shake_hands(self, sock: _socket.socket) -> TlsSocket | None:
        """Return what has come of it; None when the client has left, or wanted no TLS and was told so."""
        met, is_first, deadline = TlsSocket(sock, self._context), True, 0.0
        while True:
            now = monotonic()
            if now > deadline + HELD_UP_SECONDS:  # It begins, or begins again.
                deadline = now + self._timeout_seconds
            elif now >= deadline:
                raise TimeoutError("it took too long")
            try:
                with contextlib.suppress(TimeoutError):
                    wait_read(sock.fileno(), None if deadline == math.inf else deadline - now)
                received = sock.recv(BURST_BYTES)
            except BlockingIOError:
                continue
            if not received:
                if is_first and sock.fileno() in self._under_way:
                    return None
                raise ConnectionError("it has gone, or was cut off")
            if is_first and not received.startswith(HANDSHAKE_RECORD):
                self._limits.refuse(PLAIN_TEXT)
                with contextlib.suppress(OSError):  # It has gone: it is no failed handshake, too.
                    sock.send(PLAIN_TEXT.reply)
                linger(sock)
                return None
            is_first = False
            try:
                with self._turn:
                    is_done = met.shake_hands(received)
                    gevent.sleep(0)
            except ssl.SSLError:
                linger(sock)  # It is told why, by an alert.
                raise
            _send_all(met, deadline)
            if is_done:
                return met


def _send_all(met: TlsSocket, deadline: float) -> None:
    """Wait until the kernel has taken what is to be said: it may have little room, and certificates be long."""
    while not met.flush():
        wait_write(met.fileno(), None if deadline == math.inf else max(0.0, deadline - monotonic()))
