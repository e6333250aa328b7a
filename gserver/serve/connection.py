"""One client: its socket, and what must be known of it at any time. Kept small, since most clients are idle."""

import _socket
import contextlib
import socket
from math import ceil
from time import monotonic
from typing import Any

#: A deadline that is noticed so much too late says nothing of the client: it was this process that
#: stood still.
HELD_UP_SECONDS = 1.0


class PartialRecord(BlockingIOError):
    """Bytes have arrived that cannot be read before more has: part of a record of TLS. `data` came before it."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.data = data


class Connection:
    """A client from accept to close. `address` is kept only where it will be logged."""

    __slots__ = ("address", "has_spoken", "is_overstayed", "quiet_since", "sock")

    def __init__(self, sock: _socket.socket, address: Any) -> None:
        self.sock = sock
        self.address = address
        #: When it said something last, or was accepted.
        self.quiet_since = monotonic()
        #: Whether it has been answered once.
        self.has_spoken = False
        #: Whether it has been quiet for longer than it may.
        self.is_overstayed = False

    def limit_farewell(self, seconds: float) -> None:
        """Have the kernel give up after so long (0 = as ever) what the client leaves unread when it is closed."""
        if seconds:
            with contextlib.suppress(OSError):  # It has gone.
                self.sock.setsockopt(
                    socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, ceil(seconds * 1000)
                )


def close(sock: _socket.socket) -> None:
    """Close a client's socket; raise SystemError, which ends the worker, if somebody else has."""
    try:
        sock.close()
    except OSError as error:
        raise SystemError("somebody has closed a descriptor that is ours") from error
