"""The scene of a fault: a server, good clients of it, and a record of what it held before."""

import contextlib
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lab.admin import status
from lab.rows import Variant
from lab.running import LIMIT, PATIENCE, Client, Running, until
from lab.tls_client import TlsClient, certified, trust

#: A documented way to look into a worker: a command of one's own.
CENSUS = '''
import gc
from greenlet import greenlet
from gserver.commands import command

@command("CENSUS")
def census(service):
    """How many greenlets this worker has."""
    gc.collect()
    return sum(isinstance(item, greenlet) and not item.dead for item in gc.get_objects())
'''
SEED = int(os.environ.get("GSERVER_FAULT_SEED", "0")) or random.SystemRandom().randrange(
    1, 1_000_000
)
PAUSE_SECONDS = 0.005
#: What allocators keep of a crowd that has gone, for each process.
KEPT_BYTES = 6_000_000


class Held(NamedTuple):
    """What the processes of a server hold while there is one client for each worker."""

    descriptors: list[int]  #: of each process
    greenlets: list[int]  #: of each worker
    resident: int  #: bytes, of all


class Neighbour:
    """A good client in a thread of its own. What it asks is drawn, so no reply can pass for
    another's.
    """

    def __init__(self, site: "Site", seed: int, *, is_staying: bool) -> None:
        self.seconds: list[float] = []
        self.lost = 0
        self.failure = ""
        self._site, self._random, self._is_staying = site, random.Random(seed), is_staying
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._is_over.is_set() and not self.failure:
            try:
                with self._site.client() as client:
                    self._talk(client)
            except (OSError, EOFError) as error:
                self.lost += 1
                if not self._site.may_lose:
                    self.failure = f"lost: {error!r}"
            except AssertionError as error:
                self.failure = str(error)

    def _talk(self, client: Client) -> None:
        for _ in range(1_000_000 if self._is_staying else 3):
            asked = self._random.choices((b"WHO", b"WHERE", b"WHY"), k=self._random.randint(1, 4))
            began = time.perf_counter()
            client.send(b"".join(command + b"\n" for command in asked))
            for command in asked:
                reply = client.line()
                if not reply:
                    raise EOFError("closed")
                self._site.check(command, reply)
            self.seconds.append(time.perf_counter() - began)
            if self._is_over.wait(PAUSE_SECONDS):
                return

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join(LIMIT)
        if self._thread.is_alive():
            self.failure = self.failure or "no answer"


class Neighbours(ExitStack[None]):
    """Some that stay and some that come anew all the time; every reply to them must be right."""

    def __init__(self, site: "Site", count: int) -> None:
        super().__init__()
        self.each = [Neighbour(site, SEED + n, is_staying=n % 3 > 0) for n in range(count)]
        until(
            lambda: all(one.seconds or one.failure for one in self.each),
            "all neighbours were answered",
        )

    @property
    def answered(self) -> int:
        """How many times they were answered so far."""
        return sum(len(one.seconds) for one in self.each)

    @property
    def lost(self) -> int:
        """How many connections they have lost so far."""
        return sum(one.lost for one in self.each)

    def p99(self, since: int = 0) -> float:
        """Seconds within which 99 of 100 were answered, of each one's from that number on."""
        seconds = sorted(second for one in self.each for second in one.seconds[since:])
        return seconds[len(seconds) * 99 // 100]

    def are_served(self) -> None:
        """Wait until each has been answered anew, twice: the first question may be an old one."""
        before = [len(one.seconds) for one in self.each]
        until(
            lambda: all(
                len(one.seconds) >= count + 2 or one.failure
                for one, count in zip(self.each, before, strict=True)
            ),
            "all neighbours are answered",
        )
        self.assert_content()

    def assert_content(self) -> None:
        failures = [one.failure for one in self.each if one.failure]
        assert not failures, f"GSERVER_FAULT_SEED={SEED}: {failures}"

    def stop(self) -> None:
        for one in self.each:
            one.stop()
        self.assert_content()


class Site(ExitStack[None]):
    """A server in a variant, with an admin port.

    `crowd` is how many clients each worker has had before the fault. `may_lose` is whether a
    neighbour may lose its connection, as at a worker's death: it comes back then. `may_complain` is
    whether errors may be in the log, for the same reason.
    """

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
        self.variant, self.may_lose, self.may_complain = variant, False, False
        self.pems = pems
        (folder / "census.py").write_text(CENSUS)
        words = [
            "--workers",
            str(variant.workers),
            "--server-id",
            "here",
            "--admin-port",
            "0",
            "--commands",
            "census",
        ]
        tls = certified(pems) if variant.is_tls else []
        self.server = self.enter_context(Running(*words, *tls, *options, cwd=folder, **more))  # type: ignore[arg-type]
        self.server.wait_for("agent.ready")
        self._before = self._warm(crowd * variant.workers)

    def _warm(self, crowd: int) -> Held:
        """What it holds when it has had so many clients at once: an allocator keeps some of what
        they took.
        """
        with ExitStack() as stack:
            for _ in range(crowd):
                with contextlib.suppress(OSError):
                    stack.enter_context(self.client()).send(b"WHY\nNOPE\nWH")
        return self.held()

    def client(self, source: str = "") -> Client:
        """A new client, of the variant's kind."""
        if self.variant.is_tls:
            return TlsClient(self.server.port, trust(self.pems), source=source)
        return self.server.client(source)

    def check(self, command: bytes, reply: bytes) -> None:
        """Whether a neighbour's reply is right: WHO counts the asker at least."""
        told = reply.decode("ascii", "replace").removesuffix("\n")
        right = {
            b"WHY": told == "42",
            b"WHERE": told == "here",
            b"WHO": told.isdigit() and int(told) > 0,
        }
        assert right[command], f"{command!r} was answered {reply!r}"

    @contextmanager
    def neighbours(self, count: int = 6) -> Iterator[Neighbours]:
        """Good clients beside the body. After it they were all answered, and all is as it was
        before it.
        """
        neighbours = Neighbours(self, count)
        try:
            yield neighbours
            neighbours.are_served()
        finally:
            neighbours.stop()
        self.assert_as_before()

    def clients(self) -> list[int]:
        """How many clients each worker has."""
        return [worker["clients"] for worker in status(self.server)["workers"]["each"]]

    def _are(self, clients: list[int]) -> bool:
        return self.clients() == clients

    def _are_gone(self) -> None:
        """Wait until it has noticed that all clients have closed: one that comes sooner may be one
        too many.
        """
        until(lambda: sum(self.clients()) == 0, "all clients have gone")

    def _census(self, stack: ExitStack[Any]) -> list[Client]:
        """One client for each worker, and nobody else."""
        self._are_gone()
        chosen: list[Client] = []
        while len(chosen) < self.variant.workers:
            before = self.clients()
            client = self.client()
            client.ask(b"WHY")
            [worker] = [
                n
                for n, (old, new) in enumerate(zip(before, self.clients(), strict=True))
                if new > old
            ]
            if before[worker]:
                client.sock.close()
                until(partial(self._are, before), "it has gone")
            else:
                chosen.append(stack.enter_context(client))
        return chosen

    def resident_of_workers(self) -> int:
        """Bytes."""
        return sum(worker.memory_info().rss for worker in self.server.workers())

    def held(self) -> Held:
        """What it holds with one client for each worker."""
        until(
            lambda: len(self.server.workers()) == len(self.clients()) == self.variant.workers,
            "all workers run",
        )
        with ExitStack() as stack:
            clients = self._census(stack)
            for client in clients:
                client.ask(
                    b"CENSUS"
                )  # It has a greenlet now, which waits again when it asks once more.
            greenlets = sorted(int(client.ask(b"CENSUS")) for client in clients)
            processes = self.server.processes()
            descriptors = sorted(process.num_fds() for process in processes)
            return Held(
                descriptors, greenlets, sum(process.memory_info().rss for process in processes)
            )

    def assert_as_before(self) -> None:
        """WHO is exact, and descriptors, greenlets and memory are back to where they were."""
        self._are_gone()
        with self.client() as client:
            until(lambda: client.who() == 1, "WHO is exact: the asker alone")
        deadline = time.monotonic() + LIMIT
        while (now := self.held())[:2] != self._before[:2]:
            assert time.monotonic() < deadline, f"it holds {now}, before it was {self._before}"
        grown = now.resident - self._before.resident
        assert grown < KEPT_BYTES * len(self.server.processes()) * PATIENCE, (
            f"it has grown by {grown} bytes"
        )
        bad = [event for event in self.server.events() if event["event.action"] == "process.error"]
        assert self.may_complain or not bad, bad
        assert self.may_complain or not self.server.stderr, self.server.stderr
