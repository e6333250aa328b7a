"""Servers on separate hosts, and a network that loses packets between them and Redis.

The loss is in both directions or in one. Clients stay connected and send WHO all the time.
"""

import itertools
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lab.host import Host
from lab.netns import Cut, Network, Way, both_ways
from lab.redises import FAILOVER_LIMIT, Redis, Sentinels
from lab.rows import Notes
from lab.running import LIMIT, PATIENCE, Running, until
from lab.site import SEED
from lab.steady import Cluster, SteadyServer

SHARES = 5, 3, 2
#: Heartbeat interval and TTL.
QUICK, DEFAULT = (0.3, 3.0), (0.5, 5.0)
#: Seconds until all counts are exact after a partition, and from the end of its TTL until a server
#: that is cut off is dropped.
HEALED = 2 * PATIENCE
DROPPED = 1 * PATIENCE


def spread(
    hosts: Sequence[Host], url: str, times: tuple[float, float] = QUICK, workers: int = 1
) -> Cluster:
    """A cluster with one server on each host."""
    return Cluster(url, *times, {"WEB_CONCURRENCY": str(workers)}, SHARES, hosts)


class World(ExitStack[None]):
    """Three servers and a Redis, each on its own host."""

    def __init__(self, folder: Path, interval: float, ttl: float, workers: int = 1) -> None:
        super().__init__()
        self.ttl = ttl
        with ExitStack() as stack:
            self.network = stack.enter_context(Network(1 + len(SHARES)))
            self.redis_host, *self.hosts = self.network.hosts
            self.redis = stack.enter_context(Redis(folder, host=self.redis_host))
            self.cluster = stack.enter_context(
                spread(self.hosts, self.redis.url, (interval, ttl), workers)
            )
            self.members = list(self.cluster.members)
            self.push(stack.pop_all())

    def to_redis(self, *numbers: int) -> list[Way]:
        return [(self.hosts[number], self.redis_host) for number in numbers]

    def from_redis(self, *numbers: int) -> list[Way]:
        return [(self.redis_host, self.hosts[number]) for number in numbers]

    @contextmanager
    def cut(self, *ways: Way) -> Iterator[Cut]:
        """Lose packets on these paths; the servers notice before the body, and recover after it."""
        concerned = [
            member
            for host, member in zip(self.hosts, self.members, strict=True)
            if any(host in way for way in ways)
        ]
        with ExitStack() as ongoing:
            for member in concerned:
                ongoing.enter_context(member.server.expecting("cluster.lost", "timeout"))
            with self.network.cut(*ways) as cut:
                ongoing.close()
                counts = [len(member.server.events("cluster.regained")) for member in concerned]
                yield cut
        for member, count in zip(concerned, counts, strict=True):
            if member in self.cluster.members:
                member.server.wait_for("cluster.regained", count + 1, HEALED)

    @contextmanager
    def guest(self, number: int, total: int) -> Iterator[None]:
        """Connect another client; its server counts it at once, on top of the given total."""
        member = self.members[number]
        member.watcher.allow(total, total + 1)
        with member.server.client() as client:
            assert client.who() == total + 1
            member.watcher.allow(total + 1)
            yield

    def come_and_go(self, number: int, total: int) -> None:
        """Connect five clients, one after another, to a server that reports this total."""
        watcher = self.members[number].watcher
        for _ in range(5):
            with self.guest(number, total):
                assert watcher.says(total + 1)
                watcher.allow(total, total + 1)
            until(lambda: watcher.says(total), f"the server reports {total} again", PATIENCE)
            watcher.allow(total)

    def last_reported_at(self, number: int) -> float:
        """Return the monotonic time of the server's last heartbeat that Redis has run."""
        name = self.members[number].clients[0].ask(b"WHERE").decode()
        entry = str(self.redis.command("HGET", "{gserver:gserver}:members", name))
        return int(entry.split()[1]) / 1e6

    def wait_until_alone(self, staying: list[SteadyServer], since: float) -> None:
        """Wait until the remaining servers count only themselves."""
        left = sum(member.share for member in staying)
        for watcher in [member.watcher for member in staying]:
            until(partial(watcher.says, left), f"only {left} clients are counted", self.ttl + LIMIT)
            watcher.allow(left)
            dropped_at = next(
                a.asked for a in watcher.answers if a.asked > since and a.clients == left
            )
            assert self.ttl / 2 <= dropped_at - since <= self.ttl + DROPPED


@pytest.fixture(scope="module")
def shared_world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """One world for all tests that restore it."""
    with World(tmp_path_factory.mktemp("world"), *request.param) as running:
        yield running


@pytest.fixture
def world(shared_world: World) -> World:
    """The shared world without faults, even if the previous test failed."""
    shared_world.cluster.start_over()
    return shared_world


#: `bin/check` runs only the first.
WORKERS = [pytest.param(1, id="1 worker"), pytest.param(3, id="3 workers", marks=pytest.mark.long)]


def row(fault: str, times: tuple[float, float] = QUICK) -> Callable[[Any], Any]:
    """Mark a test of the shared world as a row of the matrix."""
    worlds = [
        pytest.param((*times, each.values[0]), id=each.id, marks=each.marks) for each in WORKERS
    ]

    def mark(test: Any) -> Any:
        return pytest.mark.fault(fault)(
            pytest.mark.parametrize("shared_world", worlds, indirect=True)(test)
        )

    return mark


@row("One server cut off, both ways", DEFAULT)
def test_a_server_that_is_cut_off_counts_its_own_clients_and_is_dropped_after_its_ttl(
    world: World, notes: Notes
) -> None:
    cluster, (cut_off, *others), began = world.cluster, world.members, time.monotonic()
    with ExitStack() as ongoing:
        for member in others:
            member.watcher.allow(10, 5)
        cut = ongoing.enter_context(world.cut(*world.to_redis(0), *world.from_redis(0)))
        world.come_and_go(0, 10)
        world.wait_until_alone(others, cut.before)
        others[1].watcher.allow(5, 6)
        with world.guest(1, 5):
            until(
                lambda: others[1].watcher.says(6), "the other server counts the new client", HEALED
            )
            world.come_and_go(0, 10)
            for member in world.members:
                member.watcher.allow(10 if member is cut_off else 6, 11)
            others[0].share += 1
            ongoing.close()
            cluster.settle(HEALED)
            others[0].share -= 1
            cluster.allow(10, 11)
    cluster.settle(HEALED)
    cluster.assert_as_quick_as_alone(began)
    cluster.check()
    notes.happened("packets were lost, and the others dropped it")


@row("One server cut off: its packets are lost")
def test_a_server_whose_heartbeats_are_lost_is_dropped_like_one_that_is_cut_off(
    world: World, notes: Notes
) -> None:
    cluster, others = world.cluster, world.members[1:]
    for member in others:
        member.watcher.allow(10, 5)
    with world.cut(*world.to_redis(0)) as cut:
        assert world.last_reported_at(0) <= cut.before
        world.come_and_go(0, 10)
        world.wait_until_alone(others, cut.before)
        for member in others:
            member.watcher.allow(5, 10)
    cluster.settle(HEALED)
    cluster.check()
    notes.happened("packets were lost, and the others dropped it")


@row("One server cut off: packets to it are lost")
def test_a_server_that_gets_no_replies_reports_once_more_and_is_then_dropped(
    world: World, notes: Notes
) -> None:
    """A heartbeat without a reply ends its connection, and a new one needs both directions."""
    cluster, others = world.cluster, world.members[1:]
    for member in others:
        member.watcher.allow(10, 5)
    with world.cut(*world.from_redis(0)) as cut:
        last_reported_at = world.last_reported_at(0)
        # A heartbeat is numbered when it is created. On a busy machine it leaves a little later.
        assert last_reported_at >= cut.after - 0.25 * PATIENCE
        world.come_and_go(0, 10)
        world.wait_until_alone(others, last_reported_at)
        for member in others:
            member.watcher.allow(5, 10)
    cluster.settle(HEALED)
    cluster.check()
    notes.happened("packets were lost, and the others dropped it")


@pytest.mark.long
@row("All servers cut off, twice as long as the TTL")
def test_no_server_is_dropped_while_all_are_cut_off_nor_when_they_are_back(
    world: World, notes: Notes
) -> None:
    cluster = world.cluster
    expired = cluster.events("cluster.expired")
    with world.cut(*world.to_redis(0, 1, 2), *world.from_redis(0, 1, 2)):
        cluster.watch(2 * world.ttl)
    cluster.settle(HEALED)
    assert cluster.events("cluster.expired") == expired
    cluster.check()
    notes.happened("packets were lost, as every server noticed")


@pytest.mark.long
@row("Two servers cut off")
def test_two_servers_that_were_cut_off_together_return_without_a_dip(
    world: World, notes: Notes
) -> None:
    cluster, third = world.cluster, world.members[2]
    expired = cluster.events("cluster.expired")
    third.watcher.allow(10, 7, 5, 2)
    with world.cut(*world.to_redis(0, 1), *world.from_redis(0, 1)) as cut:
        world.wait_until_alone([third], cut.before)
        cluster.watch(world.ttl / 2)
        third.watcher.allow(2, 5, 7, 10)
    cluster.settle(HEALED)
    assert cluster.events("cluster.expired") == [expired[0] + 1, expired[1] + 1, expired[2]]
    cluster.check()
    notes.happened("packets were lost, and the third one dropped both")


@pytest.mark.long
@row("A flapping link")
def test_a_link_that_flaps(world: World, notes: Notes) -> None:
    """Each cut is shorter than the TTL, in one direction or the other, so no server is dropped."""
    rng, cluster, flaps = random.Random(SEED), world.cluster, 0
    expired, began = cluster.events("cluster.expired"), time.monotonic()
    while time.monotonic() < began + 2 * world.ttl:
        number = rng.randrange(3)
        way = rng.choice([world.to_redis, world.from_redis])(number)
        with world.network.cut(*way):
            cluster.watch(rng.uniform(0, 0.3))
        flaps += 1
        cluster.watch(rng.uniform(0, 0.3))
    cluster.settle(HEALED)
    cluster.check()
    assert cluster.events("cluster.expired") == expired
    notes.happened(f"GSERVER_FAULT_SEED={SEED}: packets were lost {flaps} times")


@pytest.mark.long
@row("Two partitions in a row")
def test_two_partitions_in_a_row(world: World, notes: Notes) -> None:
    """The second begins when the servers of the first have reported again; it cuts off others."""
    cluster, (first, second, third) = world.cluster, world.members
    cluster.allow(10, 5, 8, 7, 2, 3)
    with world.cut(*world.to_redis(0), *world.from_redis(0)) as cut:
        first.watcher.allow(10)
        for member in (second, third):
            until(partial(member.watcher.says, 5), "the first server is dropped", world.ttl + LIMIT)
    cluster.allow(*range(2, 11))
    with world.cut(*world.to_redis(1, 2), *world.from_redis(1, 2)):
        until(partial(first.watcher.says, 5), "the others are dropped", world.ttl + LIMIT)
        first.watcher.allow(5, 7, 8, 10)
    cluster.settle(HEALED)
    cluster.check()
    notes.happened(
        f"packets were lost from {cut.after:.3f} on, and again; each side dropped the other"
    )


def kill(server: Running) -> None:
    server.send_signal(signal.SIGKILL)
    server.exit_code()


def stop_without_leaving(server: Running) -> None:
    assert server.stop() == 0
    assert server.events("cluster.not_left")


@pytest.mark.long
@pytest.mark.fault("A server stops while it is cut off")
def test_servers_that_end_while_cut_off_leave_the_count_for_good(
    tmp_path: Path, notes: Notes
) -> None:
    """Their last heartbeats must stay lost: the kernel must not retransmit them later."""
    with World(tmp_path, *QUICK) as world:
        cluster, (killed, stopped, third) = world.cluster, world.members
        with world.cut(*world.to_redis(0), *world.from_redis(0)):
            cluster.end(killed, kill)
            assert third.watcher.says(10), "the network is repaired before it is dropped"
        third.watcher.allow(10, 7, 5, 2)
        with world.cut(*world.to_redis(1), *world.from_redis(1)) as cut:
            cluster.end(stopped, stop_without_leaving)
            world.wait_until_alone([third], cut.before)
            until(
                lambda: time.monotonic() > cut.after + 1.5 * world.ttl,
                "the network is repaired after it is dropped",
            )
        until(
            lambda: time.monotonic() > cut.after + 2.5 * world.ttl,
            "all retransmissions have been sent",
        )
        cluster.check()
        notes.happened("one was killed and one stopped while their packets were lost")


@contextmanager
def another_elected(network: Network, sentinels: Sentinels) -> Iterator[Redis]:
    """The first Redis and its Sentinel are cut off from the others, which elect another primary.

    Finally the first one follows it.
    """
    old, *majority = sentinels.redises
    with network.cut(*both_ways(old.host, *(each.host for each in majority))):
        yield until(
            lambda: [one for one in majority if one.role() == "master"],
            "another Redis is the primary",
            FAILOVER_LIMIT,
        )[0]
    until(lambda: old.role() == "slave", "the old primary has been demoted", FAILOVER_LIMIT)


@pytest.mark.long
@pytest.mark.fault("Primary cut off with one server; the majority elects another")
@pytest.mark.parametrize("workers", WORKERS)
def test_each_side_counts_its_own_when_the_majority_elects_another_primary(
    tmp_path: Path, notes: Notes, workers: int
) -> None:
    interval, ttl = QUICK
    with (
        Network(len(SHARES)) as network,
        Sentinels(tmp_path, hosts=network.hosts) as sentinels,
        spread(network.hosts, sentinels.url, workers=workers) as cluster,
    ):
        cluster.allow(10, 8, 7, 5)
        with another_elected(network, sentinels):
            until(lambda: cluster.all_report(5), "each side counts its own servers", ttl + LIMIT)
            assert sentinels.redises[0].role() == "master"
            cluster.allow(5)
            cluster.watch(2 * interval)
            cluster.allow(5, 10)
        cluster.settle(HEALED)
        cluster.check()
        notes.happened("two were primary at once; the minority's was demoted after the partition")


@pytest.mark.long
@pytest.mark.fault("Primary cut off with its Sentinel; servers reach both sides")
def test_servers_that_reach_both_sides_follow_the_majority(tmp_path: Path, notes: Notes) -> None:
    """Each knows the primary from the Sentinel that is cut off with it, which still names it."""
    with ExitStack() as stack:
        network = stack.enter_context(Network(2 * len(SHARES)))
        servers = network.hosts[3:]
        sentinels = stack.enter_context(Sentinels(tmp_path, hosts=network.hosts[:3]))
        old, *majority = sentinels.redises
        apart = [both_ways(each.host, *servers) for each in majority]
        with network.cut(*itertools.chain(*apart)):
            cluster = stack.enter_context(spread(servers, sentinels.url))
        with another_elected(network, sentinels) as new:
            promoted = time.monotonic()

            def have_moved() -> bool:
                entries = new.command("HVALS", "{gserver:gserver}:members")
                return len(entries) == 3 and all(
                    int(entry.split()[1]) / 1e6 > promoted for entry in entries
                )

            cluster.allow(*range(11))
            until(have_moved, "all servers report to the new primary")
            cluster.settle(HEALED)
            cluster.watch(cluster.ttl)
            assert have_moved()
            assert old.role() == "master"
            named, _ = sentinels.sentinels[0].command(
                "SENTINEL", "GET-MASTER-ADDR-BY-NAME", "gserver"
            )
            assert named == old.host.address
            notes.happened("both were primary, and the Sentinel of the old one named it")
        cluster.settle(HEALED)
        cluster.check()
