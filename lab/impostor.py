"""A port that claims to be a Redis or a Sentinel, with the replies of a test."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def listener(reply: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port that accepts connections, and calls `reply` on each after its first request."""

    def serve(sock: socket.socket) -> None:
        try:
            with sock:
                sock.recv(65536)
                reply(sock)
        except OSError:
            pass

    def accept() -> None:
        while True:
            try:
                sock, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(sock,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def named(port: int) -> bytes:
    """A Sentinel's reply that names a primary."""
    return f"*2\r\n$9\r\n127.0.0.1\r\n${len(str(port))}\r\n{port}\r\n".encode()
