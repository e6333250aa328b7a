"""The ways in which clients leave, including bad ones.

Their server needs `fail`, `end_greenlet` and `nap` of `lab.commands`.
"""

import socket
import struct
from collections.abc import Callable
from typing import NamedTuple

from lab.running import Client


def nothing(_: Client) -> bytes:
    return b""


class Way(NamedTuple):
    """A way in which a client leaves."""

    name: str
    often: int  #: weight, of 100
    sent: bytes
    read: Callable[[Client], bytes]
    replies: bytes
    is_reset: bool = False

    def go(self, client: Client) -> bytes:
        """Leave in this way; return everything that the client received."""
        client.send(self.sent)
        received = self.read(client)
        if self.is_reset:
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return received


WAYS = [
    Way("leaves", 19, b"WHY\n", Client.line, b"42\n"),
    Way("sends nothing", 10, b"", nothing, b""),
    Way("half-closes", 15, b"WHY\nWH", Client.end, b"42\nERR unknown command\n"),
    Way("resets", 10, b"WHY\n", Client.line, b"42\n", is_reset=True),
    Way("resets at once", 10, b"", nothing, b"", is_reset=True),
    Way("sends a long line", 8, b"x" * 1100, Client.rest, b"ERR line too long\n"),
    Way("is slow", 2, b"WHE", Client.rest, b"ERR too slow\n"),
    Way("sends an unknown command", 8, b"HELP\n", Client.line, b"ERR unknown command\n"),
    Way("sends HTTP", 8, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", Client.rest, b""),
    Way("has a failing handler", 4, b"FAIL\n", Client.line, b"ERR internal\n"),
    Way("has an exiting handler", 1, b"EXIT\n", Client.line, b"ERR internal\n"),
    # It leaves many replies unread, so the server's next one causes a reset.
    Way("vanishes", 5, b"NAP\n" + b"WHY\n" * 1000, nothing, b""),
]
