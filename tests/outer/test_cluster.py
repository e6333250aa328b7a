"""A cluster of real servers with a real Redis: WHO across servers, and during faults."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from lab.admin import status
from lab.clusters import (
    FAST,
    INTERVAL,
    TTL,
    all_report,
    cluster,
    connect,
    servers_known,
    started,
    watching,
)
from lab.redises import Proxy, Redis, free_port
from lab.rows import Notes
from lab.running import LIMIT, PATIENCE, Event, Running, until

#: Seconds until a change reaches the other servers, with the default interval of 0.5 s.
SEEN = 0.7 * PATIENCE
NO_COUNT = b"ERR cluster unavailable"


@pytest.fixture(scope="module")
def three(redis: Redis) -> Iterator[list[Running]]:
    """Three servers with default times; the tests leave them running and without clients."""
    with cluster(redis.url, "three", *[["--workers", "2"]] * 3) as servers:
        yield servers


class IdleAgents:
    """The agents of servers without clients, and their CPU time at the start."""

    def __init__(self, servers: list[Running]) -> None:
        self._agents = [agent for server in servers for agent in server.agents()]
        self.before = self.cpu_seconds()
        self.began = time.monotonic()

    def cpu_seconds(self) -> list[float]:
        return [sum(agent.cpu_times()[:2]) for agent in self._agents]


@pytest.fixture(scope="module", autouse=True)
def idle_agents(redis: Redis) -> Iterator[IdleAgents]:
    """A cluster with default times that stays idle while the tests run."""
    with cluster(redis.url, "resting", [], []) as servers:
        yield IdleAgents(servers)


# The count.


def test_who_is_the_total_on_every_server_and_counts_its_own_clients_at_once(
    three: list[Running],
) -> None:
    with ExitStack() as stack:
        for count, server in enumerate(three):
            connect(stack, server, count)
        with watching(*three, total=6):
            assert three[0].who() == 7
            assert three[2].who() in (7, 8), "this client, and perhaps still the previous one"


def test_a_change_reaches_all_servers_within_a_heartbeat_and_stays_exact(
    three: list[Running],
) -> None:
    changing, *others = three
    with watching(*others, total=2) as watches, ExitStack() as stack:
        moments = []
        for number in range(64):
            time.sleep(0.05 + 0.1 * (number * 0.618 % 1))  # All phases of an interval.
            connect(stack, changing, 1)
            moments.append(time.monotonic())
        all_report(watches, 66)
        came = [w.until(since=at, at_least=n) for w in watches for n, at in enumerate(moments, 3)]
        assert sorted(came)[int(len(came) * 0.99)] <= SEEN, came
        left = time.monotonic()
        stack.close()
        all_report(watches, 2)
        gone = [watch.until(since=left, at_most=2) for watch in watches]
        assert max(gone) <= SEEN, gone
        connect(stack, changing, 5)
        connect(stack, others[0], 5)
        quiet = time.monotonic() + 2 * PATIENCE
        until(lambda: time.monotonic() > quiet + 0.3, "some replies after the quiet period")
        assert [watch.replies(since=quiet) for watch in watches] == [{12}, {12}]
        assert changing.who() == 13


# Faults within a server.


def test_each_server_has_one_id_that_outlives_its_workers_its_agent_and_a_reload(
    three: list[Running],
) -> None:
    def where() -> list[bytes]:
        answers = []
        for server in three:
            with server.client() as client:
                answers.append(client.ask(b"WHERE"))
        return answers

    before, server = where(), three[0]
    assert len(set(before)) == 3
    for victims, role in (server.workers(), "worker"), (server.agents(), "agent"):
        starts = len(server.events(f"{role}.ready"))
        victims[0].kill()
        server.wait_for(f"{role}.ready", starts + 1)
        assert where() == before
    reloads, agents = len(server.events("server.reloaded")), len(server.events("agent.ready"))
    server.send_signal(signal.SIGHUP)
    server.wait_for("server.reloaded", reloads + 1)
    server.wait_for("agent.ready", agents + 1)
    assert where() == before


def test_clients_that_die_with_their_worker_are_not_counted_elsewhere(three: list[Running]) -> None:
    server, *others = three
    with ExitStack() as stack, watching(*others, total=2) as watches:
        connect(stack, server, 20)
        all_report(watches, 22)
        deaths, starts, left = (
            len(server.events("worker.died")),
            len(server.events("worker.ready")),
            20,
        )
        for number, worker in enumerate(server.workers(), 1):
            worker.kill()
            left -= server.wait_for("worker.died", deaths + number)["gserver.lost"]
            all_report(watches, 2 + left)
            server.wait_for("worker.ready", starts + number)
        assert left == 0


@pytest.mark.fault("An agent dies or hangs")
def test_an_agent_that_dies_or_hangs_is_replaced_and_no_server_sees_a_dip(
    three: list[Running], notes: Notes
) -> None:
    server = three[0]
    with ExitStack() as stack:
        connect(stack, server, 3)
        with watching(*three, total=6) as watches:
            changes = [len(other.events("cluster.servers")) for other in three]
            ready, hung = len(server.events("agent.ready")), len(server.events("agent.hung"))
            server.agents()[0].kill()
            server.wait_for("agent.ready", ready + 1)
            server.agents()[0].suspend()
            suspended = time.monotonic()
            server.wait_for("agent.hung", hung + 1)
            server.wait_for("agent.ready", ready + 2)
            until(
                lambda: time.monotonic() > suspended + 6,
                "the leases of both agents would have ended",
            )
            assert [watch.replies() for watch in watches] == [{6}] * 3
            assert max(watch.longest_silence for watch in watches) < PATIENCE, (
                "workers do not wait for their agent"
            )
            assert [len(other.events("cluster.servers")) for other in three] == changes
            assert not any(other.events("cluster.expired") for other in three)
    notes.happened("killed, then stopped")


def test_a_reload_does_not_leave_the_cluster(redis: Redis, three: list[Running]) -> None:
    server, *others = three
    with server.client() as client:
        where = client.ask(b"WHERE").decode()
    with watching(*others, total=2) as watches:
        changes = [len(other.events("cluster.servers")) for other in three]
        reloads, agents = len(server.events("server.reloaded")), len(server.events("agent.ready"))
        server.send_signal(signal.SIGHUP)

        def is_over() -> bool:
            assert where in redis.members("three")
            return (
                len(server.events("server.reloaded")) > reloads
                and len(server.events("agent.ready")) > agents
            )

        until(is_over, "all processes have been replaced")
        assert [watch.replies() for watch in watches] == [{2}, {2}]
        assert server.who() == 3, "the new workers know the other servers"
        assert [len(other.events("cluster.servers")) for other in three] == changes


# Servers that end.


def test_the_others_log_which_server_has_come_left_or_was_lost(redis: Redis) -> None:
    def options(name: str) -> list[str]:
        return [*FAST, "--server-id", name, "--admin-port", "0"]

    def described(server: Running) -> list[dict[str, Any]]:
        names = ("servers", "joined", "left", "lost")
        return [
            {name: event[f"gserver.{name}"] for name in names if f"gserver.{name}" in event}
            for event in server.events("cluster.servers")
        ]

    with cluster(redis.url, "named", options("a"), options("b"), options("c")) as servers:
        first, second, third = servers
        before = len(described(first))
        assert second.stop() == 0
        until(lambda: len(described(first)) > before, "b has left")
        third.kill()
        until(lambda: len(described(first)) > before + 1, "c is lost")
        with Running("--redis-url", redis.url, "--cluster-name", "named", *options("d")):
            until(lambda: len(described(first)) > before + 2, "d has come")
        assert described(first)[before : before + 3] == [
            {"servers": 2, "left": "b"},
            {"servers": 1, "lost": "c"},
            {"servers": 2, "joined": "d"},
        ]
        [lost] = first.events("cluster.server_lost")
        assert lost["gserver.server"] == "c"
        document = status(first)
        assert document["verdict"] == "degraded"
        assert "server c was lost" in str(document["reasons"])
        assert "cluster.server_lost" in {event["action"] for event in document["events"]}


def test_a_server_that_dies_after_a_reload_is_named_too(redis: Redis) -> None:
    with cluster(redis.url, "reloaded", FAST, [*FAST, "--server-id", "b"]) as (first, second):
        first.send_signal(signal.SIGHUP)
        first.wait_for("agent.ready", 2)
        until(lambda: len(first.workers()) == 1, "the old worker has ended")
        second.kill()
        assert first.wait_for("cluster.server_lost")["gserver.server"] == "b"


@pytest.mark.fault("A server dies")
def test_a_killed_server_is_counted_for_its_ttl_and_no_longer(redis: Redis, notes: Notes) -> None:
    with cluster(redis.url, "killed", FAST, FAST, FAST) as (server, *others), ExitStack() as stack:
        connect(stack, server, 3)
        with watching(*others, total=5) as watches:
            now = time.monotonic()
            until(lambda: time.monotonic() > now + TTL / 2, "the lease has its full length")
            killed = time.monotonic()
            os.kill(server.pid, signal.SIGKILL)
            all_report(watches, 2)
            gone = [watch.until(since=killed, at_most=4) for watch in watches]
            assert all(TTL - INTERVAL <= seconds <= TTL + PATIENCE for seconds in gone), gone
            assert [watch.replies() for watch in watches] == [{5, 2}, {5, 2}]
    notes.happened("killed with kill -9")


def test_a_stopped_server_leaves_at_exit_and_counts_again_when_it_returns(redis: Redis) -> None:
    ttl = 2.5
    theirs = [["--server-id", name, "--member-ttl", str(ttl)] for name in ("stopping", "staying")]
    with cluster(redis.url, "stopped", *theirs) as (server, other), ExitStack() as stack:
        connect(stack, server, 3)
        with watching(other, total=4) as watches:
            assert server.stop() == 0
            exited = time.monotonic()
            until(
                lambda: servers_known(other) == 1 and watches[0].last == 1,
                "the server is dropped",
                SEEN,
            )
            while time.monotonic() < exited + ttl:
                assert set(redis.members("stopped")) == {"staying"}, (
                    "a late heartbeat has brought the server back"
                )
                time.sleep(0.01)
            assert not server.events("cluster.not_left")
            with (
                Running("--redis-url", redis.url, "--cluster-name", "stopped", *theirs[0]) as back,
                back.client(),
            ):
                connected = time.monotonic()
                all_report(watches, 2)
                assert watches[0].until(since=connected, at_least=2) <= SEEN


# Redis away.


def test_each_policy_replies_as_documented_while_redis_is_away(tmp_path: Path) -> None:
    age = 2.0
    policies = {"last-known": b"6", "local": b"1", "error": NO_COUNT}
    options = [
        [*FAST, "--cluster-max-age", str(age), "--on-cluster-loss", policy] for policy in policies
    ]
    with (
        Redis(tmp_path) as redis,
        cluster(redis.url, "loss", *options, FAST) as (*servers, other),
        ExitStack() as stack,
    ):
        connect(stack, other, 3)
        with watching(*servers, total=6) as watches:
            away = time.monotonic()
            redis.kill()
            until(
                lambda: time.monotonic() > away + age + 0.5 + PATIENCE,
                "the last known count is too old",
            )
            for watch, reply in zip(watches, policies.values(), strict=True):
                fresh = [said for at, said in watch.seen if away < at < away + age - 3 * INTERVAL]
                stale = [said for at, said in watch.seen if at > away + age + 0.5]
                assert fresh
                assert set(fresh) == {b"6"}, "the last known number is kept for a while"
                assert set(stale) == {reply}
            failing = stack.enter_context(servers[2].client())
            expected = [policies["error"], b"42", policies["error"]]
            assert [failing.ask(word) for word in (b"WHO", b"WHY", b"WHO")] == expected
            assert len(failing.ask(b"WHERE")) == 36
            redis.restart(keep_data=False)
            until(
                lambda: {watch.seen[-1][1] for watch in watches} == {b"7"},
                "the count is exact again",
            )
            assert failing.who() == 7


@pytest.mark.parametrize(
    ("policy", "reply"), [("last-known", b"1"), ("local", b"1"), ("error", NO_COUNT)]
)
def test_a_server_that_redis_has_never_answered_does_not_know_the_others(
    policy: str, reply: bytes
) -> None:
    """However long a count may be used: this one would be as old as the machine's clock."""
    options = ["--redis-url", f"redis://127.0.0.1:{free_port()}", "--on-cluster-loss", policy]
    with Running(*options, "--cluster-max-age", "900000000") as server, server.client() as client:
        assert client.ask(b"WHO") == reply


def test_events_of_the_cluster_are_logged(tmp_path: Path) -> None:
    def logged(server: Running, action: str, count: int = 1) -> Event:
        event = server.wait_for(action, count)
        assert event["log.level"] == (
            "info"
            if action in ("cluster.joined", "cluster.regained", "cluster.servers")
            else "warning"
        )
        return event

    with Redis(tmp_path) as redis, Proxy(redis.port) as proxy, ExitStack() as stack:
        urls = [["--redis-url", redis.url_at(port), *FAST] for port in (proxy.port, redis.port)]
        cut, other = stack.enter_context(started(*urls))
        connect(stack, other, 2)
        assert logged(cut, "cluster.joined")["gserver.servers"] in (1, 2)
        until(
            lambda: [servers_known(cut), servers_known(other)] == [2, 2],
            "the servers know each other",
        )
        assert logged(cut, "cluster.servers")["gserver.remote_clients"] in (0, 2)
        proxy.refuse()
        lost = logged(cut, "cluster.lost")
        assert (lost["gserver.kind"], lost["error.type"]) == ("connection", "ConnectionError")
        assert lost["error.message"]
        until(lambda: servers_known(other) == 1, "the server is dropped after its TTL")
        assert len(cut.events("cluster.lost")) == 1, "the loss of Redis is logged once"
        proxy.is_dropping = True
        proxy.accept()
        assert logged(cut, "cluster.lost", 2)["gserver.kind"] == "timeout"
        proxy.is_dropping = False
        logged(cut, "cluster.regained")
        logged(cut, "cluster.expired")
        until(
            lambda: [servers_known(cut), servers_known(other)] == [2, 2],
            "the cluster has recovered",
        )
        with watching(cut, other, total=4) as watches:
            redis.wipe()
            logged(cut, "cluster.reset")
            logged(other, "cluster.reset")
            until(lambda: len(redis.members()) == 2, "both servers have reported since")
            assert [watch.replies() for watch in watches] == [{4}, {4}]
        counts = {
            action: len(cut.events(f"cluster.{action}"))
            for action in ("joined", "lost", "regained", "expired")
        }
        assert counts == {"joined": 1, "lost": 2, "regained": 1, "expired": 1}


# Cost and metrics.


def test_metrics_of_the_cluster_arrive_at_statsd(tmp_path: Path) -> None:
    sent: dict[str, list[float]] = {}
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        Redis(tmp_path) as redis,
        ExitStack() as stack,
    ):
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(LIMIT)
        metrics = [*FAST, "--statsd-host", "127.0.0.1", "--statsd-port", str(sock.getsockname()[1])]
        _, other = stack.enter_context(cluster(redis.url, "metrics", metrics, FAST))
        connect(stack, other, 2)

        def last(name: str) -> float:
            """Return the last value of a metric, after the next datagram."""
            for line in sock.recv(65536).decode().splitlines():
                metric, _, value = line.partition(":")
                number, _, kind = value.partition("|")
                sent.setdefault(f"{metric.removeprefix('gserver.cluster.')}|{kind}", []).append(
                    float(number)
                )
            return sent.get(name, [-1.0])[-1]

        until(lambda: last("clients|g") == 2, f"clients: {sent}")
        until(lambda: last("servers|g") == 2, f"servers: {sent}")
        assert 0 <= sent["age_ms|g"][-1] < 1000 * PATIENCE
        assert sum(sent["heartbeats|c"]) >= 2
        assert 0 < sent["heartbeat_time|ms"][-1] < 1000 * PATIENCE
        assert not any("heartbeat_errors" in name for name in sent)
        redis.kill()
        until(lambda: last("heartbeat_errors.connection|c") >= 1, f"errors: {sent}")
        until(lambda: last("age_ms|g") >= 1500, f"a growing age: {sent}")
        assert last("clients|g") == 2


def test_the_agent_of_an_idle_server_uses_almost_no_cpu(idle_agents: IdleAgents) -> None:
    until(lambda: time.monotonic() > idle_agents.began + 10, "the measurement is complete")
    seconds = time.monotonic() - idle_agents.began
    used = [
        after - before
        for after, before in zip(idle_agents.cpu_seconds(), idle_agents.before, strict=True)
    ]
    assert len(used) == 2
    assert max(used) / seconds < 0.02, used
