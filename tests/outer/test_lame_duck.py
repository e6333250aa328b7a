"""SIGUSR2: the server accepts no new clients, serves the connected ones, and ends with the last."""

import signal
import threading
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import psutil
import pytest

from lab.admin import get, metrics, status
from lab.redises import Proxy, Redis
from lab.running import PATIENCE, Client, Running, argv, extended, is_refused, left_over, until

SECOND = PATIENCE
#: Longer than a test takes.
LONG = ("--drain-timeout", "60")

MODULE = """
import time
from pathlib import Path
from lab.commands import napping, pid

if Path("slow").exists():
    Path("booting").touch()
    while Path("slow").exists():
        time.sleep(0.01)

nap = napping("NAP", 0.2)
"""


def start(folder: Path, *options: str) -> Running:
    return extended(folder, MODULE, *options)


def retire(server: Running) -> None:
    """Make the server a lame duck; return when its port is closed."""
    server.send_signal(signal.SIGUSR2)
    server.wait_for("server.retiring")
    until(lambda: is_refused(server.port), "new clients are refused")


def has_clients(client: Client, count: int) -> bool:
    return client.who() == count


def test_a_lame_duck_serves_connected_clients_and_ends_with_the_last(tmp_path: Path) -> None:
    options = ("--workers", "2", "--admin-port", "0")
    with start(tmp_path, *LONG, *options) as server, ExitStack() as stack:
        server.wait_for("agent.ready")
        clients = [stack.enter_context(server.client()) for _ in range(6)]
        assert {client.ask(b"WHY") for client in clients} == {b"42"}
        retire(server)
        assert get(server, "/readyz")[::2] == (503, b"draining\n")
        assert status(server)["workers"]["now"] == 0
        time.sleep(0.3 * SECOND)  # A drain would have closed the clients by now.
        for left in range(6, 0, -1):
            client = clients[left - 1]
            assert client.ask(b"NAP" if left == 3 else b"WHY") == (
                b"rested" if left == 3 else b"42"
            )
            until(partial(has_clients, client, left), f"{left} clients are left")
            client.send(b"no command\n")
            assert client.line().startswith(b"ERR ")
            assert server.process.poll() is None
            client.sock.close()
        began = time.monotonic()
        assert server.exit_code() == 0
        assert time.monotonic() - began < 15 * SECOND
        assert not server.events("worker.died")
        assert not server.events("server.draining")
        assert server.events("server.stopped")
        assert server.stderr == ""
    assert left_over(tmp_path) == []


def test_a_lame_duck_without_clients_ends_at_once(tmp_path: Path) -> None:
    with start(tmp_path, *LONG, "--workers", "2") as server:
        server.send_signal(signal.SIGUSR2)
        assert server.exit_code(5 * SECOND) == 0
        assert not server.events("worker.died")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_during_the_drain_delay_the_server_accepts_and_is_unready(
    tmp_path: Path, number: signal.Signals
) -> None:
    words = (*LONG, "--drain-delay", "2", "--admin-port", "0")
    with start(tmp_path, *words) as server, server.client() as first:
        server.wait_for("agent.ready")
        assert get(server, "/readyz")[0] == 200
        first.who()
        began = time.monotonic()
        server.send_signal(number)
        server.wait_for("server.retiring" if number == signal.SIGUSR2 else "server.draining")
        draining = (503, b"draining\n")
        until(lambda: get(server, "/readyz")[::2] == draining, "that is published")
        assert get(server, "/livez")[0] == 200
        assert metrics(server)["gserver_ready"] == 0
        asked = 0
        while time.monotonic() - began < 1.5:
            with server.client() as other:
                assert other.ask(b"WHY") == b"42"
            asked += 1
        assert asked > 10
        until(lambda: is_refused(server.port), "new clients are refused")
        assert time.monotonic() - began >= 2
        if number == signal.SIGUSR2:
            assert first.who() == 1, "a lame duck still serves"
        else:
            assert first.rest() == b""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
@pytest.mark.parametrize("options", [(), ("--admin-port", "0")], ids=["alone", "with an agent"])
def test_a_worker_that_dies_in_the_drain_delay_is_replaced(
    tmp_path: Path, number: signal.Signals, options: tuple[str, ...]
) -> None:
    with start(tmp_path, "--drain-delay", str(4 * SECOND), *options) as server:
        began = time.monotonic()
        server.send_signal(number)
        event = server.wait_for(
            "server.retiring" if number == signal.SIGUSR2 else "server.draining"
        )
        assert f" {4 * SECOND:g} s;" in event["message"]
        server.workers()[0].kill()
        server.wait_for("worker.ready", 2)
        assert "starting another" in server.wait_for("worker.died")["message"]
        while time.monotonic() - began < 3 * SECOND:
            assert server.who() == 1
        assert server.exit_code() == 0
        assert time.monotonic() - began >= 4 * SECOND


def test_after_the_drain_timeout_the_ordinary_drain_follows(tmp_path: Path) -> None:
    with start(tmp_path, "--drain-timeout", "1") as server, server.client() as client:
        client.who()
        began = time.monotonic()
        server.send_signal(signal.SIGUSR2)
        server.wait_for("server.retiring")
        while (passed := time.monotonic() - began) < 0.8:
            assert client.ask(b"WHY") == b"42"
        client.sock.settimeout(5 * SECOND)
        assert client.rest() == b""
        assert 1 <= (passed := time.monotonic() - began) < 1 + 15 * SECOND, passed
        client.sock.close()
        assert server.exit_code() == 0


@pytest.mark.parametrize("delay", ["0", "60"])
def test_a_stop_of_a_lame_duck_starts_the_ordinary_drain_at_once(
    tmp_path: Path, delay: str
) -> None:
    with start(tmp_path, *LONG, "--drain-delay", delay) as server, server.client() as client:
        client.who()
        server.send_signal(signal.SIGUSR2)
        server.wait_for("server.retiring")
        client.send(b"NAP\n")
        server.send_signal(signal.SIGTERM)
        server.wait_for("server.draining")
        assert client.rest() == b"rested\n"
        client.sock.close()
        assert server.exit_code(5 * SECOND) == 0
        assert not server.events("server.forced")


def test_a_lame_duck_ignores_sighup_and_sigusr2(tmp_path: Path) -> None:
    with start(tmp_path, *LONG, "--workers", "2") as server, server.client() as client:
        pid = client.ask(b"PID")
        retire(server)
        for number in (signal.SIGHUP, signal.SIGUSR2, signal.SIGHUP):
            server.send_signal(number)
        until(lambda: len(server.workers()) == 1, "the worker without clients has ended")
        assert client.ask(b"PID") == pid
        assert not server.events("server.reloading")
        assert len(server.events("server.retiring")) == 1
        client.sock.close()
        assert server.exit_code() == 0


def test_a_worker_of_a_lame_duck_that_dies_is_logged_and_not_replaced(tmp_path: Path) -> None:
    with (
        start(tmp_path, *LONG, "--workers", "2", "--admin-port", "0") as server,
        ExitStack() as stack,
    ):
        server.wait_for("agent.ready")
        server.wait_for("worker.ready", 2)
        by_worker: dict[bytes, Client] = {}

        def connect() -> bool:
            client = stack.enter_context(server.client())
            by_worker.setdefault(client.ask(b"PID"), client)
            return len(by_worker) == 2

        until(connect, "both workers have clients")
        retire(server)
        victim, stays = by_worker
        psutil.Process(int(victim)).kill()
        died = server.wait_for("worker.died")
        assert died["process.exit_code"] == -signal.SIGKILL
        assert died["gserver.lost"] >= 1
        assert "another" not in died["message"]
        assert status(server)["server"]["worker_restarts"] == 0
        assert by_worker[stays].ask(b"PID") == stays
        assert len(server.events("worker.ready")) == 2
        stack.close()
        assert server.exit_code() == 0


def test_the_cluster_counts_the_clients_of_a_lame_duck_until_they_leave(tmp_path: Path) -> None:
    with ExitStack() as stack:
        redis = stack.enter_context(Redis(tmp_path))
        options = (
            *LONG,
            "--redis-url",
            redis.url,
            *argv(f"--heartbeat-interval {0.1 * PATIENCE} --member-ttl {PATIENCE} --server-id"),
        )
        duck = stack.enter_context(start(tmp_path, *options, "duck"))
        asker = stack.enter_context(stack.enter_context(Running(*options, "other")).client())
        client = stack.enter_context(duck.client())
        until(lambda: asker.who() == client.who() == 2, "each server counts both")
        retire(duck)
        time.sleep(2 * PATIENCE)  # Twice the TTL: a silent server would have been dropped.
        assert asker.who() == client.who() == 2
        client.sock.close()
        assert duck.exit_code() == 0
        assert set(redis.members()) == {"other"}
        until(lambda: asker.who() == 1, "the clients have left")


def test_a_worker_that_is_still_starting_serves_the_accept_queue(tmp_path: Path) -> None:
    """The only worker is dead when the signal arrives; the next one gets it when it is ready."""
    with start(tmp_path, *LONG) as server:
        (tmp_path / "slow").touch()
        server.workers()[0].kill()
        until((tmp_path / "booting").exists, "the next worker starts")
        with server.client() as client:
            server.send_signal(signal.SIGUSR2)
            server.wait_for("server.retiring")
            time.sleep(0.2)  # If the supervisor sent SIGUSR2 now, it would be lost.
            (tmp_path / "slow").unlink()
            assert client.who() == 1
            until(lambda: is_refused(server.port), "new clients are refused")
            assert client.who() == 1
        assert server.exit_code() == 0
        assert len(server.events("worker.died")) == 1


def test_during_a_reload_the_signal_does_not_kill_a_starting_worker(tmp_path: Path) -> None:
    with start(tmp_path, *LONG, "--workers", "2") as server:
        server.send_signal(signal.SIGHUP)
        server.wait_for("server.reloading")
        time.sleep(0.2)  # The new worker is starting.
        server.send_signal(signal.SIGUSR2)
        assert server.exit_code() == 0
        assert not server.events("worker.died")
        assert server.stderr == ""
    assert left_over(tmp_path) == []


def test_busy_clients_are_answered_without_a_gap_when_a_server_becomes_a_lame_duck(
    tmp_path: Path,
) -> None:
    with start(tmp_path, *LONG, "--workers", "2") as server, ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for _ in range(20)]
        is_over, asked = threading.Event(), dict.fromkeys(clients, 0)

        def talk(client: Client) -> None:
            while not is_over.is_set():
                assert client.ask(b"WHY") == b"42"
                asked[client] += 1
                is_over.wait(0.002)

        talks = [threading.Thread(target=talk, args=(client,)) for client in clients]
        for each in talks:
            each.start()
        retire(server)
        before = dict(asked)
        try:
            until(
                lambda: all(asked[client] > before[client] + 20 for client in clients),
                "all clients still get replies",
            )
        finally:
            is_over.set()
            for each in talks:
                each.join()
        stack.close()
        assert server.exit_code() == 0


def test_the_agent_of_a_reload_does_not_leave_the_cluster_when_a_lame_duck_follows(
    tmp_path: Path,
) -> None:
    """The old agent is sending a report, and ends after the port has been closed."""
    words = (
        *argv("--heartbeat-interval 0.3 --member-ttl 5 --drain-delay 0 --server-id here"),
        *LONG,
    )
    with (
        Redis(tmp_path) as redis,
        Proxy(redis.port) as proxy,
        start(tmp_path, "--redis-url", redis.url_at(proxy.port), *words) as server,
        ExitStack() as stack,
    ):
        until(redis.members, "the server reports to Redis")
        stack.enter_context(server.client()).send(
            b"WH"
        )  # The old worker waits briefly for the rest of the line.
        server.send_signal(signal.SIGHUP)
        server.wait_for("worker.ready", 2)
        new = str(server.events("worker.ready")[1]["gserver.child_pid"]).encode()
        client = server.client()
        while client.ask(b"PID") != new:
            client.sock.close()
            client = server.client()
        stack.enter_context(client)
        proxy.delay_seconds = 0.2
        server.wait_for("server.reloaded")
        server.send_signal(signal.SIGUSR2)
        until(
            lambda: len(server.events("agent.ready")) == 2 or not redis.members(),
            "the next agent reports",
        )
        assert redis.members()
        proxy.delay_seconds = 0.0
        assert client.ask(b"PID") == new


@pytest.mark.parametrize("pause_seconds", [0.0, 0.005, 0.02])
def test_a_lame_duck_just_after_a_reload_leaves_the_cluster(
    tmp_path: Path, pause_seconds: float
) -> None:
    """The agent that the reload ends does not know that the server ends."""
    with Redis(tmp_path) as redis, start(tmp_path, "--redis-url", redis.url) as server:
        until(redis.members, "the server reports to Redis")
        server.send_signal(signal.SIGHUP)
        server.wait_for("server.reloaded")
        time.sleep(pause_seconds)
        server.send_signal(signal.SIGUSR2)
        assert server.exit_code() == 0
        assert redis.members() == {}
