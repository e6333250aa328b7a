"""Servers that form a cluster, and clients that watch WHO on each of them."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise

from lab.running import LIMIT, Client, Running, until

#: Seconds: a heartbeat interval and a TTL that keep tests of dead servers short.
INTERVAL, TTL = 0.2, 2.0
FAST = ["--heartbeat-interval", str(INTERVAL), "--member-ttl", str(TTL)]


@contextmanager
def started(*servers: list[str]) -> Iterator[list[Running]]:
    """Start servers with these options, all at the same time."""
    with ExitStack() as stack:
        running = [stack.enter_context(Running(*options, wait=False)) for options in servers]
        for server in running:
            server.port = server.wait_for("server.listening")["server.port"]
        yield running


@contextmanager
def cluster(url: str, name: str, *servers: list[str]) -> Iterator[list[Running]]:
    """Start servers as a cluster; yield them when each knows all of them."""
    with started(
        *(["--redis-url", url, "--cluster-name", name, *options] for options in servers)
    ) as running:
        until(
            lambda: {servers_known(server) for server in running} == {len(servers)},
            "each server knows all of them",
        )
        yield running


def servers_known(server: Running) -> int:
    """Return the number of servers that a server last logged."""
    events = server.events("cluster.servers")
    return int(events[-1]["gserver.servers"]) if events else 0


class Watch:
    """An additional client of a server, which sends WHO all the time.

    `seen` has the replies with their times.
    """

    def __init__(self, server: Running) -> None:
        self.seen: list[tuple[float, bytes]] = []
        self._client = server.client()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._is_over.wait(0.005):
            self.seen.append((time.monotonic(), self._client.ask(b"WHO")))

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join(LIMIT)
        self._client.sock.close()

    @property
    def last(self) -> int:
        return int(self.seen[-1][1]) if self.seen else -1

    def replies(self, since: float = 0.0) -> set[int]:
        return {int(reply) for at, reply in self.seen if at >= since}

    def until(self, *, since: float, at_least: int = 0, at_most: int = 10**6) -> float:
        """Return the seconds from `since` until the first reply in these bounds."""
        return (
            next(at for at, reply in self.seen if at >= since and at_least <= int(reply) <= at_most)
            - since
        )

    @property
    def longest_silence(self) -> float:
        return max(later - earlier for (earlier, _), (later, _) in pairwise(self.seen))


@contextmanager
def watching(*servers: Running, total: int) -> Iterator[list[Watch]]:
    """Watch WHO on each server from when all report the total, which includes these clients."""
    watches: list[Watch] = []
    try:
        watches += (Watch(server) for server in servers)
        all_report(watches, total)
        for watch in watches:
            watch.seen.clear()
        yield watches
    finally:
        for watch in watches:
            watch.stop()


def all_report(watches: list[Watch], total: int, limit: float = LIMIT) -> None:
    until(
        lambda: {watch.last for watch in watches} == {total},
        f"{total}: {[w.seen[-5:] for w in watches]}",
        limit,
    )


def connect(stack: ExitStack, server: Running, count: int) -> list[Client]:
    return [stack.enter_context(server.client()) for _ in range(count)]
