"""The standard library's blocking server, with a thread for each client: `threads.py PORT`."""

import socketserver
import sys
import threading
import uuid

UNKNOWN = b"ERR unknown command\n"
REPLIES = {b"WHERE": b"%b\n" % str(uuid.uuid4()).encode(), b"WHY": b"42\n"}


class Server(socketserver.ThreadingTCPServer):
    """A server that ends without waiting for its threads."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.lock = threading.Lock()
        self.clients = 0
        self.commands = 0

    def count(self, *, clients: int = 0, commands: int = 0) -> None:
        """Add to the counters; rebuild the reply to WHO when it changes."""
        with self.lock:
            self.commands += commands
            if clients:
                self.clients += clients
                REPLIES[b"WHO"] = b"%d\n" % self.clients


class Handler(socketserver.StreamRequestHandler):
    """One client."""

    disable_nagle_algorithm = True
    server: Server

    def handle(self) -> None:
        """Answer all complete lines with one write."""
        self.server.count(clients=1)
        rest = b""
        try:
            while data := self.rfile.read1():
                *lines, rest = (rest + data).split(b"\n")
                if lines:
                    self.server.count(commands=len(lines))
                    self.wfile.write(b"".join([REPLIES.get(line, UNKNOWN) for line in lines]))
        except ConnectionError:
            pass
        finally:
            self.server.count(clients=-1)


if __name__ == "__main__":
    with Server(int(sys.argv[1])) as server:
        print("ready", flush=True)
        server.serve_forever()
