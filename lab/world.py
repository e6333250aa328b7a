"""A steady cluster with its Redis and the network between them, and its test under a fault."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import redis

from lab.redis_faults import RedisFault
from lab.redises import Proxy, Redis, keys_of
from lab.rows import Notes
from lab.running import PATIENCE, until
from lab.site import KEPT_BYTES
from lab.steady import Cluster

KEYS = keys_of()


class World(ExitStack[None]):
    """A cluster, its Redis, and the network between them."""

    def __init__(self, folder: Path, interval: float, ttl: float, **env: str) -> None:
        super().__init__()
        self.ttl = ttl
        with ExitStack() as stack:
            self.redis = stack.enter_context(Redis(folder))
            self.proxy = stack.enter_context(Proxy(self.redis.port))
            self.cluster = stack.enter_context(
                Cluster(self.redis.url_at(self.proxy.port), interval, ttl, env)
            )
            self.push(stack.pop_all())

    def lost(self, kind: str) -> AbstractContextManager[None]:
        """The body makes Redis unavailable to every server, with this kind of error."""
        return self.cluster.expecting("cluster.lost", kind)

    def reset(self) -> AbstractContextManager[None]:
        """The body makes Redis lose its data, which every server notices."""
        return self.cluster.expecting("cluster.reset")

    def dump(self) -> list[Any]:
        """Return the keys and their values, for `restore`."""
        with redis.Redis(port=self.redis.port) as client:
            return [client.dump(key) for key in KEYS]

    def restore(self, dumped: list[Any]) -> None:
        with redis.Redis(port=self.redis.port) as client, client.pipeline() as pipeline:
            for key, value in zip(KEYS, dumped, strict=True):
                pipeline.restore(key, 0, value, replace=True)
            pipeline.execute()


Fault = Callable[[World], AbstractContextManager[None]]


def lasting(name: str, kind: str, fault: RedisFault, seconds: float = 0, ttls: float = 0) -> Fault:
    """A fault of this length that every server notices as an error of this kind."""

    @contextmanager
    def begin(world: World) -> Iterator[None]:
        with ExitStack() as stack:
            with world.lost(kind):
                stack.enter_context(fault(world.redis))
            world.cluster.watch(seconds + ttls * world.ttl)
            yield

    begin.__name__ = name
    return begin


def survive(cluster: Cluster, fault: AbstractContextManager[None], notes: Notes) -> None:
    """Go through a fault, which checks that it happens; then count one more client."""
    cluster.start_over()
    began, answers, descriptors, resident = (
        time.monotonic(),
        cluster.answers,
        cluster.descriptors(),
        cluster.resident(),
    )
    with ExitStack() as ongoing:
        ongoing.enter_context(fault)
        with cluster.guests(0):
            ongoing.close()
            ended = time.monotonic()
            cluster.settle()
            notes.measured("exact after", time.monotonic() - ended - 2 * cluster.interval, "s")
        cluster.settle()
    cluster.assert_as_quick_as_alone(began)
    cluster.check()
    until(
        lambda: cluster.descriptors() == descriptors, "the number of open descriptors is as before"
    )
    grown = cluster.resident() - resident
    assert grown < KEPT_BYTES * len(descriptors) * PATIENCE, (
        f"{grown} bytes of memory more than before"
    )
    notes.measured("right replies", cluster.answers - answers, "")
