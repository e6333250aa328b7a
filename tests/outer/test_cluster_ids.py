"""Server ids and joining a cluster: duplicate ids, starts without Redis, options, secrets, TLS."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import psutil
import pytest

from gserver.cluster.membership import Heartbeat
from gserver.cluster.redis_link import RedisLink
from gserver.config import Config
from lab.clusters import FAST, all_report, cluster, connect, servers_known, started, watching
from lab.redises import Redis, free_port
from lab.rows import Notes
from lab.running import LIMIT, PATIENCE, ROOT, Running, environment, error_line, gserver, until

#: Seconds that a start may take longer while Redis is away.
START = 2.5 * PATIENCE
SECRET = "open-sesame"


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    """A Redis that requires a password."""
    with Redis(tmp_path_factory.mktemp("locked"), requirepass=SECRET) as running:
        yield running


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    with Redis(tmp_path_factory.mktemp("encrypted"), is_tls=True) as running:
        yield running


def in_cluster(redis: Redis, name: str, *options: str) -> list[str]:
    return ["--redis-url", redis.url, "--cluster-name", name, *options]


def only_line(stderr: str) -> str:
    assert re.fullmatch("gserver: [^\n]+\n", stderr), stderr
    return stderr


def usual_start() -> float:
    """Return the current duration of a start on this machine, in seconds."""
    began = time.monotonic()
    with Running():
        return time.monotonic() - began


# Duplicate ids.


@pytest.mark.fault("Two servers with one id")
def test_a_second_server_with_a_live_id_is_refused_and_the_first_stays(
    redis: Redis, notes: Notes
) -> None:
    with (
        cluster(redis.url, "duplicates", [*FAST, "--server-id", "one"], FAST) as (first, other),
        ExitStack() as stack,
    ):
        connect(stack, first, 2)
        with watching(first, other, total=4) as watches:
            duplicate = stack.enter_context(
                Running(
                    *in_cluster(redis, "duplicates", *FAST, "--server-id", "one", "--workers", "2"),
                    wait=False,
                )
            )
            assert duplicate.exit_code() == 2
            assert "another live server of cluster duplicates has the id one" in only_line(
                duplicate.stderr
            )
            assert not duplicate.events("server.listening"), "the duplicate never serves"
            assert [watch.replies() for watch in watches] == [{4}, {4}]
            assert redis.members("duplicates")["one"] == 3
        assert first.process.poll() is None
        assert not [event for event in first.events() if event["log.level"] in ("warning", "error")]
    notes.happened("the second server was refused")


def test_servers_with_one_id_in_clusters_of_different_names_do_not_conflict(redis: Redis) -> None:
    options = [in_cluster(redis, name, *FAST, "--server-id", "one") for name in ("red", "blue")]
    with started(*options) as servers, ExitStack() as stack:
        for count, server in enumerate(servers, 1):
            connect(stack, server, count)
            server.wait_for("cluster.joined")
        with watching(servers[0], total=2) as red, watching(servers[1], total=3) as blue:
            until(
                lambda: [redis.members("red"), redis.members("blue")] == [{"one": 2}, {"one": 3}],
                "all clients are reported",
            )
            for watch in (*red, *blue):
                watch.seen.clear()
            now = time.monotonic()
            until(lambda: time.monotonic() > now + 1, "both send some heartbeats")
            assert [red[0].replies(), blue[0].replies()] == [{2}, {3}]
        assert [servers_known(server) for server in servers] == [1, 1]


@pytest.mark.fault("A server dies and restarts with its id")
def test_a_server_that_died_can_start_again_with_its_id_long_before_its_ttl_ends(
    redis: Redis, notes: Notes
) -> None:
    ttl, usual = ["--member-ttl", "10"], usual_start()
    options = [*ttl, "--server-id", "phoenix"]
    with cluster(redis.url, "phoenix", options, ttl) as (dead, other), ExitStack() as stack:
        connect(stack, dead, 3)
        with watching(other, total=4) as watches:
            os.kill(dead.pid, signal.SIGKILL)
            killed = time.monotonic()
            with Running(*in_cluster(redis, "phoenix", *options)) as back, back.client() as client:
                assert client.ask(b"WHERE") == b"phoenix"
                assert time.monotonic() - killed <= 2 * usual + 2 * PATIENCE
                all_report(watches, 2)
                assert time.monotonic() - killed <= 5 * PATIENCE, (
                    "long before the lease of the dead server ends"
                )
                until(lambda: client.who() == 2, "the dead server is not counted either", PATIENCE)
    notes.happened("killed with kill -9")


@pytest.mark.fault("Two servers with one id, started without Redis")
def test_of_two_servers_with_one_id_that_started_without_redis_one_drains(
    tmp_path: Path, notes: Notes
) -> None:
    with Redis(tmp_path) as redis, ExitStack() as stack:
        redis.kill()
        duplicate = in_cluster(redis, "duplicates", *FAST, "--server-id", "one")
        pair = stack.enter_context(started(duplicate, duplicate))
        for server in pair:
            assert server.wait_for("cluster.lost")["gserver.kind"] == "connection"
            assert server.who() == 1
        clients = [connect(stack, server, 1)[0] for server in pair]
        redis.restart(keep_data=False)
        until(
            lambda: any(server.process.poll() is not None for server in pair),
            "one of the servers ends",
        )
        leaving, staying = sorted(pair, key=lambda server: server.process.poll() is None)
        assert leaving.exit_code() == 2
        assert "another live server of cluster duplicates has the id one" in only_line(
            leaving.stderr
        )
        (reason,) = leaving.events("server.duplicate_id")
        assert reason["log.level"] == "error"
        assert clients[pair.index(leaving)].rest() == b"", "its client was closed cleanly"
        assert staying.wait_for("cluster.joined")
        until(lambda: redis.members("duplicates") == {"one": 1}, "the remaining server is counted")
        assert clients[pair.index(staying)].who() == 1
        assert staying.process.poll() is None
    notes.happened("one of them ended when Redis was available")


def clone(redis: Redis, ahead_us: int) -> Iterator[str]:
    """Send heartbeats like a copy of the cluster's only server; yield what marks the holder.

    The copy has the same id and incarnation. The monotonic clock of its machine may be ahead.
    """

    def entry() -> list[str]:
        return str(redis.command("HGET", "{gserver:clones}:members", "one")).split()

    _, then, incarnation = entry()
    until(lambda: entry()[1] != then, "the server has sent a heartbeat since it was copied")
    link = RedisLink(Config(redis_url=redis.url, cluster_name="clones"))
    last_sent_sequence = acked_sequence = int(then) + ahead_us
    last_clock = 0
    while True:
        sequence = time.monotonic_ns() // 1000 + ahead_us
        heartbeat = Heartbeat("one", incarnation, sequence, 5, 2000, 200)
        reply = link.send(
            heartbeat._replace(
                acked_sequence=acked_sequence,
                last_clock=last_clock,
                last_sent_sequence=last_sent_sequence,
            )
        )
        last_clock = reply.clock
        if reply.holder == incarnation:
            last_sent_sequence = acked_sequence = sequence
        yield reply.holder.removeprefix(incarnation)
        time.sleep(0.15)


@pytest.mark.fault("A machine was cloned: one id, one incarnation")
@pytest.mark.parametrize("ahead_us", [0, 10**9], ids=["", "ahead"])
def test_of_a_server_and_its_clone_one_is_not_the_holder(
    redis: Redis, ahead_us: int, notes: Notes
) -> None:
    with Running(*in_cluster(redis, "clones", *FAST, "--server-id", "one")) as server:
        server.wait_for("cluster.joined")
        said = list(islice(clone(redis, ahead_us), 12))
        notes.happened(f"the clone was marked {', '.join(map(repr, said))}")
        if ahead_us:
            assert said == [""] * 12, "the clone is the holder from its first heartbeat on"
            assert server.exit_code() == 2
            assert "another live server of cluster clones has the id one" in only_line(
                server.stderr
            )
            redis.wipe()
        else:
            assert said[-5:] == ["*"] * 5
            until(lambda: redis.members("clones") == {"one": 0}, "the clone is not counted")
            assert not server.events("server.draining")


# A start without Redis.


@pytest.mark.parametrize(("fault", "kind"), [("killed", "connection"), ("frozen", "timeout")])
def test_a_server_starts_while_redis_is_away_and_joins_when_it_comes(
    tmp_path: Path, fault: str, kind: str
) -> None:
    with Redis(tmp_path) as redis, ExitStack() as stack:
        usual = usual_start()
        (redis.kill if fault == "killed" else redis.freeze)()
        began = time.monotonic()
        policies = ("last-known", "local", "error")
        servers = stack.enter_context(
            started(
                *(
                    ["--redis-url", redis.url, *FAST, "--on-cluster-loss", policy]
                    for policy in policies
                )
            )
        )
        assert time.monotonic() - began <= 3 * usual + START
        for server in servers:
            event = server.wait_for("cluster.lost")
            assert (event["log.level"], event["gserver.kind"]) == ("warning", kind)
        said = []
        for server in servers:
            with server.client() as client:
                said.append(client.ask(b"WHO"))
                assert client.ask(b"WHY") == b"42"
                assert len(client.ask(b"WHERE")) == 36
        assert said == [b"1", b"1", b"ERR cluster unavailable"]
        now = time.monotonic()
        until(lambda: time.monotonic() > now + 1, "the agent makes more attempts")
        assert [len(server.events("cluster.lost")) for server in servers] == [1, 1, 1]
        if fault == "killed":
            redis.restart(keep_data=False)
        else:
            redis.thaw()
        for server in servers:
            server.wait_for("cluster.joined")
        with watching(*servers, total=3):
            assert [len(server.events("cluster.lost")) for server in servers] == [1, 1, 1]


def test_a_server_starts_when_the_name_of_its_redis_does_not_resolve() -> None:
    began = time.monotonic()
    with Running("--redis-url", "redis://no-such-host.invalid", *FAST) as server:
        assert time.monotonic() - began <= START + 2 * PATIENCE
        assert server.who() == 1
        lost = server.wait_for("cluster.lost")
        assert lost["gserver.kind"] == "name"
        assert "redis://no-such-host.invalid:6379" in lost["message"]
        now = time.monotonic()
        until(lambda: time.monotonic() > now + 1, "the agent makes more attempts")
        assert len(server.events("cluster.lost")) == 1


# Options.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--member-ttl", "2.4"],
            "--member-ttl 2.4 is too short: at least five times --heartbeat-interval (0.5)",
        ),
        (
            ["--heartbeat-interval", "2"],
            "--member-ttl 5 is too short: at least five times --heartbeat-interval (2)",
        ),
        (
            ["--cluster-max-age", "1.4"],
            "--cluster-max-age 1.4 is too short: at least three times --heartbeat-interval",
        ),
        (["--redis-ca-file", "ca.pem"], "--redis-ca-file needs a --redis-url with TLS (rediss://)"),
        (["--heartbeat-interval", "0"], "--heartbeat-interval"),
        (["--cluster-name", "a b"], "--cluster-name"),
        (["--on-cluster-loss", "panic"], "--on-cluster-loss"),
        (["--redis-tls-verify", "maybe"], "--redis-tls-verify"),
        (["--redis-url", f"http://:{SECRET}@localhost"], "the URL must begin with redis://"),
    ],
)
def test_invalid_options_are_refused_in_one_line(options: list[str], message: str) -> None:
    done = gserver(
        "--port",
        "0",
        *(options if "--redis-url" in options else ["--redis-url", "redis://-", *options]),
    )
    assert message in error_line(done)
    assert SECRET not in done.stderr + done.stdout


def test_a_bad_url_of_the_environment_is_refused_without_its_secret() -> None:
    done = gserver("--port", "0", REDIS_URL=f"redis://:{SECRET}@h:1,h:2")
    assert "the URL has several hosts" in error_line(done)
    assert "(from REDIS_URL)" in done.stderr
    assert SECRET not in done.stderr + done.stdout


def test_environment_variables_can_name_the_redis(redis: Redis) -> None:
    away = f"redis://127.0.0.1:{free_port()}"
    for variables in {"REDIS_URL": redis.url}, {"GSERVER_REDIS_URL": redis.url, "REDIS_URL": away}:
        with Running("--cluster-name", "variables", env=variables) as server:
            assert redis.url in server.wait_for("cluster.joined")["message"]
            assert len(redis.members("variables")) == 1
            server.stop()


# Secrets.


@pytest.mark.parametrize("source", ["file", "variable"])
@pytest.mark.parametrize(
    ("url", "outcome"),
    [
        ("redis://:open-sesame@127.0.0.1:{}", "joined"),
        ("redis://127.0.0.1:{}?password=open-sesame", "joined"),
        ("redis://:open-sesame-not@127.0.0.1:{}", "auth"),
        ("redis://ali:open-sesame@127.0.0.1:{}", "auth"),
    ],
)
def test_a_password_is_in_no_command_line_and_no_log(
    locked: Redis, source: str, url: str, outcome: str, tmp_path: Path
) -> None:
    (tmp_path / "url").write_text(url.format(locked.port) + "\n")
    options = ["--redis-url-file", str(tmp_path / "url")] if source == "file" else []
    env = {"GSERVER_REDIS_URL": url.format(locked.port)} if source == "variable" else {}
    words = [*FAST, "--cluster-name", "locked", "--log-level", "debug", *options]
    with Running(*words, env=env) as server:
        command_lines = [p.cmdline() for p in psutil.Process(server.pid).children(recursive=True)]
        assert len(command_lines) >= 2, "a worker and an agent"
        command_lines.append(psutil.Process(server.pid).cmdline())
        assert SECRET not in str(command_lines)
        if outcome == "joined":
            assert (
                f"redis://127.0.0.1:{locked.port}" in server.wait_for("cluster.joined")["message"]
            )
        else:
            assert server.wait_for("cluster.lost")["gserver.kind"] == outcome
        assert server.who() == 1
        server.stop()
        assert SECRET not in server.stderr + "".join(server.lines)


def test_a_unix_socket_is_enough(redis: Redis, locked: Redis) -> None:
    for one in (redis, locked):
        with Running("--redis-url", one.unix_url, "--cluster-name", "unix", *FAST) as server:
            assert (
                f"at unix://{one.folder}/redis.sock" in server.wait_for("cluster.joined")["message"]
            )
            assert len(one.members("unix")) == 1


def test_a_tls_certificate_of_redis_must_be_valid_unless_it_is_not_verified(
    encrypted: Redis,
) -> None:
    url = ["--cluster-name", "tls", "--redis-url"]
    localhost = encrypted.url.replace("127.0.0.1", "localhost")
    joining = [
        [*url, encrypted.url, "--redis-ca-file", str(encrypted.ca_file)],
        [*url, encrypted.url, "--redis-tls-verify", "no"],
        [*url, localhost, "--redis-tls-verify", "no"],
    ]
    refusing = [
        [*url, encrypted.url, "--redis-ca-file", str(encrypted.other_ca_file)],
        [*url, encrypted.url],
        [*url, localhost, "--redis-ca-file", str(encrypted.ca_file)],
    ]
    with started(*joining) as servers:
        for server in servers:
            server.wait_for("cluster.joined")
        assert len(encrypted.members("tls")) == 3
    with started(*refusing) as servers:
        for server in servers:
            lost = server.wait_for("cluster.lost")
            assert lost["gserver.kind"] == "tls"
            assert "CERTIFICATE_VERIFY_FAILED" in lost["error.message"]


# A server without a cluster.


def test_without_a_cluster_there_is_no_agent_or_one_that_does_not_load_redis() -> None:
    with Running() as server:
        assert server.agents() == []
    with Running("--statsd-host", "127.0.0.1", "--statsd-port", "9") as server:
        assert len(server.agents()) == 1
        assert not server.events("cluster.joined")
    code = "import sys, json, gserver.agent.agent; before = list(sys.modules)"
    code += "; import gserver.cluster.heartbeat"
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"{code}; print(json.dumps([before, list(sys.modules)]))"],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env={key: value for key, value in environment().items() if not key.startswith("COVERAGE_")},
        check=True,
    )
    before, after = json.loads(done.stdout)
    assert "gserver.agent.statsd" in before
    assert not {"redis", "gserver.cluster.heartbeat", "gserver.cluster.redis_link"} & set(before)
    assert {"redis", "gserver.cluster.redis_link"} <= set(after)


def test_a_server_whose_agent_cannot_start_does_not_skip_the_id_check(
    redis: Redis, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif 'agent' in sys.orig_argv:\n    sys.exit(1)\n"
    )
    config = Config(redis_url=redis.url)
    options = in_cluster(redis, "unchecked", "--server-id", "mine")
    began = time.monotonic()
    with Running(*options, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}, wait=False) as server:
        server.wait_for("agent.died")
        server.wait_for("worker.ready")
        assert time.monotonic() - began > config.settle_seconds
