"""A named server and its successors, on the same port of the same host."""

from collections.abc import Sequence
from typing import Any

from lab.host import HERE, Host
from lab.redises import free_port
from lab.running import GSERVER, Client, Running


class Member:
    """A server that runs from its creation until `end`."""

    server_type: type[Running] = Running
    words: tuple[str, ...] = ()  #: before the program

    def __init__(
        self,
        name: str,
        *options: str,
        host: Host = HERE,
        program: Sequence[str] = (*GSERVER, "serve"),
        **more: Any,
    ) -> None:
        self.name, self.host, self.port = name, host, free_port(host)
        address = ["--host", host.listens_on, "--port", str(self.port)]
        self._command = [*self.words, *program, *address, *options]
        self._more = more
        self.start()

    def start(self) -> None:
        """Start the server, and wait for its agent, which has reported to Redis or tried."""
        self.server = self.server_type(command=self._command, host=self.host, **self._more)
        self.server.wait_for("agent.ready")

    def end(self) -> None:
        """End the running server, whatever its state."""
        self.server.kill()

    def client(self) -> Client:
        return self.server.client()
