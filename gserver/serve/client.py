"""What is known of one client, whether it is silent or in a conversation."""

import _socket
import logging
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from socket import AF_UNIX, SO_PEERCRED, SOL_SOCKET
from typing import TYPE_CHECKING, Any, cast

from gserver import logs
from gserver.addresses import TCP, TLS, UNIX, client_address
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
    )

    def __init__(
        self, sock: "_socket.socket | TlsSocket", address: tuple[str, int] | None, now: float
    ) -> None:
        self.sock = sock
        #: Host and port, if the kernel does not know them: behind a balancer.
        self.address = address
        #: When it was accepted, in monotonic seconds.
        self.accepted_at = now
        #: When it sent something last, or was accepted.
        self.quiet_since = now
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
    def has_tls(self) -> bool:
        """Whether it speaks TLS."""
        return isinstance(self.sock, TlsSocket)

    @property
    def transport(self) -> str:
        """How it has connected."""
        if isinstance(self.sock, TlsSocket):
            return TLS
        return UNIX if self.sock.family == AF_UNIX else TCP

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
        if self.transport != UNIX:
            return None, None
        sock, size = cast("_socket.socket", self.sock), struct.calcsize(UCRED)
        pid, uid, _ = struct.unpack(UCRED, sock.getsockopt(SOL_SOCKET, SO_PEERCRED, size))
        return pid, uid


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


def log_client(
    action: str, verb: str, client: Client, more: Mapping[str, object] | None = None
) -> None:
    """Log an event of a client at debug level."""
    host, port = client.peer
    fields = {**address_fields((host, port)), **(more or {})}
    pid, uid = client.credentials
    if pid is not None:
        fields |= {"client.user.id": str(uid), "gserver.client_pid": pid}
        logs.event(logging.DEBUG, action, f"{verb} {host} uid {uid} pid {pid}", fields)
    else:
        logs.event(logging.DEBUG, action, f"{verb} {host} port {port}", fields)
