"""A name or an address that leads to another Redis, and a Redis that stalls again and again."""

import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from gserver.cluster.membership import Heartbeat
from gserver.cluster.redis_link import RedisLink
from gserver.config import Config
from lab.admin import status
from lab.clusters import FAST, INTERVAL, TTL, cluster, connect, started
from lab.redises import Proxy, Redis, free_port
from lab.rows import Notes
from lab.running import LIMIT, argv, until


@pytest.mark.fault("The address of Redis leads to another one, while the old one lives")
def test_servers_follow_an_address_that_leads_to_another_redis(
    tmp_path: Path, notes: Notes
) -> None:
    """As the name, or the virtual address, of a Redis that was replaced."""
    with ExitStack() as stack:
        old, new = (stack.enter_context(Redis(tmp_path)) for _ in range(2))
        proxy = stack.enter_context(Proxy(old.port))
        url = old.url_at(proxy.port)
        options = [[*FAST, "--server-id", name] for name in ("one", "two")]
        one, two = stack.enter_context(cluster(url, "gserver", *options))
        clients = [*connect(stack, one, 1), *connect(stack, two, 10)]
        until(lambda: {client.who() for client in clients} == {11}, "both servers count all")
        proxy.point_at(new.port)
        moved_at = time.monotonic()
        # A server that starts now reaches only the new one.
        [three] = stack.enter_context(started([*FAST, "--redis-url", url, "--server-id", "three"]))
        clients += connect(stack, three, 20)
        until(lambda: {client.who() for client in clients} == {31}, "all servers count all")
        notes.happened("new connections reached another Redis, which a new server had joined")
        notes.measured("exact after", time.monotonic() - moved_at, "s")
        for server in (one, two):
            server.wait_for("cluster.moved")
            assert not server.events("cluster.lost"), "the old connection served until then"
        assert set(new.members()) == {"one", "two", "three"}


@pytest.mark.parametrize("other", ["nobody", "a replica"])
def test_a_connection_that_cannot_be_replaced_stays(other: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        redis, replica = (stack.enter_context(Redis(tmp_path)) for _ in range(2))
        replica.read_only()
        proxy = stack.enter_context(Proxy(redis.port))
        [server] = stack.enter_context(started([*FAST, "--redis-url", redis.url_at(proxy.port)]))
        server.wait_for("cluster.joined")
        proxy.point_at(replica.port if other == "a replica" else free_port())
        before = redis.command("INFO", "stats")["total_commands_processed"]
        time.sleep(3 * TTL)
        assert redis.command("INFO", "stats")["total_commands_processed"] > before + TTL / INTERVAL
        assert not server.events("cluster.lost")
        assert server.events("cluster.not_renewed")


@pytest.mark.fault("Redis stalls again and again, and a server is killed")
def test_the_age_of_the_count_grows_while_a_stalling_redis_keeps_a_dead_server(
    tmp_path: Path, notes: Notes
) -> None:
    """Each stall moves the lease clock by one interval, however long it is."""
    max_age = 2 * TTL
    options = [*FAST, *argv(f"--on-cluster-loss error --cluster-max-age {max_age} --admin-port 0")]
    with ExitStack() as stack:
        redis = stack.enter_context(Redis(tmp_path))
        servers = [[*options, "--server-id", name] for name in ("one", "two", "dead")]
        one, two, dead = stack.enter_context(cluster(redis.url, "gserver", *servers))
        [client] = connect(stack, one, 1)
        connect(stack, two, 10)
        connect(stack, dead, 20)
        until(lambda: client.ask(b"WHO") == b"31", "all are counted")
        dead.kill()
        killed_at = time.monotonic()
        counted: list[float] = []
        refused: list[float] = []
        while (reply := client.ask(b"WHO")) != b"11":
            seconds = time.monotonic() - killed_at
            (counted if reply == b"31" else refused).append(seconds)
            assert reply in {b"31", b"ERR cluster unavailable"}
            age = status(one)["cluster"]["age_seconds"]
            assert age > seconds - 2 * INTERVAL or client.ask(b"WHO") == b"11"
            redis.freeze()
            time.sleep(1.0)
            redis.thaw()
            time.sleep(0.1)
            assert seconds < LIMIT
        assert counted
        assert refused, "the count was too old for a while"
        assert counted[-1] <= max_age
        notes.happened(f"{len(counted) + len(refused)} stalls of 1 s, with 0.1 s between them")
        notes.measured("dead server counted for", time.monotonic() - killed_at, "s")


def test_a_node_of_a_redis_cluster_that_does_not_have_the_keys_is_followed(tmp_path: Path) -> None:
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(Redis(tmp_path, cluster_enabled="yes", cluster_port=free_port()))
            for _ in range(2)
        ]
        keeper, other = nodes
        keeper.command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        bus = keeper.command("CONFIG GET", "cluster-port")["cluster-port"]
        other.command("CLUSTER MEET", "127.0.0.1", keeper.port, bus)
        until(
            lambda: all("state:ok" in repr(node.command("CLUSTER", "INFO")) for node in nodes),
            "both nodes know who has the slots",
        )
        link = RedisLink(Config(redis_url=other.url))
        for sequence in (1, 2):
            reply = link.send(Heartbeat("one", "a1", sequence, 5, 5000, 500))
            assert (reply.total_clients, reply.servers) == (5, 1)
        link.drop()
        assert keeper.members() == {"one": 5}
