"""A server with a name, and the next ones in its place: at the same port of the same host."""

from typing import Any

from lab.host import HERE, Host
from lab.redises import free_port
from lab.running import GSERVER, Client, Running


class Member:
    """One of them; it runs from its making until `end`."""

    server_type: type[Running] = Running
    words: tuple[str, ...] = ()  #: before those of gserver

    def __init__(self, name: str, *options: str, host: Host = HERE, **more: Any) -> None:
        self.name, self.host, self.port = name, host, free_port(host)
        address = ["--host", host.listens_on, "--port", str(self.port)]
        self._command = [*self.words, *GSERVER, "serve", *address, *options]
        self._more = more
        self.start()

    def start(self) -> None:
        """Start it; it has reported to Redis, if it is to, or has tried."""
        self.server = self.server_type(command=self._command, host=self.host, **self._more)
        self.server.wait_for("agent.ready")

    def end(self) -> None:
        """End the one that runs, whatever its state."""
        self.server.kill()

    def client(self) -> Client:
        return self.server.client()
