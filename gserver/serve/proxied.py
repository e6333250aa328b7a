"""A connection from a balancer, with the address of the true client."""

import _socket
import socket
from typing import Any

from gserver.serve.proxy_header import MAX_V2_BYTES, ProxyHeader, parse


class ProxiedSocket(_socket.socket):
    """A bare socket that begins with a PROXY header, and knows the address of the client."""

    __slots__ = ("_peer", "_received", "has_tls")

    def __init__(self, sock: _socket.socket, peer: Any, *, has_tls: bool = False) -> None:
        """Take the descriptor of `sock`.

        `peer` is the address of the balancer; or of the client, if the header has been read.
        `has_tls`: after the header comes TLS.
        """
        super().__init__(sock.family, sock.type, sock.proto, sock.detach())
        self.setblocking(False)
        self.has_tls = has_tls
        #: Not asked of the kernel later: it forgets the address when the connection is reset.
        self._peer = peer
        #: The beginning of the header.
        self._received = b""

    @property
    def has_begun(self) -> bool:
        """Whether a part of the header has arrived."""
        return bool(self._received)

    def read_header(self) -> ProxyHeader:
        """Return the header, and leave in the kernel what follows it: that may be TLS.

        Raises BlockingIOError until it is whole, EOFError if the balancer ends before that,
        `ProxyHeaderError` if it is invalid, and OSError.
        """
        waiting = self.recv(MAX_V2_BYTES, socket.MSG_PEEK)
        if not waiting:
            raise EOFError("the connection ended before the header")
        before = len(self._received)
        header = parse(self._received + waiting)
        self._received += self.recv(header.size - before if header else len(waiting))
        if not header:
            raise BlockingIOError
        self._received = b""
        self._peer = header.client or self._peer
        return header

    def getpeername(self) -> Any:
        """Return address and port of the client; before the header, those of the balancer."""
        return self._peer
