"""A server under a fault, its good clients, and its resources before the fault."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from lab import seed
from lab.census import CENSUS, Held, clients, connect_crowd, held, one_each
from lab.load import Load
from lab.rows import Variant
from lab.running import PATIENCE, Client, Running, until
from lab.tls_client import certified, trust

SEED = seed.draw("GSERVER_FAULT_SEED")
#: Seconds between two requests of a neighbour.
PAUSE_SECONDS = 0.005
#: Memory that allocators keep after a crowd has left, per process.
KEPT_BYTES = 6_000_000


class Site(ExitStack[None]):
    """A server in a variant, with an admin port.

    `crowd` is the number of clients that each worker has had before the fault. `may_lose`: a
    neighbour may lose its connection, as when a worker dies, and then reconnects.
    `may_log_errors`: errors may be logged, for the same reason.
    """

    name = "here"

    def __init__(
        self,
        folder: Path,
        pems: Path,
        variant: Variant,
        *options: str,
        crowd: int = 60,
        **more: object,
    ) -> None:
        super().__init__()
        self.variant, self.may_lose, self.may_log_errors = variant, False, False
        self.pems = pems
        (folder / "census.py").write_text(CENSUS)
        words = ["--workers", str(variant.workers), "--server-id", self.name, "--admin-port", "0"]
        tls = certified(pems) if variant.is_tls else []
        self._context = trust(pems) if variant.is_tls else None
        self.server = self.enter_context(
            Running(*words, "--commands", "census", *tls, *options, cwd=folder, **more)  # type: ignore[arg-type]
        )
        self.server.wait_for("agent.ready")
        connect_crowd(self.client, crowd * variant.workers)
        self._before = self.held()

    @property
    def is_tls(self) -> bool:
        return self.variant.is_tls

    @property
    def excuse(self) -> str:
        """Excused errors of a neighbour: see `load.Target`."""
        return "away" if self.may_lose else ""

    def client(self, source: str = "") -> Client:
        """A new client, over TLS if the variant has it."""
        return self.server.client(source, self._context)

    def plain_client(self) -> Client:
        return self.server.client()

    @contextmanager
    def neighbours(self, count: int = 6) -> Iterator[Load]:
        """Good clients during the body. Afterwards all were answered and resources are released."""
        kinds = [("comes_and_goes", "stays", "stays")[number % 3] for number in range(count)]
        load = Load([self], SEED, kinds, pause=PAUSE_SECONDS)
        load.may_call.set()
        try:
            load.are_served()
            yield load
            load.are_served()
        finally:
            load.stop()
            load.join()
            problems = load.problems()
            assert not problems, f"GSERVER_FAULT_SEED={SEED}: {problems}"
        self.assert_as_before()

    def clients(self) -> list[int]:
        """The number of clients of each worker."""
        return [*clients(self.server).values()]

    def resident_of_workers(self) -> int:
        """Bytes."""
        return sum(worker.memory_info().rss for worker in self.server.workers())

    def held(self) -> list[Held]:
        """The sorted resources of its processes with one client for each worker."""
        until(
            lambda: len(self.server.workers()) == len(self.clients()) == self.variant.workers,
            "all workers run",
        )
        with ExitStack() as stack:
            chosen = one_each(self.server, self.client, stack)
            return sorted(held(self.server, chosen).values(), key=lambda each: each[1:])

    def await_others(self, gone: Sequence[psutil.Process] = ()) -> None:
        """Wait until these processes have ended and been replaced."""

        def have_places() -> bool:
            now = [*self.server.workers(), *self.server.agents()]
            return len(now) == self.variant.workers + 1 and not set(gone) & set(now)

        until(have_places, "the processes are replaced")

    def assert_as_before(self) -> None:
        """WHO is exact, and descriptors, greenlets and memory are as before."""
        until(lambda: sum(self.clients()) == 0, "all clients have left")
        with self.client() as client:
            until(lambda: client.who() == 1, "WHO counts only the asking client")
        now: list[Held] = []

        def holds_no_more() -> bool:
            now[:] = self.held()
            return [each[1:] for each in now] == [each[1:] for each in self._before]

        until(holds_no_more, lambda: f"the server holds {now}; before it held {self._before}")
        grown = sum(each.resident for each in now) - sum(each.resident for each in self._before)
        assert grown < KEPT_BYTES * len(now) * PATIENCE, f"memory has grown by {grown} bytes"
        bad = [event for event in self.server.events() if event["event.action"] == "process.error"]
        assert self.may_log_errors or not bad, bad
        assert self.may_log_errors or not self.server.stderr, self.server.stderr
