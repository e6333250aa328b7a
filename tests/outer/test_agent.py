"""The agent: if it dies, hangs or is replaced, no client notices and every count stays exact."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

from lab.running import LIMIT, PATIENCE, Client, Running, argv, until
from lab.statsd import Daemon, becomes, received, to

#: No daemon listens there, and no datagram leaves the machine.
UNUSED_STATSD = ["--statsd-host", "127.0.0.1"]


@contextlib.contextmanager
def asking(server: Running, command: bytes) -> Iterator[tuple[list[float], list[int]]]:
    """During the body, clients connect one after another, send ten commands each and disconnect.

    Yields the time of each reply in seconds, and the number of replies of each client: ten, unless
    it was closed early.
    """
    times: list[float] = []
    clients: list[int] = []
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            with server.client() as client, contextlib.suppress(ConnectionError):
                clients.append(0)
                for _ in range(10):
                    began = time.monotonic()
                    client.send(command + b"\n")
                    if not client.line():
                        break
                    times.append(time.monotonic() - began)
                    clients[-1] += 1
            is_over.wait(0.001)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield times, clients
    finally:
        is_over.set()
        thread.join(LIMIT)


def test_a_killed_agent_is_replaced_without_double_counting(daemon: Daemon) -> None:
    with Running(*to(daemon, "killed")) as server, server.client() as client:
        server.wait_for("agent.ready")
        (first,) = server.agents()
        for _ in range(10):
            assert client.ask(b"WHY") == b"42"
        becomes(lambda: received(daemon, "counters", "killed.").get("commands.why"), 10)
        with asking(server, b"WHO") as (times, clients):
            first.kill()
            died = server.wait_for("agent.died")
            server.wait_for("agent.ready", 2)
        assert set(clients) == {10}
        assert max(times) < PATIENCE
        (second,) = server.agents()
        assert second.pid != first.pid
        assert server.events("worker.died") == []
        assert (died["log.level"], died["gserver.child_pid"]) == ("warning", first.pid)
        assert f"agent {first.pid} died (killed by SIGKILL)" in died["message"]
        for _ in range(7):
            assert client.ask(b"WHY") == b"42"
        assert server.stop() == 0
    becomes(lambda: received(daemon, "gauges", "killed."), {"clients": 0, "workers": 0})
    assert received(daemon, "counters", "killed.")["commands.why"] == 17


def test_every_start_of_an_agent_is_counted(daemon: Daemon) -> None:
    with Running(*to(daemon, "starts")) as server:
        for count in (1, 2):
            server.wait_for("agent.ready", count)
            becomes(lambda: received(daemon, "counters", "starts.").get("agent_starts"), count)
            server.agents()[0].kill()
        server.wait_for("agent.ready", 3)
        assert server.stop() == 0
    becomes(lambda: received(daemon, "counters", "starts.").get("agent_starts"), 3)
    assert "worker_restarts" not in received(daemon, "counters", "starts.")


def test_a_reload_replaces_the_agent_and_sums_stay_exact(daemon: Daemon) -> None:
    with Running("--workers", "2", *to(daemon, "reload")) as server:
        server.wait_for("agent.ready")
        (first,) = server.agents()
        with asking(server, b"WHY") as (times, clients):
            server.send_signal(signal.SIGHUP)
            server.wait_for("server.reloaded")
            server.wait_for("agent.ready", 2)
        assert [agent.pid for agent in server.agents() if agent.pid != first.pid]
        assert server.events("agent.died") == []
        assert server.stop() == 0
    becomes(lambda: received(daemon, "gauges", "reload."), {"clients": 0, "workers": 0})
    counters = received(daemon, "counters", "reload.")
    assert counters.pop("clients_handed_over", 0) <= 2 * 4  # Each of them asks once per connection.
    assert counters == {
        "clients_accepted": len(clients),
        "clients_closed": len(clients),
        "commands.why": len(times),
        "agent_starts": 2,
        "reloads": 1,
    }


def test_an_agent_that_hangs_does_not_delay_a_stop() -> None:
    with Running(*UNUSED_STATSD, *argv("--drain-timeout 1 --hang-timeout 0")) as server:
        server.wait_for("agent.ready")
        server.agents()[0].suspend()
        assert server.stop() == 0


def test_a_server_that_stops_before_its_agent_is_ready_still_sends_its_figures(
    daemon: Daemon,
) -> None:
    with Running(*to(daemon, "short"), wait=False) as server:
        (agent,) = until(server.agents, "an agent")
        agent.suspend()  # It is still starting, which takes at least a tenth of a second.
        with Client(server.wait_for("server.listening")["server.port"]) as client:
            assert client.ask(b"WHY") == b"42"
        assert server.events("agent.ready") == []
        server.send_signal(signal.SIGTERM)
        until(lambda: not server.workers(), "the end of the workers")
        agent.resume()
        assert server.exit_code() == 0
    becomes(lambda: received(daemon, "counters", "short.").get("commands.why"), 1)


def test_an_agent_that_ends_late_does_not_double_count(daemon: Daemon) -> None:
    with Running(*to(daemon, "late")) as server, server.client() as client:
        server.wait_for("agent.ready")
        (first,) = server.agents()
        assert client.ask(b"WHERE")
        becomes(lambda: received(daemon, "counters", "late.").get("commands.where"), 1)
        first.suspend()
        for _ in range(5):
            assert client.ask(b"WHY") == b"42"
        server.send_signal(signal.SIGHUP)
        server.wait_for("server.reloaded")
        if len(server.agents()) > 1:  # The next agent has already started and sends first.
            becomes(lambda: received(daemon, "counters", "late.").get("commands.why"), 5)
        first.resume()
        until(lambda: first not in server.agents(), "the end of the first agent")
        server.wait_for("agent.ready", 2)
        assert server.stop() == 0
    becomes(lambda: received(daemon, "gauges", "late."), {"clients": 0, "workers": 0})
    assert received(daemon, "counters", "late.")["commands.why"] == 5
