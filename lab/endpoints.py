"""A server with several endpoints, and its clients."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gserver.addresses import TLS, UNIX, parse_endpoint
from lab.running import Client, Running, UnixClient
from lab.tls_client import certified, trust


class Endpoints:
    """The endpoints of a running server."""

    def __init__(self, server: Running, pems: Path) -> None:
        self._context = trust(pems)
        self._by_transport = {
            endpoint.transport: endpoint for endpoint in map(parse_endpoint, server.endpoints())
        }

    def client(self, transport: str) -> Client:
        """A new client of the endpoint with this transport."""
        endpoint = self._by_transport[transport]
        if transport == UNIX:
            return UnixClient(Path(endpoint.path))
        context = self._context if transport == TLS else None
        return Client(endpoint.port, endpoint.host, context=context)

    def port(self, transport: str) -> int:
        """The port of the endpoint with this transport."""
        return self._by_transport[transport].port


@contextmanager
def three_endpoints(folder: Path, pems: Path, *options: str) -> Iterator[tuple[Running, Endpoints]]:
    """A server with plain TCP, TLS, and the socket file `gserver.sock` in the folder."""
    path = folder / "gserver.sock"
    binds = ("tcp://127.0.0.1:0", "tls://127.0.0.1:0", f"unix:{path}")
    words = [word for bind in binds for word in ("--bind", bind)]
    given = [*words, *certified(pems), "--admin-port", "0", *options]
    with Running(*given) as server:
        yield server, Endpoints(server, pems)
