"""The supervisor: workers that die, hang or fail to start, reloads and stops."""

import os
import re
import resource
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from gserver.serve.clients import DRAIN_GRACE_SECONDS
from gserver.supervise.phases import GIVE_UP_SECONDS
from lab.admin import status
from lab.redises import Redis
from lab.running import (
    GSERVER,
    LIMIT,
    PATIENCE,
    ROOT,
    Client,
    Event,
    Running,
    argv,
    extended,
    gserver,
    is_alive,
    is_refused,
    left_over,
    stopped,
    until,
)

MODULE = """
import os, signal, time
from pathlib import Path
from gserver.commands import command
from lab.commands import napping, pid, spin

if Path("crash").exists():
    os.kill(os.getpid(), signal.SIGKILL)

sleep = napping("SLEEP", 60)

@command("NAP")
def nap(request):
    time.sleep(1)
    return "rested"

@command("FORK")
def fork(request):
    child = os.fork()
    if child == 0:
        os.setsid()  # The supervisor kills the group of a worker that dies.
        signal.pause()
    while os.getsid(child) != child:
        time.sleep(0.001)
    return child
"""


def start(folder: Path, *options: str, wait: bool = True) -> Running:
    """A server with the commands above."""
    return extended(folder, MODULE, *options, wait=wait)


def clients_of(
    server: Running, worker: psutil.Process, count: int, stack: ExitStack
) -> list[Client]:
    """Clients of this worker. The others are stopped while the clients are accepted."""
    with stopped(*(other for other in server.workers() if other != worker)):
        clients = [stack.enter_context(server.client()) for _ in range(count)]
        assert {int(client.ask(b"PID")) for client in clients} == {worker.pid}
    return clients


@contextmanager
def talking(*clients: Client) -> Iterator[None]:
    """Keep the clients sending commands; fail if one gets no reply."""
    is_over = threading.Event()

    def talk(client: Client) -> int:
        asked = 0
        while not is_over.is_set():
            assert client.ask(b"WHY") == b"42"
            assert client.who() >= len(clients)
            asked += 1
            is_over.wait(0.002)
        return asked

    with ThreadPoolExecutor() as pool:
        talks = [pool.submit(talk, client) for client in clients]
        try:
            yield
        finally:
            is_over.set()
    assert all(talk.result() > 0 for talk in talks)


def read_to_end(client: Client) -> bytes:
    """Read to the end, then close the client."""
    with client:
        return client.rest()


def timed(action: Callable[[], Any]) -> tuple[Any, float]:
    began = time.monotonic()
    result = action()
    return result, time.monotonic() - began


# Workers that die.


@pytest.mark.outer
def test_a_worker_that_crashes_at_boot_is_retried_with_growing_pauses(tmp_path: Path) -> None:
    with start(tmp_path, "--workers", "2") as server, ExitStack() as stack:
        victim, stays = server.workers()
        client = clients_of(server, stays, 1, stack)[0]
        with talking(client):
            (tmp_path / "crash").touch()
            supervisor = psutil.Process(server.pid)
            used = sum(supervisor.cpu_times()[:2])
            victim.kill()
            server.wait_for("worker.died", 6)
            used = sum(supervisor.cpu_times()[:2]) - used
            (tmp_path / "crash").unlink()
            server.wait_for("worker.ready", 3)
            until(lambda: server.who() == 2, "WHO is exact")
        died = [moment(event) for event in server.events("worker.died")[1:6]]
        gaps = [later - earlier for earlier, later in pairwise(died)]
        assert [gap > 0.1 * 2**at for at, gap in enumerate(gaps)] == [True] * 4
        assert used < sum(gaps) / 4, "the supervisor waits without spinning"


@pytest.mark.outer
def test_a_server_whose_first_workers_crash_retries_and_can_be_stopped(tmp_path: Path) -> None:
    (tmp_path / "crash").touch()
    with start(tmp_path, "--workers", "2", wait=False) as server:
        server.wait_for("worker.died", 4)
        assert server.stop() == 0
        assert not server.events("server.listening")
        assert server.stderr == ""
    assert left_over(tmp_path) == []


@pytest.mark.outer
def test_a_server_whose_first_workers_crash_listens_once_they_start(tmp_path: Path) -> None:
    (tmp_path / "crash").touch()
    with start(tmp_path, wait=False) as server:
        server.wait_for("worker.died", 2)
        (tmp_path / "crash").unlink()
        server.port = server.wait_for("server.listening")["server.port"]
        assert server.who() == 1


def test_a_worker_is_replaced_even_if_a_process_that_it_started_survives(tmp_path: Path) -> None:
    with start(tmp_path) as server, server.client() as client:
        grandchild = psutil.Process(int(client.ask(b"FORK")))
        try:
            server.workers()[0].kill()
            server.wait_for("worker.ready", 2)
            assert server.who() == 1
            assert is_alive(grandchild)
        finally:
            grandchild.kill()


def test_a_worker_that_gets_a_sigterm_drains_and_is_replaced(tmp_path: Path) -> None:
    with start(tmp_path) as server, server.client() as client, server.client() as other:
        assert other.who() == 2
        client.send(b"NAP\nWHY\n")
        until(lambda: server.who() == 3, "the first client is in its command")
        server.workers()[0].terminate()
        assert read_to_end(other) == b""
        assert read_to_end(client) == b"rested\n42\n"
        assert server.wait_for("worker.died")["process.exit_code"] == 0
        assert server.who() == 1


# Workers that hang.


def test_the_log_of_a_hang_says_where_the_worker_was(tmp_path: Path) -> None:
    with extended(tmp_path, SPINNING, "--hang-timeout", "1") as server, server.client() as client:
        client.send(b"SPIN\n")
        hung = server.wait_for("worker.hung")
        assert re.search(r"; it was in inner \(\S+\.py, line 6\)$", hung["message"])
        functions = re.findall(r" in (\w+)$", hung["error.stack_trace"], re.M)
        assert functions[-3:] == ["spin", "outer", "inner"]


SPINNING = """
from gserver.commands import command
def outer():
    inner()
def inner():
    while True: pass
@command("SPIN")
def spin(request):
    outer()
"""


@pytest.mark.outer
def test_without_a_hang_timeout_only_the_agent_of_a_cluster_is_watched(tmp_path: Path) -> None:
    with Redis(tmp_path) as redis:
        cluster = ("--redis-url", redis.url, "--heartbeat-interval", "0.2", "--member-ttl", "3")
        with start(tmp_path, "--hang-timeout", "0", *cluster) as server:
            server.wait_for("agent.ready")
            [agent], [worker] = server.agents(), server.workers()
            with stopped(worker):
                agent.suspend()
                assert server.wait_for("agent.hung")["gserver.child_pid"] == agent.pid
                server.wait_for("agent.ready", 2)
                time.sleep(1.5)  # A worker with a limit of 1 s would have been replaced by now.
            assert server.who() == 1
            assert server.workers() == [worker]


# Stops.


@pytest.mark.outer
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_stop_closes_idle_clients_at_once_and_exits_with_0(
    tmp_path: Path, number: signal.Signals, workers: int
) -> None:
    options = ("--workers", str(workers), "--drain-timeout", "600")
    with start(tmp_path, *options) as server, ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for _ in range(20)]
        assert {client.ask(b"WHY") for client in clients[10:]} == {b"42"}
        time.sleep(0.6)  # A drain waits only for new clients that have sent nothing.
        server.send_signal(number)
        assert {read_to_end(client) for client in clients} == {b""}
        assert (
            server.exit_code() == 0
        )  # The clients' end completes the stop, not the drain timeout.
        assert server.events("server.stopped")
        assert server.stderr == ""
    assert left_over(tmp_path) == []


def test_a_newly_connected_client_may_send_a_command_after_a_stop(tmp_path: Path) -> None:
    with start(tmp_path) as server, ExitStack() as stack:
        began = time.monotonic()
        client = stack.enter_context(server.client())
        server.send_signal(signal.SIGTERM)
        server.wait_for("server.draining")
        time.sleep(0.2)  # The worker is draining by now.
        client.send(b"WHY\n")
        if time.monotonic() - began > 0.9 * DRAIN_GRACE_SECONDS:
            pytest.skip("this machine was too slow: a client has half a second")
        assert client.line() == b"42\n"
        assert read_to_end(client) == b""
        assert server.exit_code() == 0


def test_a_signal_after_the_stop_does_not_change_the_exit_code() -> None:
    for _ in range(3):
        with Running() as server:
            server.send_signal(signal.SIGUSR2)
            server.wait_for("server.stopped")
            while server.process.poll() is None:
                server.send_signal(signal.SIGTERM)
            assert server.exit_code() == 0


def test_a_lame_duck_serves_clients_in_the_accept_queue(tmp_path: Path) -> None:
    with (
        start(tmp_path, "--workers", "2", "--drain-timeout", "600") as server,
        ExitStack() as stack,
    ):
        with stopped(*server.workers()):
            clients = [stack.enter_context(server.client()) for _ in range(50)]
            server.send_signal(signal.SIGUSR2)
            server.wait_for("server.retiring")
        time.sleep(0.6)  # A drain would have given them half a second.
        until(lambda: clients[0].who() == 50, "both workers have accepted their clients")
        assert {client.ask(b"WHO") for client in clients} == {b"50"}


def test_a_command_without_a_newline_is_answered_at_the_end_of_a_drain(tmp_path: Path) -> None:
    with start(tmp_path, "--unterminated-after", "0") as server, server.client() as client:
        client.send(b"WHY\nWHY")
        assert client.line() == b"42\n"
        server.send_signal(signal.SIGTERM)
        assert read_to_end(client) == b"42\n"
        assert server.exit_code() == 0


@pytest.mark.outer
def test_lines_behind_a_slow_command_are_answered_after_a_stop(tmp_path: Path) -> None:
    with start(tmp_path, "--drain-timeout", "60") as server, server.client() as client:
        client.send(b"NAP\nNAP\nNAP\nWHY\n")
        with server.client() as other:
            until(lambda: other.who() == 2, "the first client is in its command")
            client.send(b"WHO\n")
            server.send_signal(signal.SIGTERM)
            assert read_to_end(other) == b""
        assert read_to_end(client) == b"rested\n" * 3 + b"42\n1\n"
        assert server.exit_code() == 0


@pytest.mark.outer
@pytest.mark.parametrize("workers", [1, 2])
def test_a_line_sent_before_a_stop_is_answered_even_if_read_late(
    tmp_path: Path, workers: int
) -> None:
    """The signal and the bytes both wait for a stopped worker, as on a busy machine."""
    options = ("--workers", str(workers), "--drain-timeout", "60")
    with start(tmp_path, *options) as server, ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for _ in range(100)]
        assert {client.ask(b"WHY") for client in clients} == {b"42"}
        with stopped(*server.workers()):
            clients += [stack.enter_context(server.client()) for _ in range(100)]
            for client in clients:
                client.send(b"WHY\n")
            server.send_signal(signal.SIGTERM)
            server.wait_for("server.draining")
        replies = [read_to_end(client) for client in clients]
        assert replies[:100] == [b"42\n"] * 100, "accepted clients"
        assert replies[100:] == [b"42\n"] * 100, "clients that had only connected"
        assert server.exit_code() == 0


def test_more_lines_than_one_read_takes_are_answered_after_a_stop(tmp_path: Path) -> None:
    with start(tmp_path, "--drain-timeout", "60") as server, server.client() as client:
        assert client.ask(b"WHY") == b"42"
        with stopped(*server.workers()):
            client.send(b"WHY\n" * 5000)
            server.send_signal(signal.SIGTERM)
            server.wait_for("server.draining")
        assert read_to_end(client).count(b"42\n") == 5000
        assert server.exit_code() == 0


@pytest.mark.outer
@pytest.mark.parametrize("command", [b"SLEEP\n", b"SPIN\n"])
def test_a_command_that_does_not_end_is_cut_off_at_the_drain_timeout(
    tmp_path: Path, command: bytes
) -> None:
    with start(tmp_path, "--drain-timeout", "10") as server, server.client() as client:
        client.who()
        client.send(command)
        began = time.monotonic()
        server.send_signal(signal.SIGTERM)
        if command == b"SLEEP\n":
            until(lambda: is_refused(server.port), "new clients are refused", 5)
        assert server.exit_code() == 0
        assert 7 < time.monotonic() - began < 20 * PATIENCE
        # A computing worker cannot log: it is killed, and the supervisor logs it.
        cut_off = [event["gserver.clients"] for event in server.events("worker.cut_off")]
        assert cut_off == ([1] if command == b"SLEEP\n" else [])
        killed = [
            (event["gserver.clients"], event["gserver.reason"])
            for event in server.events("worker.killed")
        ]
        assert killed == ([(1, "drain timeout")] if command == b"SPIN\n" else [])
    assert left_over(tmp_path) == []


@pytest.mark.outer
@pytest.mark.parametrize("workers", [1, 2])
def test_busy_clients_get_complete_replies_and_a_clean_close_at_a_stop(
    tmp_path: Path, workers: int
) -> None:
    options = ("--workers", str(workers), "--drain-timeout", "600")
    with start(tmp_path, *options) as server, ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for _ in range(500)]
        asked, replies, rests = (
            dict.fromkeys(clients, 0),
            dict.fromkeys(clients, 0),
            dict.fromkeys(clients, b""),
        )
        selector = stack.enter_context(selectors.DefaultSelector())

        def ask(client: Client) -> None:
            with suppress(OSError):  # It has been closed, which it is about to read.
                client.send(b"WHO\n")
            asked[client] += 1

        def turn() -> bool:
            """Receive, and send a command for every reply. Return whether all have ended."""
            for key, _ in selector.select(LIMIT):
                client = key.data
                if data := client.sock.recv(4096):
                    *lines, rests[client] = (rests[client] + data).split(b"\n")
                    assert all(1 <= int(line) <= 500 for line in lines)
                    replies[client] += len(lines)
                    if lines:
                        ask(client)
                else:
                    selector.unregister(client.sock)
                    client.sock.close()
            return not selector.get_map()

        for client in clients:
            selector.register(client.sock, selectors.EVENT_READ, client)
            ask(client)
        until(lambda: turn() or min(replies.values()) >= 20, "all clients are busy")
        before = dict(asked)
        server.send_signal(signal.SIGTERM)
        until(turn, "all clients have ended")
        assert set(rests.values()) == {b""}
        assert [client for client in clients if replies[client] < before[client]] == [], (
            "a command sent before the stop was not answered"
        )
        assert server.exit_code() == 0


@pytest.mark.outer
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGINT, signal.SIGTERM),
    ],
)
def test_a_second_signal_forces_exit_1_unless_it_was_forwarded(
    tmp_path: Path, first: signal.Signals, second: signal.Signals
) -> None:
    with (
        start(tmp_path, "--workers", "2", "--drain-timeout", "60") as server,
        server.client() as client,
    ):
        client.who()
        client.send(b"SLEEP\n")
        server.send_signal(first)
        time.sleep(0.01)  # The kernel may merge two signals of a kind that come at once.
        server.send_signal(second)  # Forwarded by a runner that got the same Ctrl-C.
        server.wait_for("server.draining")
        time.sleep(0.7)  # After this, a signal counts as a new request.
        forced = server.events("server.forced")
        if forced and moment(forced[0]) - moment(server.wait_for("server.draining")) > 0.1:
            pytest.skip("this machine delayed the second signal")
        assert not forced
        assert server.stop(second) == 1
        assert server.events("server.forced")
        assert server.stderr == ""
    assert left_over(tmp_path) == []


@pytest.mark.outer
def test_a_stop_at_any_moment_of_the_start_leaves_nothing_behind(tmp_path: Path) -> None:
    ends = set()
    for step in range(14):
        with start(tmp_path, "--workers", "2", wait=False) as server:
            time.sleep(0.04 * step)  # The test varies this moment.
            ends.add(server.stop())
            assert server.stderr == ""
        assert left_over(tmp_path) == []
    # Before the interpreter runs the program, the signal has its default effect.
    assert ends <= {-signal.SIGTERM, 0}


def test_a_terminal_with_tostop_stops_no_worker(tmp_path: Path) -> None:
    script = (
        'import pty, sys; pty.spawn(["sh", "-c", \'stty tostop; exec "$@"\', "sh", *sys.argv[1:]])'
    )
    command = [sys.executable, "-c", script, *GSERVER, *argv("serve --port 0 --log-format json")]
    with Running("--log-level", "debug", command=command, env={"MARK": str(tmp_path)}) as server:
        for _ in range(2):
            with server.client() as client:
                assert client.who() == 1
        server.wait_for("client.closed", 2)
    until(lambda: not left_over(tmp_path), "the server stops with its terminal")


def test_a_server_stops_when_its_terminal_is_closed(tmp_path: Path) -> None:
    terminal = [sys.executable, "-c", "import pty, sys; pty.spawn(sys.argv[1:])"]
    command = [*terminal, *GSERVER, "serve", "--port", "0", "--log-format", "json"]
    try:
        with (
            Running(command=command, env={"MARK": str(tmp_path)}) as server,
            server.client() as client,
        ):
            client.who()
            server.process.kill()
            assert read_to_end(client) == b""
            until(lambda: not left_over(tmp_path), "no process is left")
    finally:
        for process in left_over(tmp_path):
            process.kill()


# Reloads.


@pytest.mark.parametrize("workers", [1, 2])
def test_a_reload_starts_workers_with_new_code_and_keeps_everything_else(
    tmp_path: Path, workers: int
) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as daemon:
        daemon.bind(("127.0.0.1", 0))
        statsd = ("--statsd-host", "127.0.0.1", "--statsd-port", str(daemon.getsockname()[1]))
        with (
            start(tmp_path, "--workers", str(workers), *statsd) as server,
            server.client() as before,
        ):
            server.wait_for("agent.ready")
            children = {*server.workers(), *server.agents()}
            where = before.ask(b"WHERE")
            (tmp_path / "extra.py").write_text(
                MODULE.replace("rested", "well rested").replace("sleep(1)", "sleep(0)")
            )
            server.send_signal(signal.SIGHUP)
            server.wait_for("server.reloaded")
            server.wait_for("agent.ready", 2)
            until(
                lambda: not any(child.is_running() for child in children),
                "the old processes have ended",
            )
            with server.client() as after:
                for client in (after, before):  # Another worker may accept the new one later.
                    assert client.who() == 2
                    assert client.ask(b"WHERE") == where
                    assert client.ask(b"NAP") == b"well rested"
            assert len(server.workers()) == workers
            assert len(server.agents()) == 1
            assert not server.events("worker.died")
            assert server.stop() == 0


@pytest.mark.outer
def test_after_quick_reloads_the_last_code_runs(tmp_path: Path) -> None:
    with start(tmp_path, "--workers", "2") as server, ExitStack() as stack:
        for reloads in range(1, 8):
            # Renamed: a worker of the previous reload may be reading the file.
            new = tmp_path / "new.py"
            new.write_text(MODULE.replace("time.sleep(1)", f"return 'version {reloads}'"))
            new.replace(tmp_path / "extra.py")
            server.send_signal(signal.SIGHUP)
            server.wait_for("server.reloading", reloads)
            time.sleep(0.1)  # During the previous reload.
        until(
            lambda: is_last(server.events(), "server.reloaded", "server.reloading"),
            "the last reload is complete",
        )
        until(lambda: len(server.workers()) == 2, "the surplus worker has ended")
        for worker in server.workers():
            assert clients_of(server, worker, 1, stack)[0].ask(b"NAP") == b"version 7"
        assert not server.events("worker.died")


def moment(event: Event) -> float:
    """When an event happened, in seconds."""
    return datetime.fromisoformat(event["@timestamp"]).timestamp()


def is_last(events: list[Event], last: str, other: str) -> bool:
    """Whether the later of the last two events is `last`."""
    return [event["event.action"] for event in events if event["event.action"] in (last, other)][
        -1:
    ] == [last]


@pytest.mark.outer
def test_a_sighup_does_not_shorten_a_stop(tmp_path: Path) -> None:
    with start(tmp_path, "--drain-timeout", "60") as server, server.client() as client:
        client.who()
        client.send(b"NAP\n" * 3)
        server.send_signal(signal.SIGTERM)
        server.wait_for("server.draining")
        server.send_signal(signal.SIGHUP)
        assert server.wait_for("server.signal_ignored")["message"].startswith("SIGHUP ignored")
        assert read_to_end(client) == b"rested\n" * 3
        assert server.exit_code() == 0


#: A part of the message of a failed reload, and the module that causes it.
BROKEN_LATER = {
    "SyntaxError": "def broken(:",
    "out of luck": "raise RuntimeError('out of\\nluck')",
    "no command": "WHO = 1",
    "SIGKILL": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.outer
def test_a_reload_with_a_broken_module_keeps_the_workers(tmp_path: Path) -> None:
    with start(tmp_path, "--workers", "2") as server, ExitStack() as stack:
        old = server.workers()
        with talking(
            *(client for worker in old for client in clients_of(server, worker, 1, stack))
        ):
            for failures, (reason, text) in enumerate(BROKEN_LATER.items(), 1):
                (tmp_path / "extra.py").write_text(text)
                server.send_signal(signal.SIGHUP)
                assert reason in server.wait_for("server.reload_failed", failures)["message"]
                time.sleep(
                    0.5 if failures == 1 else 0
                )  # Another attempt would have started by now.
                assert server.workers() == old
            assert not server.events("worker.died")
        (tmp_path / "extra.py").write_text(MODULE)
        server.send_signal(signal.SIGHUP)
        server.wait_for("server.reloaded")
        until(lambda: not any(worker.is_running() for worker in old), "the old workers have ended")
        assert len(server.workers()) == 2


@pytest.mark.outer
def test_a_reload_that_leaves_no_descriptors_for_clients_keeps_the_workers() -> None:
    with Running("--workers", "2") as server:
        before = {worker.pid for worker in server.workers()}
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (64, 64))
        server.send_signal(signal.SIGHUP)
        failed = server.wait_for("server.reload_failed")
        assert (
            "the limit of open files is too low: raise it (ulimit -n, prlimit)" in failed["message"]
        )
        assert {worker.pid for worker in server.workers()} == before
        with server.client() as client:
            assert client.who() == 1


def test_a_system_without_threads_is_reported_in_one_line(tmp_path: Path) -> None:
    """The requested stack size exceeds any memory."""
    (tmp_path / "sitecustomize.py").write_text("import threading\nthreading.stack_size(1 << 46)\n")
    done = gserver("--port", "0", PYTHONPATH=f"{tmp_path}:{ROOT}")
    expected = "gserver: cannot start the log thread: raise the limit on processes (ulimit -u)\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)


@pytest.mark.outer
def test_clients_that_a_reload_disconnects_count_as_closed_not_lost(tmp_path: Path) -> None:
    options = ("--drain-timeout", "1", "--admin-port", "0", "--hang-timeout", "0")
    with start(tmp_path, *options) as server, server.client() as client:
        server.wait_for("agent.ready")
        client.who()
        client.send(b"SPIN\n")
        until(lambda: server.workers()[0].cpu_times().user > 0.5, "the worker is computing")
        server.send_signal(signal.SIGHUP)
        killed = server.wait_for("worker.killed")
        assert (killed["gserver.clients"], killed["gserver.reason"]) == (1, "drain timeout")
        server.wait_for("server.reloaded")
        server.wait_for("agent.ready", 2)
        clients = status(server)["clients"]
        assert (clients["accepted"], clients["closed"], clients["lost"]) == (1, 1, 0)


@pytest.mark.outer
def test_a_stop_during_a_reload_kills_an_old_worker_that_is_stuck(tmp_path: Path) -> None:
    drain = ("--drain-timeout", str(2 * PATIENCE))
    with start(tmp_path, *drain) as server, server.client() as client:
        client.who()
        client.send(b"SPIN\n")
        (old,) = server.workers()
        until(lambda: old.cpu_times().user > 0.5, "the worker is computing")
        server.send_signal(signal.SIGHUP)
        server.wait_for("worker.ready", 2)
        assert server.stop() == 0
        assert not server.events("server.reloaded")  # An old worker ran until the end.
        [killed] = server.events("worker.killed")
        assert killed["gserver.child_pid"] == old.pid
        assert not server.events("server.forced")


@pytest.mark.outer
def test_a_reload_with_a_missing_worker_keeps_the_others_until_one_is_ready(tmp_path: Path) -> None:
    with start(tmp_path, "--workers", "2") as server, ExitStack() as stack:
        staying, missing = server.workers()
        (client,) = clients_of(server, staying, 1, stack)
        (tmp_path / "extra.py").write_text("raise RuntimeError('half a deploy')")
        missing.kill()
        server.wait_for("worker.died", 3)
        server.send_signal(signal.SIGHUP)
        server.wait_for("server.reload_failed")
        assert int(client.ask(b"PID")) == staying.pid
        assert server.who() == 2
        assert not server.events("server.reloaded")
        (tmp_path / "extra.py").write_text(MODULE)
        server.send_signal(signal.SIGHUP)
        server.wait_for("server.reloaded")
        until(
            lambda: len(server.workers()) == 2 and staying not in server.workers(),
            "both workers are new",
        )


@pytest.mark.parametrize("text", ["\u00e9" * 5000, "\ud800"])
def test_any_error_text_fails_a_reload_and_not_the_server(tmp_path: Path, text: str) -> None:
    with start(tmp_path) as server:
        (tmp_path / "extra.py").write_text(f"raise RuntimeError({text!r})")
        server.send_signal(signal.SIGHUP)
        assert "RuntimeError" in server.wait_for("server.reload_failed")["message"]
        assert server.who() == 1


@pytest.mark.outer
def test_a_dead_worker_is_retried_while_its_module_is_broken(tmp_path: Path) -> None:
    with start(tmp_path) as server:
        (tmp_path / "extra.py").write_text("raise RuntimeError('out of luck')")
        server.workers()[0].kill()
        assert "RuntimeError: out of luck" in server.wait_for("worker.died", 3)["message"]
        (tmp_path / "extra.py").write_text(MODULE)
        assert server.who() == 1


@pytest.mark.outer
@pytest.mark.parametrize("moment", [0, 0.2, 0.4, 0.6])
def test_a_stop_during_a_reload_is_a_stop(tmp_path: Path, moment: float) -> None:
    with start(tmp_path, "--workers", "2", "--drain-timeout", "60") as server:
        server.send_signal(signal.SIGHUP)
        server.wait_for("server.reloading")
        time.sleep(moment)
        code, seconds = timed(server.stop)
        assert code == 0
        assert seconds < 30  # The stop did not wait for the drain timeout.
        assert server.stderr == ""
    assert left_over(tmp_path) == []


# Programs of handlers.


SPAWN = """
import subprocess
from gserver.commands import command

@command("SPAWN")
def spawn(request):
    unused = subprocess.DEVNULL
    return subprocess.Popen(["sleep", "600"], stdout=unused, stderr=unused).pid
"""


@pytest.mark.outer
def test_handlers_programs_are_killed_with_a_dead_worker_but_survive_a_reload(
    tmp_path: Path,
) -> None:
    with extended(tmp_path, SPAWN) as server:

        def spawned() -> psutil.Process:
            with server.client() as client:
                return psutil.Process(int(client.ask(b"SPAWN")))

        surviving = spawned()
        server.send_signal(signal.SIGHUP)
        server.wait_for("server.reloaded")
        ended = spawned()
        server.workers()[0].kill()
        server.wait_for("worker.ready", 3)
        until(lambda: not is_alive(ended), "the program has ended")
        assert surviving.status() == psutil.STATUS_SLEEPING
        surviving.kill()


@contextmanager
def frozen(process: psutil.Process) -> Iterator[None]:
    """Freeze a process so that it cannot be killed, as if it waited for a disk endlessly.

    This uses the kernel's freezer. After the body the process is thawed, so a pending SIGKILL
    takes effect.
    """
    group = Path(f"/sys/fs/cgroup/freezer/gserver-{process.pid}")
    if not os.access(group.parent / "cgroup.procs", os.W_OK):
        pytest.skip("freezing a process needs root and the freezer of cgroups, version 1")
    group.mkdir()
    state = group / "freezer.state"
    try:
        (group / "cgroup.procs").write_text(str(process.pid))
        state.write_text("FROZEN")
        until(lambda: state.read_text() == "FROZEN\n", "the process is frozen")
        yield
    finally:
        state.write_text("THAWED")
        until(lambda: not is_alive(process), "the process has ended")
        until(lambda: not (group / "cgroup.procs").read_text(), "the group is empty")
        group.rmdir()


@pytest.mark.outer
@pytest.mark.parametrize(
    "words", [("--workers", "1"), ("--workers", "2", "--admin-port", "0")], ids=["alone", "of two"]
)
def test_a_stop_completes_even_if_a_worker_cannot_be_killed(words: tuple[str, ...]) -> None:
    with Running(*words, "--drain-timeout", "1") as server:
        server.wait_for("worker.ready", int(words[1]))
        if "--admin-port" in words:
            server.wait_for("agent.ready")
        stuck = server.workers()[0]
        with frozen(stuck):
            agents = len(server.events("agent.ready"))
            for _ in range(2):
                server.send_signal(signal.SIGTERM)
                server.wait_for("server.draining")
                time.sleep(0.3)  # Sooner, the second signal would count as forwarded.
            assert server.process.wait(1 + GIVE_UP_SECONDS + LIMIT) == 1
            assert (
                server.wait_for("server.stopped")["message"]
                == f"stopped, forced; worker {stuck.pid} could not be killed"
            )
            assert len(server.events("agent.ready")) == agents


@pytest.mark.outer
def test_a_worker_that_cannot_be_killed_does_not_delay_a_reload() -> None:
    with Running("--workers", "2", "--drain-timeout", "1") as server:
        server.wait_for("worker.ready", 2)
        stuck = server.workers()[0]
        with frozen(stuck):
            for reloads in (1, 2):
                server.send_signal(signal.SIGHUP)
                server.wait_for("server.reloaded", reloads)
            [event] = server.events("worker.stuck")
            assert event["gserver.child_pid"] == stuck.pid
            assert len([worker for worker in server.workers() if worker != stuck]) == 2
            assert server.who() == 1
        died = server.wait_for("worker.died")
        assert died["gserver.child_pid"] == stuck.pid
        assert "another" not in died["message"], "it has already been replaced"


@pytest.mark.outer
def test_a_hung_worker_that_cannot_be_killed_is_replaced(tmp_path: Path) -> None:
    with start(tmp_path, "--hang-timeout", "1", "--admin-port", "0") as server:
        server.wait_for("agent.ready")
        stuck = server.workers()[0]
        with frozen(stuck):
            server.wait_for("worker.stuck")
            server.wait_for("worker.ready", 2)
            with server.client() as client:
                assert int(client.ask(b"PID")) != stuck.pid
        died = server.wait_for("worker.died")
        assert died["gserver.child_pid"] == stuck.pid
        assert "another" not in died["message"], "it has already been replaced"
        assert status(server)["server"]["worker_restarts"] == 1


@pytest.mark.outer
def test_a_reload_without_a_free_slot_fails_with_the_reason() -> None:
    with Running("--drain-timeout", "1") as server, ExitStack() as stack:
        for reloads in (1, 2):
            stack.enter_context(frozen(server.workers()[-1]))
            server.send_signal(signal.SIGHUP)
            server.wait_for("server.reloaded", reloads)
        server.send_signal(signal.SIGHUP)
        failed = server.wait_for("server.reload_failed")
        assert "2 workers were killed and have not ended" in failed["message"]
        assert server.who() == 1


@pytest.mark.outer
def test_a_stop_does_not_wait_for_a_worker_that_cannot_be_killed() -> None:
    with Running("--hang-timeout", "1", "--drain-timeout", "300") as server:
        stuck = server.workers()[0]
        with frozen(stuck):
            server.wait_for("worker.stuck")
            server.wait_for("worker.ready", 2)
            server.send_signal(signal.SIGTERM)
            assert server.process.wait(LIMIT) == 1
            assert server.wait_for("server.stopped")["message"] == (
                f"stopped; worker {stuck.pid} could not be killed"
            )


@pytest.mark.outer
def test_a_worker_that_learns_late_of_a_drain_still_meets_its_deadline(tmp_path: Path) -> None:
    drain = ("--drain-timeout", str(6 * PATIENCE))
    options = ("--admin-port", "0", *drain, "--hang-timeout", "0")
    with start(tmp_path, *options) as server:
        server.wait_for("agent.ready")
        with stopped(*server.agents()):  # A drain waits for the agent that a reload terminates.
            server.send_signal(signal.SIGHUP)
            server.wait_for("server.reloaded")
            with server.client() as client:
                client.who()
                client.send(b"SLEEP\n")
                server.send_signal(signal.SIGTERM)
                server.wait_for("worker.cut_off")
                server.wait_for("server.stopped")
        killed = {event["gserver.child_pid"] for event in server.events("worker.killed")}
        assert not killed


@pytest.mark.outer
def test_a_client_that_has_its_last_reply_does_not_count_as_cut_off() -> None:
    with Running("--drain-timeout", str(PATIENCE)) as server, server.client() as client:
        client.who()
        server.send_signal(signal.SIGTERM)
        assert server.exit_code() == 0  # The client has not closed its side yet.
        assert not server.events("worker.cut_off")
