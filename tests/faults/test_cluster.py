"""Faults of servers in a cluster; clients of the other servers do not notice."""

import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from operator import le
from pathlib import Path

import pytest
from redis import Redis as Client

from lab.redises import Redis
from lab.rows import PLAIN, Notes, Variant, row
from lab.running import LIMIT, PATIENCE, Running, argv, environment, stopped, until
from lab.steady import Cluster, SteadyServer

INTERVAL, TTL = 0.2, 2.0
MEMBERS = "{gserver:gserver}:members"


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    with Redis(tmp_path) as running:
        yield running


@pytest.fixture
def ttl() -> float:
    return TTL


@pytest.fixture
def cluster(redis: Redis, variant: Variant, ttl: float) -> Iterator[Cluster]:
    """Three servers of the test's variant."""
    with Cluster(redis.url, INTERVAL, ttl, {"WEB_CONCURRENCY": str(variant.workers)}) as running:
        yield running


@row("A server is paused for longer than its TTL", *PLAIN)
def test_a_paused_server_is_dropped_and_comes_back(cluster: Cluster, notes: Notes) -> None:
    paused, *others = cluster.members
    expired, descriptors = cluster.events("cluster.expired"), cluster.descriptors()
    for member in others:
        member.watcher.allow(10, 5)
    before = cluster.processes()
    # The supervisor is resumed last: it would take processes that have not run yet for hung.
    with stopped(*reversed(paused.server.processes())):
        for member in others:
            until(partial(member.watcher.says, 5), "the server is dropped", TTL + LIMIT)
            member.watcher.allow(5)
        cluster.watch(TTL)
        for member in others:
            member.watcher.allow(5, 10)
    cluster.settle()
    cluster.check()
    assert cluster.events("cluster.expired") == [expired[0] + 1, *expired[1:]]
    assert cluster.processes() == before, "no process was replaced"
    # There may have been one more before: a connection that was being replaced.
    until(lambda: all(map(le, cluster.descriptors(), descriptors)), "no descriptor is left behind")
    notes.happened("the others dropped it, and it logged this when it returned")


@row("Agents are killed just after a heartbeat", *PLAIN)
@pytest.mark.parametrize("ttl", [10], ids=[""])
def test_agents_killed_at_the_worst_time(cluster: Cluster, redis: Redis, notes: Notes) -> None:
    """Redis has run the heartbeat, and its reply is lost. The next agent starts within the TTL."""
    descriptors = cluster.descriptors()
    for number in range(3):
        for member in cluster.members:
            member.bad = "worker.died", "hung", "not_started"
            (agent,) = member.server.agents()
            own_id = member.clients[0].ask(b"WHERE").decode()

            def entry(own_id: str = own_id) -> str:
                return str(redis.command("HGET", MEMBERS, own_id))

            def has_reported(before: str = entry()) -> bool:
                return entry() != before

            until(has_reported, "a heartbeat is sent")
            agent.kill()
            member.server.wait_for("agent.ready", number + 2)
    cluster.settle()
    cluster.check()
    until(
        lambda: cluster.descriptors() == descriptors, "the number of open descriptors is as before"
    )
    notes.happened(f"agents that died: {cluster.events('agent.died')}")
    assert cluster.events("agent.died") == [3, 3, 3]


@row("All servers are restarted at once", *PLAIN, quick=None)
def test_all_servers_restarted_at_once(redis: Redis, variant: Variant, notes: Notes) -> None:
    """By kill -9, twice, with fixed ids: the new servers replace the old ones in the count."""
    shares = {"one": 5, "two": 3, "three": 2}
    for life in range(3):
        with Cluster(redis.url, INTERVAL, TTL, shares=()) as cluster, ExitStack() as stack:
            options = *cluster.options, "--workers", str(variant.workers), "--server-id"
            with ThreadPoolExecutor() as pool:
                starts = [
                    pool.submit(SteadyServer, share, *options, one) for one, share in shares.items()
                ]
                cluster.members += [stack.enter_context(start.result()) for start in starts]
            until(lambda: cluster.all_report(10), "all servers report the total")
            cluster.allow(10)
            cluster.watch(TTL)
            cluster.check()
            notes.happened(f"life {life}: {redis.members()}")
            assert redis.members() == shares


@row("Servers of one cluster have different intervals and TTLs", *PLAIN, quick=None)
def test_mixed_intervals_and_ttls(redis: Redis, variant: Variant, notes: Notes) -> None:
    """As during a rolling change. Each server's lease has its own length."""
    times = (0.2, 2.0), (0.5, 5.0), (1.0, 10.0)
    with Cluster(redis.url, 1.0, 10.0, shares=()) as cluster, ExitStack() as stack:
        for (interval, ttl), share in zip(times, (5, 3, 2), strict=True):
            options = (
                "--redis-url",
                redis.url,
                *argv(f"--heartbeat-interval {interval} --member-ttl {ttl}"),
            )
            member = SteadyServer(share, *options, "--workers", str(variant.workers))
            cluster.members.append(stack.enter_context(member))
        until(lambda: cluster.all_report(10), "all servers report the total")
        cluster.allow(10)
        for fault in (redis.wipe, redis.freeze):
            with cluster.expecting("cluster.reset" if fault == redis.wipe else "cluster.lost"):
                fault()
            cluster.watch(12 if fault == redis.freeze else 5)
        redis.thaw()
        cluster.settle(15 * PATIENCE)
        cluster.check()
        notes.happened("Redis was wiped, then frozen for longer than any TTL")


AGENT = """
from gevent import monkey
monkey.patch_all()
import sys
from gserver.scoreboard import Scoreboard
from gserver.cluster.engines import Engines
from gserver.config import Config
Engines(Config(redis_url=sys.argv[1], server_id=sys.argv[2]), Scoreboard.create(1)).run()
"""
CROWD = 50


@pytest.mark.fault("50 servers return to Redis at once")
@pytest.mark.long
def test_50_servers_reconnect_to_redis_at_once(redis: Redis, notes: Notes) -> None:
    """The heartbeat greenlets of 50 servers, each in a process of its own, without workers."""
    with ExitStack() as stack:
        for number in range(CROWD):
            words = [sys.executable, "-P", "-c", AGENT, redis.url, f"server-{number}"]
            agent = subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL)
            stack.enter_context(agent)
            stack.callback(agent.kill)
        until(lambda: len(redis.members()) == CROWD, "all servers report", 4 * LIMIT)
        redis.kill()
        time.sleep(5)
        redis.restart(keep_data=False)
        began, counts = time.monotonic(), [0]
        with Client(port=redis.port) as client:
            while time.monotonic() < began + 5:
                stats = client.info("commandstats")
                counts.append(
                    sum(
                        stats.get(f"cmdstat_{name}", {}).get("calls", 0)
                        for name in ("eval", "evalsha")
                    )
                )
                time.sleep(0.1)
            connections = client.info("stats")["total_connections_received"]
        assert len(redis.members()) == CROWD
        peak = max(after - before for before, after in itertools.pairwise(counts))
        notes.happened(f"{connections} connections since the restart, {counts[-1]} heartbeats")
        notes.measured("heartbeats in 0.1 s at most", peak, "")
        notes.measured(
            "all back after", 0.1 * next(n for n, count in enumerate(counts) if count >= CROWD), "s"
        )
        assert connections < 2 * CROWD, "each server connects about once"
        assert peak <= 2 * CROWD


@row("A paused server's id is taken, and it wakes", *PLAIN, quick=None)
def test_a_server_taken_for_dead_comes_back(redis: Redis, variant: Variant, notes: Notes) -> None:
    """The server was only paused. Another has taken its id, so it drains and is not counted."""
    env = {"WEB_CONCURRENCY": str(variant.workers)}
    with Cluster(redis.url, INTERVAL, TTL, env, shares=(5,)) as cluster, ExitStack() as stack:
        options = *cluster.options, "--server-id", "one"
        cluster.allow(*range(20))
        paused = stack.enter_context(Running(*options, env=env))
        until(lambda: len(redis.members()) == 2, "the server is a member")
        client = stack.enter_context(paused.client())
        assert client.who() > 0
        with stopped(*paused.processes()):
            another = stack.enter_context(Running(*options, env=env))
            assert another.who() >= 1
        assert paused.exit_code() == 2
        assert client.rest() == b"", "the client is closed cleanly"
        assert "another live server" in paused.stderr
        until(
            lambda: redis.members()["one"] == 0 and cluster.all_report(5),
            "the server that stays is counted correctly",
        )
        notes.happened(paused.stderr)
        cluster.check()
