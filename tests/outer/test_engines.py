"""Clusters that use several Redis at once."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from gserver.cluster.engines import MAX_LISTED
from gserver.cluster.membership import Heartbeat
from gserver.cluster.redis_link import RedisLink
from gserver.config import Config
from lab.admin import status
from lab.clusters import FAST, INTERVAL, TTL, Watch, connect
from lab.redises import Proxy, Redis
from lab.rows import Notes
from lab.running import PATIENCE, Client, Running, stopped, until

#: Seconds until a change is known to all servers, and in which none happens.
SOON = 1.0 * PATIENCE
#: Longer than a lease.
LONG = 1.2 * TTL


class World(ExitStack[None]):
    """Two Redis, each behind a proxy per server, and servers with one client more each."""

    def __init__(self, folder: Path, servers: int, ttl: float = TTL) -> None:
        super().__init__()
        self.redises = [self.enter_context(Redis(folder)) for _ in range(2)]
        #: By server, its ways to the two.
        self.ways = [
            [self.enter_context(Proxy(redis.port)) for redis in self.redises]
            for _ in range(servers)
        ]
        self.options = [*FAST, "--admin-port", "0", "--member-ttl", str(ttl)]
        self.servers: list[Running] = []
        self.clients: list[Client] = []
        for number in range(servers):
            self.start(f"server-{number}", self.url(number))
        self.await_total()

    def url(self, number: int) -> str:
        ways = zip(self.redises, self.ways[number], strict=True)
        return " ".join(redis.url_at(way.port) for redis, way in ways)

    def start(self, server_id: str, url: str) -> Running:
        given = [*self.options, "--redis-url", url, "--server-id", server_id]
        server = self.enter_context(Running(*given))
        self.servers.append(server)
        self.clients += connect(self, server, 1)
        return server

    @property
    def total(self) -> int:
        return len(self.clients)

    def replies(self) -> set[int]:
        return {client.who() for client in self.clients}

    def await_total(self) -> None:
        until(lambda: self.replies() == {self.total}, "all servers report the total")

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Every reply of every server is the total while the body runs."""
        watches = [Watch(server) for server in self.servers]
        total = self.total + len(watches)
        try:
            until(lambda: {each.last for each in watches} == {total}, "the watches are counted")
            time.sleep(SOON)
            began = time.monotonic()
            yield
            for watch in watches:
                assert watch.replies(began) == {total}
        finally:
            for watch in watches:
                watch.stop()


def reasons(server: Running) -> set[str]:
    return {reason["name"] for reason in status(server)["reasons"]}


def dead_and_back_empty(redis: Redis) -> None:
    redis.kill()
    time.sleep(LONG)
    redis.restart(keep_data=False)


def dead_and_back_with_old_data(redis: Redis) -> None:
    redis.command("SAVE")
    redis.kill()
    time.sleep(LONG)
    redis.restart(keep_data=True)


def frozen(redis: Redis) -> None:
    redis.freeze()
    time.sleep(LONG)
    redis.thaw()


def wiped(redis: Redis) -> None:
    redis.wipe()


def read_only(redis: Redis) -> None:
    redis.read_only()
    time.sleep(LONG)
    redis.writable()


FAULTS: list[Callable[[Redis], None]] = [
    dead_and_back_empty,
    dead_and_back_with_old_data,
    frozen,
    wiped,
    read_only,
]


@pytest.mark.fault("One of two Redis fails, and then the other one")
def test_a_fault_of_one_redis_changes_no_reply(tmp_path: Path, notes: Notes) -> None:
    with World(tmp_path, 3) as world, world.exact():
        for number, fault in enumerate(FAULTS):
            for redis in world.redises if number == 0 else [world.redises[number % 2]]:
                fault(redis)
                time.sleep(SOON)
                notes.happened(f"one of the two was {fault.__name__.replace('_', ' ')}")


@pytest.mark.parametrize("number", [0, 1])
def test_clients_come_and_go_while_one_redis_is_away(tmp_path: Path, number: int) -> None:
    with World(tmp_path, 3) as world:
        redis = world.redises[number]
        for begin, end in ((redis.kill, redis.start), (redis.freeze, redis.thaw)):
            begin()
            world.clients += connect(world, world.servers[0], 2)
            world.await_total()
            world.clients.pop(1).sock.close()
            world.await_total()
            end()
            world.clients += connect(world, world.servers[1], 1)
            world.await_total()
            with world.exact():
                time.sleep(SOON)


@pytest.mark.fault("A server is killed while one of two Redis is away")
def test_a_server_that_is_killed_while_one_redis_is_away_is_gone_after_its_ttl(
    tmp_path: Path, notes: Notes
) -> None:
    with World(tmp_path, 3) as world:
        first, _ = world.redises
        first.freeze()
        time.sleep(SOON)
        world.servers.pop().kill()
        del world.clients[-1]
        killed_at = time.monotonic()
        world.await_total()
        seconds = time.monotonic() - killed_at
        notes.happened("one was killed while the first Redis was frozen")
        notes.measured("gone after", seconds, "s")
        assert seconds < TTL + SOON + 1
        with world.exact():
            first.thaw()
            time.sleep(TTL)


def test_the_verdict_names_the_redis_that_is_away_or_all(tmp_path: Path) -> None:
    with World(tmp_path, 2) as world:
        server, (first, second) = world.servers[0], world.redises
        assert reasons(server) == set()
        first.freeze()
        until(lambda: reasons(server) == {"engine_away"}, "one is away")
        [reason] = status(server)["reasons"]
        assert f":{world.ways[0][0].port} does not answer" in reason["text"]
        lost = server.wait_for("cluster.lost")
        assert "WHO goes on with another Redis" in lost["message"]
        second.freeze()
        until(lambda: reasons(server) == {"redis_away"}, "both are away")
        lost = server.wait_for("cluster.lost", 2)
        assert "WHO keeps the last known count" in lost["message"]
        first.thaw()
        second.thaw()
        until(lambda: reasons(server) == set(), "both answer again")


def test_each_pair_that_shares_a_redis_counts_the_other(tmp_path: Path) -> None:
    """The first server does not reach the first Redis, the second does not reach the second."""
    with World(tmp_path, 3) as world:
        for number in range(2):
            world.ways[number][number].refuse()
        third = world.clients[2]
        end = time.monotonic() + 3 * TTL
        while time.monotonic() < end:
            assert third.who() == 3
            time.sleep(0.02)
        # The other two share none.
        for server, client in zip(world.servers[:2], world.clients, strict=False):
            assert client.who() == 2
            assert status(server)["cluster"]["age_seconds"] > 2 * TTL, "it may lack a server"
            assert reasons(server) == {"engine_away", "count_old", "server_lost"}
        for number in range(2):
            world.ways[number][number].accept()
        world.await_total()
        until(lambda: reasons(world.servers[0]) == {"server_lost"}, "the verdict is of now")


def test_a_cluster_moves_to_another_redis_by_way_of_both(tmp_path: Path) -> None:
    """Each pair of servers shares one of them all the time."""
    with World(tmp_path, 2) as world:
        old, new = (redis.url for redis in world.redises)
        for url in (old, f"{old} {new}", f"{new} {old}", new):
            for _ in range(2):
                world.start(f"server-{time.monotonic_ns()}", url)
                world.await_total()
                world.servers.pop(0).stop()
                world.clients.pop(0)
                world.await_total()
            with world.exact():
                time.sleep(SOON)


@pytest.mark.fault("Two URLs lead to one Redis")
def test_two_urls_of_one_redis_count_as_one(tmp_path: Path, notes: Notes) -> None:
    """From the start, and after the second one has been repointed."""
    with World(tmp_path, 2) as world:
        first, _ = world.redises
        with world.exact():
            for ways in world.ways:
                ways[1].point_at(first.port)
            time.sleep(2 * TTL)
        new = world.start("new", world.url(0))
        world.await_total()
        until(lambda: "engine_away" in reasons(new), "the second URL counts as away")
        lost = new.wait_for("cluster.lost")
        assert "it is the same Redis as at another URL of --redis-url" in lost["message"]
        assert not any(server.events("server.duplicate_id") for server in world.servers)
        notes.happened("the second URL was repointed to the first Redis, and back")
        for ways in world.ways:
            ways[1].point_at(world.redises[1].port)
        until(lambda: not any(map(reasons, world.servers)), "each uses both again", 4 * TTL)


def test_of_two_servers_that_hold_one_id_at_one_redis_each_one_stays(tmp_path: Path) -> None:
    with World(tmp_path, 1) as world:
        ways = [[world.enter_context(Proxy(redis.port)) for redis in world.redises] for _ in "xy"]
        world.ways += ways
        ways[0][1].refuse()
        ways[1][0].refuse()
        twins = [world.start("twin", world.url(number)) for number in (1, 2)]
        for twin in twins:
            twin.wait_for("cluster.joined")
        ways[0][1].accept()
        ways[1][0].accept()
        until(
            lambda: any(twin.process.poll() is not None for twin in twins), "one of them has ended"
        )
        time.sleep(TTL)
        stayed = [twin for twin in twins if twin.process.poll() is None]
        assert len(stayed) == 1
        [ended] = [twin for twin in twins if twin not in stayed]
        assert ended.process.wait() == 2
        with stayed[0].client() as client:
            until(lambda: client.who() == 3, "it is counted, with its own client and the others")


@pytest.mark.parametrize("is_before", [True, False])
def test_a_new_agent_holds_what_all_redis_have_lost(tmp_path: Path, is_before: bool) -> None:
    """It goes on with the hold of the agent before, or begins it with that one's count."""
    ttl = 4.0
    with World(tmp_path, 3, ttl) as world:
        first, second, third = world.servers

        def lose_data() -> None:
            for redis in world.redises:
                redis.wipe()
            second.wait_for("cluster.reset", 2)

        time.sleep(SOON)  # Until both Redis have told the counts.
        with stopped(*third.processes()):
            if is_before:
                lose_data()
                first.wait_for("cluster.reset", 2)
                first.send_signal(signal.SIGHUP)
                first.wait_for("agent.ready", 2)
            else:
                [agent] = first.agents()
                with stopped(agent):
                    lose_data()
                    agent.kill()
                first.wait_for("agent.ready", 2)
            assert status(first)["cluster"]["is_held"]
            assert {world.clients[0].who() for _ in range(20)} == {3}
            until(lambda: world.clients[0].who() == 2, "the hold ends", 2 * ttl * PATIENCE)
        world.await_total()


def test_a_new_agent_holds_who_has_not_reported_since_it_was_started(tmp_path: Path) -> None:
    with World(tmp_path, 3, ttl=6.0) as world:
        first, second, third = world.servers
        time.sleep(SOON)  # Until both Redis have told the counts.
        with stopped(*third.processes()):
            first.send_signal(signal.SIGHUP)
            first.wait_for("agent.ready", 2)
            time.sleep(SOON)  # It has had replies of both.
            for redis in world.redises:
                redis.wipe()
            for server in first, second:
                server.wait_for("cluster.reset", 2)
            time.sleep(SOON)
            assert {world.clients[0].who() for _ in range(20)} == {3}
        world.await_total()


class Crowd:
    """Servers that only report to every Redis, all of them one client each."""

    def __init__(self, redises: list[Redis], servers: int) -> None:
        self._servers = servers
        self._links = [RedisLink(Config(redis_url=redis.url)) for redis in redises]
        self._acked: dict[tuple[int, int], tuple[int, int]] = {}
        self._is_over = threading.Event()
        self._may_report = threading.Lock()
        self._threads = [
            threading.Thread(target=self._report, args=(number,)) for number in range(len(redises))
        ]

    def __enter__(self) -> "Crowd":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()
        for link in self._links:
            link.drop()

    @contextmanager
    def silent(self) -> Iterator[None]:
        """They do not report."""
        with self._may_report:
            yield

    def _report(self, engine: int) -> None:
        while not self._is_over.is_set():
            for server in range(self._servers):
                with self._may_report:
                    self._heartbeat(engine, server)
            self._is_over.wait(0.05)

    def _heartbeat(self, engine: int, server: int) -> None:
        acked, clock = self._acked.get((engine, server), (0, 0))
        sequence = time.monotonic_ns() // 1000
        own = Heartbeat(f"crowd-{server}", f"{server:x}.{engine}", sequence, 1, 2000, 200)
        own = own._replace(acked_sequence=acked, last_clock=clock)
        reply = self._links[engine].send(own)
        if reply.is_late:
            reply = self._links[engine].send(own._replace(told_clock=reply.clock))
        self._acked[engine, server] = sequence, reply.clock


def test_a_cluster_too_large_for_lists_holds_the_best_total(tmp_path: Path) -> None:
    with World(tmp_path, 2) as world:
        [client, _] = world.clients
        with Crowd(world.redises, MAX_LISTED) as crowd:
            until(lambda: client.who() == MAX_LISTED + 2, "all are counted")
            time.sleep(SOON)
            with crowd.silent():
                for redis in world.redises:
                    redis.wipe()
                for server in world.servers:
                    server.wait_for("cluster.reset", 2)
                time.sleep(INTERVAL)
                assert world.replies() == {MAX_LISTED + 2}
            time.sleep(SOON)
            assert world.replies() == {MAX_LISTED + 2}
        world.await_total()
