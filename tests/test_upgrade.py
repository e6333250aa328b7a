"""Upgrades: SIGHUP after the installed files have changed."""

import json
import os
import signal
import socket
import subprocess
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from gserver.certificates import Certificates
from gserver.config import UPGRADE_VARIABLE, Config
from gserver.errors import EXIT_USAGE, UsageError
from gserver.scoreboard import SERVER_ROOM, WORKER_CELLS, Scoreboard
from gserver.supervise.child import WORKER, Child, Inherited, resume_children
from gserver.supervise.phases import Generation
from gserver.supervise.upgrade import State, with_previous
from lab.admin import status
from lab.installed import Installed
from lab.running import (
    LIMIT,
    PATIENCE,
    Client,
    Running,
    argv,
    environment,
    gserver,
    is_alive,
    until,
)

NEW_METRIC = (
    '    Metric("clients", Source.WORKER',
    '    Metric("spoons", Source.WORKER, Kind.COUNTER, "Spoons.", json="server.spoons"),\n'
    '    Metric("clients", Source.WORKER',
)


@pytest.fixture
def installed(tmp_path: Path) -> Installed:
    return Installed(tmp_path)


def connected(server: Running, stack: ExitStack, count: int) -> list[Client]:
    """This many clients of a server whose processes have started, with the code of the start."""
    listening = server.wait_for("server.listening")
    server.wait_for("worker.ready", listening["gserver.workers"])
    if listening["gserver.admin_port"] is not None:
        server.wait_for("agent.ready")
    clients = [stack.enter_context(server.client()) for _ in range(count)]
    until(lambda: clients[0].who() == count, "the clients are counted")
    return clients


def reload(server: Running, number: int = 1) -> None:
    server.send_signal(signal.SIGHUP)
    server.wait_for("server.reloaded", number)


def test_an_upgrade_keeps_the_process_the_ports_and_every_client(installed: Installed) -> None:
    # Half a line must not be too slow, even if the machine is.
    options = argv("--admin-port 0 --workers 2 --line-timeout 0")
    with installed.start(*options) as server, ExitStack() as stack:
        clients = connected(server, stack, 20)
        where = clients[0].ask(b"WHERE")
        old = {*server.workers(), *server.agents()}
        clients[0].send(b"WH")
        installed.set_version("1.0.1")
        reload(server)
        upgraded = server.wait_for("server.upgraded")
        assert upgraded["message"] == "upgraded: version 1.0.1, before: 1.0.0"
        assert upgraded["process.pid"] == server.pid
        server.wait_for("agent.ready", 2)
        assert clients[0].ask(b"ERE") == where
        assert {client.who() for client in clients} == {20}
        with server.client() as new:
            assert new.ask(b"WHERE") == where
        until(lambda: not any(is_alive(each) for each in old), "the old processes have ended")
        figures = status(server)
        assert figures["server"]["version"] == "1.0.1"
        assert figures["clients"]["handed_over"] == 20
        assert figures["clients"]["accepted"] >= 21
        assert psutil.Process(server.pid).cmdline()[-8:] == ["--port", "0", *options]
        assert server.stop() == 0
        assert not server.events("worker.died")


def test_without_changed_files_the_supervisor_stays_as_it_is(installed: Installed) -> None:
    with installed.start() as server:
        reload(server)
        assert not server.events("server.upgraded")


@pytest.mark.parametrize(
    ("module", "old", "new", "reason"),
    [
        ("serve/limits.py", "import socket\n", "import sockets\n", "No module named 'sockets'"),
        pytest.param(
            "supervise/phases.py",
            "class Lifecycle:",
            "class Lifecycle",
            "SyntaxError",
            marks=pytest.mark.outer,
        ),
        pytest.param(
            "cli/main.py",
            "def main() -> None:",
            "def main() -> None",
            "SyntaxError",
            marks=pytest.mark.outer,
        ),
        pytest.param(
            "supervise/child.py",
            "    suspected_at: float | None = None\n",
            "    suspicious_since: float | None = None\n",
            "unexpected keyword argument 'suspected_at'",
            marks=pytest.mark.outer,
        ),
        (
            "config.py",
            "    max_clients: int",
            "    most_clients: int",
            "the new version has no option --max-clients",
        ),
        pytest.param(
            "scoreboard.py",
            "WORKER_ROOM, SERVER_ROOM = 96, 192",
            "WORKER_ROOM, SERVER_ROOM = 128, 192",
            "has another version than the installed code: restart the server",
            marks=pytest.mark.outer,
        ),
        pytest.param(
            "supervise/upgrade.py",
            "FORMAT = 2\n",
            "FORMAT = 3\n",
            "the two versions do not understand each other: restart the server",
            marks=pytest.mark.outer,
        ),
    ],
)
def test_a_version_that_cannot_run_leaves_everything_as_it_was(
    installed: Installed, module: str, old: str, new: str, reason: str
) -> None:
    with installed.start("--max-clients", "500") as server, ExitStack() as stack:
        clients = connected(server, stack, 5)
        processes = server.processes()
        with installed.changed(module, old, new):
            server.send_signal(signal.SIGHUP)
            failed = server.wait_for("server.reload_failed")
        assert "the old workers stay: the new version cannot run: " in failed["message"]
        assert reason in failed["message"]
        assert {client.who() for client in clients} == {5}
        assert server.processes() == processes
        assert all(is_alive(each) for each in processes)
        installed.set_version("1.0.1")
        reload(server)
        assert {client.who() for client in clients} == {5}


def test_a_version_with_more_metrics_shares_the_scoreboard(installed: Installed) -> None:
    with installed.start("--admin-port", "0") as server, ExitStack() as stack:
        clients = connected(server, stack, 5)
        installed.change("metrics.py", *NEW_METRIC)
        reload(server)
        server.wait_for("agent.ready", 2)
        assert status(server)["server"]["spoons"] == 0
        assert {client.who() for client in clients} == {5}


@pytest.mark.outer
def test_an_upgrade_and_the_way_back(installed: Installed) -> None:
    with installed.start("--admin-port", "0") as server, ExitStack() as stack:
        clients = connected(server, stack, 5)
        with installed.changed("metrics.py", *NEW_METRIC):
            reload(server)
        reload(server, 2)
        assert len(server.events("server.upgraded")) == 2
        assert {client.who() for client in clients} == {5}
        assert server.stop() == 0


@pytest.mark.outer
def test_a_new_version_whose_workers_fail_keeps_the_old_workers(installed: Installed) -> None:
    with installed.start() as server, ExitStack() as stack:
        clients = connected(server, stack, 5)
        [old] = server.workers()
        with installed.changed(
            "serve/worker.py",
            "    Worker(instructions).run()\n",
            "    raise SystemError('broken')\n",
        ):
            server.send_signal(signal.SIGHUP)
            server.wait_for("server.upgraded")
            server.wait_for("server.reload_failed")
        assert is_alive(old)
        assert {client.who() for client in clients} == {5}
        reload(server)
        assert {client.who() for client in clients} == {5}


@pytest.mark.outer
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
@pytest.mark.parametrize("delay", [0.0, 0.1, 0.3, 0.5, 0.6, 0.7])
def test_a_stop_at_any_moment_of_an_upgrade_is_a_stop(
    installed: Installed, number: signal.Signals, delay: float
) -> None:
    with installed.start() as server, ExitStack() as stack:
        clients = connected(server, stack, 5)
        installed.set_version("1.0.1")
        server.send_signal(signal.SIGHUP)
        time.sleep(delay)
        server.send_signal(number)
        if number == signal.SIGUSR2:
            for client in clients:
                client.sock.close()
        assert server.exit_code() == 0
        assert server.events("server.stopped")
        assert server.stderr == ""


@pytest.mark.outer
def test_reloads_during_an_upgrade_end_with_the_last_version(installed: Installed) -> None:
    with installed.start("--workers", "2", "--admin-port", "0") as server, ExitStack() as stack:
        clients = connected(server, stack, 50)
        for number in range(1, 9):
            installed.set_version(f"1.0.{number}")
            server.send_signal(signal.SIGHUP)
            time.sleep(0.17 * (number % 4))

        def is_last() -> bool:
            actions = [event["event.action"] for event in server.events()]
            last = len(actions) - actions[::-1].index("server.upgraded")
            return "server.reloaded" in actions[last:]

        until(
            lambda: (
                "version 1.0.8"
                in "".join(event["message"] for event in server.events("server.upgraded"))
            ),
            "the last version runs",
        )
        until(is_last, "the last reload has ended")
        until(lambda: len(server.workers()) == 2, "the surplus worker has ended")
        assert {client.who() for client in clients} == {50}
        assert not server.events("worker.died")
        assert not server.events("server.reload_failed")


@pytest.mark.outer
def test_a_trial_that_hangs_fails_the_reload(installed: Installed) -> None:
    installed.change("supervise/upgrade.py", "TRIAL_SECONDS = 30.0", "TRIAL_SECONDS = 1.0")
    with installed.start() as server, server.client() as client:
        with installed.changed(
            "supervise/supervisor.py",
            "    state = upgrade.State.decode(text)\n",
            "    import time; time.sleep(60)\n    state = upgrade.State.decode(text)\n",
        ):
            server.send_signal(signal.SIGHUP)
            failed = server.wait_for("server.reload_failed")
        assert "it was not ready within 1 s" in failed["message"]
        assert client.who() == 1
        server_process = psutil.Process(server.pid)
        until(lambda: not any(map(is_trial, server_process.children())), "the trial is killed")


def is_trial(process: psutil.Process) -> bool:
    with suppress(psutil.Error):  # It has ended meanwhile.
        return "trial" in process.cmdline()
    return False


@pytest.mark.outer
def test_upgrades_leave_nothing_behind(installed: Installed) -> None:
    with installed.start("--workers", "2", "--admin-port", "0") as server, ExitStack() as stack:
        clients = connected(server, stack, 100)
        supervisor = psutil.Process(server.pid)

        def upgrade(number: int) -> tuple[int, int]:
            installed.set_version(f"1.0.{number}")
            reload(server, number)
            server.wait_for("agent.ready", number + 1)
            children = until(
                lambda: (found := supervisor.children()) and len(found) == 3 and found,
                "the old agent has ended",
            )
            files = sum(len(os.listdir(f"/proc/{each.pid}/fd")) for each in children)
            return supervisor.num_fds(), files

        before = [upgrade(number) for number in range(1, 3)][-1]
        after = [upgrade(number) for number in range(3, 6)][-1]
        assert after == before
        assert {client.who() for client in clients} == {100}


@pytest.mark.outer
@pytest.mark.parametrize(
    ("module", "line", "is_upgraded"),
    [
        # The old program has blocked signals: the new one takes it.
        ("supervise/upgrade.py", "            os.execve(", True),
        ("supervise/supervisor.py", "        logs.stop()", True),
        # The old program has noted it, and takes it before it goes on.
        ("supervise/supervisor.py", "        if not self._signals.try_block():", False),
    ],
)
def test_a_signal_just_before_the_new_program_starts_is_not_lost(
    installed: Installed, module: str, line: str, is_upgraded: bool
) -> None:
    indent = line[: len(line) - len(line.lstrip())]
    # As from another process: the kernel gives it to any thread that does not block it.
    stop = "__import__('os').kill(__import__('os').getpid(), 15); __import__('time').sleep(0.05)"
    installed.change(module, line, f"{indent}{stop}\n{line}")
    with installed.start() as server:
        installed.set_version("1.0.1")
        server.send_signal(signal.SIGHUP)
        assert server.exit_code() == 0
        assert bool(server.events("server.upgraded")) is is_upgraded
        assert server.events("server.draining")


@pytest.mark.outer
def test_files_that_change_during_a_trial_are_tried_again(installed: Installed) -> None:
    pause = f"    import time; time.sleep({PATIENCE})\n    state = upgrade.State.decode(text)\n"
    with installed.start() as server, server.client() as client:
        installed.change(
            "supervise/supervisor.py", "    state = upgrade.State.decode(text)\n", pause
        )
        server.send_signal(signal.SIGHUP)
        time.sleep(0.7)
        with installed.changed("cli/main.py", "def main() -> None:", "def main() -> None"):
            failed = server.wait_for("server.reload_failed")
        assert "SyntaxError" in failed["message"]
        assert client.who() == 1


@pytest.mark.outer
def test_a_server_without_a_worker_at_that_moment_survives_an_upgrade(installed: Installed) -> None:
    """The module is broken: each worker ends before it is ready."""
    (installed.package.parent / "own.py").write_text(
        "from gserver.commands import command\n@command('X')\ndef x(request): return 1\n"
    )
    with installed.start("--commands", "own", cwd=installed.package.parent) as server:
        (installed.package.parent / "own.py").write_text("no Python")
        [worker] = server.workers()
        worker.kill()
        server.wait_for("worker.died", 4)
        installed.set_version("1.0.1")
        server.send_signal(signal.SIGHUP)
        server.wait_for("server.upgraded")
        died = len(server.events("worker.died"))
        server.wait_for("worker.died", died + 1)
        (installed.package.parent / "own.py").write_text(
            "from gserver.commands import command\n@command('Y')\ndef y(request): return 2\n"
        )
        server.wait_for("worker.ready", 2)
        with server.client() as client:
            assert client.ask(b"Y") == b"2"


def test_a_new_program_whose_files_are_being_written_starts_again(installed: Installed) -> None:
    variables = {UPGRADE_VARIABLE: "999", "PYTHONDONTWRITEBYTECODE": "1"}
    with ExitStack() as stack:
        stack.enter_context(installed.changed("config.py", "import re\n", "import re and\n"))
        with subprocess.Popen(
            installed.program, env=environment(**variables), stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr
            said = process.stderr.readline()
            assert "the new version cannot start, trying again: SyntaxError" in said
            stack.close()
            # The files are whole again, so it comes as far as the state, which this test lacks.
            assert process.wait(LIMIT) == 2
            assert process.stderr.read().endswith(f"{UPGRADE_VARIABLE} is internal: unset it\n")


# The state.


def test_a_child_without_a_control_socket_is_resumed() -> None:
    saved = Child(WORKER, 0, Generation(7, Certificates()), Inherited(1), socket.socket(), 0.0)
    saved.control.close()
    [resumed] = resume_children([saved.save()], {7: saved.generation})
    assert (resumed.pid, resumed.control.fileno(), resumed.state) == (1, -1, saved.state)


def state(**changes: object) -> State:
    first = Generation(0, Certificates("a"), is_proven=True, is_complete=True)
    second = Generation(3, Certificates("b"), previous=first)
    whole = State(
        config=Config(max_clients=7, server_id="here"),
        version="1",
        code_version="x",
        slots=3,
        scoreboard_fd=4,
        endpoint_fds=[5],
        endpoint_files=[None],
        admin_fds=[],
        manager={},
        generations={0: first, 3: second},
        lifecycle={},
        children=[{"control_fd": 9}, {"control_fd": -1}],
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


def test_a_state_survives_its_encoding() -> None:
    before = state()
    after = State.decode(before.encode())
    assert after.config == before.config
    assert after.fds == [4, 5, 9]
    first, second = after.generations[0], after.generations[3]
    assert second.previous is first
    assert (second.certificates.chain, second.is_proven, first.is_complete) == ("b", False, True)


def test_a_state_has_all_generations_that_may_be_gone_back_to() -> None:
    first = Generation(0, Certificates())
    second = Generation(1, Certificates(), previous=first)
    third = Generation(2, Certificates(), previous=second)
    after = State.decode(state(generations=with_previous([third])).encode())
    assert sorted(after.generations) == [0, 1, 2]
    assert after.generations[2].previous is after.generations[1]


def test_an_option_that_is_gone_matters_only_if_it_was_set() -> None:
    text = state().encode()
    assert "write_timeout_seconds" not in text
    saved = json.loads(text)
    saved["options"]["spoons_seconds"] = 4
    with pytest.raises(UsageError, match="the new version has no option --spoons"):
        State.decode(json.dumps(saved))


def test_options_that_contradict_each_other_now_are_an_error() -> None:
    with pytest.raises(UsageError, match="--tls-key needs --tls-cert"):
        State.decode(state(config=Config(tls_key="key.pem")).encode())


def test_a_redis_url_that_is_refused_now_is_an_error() -> None:
    url = "redis://h?sentinel_username=x"
    with pytest.raises(UsageError, match="--redis-url: sentinel_username"):
        State.decode(state(config=Config(redis_url=url)).encode())


def test_a_scoreboard_gets_the_missing_names_and_keeps_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = Scoreboard.create(2)
    old.cells[old.cell("clients", 1)] = 5
    monkeypatch.setattr("gserver.scoreboard.WORKER_CELLS", ("spoons", *WORKER_CELLS[3:]))
    with pytest.raises(UsageError, match="restart the server"):
        Scoreboard.attach(old.fd, 2)
    Scoreboard.check(old.fd, 2)
    new = Scoreboard.attach(old.fd, 2, may_extend=True)
    assert new.clients() == 5
    assert new.cell("spoons", 0) > old.cell(WORKER_CELLS[-1], 1)
    assert Scoreboard.attach(old.fd, 2).cell("spoons", 0) == new.cell("spoons", 0)


def test_a_scoreboard_without_room_for_new_names_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = Scoreboard.create(2)
    names = tuple(f"name{number}" for number in range(SERVER_ROOM))
    monkeypatch.setattr("gserver.scoreboard.SERVER_CELLS", names)
    for use in (
        lambda: Scoreboard.check(old.fd, 2),
        lambda: Scoreboard.attach(old.fd, 2, may_extend=True),
    ):
        with pytest.raises(UsageError, match="restart the server"):
            use()


@pytest.mark.parametrize("value", ["", "x", "99", "0"])
def test_the_variable_of_an_upgrade_is_not_for_people(value: str) -> None:
    done = gserver(**{UPGRADE_VARIABLE: value})
    assert done.returncode == EXIT_USAGE
    assert done.stderr == f"gserver: {UPGRADE_VARIABLE} is internal: unset it\n"
