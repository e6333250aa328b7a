"""What is known of one client, whether it is silent or in a conversation."""

import _socket
import struct
from dataclasses import dataclass
from math import inf
from socket import SO_PEERCRED, SOL_SOCKET
from time import monotonic
from typing import TYPE_CHECKING, Any

from gserver.addresses import TLS, UNIX, client_address
from gserver.protocol import ErrorReply
from gserver.serve.tls import TlsSocket

if TYPE_CHECKING:
    from gserver.serve.stream import Stream

#: Process, user and group of a peer (unix(7)).
UCRED = "iII"


class Client:
    """A client of one worker. A silent one is this record, its socket, and an entry in epoll."""

    __slots__ = (
        "accepted_at",
        "address",
        "has_spoken",
        "is_counted",
        "quiet_since",
        "sock",
        "stream",
        "transport",
    )

    def __init__(self, sock: _socket.socket, address: Any, transport: str) -> None:
        self.sock: _socket.socket | TlsSocket = sock
        #: As `accept` returns it. None once the kernel is asked instead, to save memory.
        self.address = address
        #: How it has connected.
        self.transport = transport
        #: When it was accepted, and when it sent something last, in monotonic seconds.
        self.accepted_at = self.quiet_since = monotonic()
        #: Whether it has sent a line that is not blank.
        self.has_spoken = False
        #: Whether it counts in WHO.
        self.is_counted = False
        #: Its stream while it is in a conversation; None while it is silent.
        self.stream: Stream | None = None

    @property
    def id(self) -> str:
        """Its id on the list of clients. It stays over handovers."""
        return f"{round(self.accepted_at * 1e9):x}"

    @property
    def is_closed(self) -> bool:
        """Whether its socket is closed."""
        return self.sock.fileno() < 0

    def getpeername(self) -> Any:
        """Return its address as a socket does. Raises OSError after a reset."""
        return self.address or self.sock.getpeername()

    @property
    def peer(self) -> tuple[str, int]:
        """Its host and port; "" and 0 if its connection was reset."""
        try:
            return client_address(self.getpeername())
        except OSError:
            return "", 0

    @property
    def peer_certificate_name(self) -> str:
        """The name in its certificate; "" if it has shown none."""
        return self.sock.peer_certificate_name if isinstance(self.sock, TlsSocket) else ""

    @property
    def credentials(self) -> tuple[int, int] | tuple[None, None]:
        """Process and user of a Unix client when it connected; None for other clients."""
        if self.transport != UNIX or isinstance(self.sock, TlsSocket):
            return None, None
        size = struct.calcsize(UCRED)
        pid, uid, _ = struct.unpack(UCRED, self.sock.getsockopt(SOL_SOCKET, SO_PEERCRED, size))
        return pid, uid

    @property
    def has_partial_record(self) -> bool:
        """Whether part of a TLS record has arrived."""
        return self.transport == TLS and getattr(self.sock, "has_partial_record", False)

    @property
    def has_unread(self) -> bool:
        """Whether TLS has something to read although the socket is not readable."""
        return self.transport == TLS and getattr(self.sock, "has_unread", False)


@dataclass(slots=True)
class Rest:
    """What a conversation begins with, or has left to do when it is interrupted."""

    #: Received, and not answered yet.
    unread: bytes = b""
    #: When the line in it must have ended.
    line_ends: float = inf
    #: Replies that the client has not taken.
    unsent: bytes | memoryview = b""
    #: When it must have taken them.
    write_ends: float | None = None
    #: The error reply at the end of `unsent`, after which the client is closed.
    error: ErrorReply | None = None


def address_fields(address: tuple[str, int]) -> dict[str, object]:
    """Return the fields of a log event for a client's address."""
    return {"client.address": address[0], "client.port": address[1]}
