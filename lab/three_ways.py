"""A server with several ways in, and its clients."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gserver.addresses import TLS, UNIX, parse_way
from lab.running import GSERVER, Client, Running, UnixClient
from lab.tls_client import certified, trust

#: A command without the `--port` of `Running`.
SERVE = [*GSERVER, "serve"]


class Ways:
    """The ways in of a running server."""

    def __init__(self, server: Running, pems: Path) -> None:
        self._context = trust(pems)
        self._ways = list(map(parse_way, server.ways()))

    def client(self, kind: str, source: str = "") -> Client:
        """A new client by the first way of this kind."""
        [way, *_] = [way for way in self._ways if way.kind == kind]
        if kind == UNIX:
            return UnixClient(Path(way.path))
        return Client(way.port, way.host, source, self._context if kind == TLS else None)

    def port(self, kind: str) -> int:
        """The port of the first way of this kind."""
        return next(way.port for way in self._ways if way.kind == kind)


@contextmanager
def three_ways(folder: Path, pems: Path, *options: str) -> Iterator[tuple[Running, Ways]]:
    """A server with plain TCP, TLS, and the socket file `gserver.sock` in the folder."""
    path = folder / "gserver.sock"
    binds = ("tcp://127.0.0.1:0", "tls://127.0.0.1:0", f"unix:{path}")
    words = [word for bind in binds for word in ("--bind", bind)]
    given = [*words, *certified(pems), "--admin-port", "0", *options]
    with Running(*given, command=SERVE) as server:
        yield server, Ways(server, pems)
