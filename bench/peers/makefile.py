"""Typical gevent code, with a patched socket used as a file: `makefile.py PORT`."""

from gevent import monkey

monkey.patch_all()

import socket  # noqa: E402 (gevent patches before anything else is imported)
import sys  # noqa: E402
import uuid  # noqa: E402

from gevent.server import StreamServer  # noqa: E402

UNKNOWN = b"ERR unknown command\n"


class Service:
    """State that all clients share.

    The replies are ready to send. The reply to WHO is made again when the number changes.
    """

    def __init__(self) -> None:
        self.clients = 0
        self.commands = 0
        self.replies = {b"WHERE\n": b"%b\n" % str(uuid.uuid4()).encode(), b"WHY\n": b"42\n"}

    def count(self, change: int) -> None:
        """Add `change` to the number of clients."""
        self.clients += change
        self.replies[b"WHO\n"] = b"%d\n" % self.clients

    def serve(self, sock: socket.socket, _address: object) -> None:
        """Answer one client until it ends."""
        self.count(1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            with sock.makefile("rwb") as file:
                for line in file:
                    self.commands += 1
                    file.write(self.replies.get(line, UNKNOWN))
                    file.flush()
        except ConnectionError:
            pass
        finally:
            self.count(-1)


if __name__ == "__main__":
    server = StreamServer(("127.0.0.1", int(sys.argv[1])), Service().serve, backlog=1024)
    server.start()
    print("ready", flush=True)
    server.serve_forever()
