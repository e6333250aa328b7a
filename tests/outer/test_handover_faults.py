"""Handovers of real servers that are killed, stopped or reloaded again at each step."""

import os
import signal
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from gserver.supervise.supervisor import HANDOVER_SECONDS
from lab.running import Client, Running, extended, is_alive, is_refused, stopped, until
from lab.tls_client import certified, trust

#: Clients of the old worker: three batches.
CLIENTS = 600
BATCH = 250

#: Kills its process before, or after, the call with this number of a function.
FAULT = """
import os, signal, time
from pathlib import Path
from gserver.serve import clients, handover, limits
from gserver.commands import command
from lab.commands import napping, pid

nap = napping("NAP", 3)

def act_at(owner, name, number, act, after=False):
    original, calls = getattr(owner, name), 0
    def wrapped(*arguments, **named):
        nonlocal calls
        calls += 1
        if calls == number and not after:
            act()
        result = original(*arguments, **named)
        if calls == number and after:
            act()
        return result
    setattr(owner, name, wrapped)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def pause():
    Path("paused").touch()
    while not Path("go").exists():
        time.sleep(0.01)
"""

#: Where the successor dies: the call, and which clients are lost with it, at most.
IN_SUCCESSOR = {
    "before its greeting": ("handover.Greeting, 'encode', 1, die", 0),
    "with the first batch unread": ("handover.socket, 'recv_fds', 2, die", 0),
    "before it counts the second batch": ("limits.Limits, 'take_over', 2, die", BATCH),
    "before it answers the second batch": ("limits.Limits, 'take_over', 2, die, True", BATCH),
    "before it serves the second batch": ("clients.Clients, 'add', 251, die", 2 * BATCH),
    "in the second batch": ("clients.Clients, 'add', 300, die", 2 * BATCH),
    "after the last batch": ("limits.Limits, 'end_arrival', 1, die", CLIENTS),
}
#: The same for the old worker.
IN_OLD_WORKER = {
    "before the greeting": ("handover.Sender, 'greet', 1, die", CLIENTS),
    "before the first batch": ("handover.Sender, '_send', 1, die", CLIENTS),
    "with the second batch unanswered": ("handover.Sender, '_receive', 3, die", CLIENTS - BATCH),
    "before it uncounts the second batch": ("limits.Limits, 'hand_over', 2, die", CLIENTS - BATCH),
    "after it uncounts it": ("limits.Limits, 'hand_over', 2, die, True", CLIENTS - 2 * BATCH),
    "in the middle of closing it": ("clients.Clients, 'forget', 300, die", CLIENTS - 2 * BATCH),
    "after the last batch": ("handover.Sender, 'close', 1, die", 0),
}


def survivors(clients: list[Client]) -> list[Client]:
    """The clients that are still connected. Each of them is asked, and gets its one reply."""
    found = []
    for client in clients:
        reply = b""
        with suppress(OSError):
            client.send(b"WHY\n")
            reply = client.line()
        assert reply in (b"42\n", b"")
        if reply:
            found.append(client)
    return found


def crowd(server: Running, stack: ExitStack) -> list[Client]:
    clients = [stack.enter_context(server.client()) for _ in range(CLIENTS)]
    until(lambda: clients[0].who() == CLIENTS, "the clients are counted")
    return clients


@pytest.mark.parametrize("step", IN_SUCCESSOR)
def test_if_the_successor_dies_only_its_own_clients_are_lost(tmp_path: Path, step: str) -> None:
    call, most_lost = IN_SUCCESSOR[step]
    with extended(tmp_path, FAULT) as server, ExitStack() as stack:
        clients = crowd(server, stack)
        [old] = server.workers()
        (tmp_path / "extra.py").write_text(f"{FAULT}\nact_at({call})\n")
        server.send_signal(signal.SIGHUP)
        failed = server.wait_for("server.reload_failed")
        assert "a new worker ended early: killed by SIGKILL" in failed["message"]
        alive = survivors(clients)
        assert CLIENTS - most_lost <= len(alive)
        assert alive or most_lost == CLIENTS
        until(lambda: server.who() == len(alive) + 1, "WHO is right")
        assert is_alive(old) or most_lost == CLIENTS, "the old worker stays"
        (tmp_path / "extra.py").write_text(FAULT)
        server.send_signal(signal.SIGHUP)
        server.wait_for("server.reloaded")
        assert len(survivors(alive)) == len(alive)
        assert server.who() in (len(alive) + 1, len(alive) + 2)


@pytest.mark.parametrize("step", IN_OLD_WORKER)
def test_if_the_old_worker_dies_only_its_own_clients_are_lost(tmp_path: Path, step: str) -> None:
    call, most_lost = IN_OLD_WORKER[step]
    with extended(tmp_path, f"{FAULT}\nact_at({call})\n") as server, ExitStack() as stack:
        clients = crowd(server, stack)
        (tmp_path / "extra.py").write_text(FAULT)
        server.send_signal(signal.SIGHUP)
        server.wait_for("server.reloaded")
        assert len(server.events("worker.died")) == 1
        alive = survivors(clients)
        assert CLIENTS - most_lost <= len(alive)
        until(lambda: server.who() == len(alive) + 1, "WHO is right")


def test_if_the_supervisor_dies_all_processes_end(tmp_path: Path) -> None:
    slow = f"{FAULT}\nact_at(handover.Sender, '_send', 2, lambda: time.sleep(60))\n"
    with extended(tmp_path, slow) as server, ExitStack() as stack:
        crowd(server, stack)
        server.send_signal(signal.SIGHUP)
        server.wait_for("worker.ready", 2)
        workers = server.workers()
        server.kill()
        until(lambda: not any(is_alive(worker) for worker in workers), "all workers have ended")


def has_reloaded(server: Running) -> bool:
    """Whether no reload is in progress."""
    actions = [str(event["event.action"]) for event in server.events()]
    return [each for each in actions if each.startswith("server.reload")][-1] == "server.reloaded"


#: The event, and which one of its kind, that a signal is noted by.
NOTED = {
    signal.SIGTERM: ("server.draining", 1),
    signal.SIGUSR2: ("server.retiring", 1),
    signal.SIGHUP: ("server.reloading", 2),
}


@pytest.mark.parametrize("number", NOTED)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_signal_in_the_middle_has_its_usual_effect(
    tmp_path: Path, number: signal.Signals, batch: int
) -> None:
    pause = f"{FAULT}\nact_at(handover.Sender, '_send', {batch}, pause)\n"
    with extended(tmp_path, pause, "--drain-timeout", "60") as server, ExitStack() as stack:
        clients = crowd(server, stack)
        server.send_signal(signal.SIGHUP)
        until((tmp_path / "paused").exists, "it is in the middle")
        server.send_signal(number)
        server.wait_for(*NOTED[number])
        time.sleep(0.2)
        (tmp_path / "go").touch()
        if number == signal.SIGTERM:
            assert server.exit_code() == 0
            assert {client.rest() for client in clients} == {b""}
        elif number == signal.SIGUSR2:
            time.sleep(1)
            assert len(survivors(clients)) == CLIENTS
            for client in clients:
                client.sock.close()
            assert server.exit_code() == 0
        else:
            until(lambda: has_reloaded(server), "the second reload has ended")
            assert len(survivors(clients)) == CLIENTS
            assert server.who() == CLIENTS + 1
        assert not server.events("worker.died")
        assert not server.events("worker.cut_off")


def test_a_worker_without_enough_descriptors_takes_no_clients(tmp_path: Path) -> None:
    """The limit was lowered after the start: the new worker has room for fewer clients."""
    with extended(tmp_path, FAULT, "--max-clients", "800") as server, ExitStack() as stack:
        clients = crowd(server, stack)
        psutil.Process(server.pid).rlimit(psutil.RLIMIT_NOFILE, (500, 500))
        server.send_signal(signal.SIGHUP)
        assert "descriptors for 436 clients" in server.wait_for("server.reload_failed")["message"]
        assert len(survivors(clients)) == CLIENTS
        assert server.who() == CLIENTS + 1
        until(lambda: len(server.workers()) == 1, "the new worker has ended")


def test_an_old_worker_without_a_free_descriptor_keeps_its_clients(tmp_path: Path) -> None:
    with extended(tmp_path, FAULT) as server, ExitStack() as stack:
        clients = crowd(server, stack)
        [old] = server.workers()
        old.rlimit(psutil.RLIMIT_NOFILE, (10, 20_000))
        server.send_signal(signal.SIGHUP)
        failed = server.wait_for("server.reload_failed")
        assert "the old worker has no free descriptor" in failed["message"]
        assert len(survivors(clients)) == CLIENTS
        old.rlimit(psutil.RLIMIT_NOFILE, (20_000, 20_000))
        assert server.who() == CLIENTS + 1
        server.send_signal(signal.SIGHUP)
        server.wait_for("server.reloaded")
        assert len(survivors(clients)) == CLIENTS


#: The old worker pauses before it sends the second batch.
IN_SECOND_BATCH = f"{FAULT}\nact_at(handover.Sender, '_send', 2, pause)\n"


def moved_half_way(
    folder: Path, server: Running, stack: ExitStack
) -> tuple[list[Client], psutil.Process]:
    """Connect clients, and hand over one batch: then the old worker has no free descriptor."""
    clients = crowd(server, stack)
    [old] = server.workers()
    server.send_signal(signal.SIGHUP)
    until((folder / "paused").exists, "a batch has moved")
    old.rlimit(psutil.RLIMIT_NOFILE, (10, 20_000))
    (folder / "go").touch()
    return clients, old


def test_a_handover_that_stopped_half_way_goes_on_once_there_are_descriptors(
    tmp_path: Path,
) -> None:
    with extended(tmp_path, IN_SECOND_BATCH) as server, ExitStack() as stack:
        clients, old = moved_half_way(tmp_path, server, stack)
        time.sleep(2.5)  # It is tried again each second.
        assert not server.events("server.reload_failed")
        assert len(server.workers()) == 2
        assert len(survivors(clients)) == CLIENTS
        old.rlimit(psutil.RLIMIT_NOFILE, (20_000, 20_000))
        server.wait_for("server.reloaded")
        assert len(survivors(clients)) == CLIENTS


def test_a_successor_that_dies_after_a_handover_that_stopped_half_way_hides_no_later_failure(
    tmp_path: Path,
) -> None:
    options = ("--max-clients", "800")
    with extended(tmp_path, IN_SECOND_BATCH, *options) as server, ExitStack() as stack:
        clients, old = moved_half_way(tmp_path, server, stack)
        [new] = [worker for worker in server.workers() if worker.pid != old.pid]
        time.sleep(0.5)  # The first try has failed.
        new.kill()
        server.wait_for("server.reload_failed")
        old.rlimit(psutil.RLIMIT_NOFILE, (20_000, 20_000))
        assert len(survivors(clients)) == CLIENTS - BATCH
        psutil.Process(server.pid).rlimit(psutil.RLIMIT_NOFILE, (300, 300))
        server.send_signal(signal.SIGHUP)
        assert "descriptors for" in server.wait_for("server.reload_failed", 2)["message"]


def test_a_handover_that_fails_in_a_lame_duck_closes_no_client(tmp_path: Path) -> None:
    pause = f"{FAULT}\nact_at(handover.Sender, 'greet', 1, pause)\n"
    options = ("--max-clients", "800", "--drain-timeout", "60")
    with extended(tmp_path, pause, *options) as server, ExitStack() as stack:
        clients = crowd(server, stack)
        psutil.Process(server.pid).rlimit(psutil.RLIMIT_NOFILE, (500, 500))
        server.send_signal(signal.SIGHUP)
        until((tmp_path / "paused").exists, "the handover has begun")
        clients.append(stack.enter_context(server.client()))  # The new worker accepts it.
        assert clients[-1].ask(b"WHY") == b"42"
        server.send_signal(signal.SIGUSR2)
        server.wait_for("server.retiring")
        (tmp_path / "go").touch()
        time.sleep(1)
        assert len(survivors(clients)) == CLIENTS + 1
        assert not server.events("server.reload_failed")


def test_a_new_worker_that_dies_in_a_stop_is_no_failed_reload(tmp_path: Path) -> None:
    module = f"{FAULT}\nif Path('slow').exists():\n    pause()\n"
    with extended(tmp_path, module) as server:
        (tmp_path / "slow").touch()
        with server.client() as client, server.client() as idle:
            assert idle.who() == 2
            client.send(b"NAP\n")
            server.send_signal(signal.SIGHUP)
            until((tmp_path / "paused").exists, "the new worker starts")
            [new] = sorted(server.workers(), key=lambda each: each.pid)[1:]
            with stopped(new):  # Else it ends at once.
                server.send_signal(signal.SIGTERM)
                assert idle.line() == b""  # The supervisor is past the signal.
                new.send_signal(signal.SIGSEGV)
            assert server.exit_code() == 0
        assert server.events("worker.died")
        assert not server.events("server.reload_failed")


def test_processes_that_were_all_frozen_during_a_handover_are_spared(tmp_path: Path) -> None:
    """As by `docker pause`: its deadline has passed when they wake."""
    module = f"{FAULT}\nact_at(handover.Sender, 'greet', 1, pause)\n"
    options = ("--drain-timeout", "0", "--hang-timeout", "0")
    with extended(tmp_path, module, *options) as server, ExitStack() as stack:
        clients = crowd(server, stack)
        server.send_signal(signal.SIGHUP)
        until((tmp_path / "paused").exists, "the handover has begun")
        with stopped(psutil.Process(server.pid), *server.workers()):
            time.sleep(HANDOVER_SECONDS + 1)
            (tmp_path / "go").touch()
        server.wait_for("server.reloaded")
        assert len(survivors(clients)) == CLIENTS
        assert not server.events("worker.hung") + server.events("worker.killed")


def test_a_second_reload_does_not_hide_that_the_handover_of_the_first_fails(tmp_path: Path) -> None:
    pause = f"{FAULT}\nact_at(handover.Sender, 'greet', 1, pause)\n"
    with extended(tmp_path, pause, "--max-clients", "800") as server, ExitStack() as stack:
        clients = crowd(server, stack)
        psutil.Process(server.pid).rlimit(psutil.RLIMIT_NOFILE, (500, 500))
        server.send_signal(signal.SIGHUP)
        until((tmp_path / "paused").exists, "the handover has begun")
        server.send_signal(signal.SIGHUP)
        server.wait_for("server.reloading", 2)
        (tmp_path / "go").touch()
        assert "descriptors for 436 clients" in server.wait_for("server.reload_failed")["message"]
        assert len(survivors(clients)) == CLIENTS
        until(lambda: len(server.workers()) == 1, "the new workers have ended")


def test_a_reload_that_fails_after_one_whose_successor_died_says_so(tmp_path: Path) -> None:
    with extended(tmp_path, FAULT, "--max-clients", "800") as server, ExitStack() as stack:
        clients = crowd(server, stack)
        die = f"{FAULT}\nact_at(limits.Limits, 'take_over', 2, die)\n"
        (tmp_path / "extra.py").write_text(die)
        server.send_signal(signal.SIGHUP)
        server.wait_for("server.reload_failed")
        assert len(survivors(clients)) == CLIENTS - BATCH
        (tmp_path / "extra.py").write_text(FAULT)
        psutil.Process(server.pid).rlimit(psutil.RLIMIT_NOFILE, (300, 300))
        server.send_signal(signal.SIGHUP)
        failed = server.wait_for("server.reload_failed", 2)
        assert "descriptors for 236 clients" in failed["message"]


#: For a minute the old worker waits for the first command; the second one computes.
LONG = """
long = napping("LONG", 60)

@command("COMPUTE", may_block=False)
def compute(request):
    end = time.monotonic() + 1.7
    while time.monotonic() < end:
        pass
    return "done"
"""


def test_a_stop_in_a_reload_spares_a_successor_that_computes(tmp_path: Path) -> None:
    with extended(tmp_path, FAULT + LONG, "--drain-timeout", "20") as server, ExitStack() as stack:
        busy, other = (stack.enter_context(server.client()) for _ in range(2))
        busy.send(b"LONG\n")
        until(lambda: other.who() == 2, "the command runs")
        server.send_signal(signal.SIGHUP)
        server.wait_for("worker.handed_over")
        other.send(b"COMPUTE\n")
        time.sleep(0.1)  # It computes.
        server.send_signal(signal.SIGTERM)
        assert other.line() == b"done\n"
        assert other.line() == b""
        assert not server.events("worker.hung")


def test_in_a_lame_duck_the_port_is_closed_while_an_old_worker_has_clients(tmp_path: Path) -> None:
    with extended(tmp_path, FAULT + LONG, "--drain-timeout", "120") as server, ExitStack() as stack:
        busy, other = (stack.enter_context(server.client()) for _ in range(2))
        busy.send(b"LONG\n")
        until(lambda: other.who() == 2, "the command runs")
        server.send_signal(signal.SIGHUP)
        server.wait_for("worker.handed_over")
        server.send_signal(signal.SIGUSR2)
        until(lambda: is_refused(server.port), "new clients are refused", 10)
        assert other.who() == 2


@pytest.mark.parametrize("call", ["handover.Greeting, 'encode'", "limits.Limits, 'take_over'"])
def test_a_successor_that_hangs_is_killed_before_the_old_worker(tmp_path: Path, call: str) -> None:
    options = ("--drain-timeout", "0", "--hang-timeout", "0")
    with extended(tmp_path, FAULT, *options) as server, ExitStack() as stack:
        clients = crowd(server, stack)
        [old] = server.workers()
        stop = "lambda: os.kill(os.getpid(), signal.SIGSTOP)"
        (tmp_path / "extra.py").write_text(f"{FAULT}\nact_at({call}, 1, {stop})\n")
        server.send_signal(signal.SIGHUP)
        server.wait_for("server.reload_failed")
        assert is_alive(old)
        assert len(survivors(clients)) == CLIENTS
        until(lambda: server.who() == CLIENTS + 1, "WHO is right")
        until(lambda: len(server.workers()) == 1, "the new worker has ended")


@pytest.mark.parametrize("role", ["old", "new"])
def test_one_worker_that_is_told_to_end_loses_only_its_own_clients(
    tmp_path: Path, role: str
) -> None:
    with extended(tmp_path, IN_SECOND_BATCH) as server, ExitStack() as stack:
        clients = crowd(server, stack)
        [old] = server.workers()
        server.send_signal(signal.SIGHUP)
        until((tmp_path / "paused").exists, "it is in the middle")
        [new] = [worker for worker in server.workers() if worker.pid != old.pid]
        (old if role == "old" else new).terminate()
        time.sleep(0.3)
        (tmp_path / "go").touch()
        until(
            lambda: server.events("server.reloaded") or server.events("server.reload_failed"),
            "the reload has ended",
        )
        alive = survivors(clients)
        # The old worker may still send the batch at which it was stopped.
        assert len(alive) in ((BATCH, 2 * BATCH) if role == "old" else (CLIENTS - BATCH,))
        until(lambda: server.who() == len(alive) + 1, "WHO is right")


def test_if_the_successor_dies_while_the_old_worker_drains_another_one_starts(
    pems: Path, tmp_path: Path
) -> None:
    options = (*certified(pems), "--drain-timeout", "1")
    with extended(tmp_path, FAULT, *options) as server, server.client(context=trust(pems)) as busy:
        busy.send(b"NAP\n")
        time.sleep(0.2)
        [old] = server.workers()
        server.send_signal(signal.SIGHUP)
        server.wait_for("worker.handed_over")
        time.sleep(1.2)  # It drains by now, for 0.75 s.
        [new] = [worker for worker in server.workers() if worker.pid != old.pid]
        new.kill()
        server.wait_for("worker.ready", 3)
        with server.client(context=trust(pems)) as other:
            assert other.ask(b"WHY") == b"42"


def test_tls_clients_stay_with_their_worker_for_the_drain_timeout(
    pems: Path, tmp_path: Path
) -> None:
    options = (*certified(pems), "--drain-timeout", "3")
    with extended(tmp_path, FAULT, *options) as server, ExitStack() as stack:
        clients = [stack.enter_context(server.client(context=trust(pems))) for _ in range(10)]
        old = {client.ask(b"PID") for client in clients}
        server.send_signal(signal.SIGHUP)
        moved = server.wait_for("worker.handed_over")
        assert (moved["gserver.clients"], moved["gserver.staying"]) == (0, 10)
        assert "10 stay for up to 3 s (TLS)" in moved["message"]
        with server.client(context=trust(pems)) as new:
            assert new.ask(b"PID") not in old
        assert {client.ask(b"PID") for client in clients} == old
        began = time.monotonic()
        assert {client.end() for client in clients} == {b""}
        server.wait_for("server.reloaded")
        assert time.monotonic() - began < 30


@pytest.mark.long
def test_100_reloads_leave_nothing_behind(tmp_path: Path) -> None:
    with (
        extended(tmp_path, FAULT, "--workers", "2", "--admin-port", "0") as server,
        ExitStack() as stack,
    ):
        clients = crowd(server, stack)
        supervisor = psutil.Process(server.pid)

        def held() -> Counter[str]:
            children = supervisor.children()
            files = sum(len(os.listdir(f"/proc/{each.pid}/fd")) for each in children)
            return Counter(
                supervisor_files=supervisor.num_fds(),
                files=files,
                processes=len(children),
                kilobytes=supervisor.memory_info().rss // 1024,
            )

        def reload(number: int) -> None:
            server.send_signal(signal.SIGHUP)
            server.wait_for("server.reloaded", number)
            server.wait_for("agent.ready", number + 1)

        for number in range(1, 4):
            reload(number)
        before = held()
        for number in range(4, 104):
            reload(number)
        after = held()
        assert after["kilobytes"] - before["kilobytes"] < 2000
        del before["kilobytes"], after["kilobytes"]
        assert after == before
        assert len(survivors(clients)) == CLIENTS


def test_a_stop_gets_the_clients_back_from_a_successor_that_is_stopped(tmp_path: Path) -> None:
    stop = "lambda: os.kill(os.getpid(), signal.SIGSTOP)"
    module = f"{FAULT}\nact_at(limits.Limits, 'take_over', 1, {stop})\n"
    options = ("--drain-timeout", "20", "--hang-timeout", "0")
    with extended(tmp_path, FAULT, *options) as server, ExitStack() as stack:
        clients = crowd(server, stack)
        (tmp_path / "extra.py").write_text(module)
        server.send_signal(signal.SIGHUP)
        server.wait_for("worker.ready", 2)
        until(lambda: any(is_stopped(worker) for worker in server.workers()), "it is stopped")
        for client in clients:
            client.send(b"WHY\n")
        server.send_signal(signal.SIGTERM)
        assert server.exit_code() == 0
        assert {client.rest() for client in clients} == {b"42\n"}


def is_stopped(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.status() == psutil.STATUS_STOPPED
    return False
