"""A machine without descriptors, memory, programs or processor time, and broken modules."""

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from lab.admin import get
from lab.rows import ALL, PLAIN, Notes, row
from lab.running import GSERVER, LIMIT, PATIENCE, until
from lab.site import Site

Start = Callable[..., Site]
Choice = Callable[[Site], psutil.Process]
ROLES: dict[str, Choice] = {
    "supervisor": lambda site: psutil.Process(site.server.pid),
    "worker": lambda site: site.server.workers()[0],
    "agent": lambda site: site.server.agents()[0],
}


@contextmanager
def limited(process: psutil.Process, kind: int, limit: int) -> Iterator[None]:
    """Set a resource limit of a process for the time of the body."""
    soft, hard = process.rlimit(kind)
    process.rlimit(kind, (limit, hard))
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            process.rlimit(kind, (soft, hard))


def cpu_share(process: psutil.Process, seconds: float) -> float:
    """The share of a core that a process uses, measured over `seconds`."""
    before, began = sum(process.cpu_times()[:2]), time.monotonic()
    time.sleep(seconds)
    return float((sum(process.cpu_times()[:2]) - before) / (time.monotonic() - began))


@row("Out of descriptors", *PLAIN, values=ROLES)
def test_a_process_without_descriptors_waits_and_recovers(
    start: Start, notes: Notes, kind: Choice
) -> None:
    site = start()
    process, children = kind(site), [*site.server.workers(), *site.server.agents()]
    site.may_lose = site.may_log_errors = True
    # Dead children free enough descriptors for the supervisor to begin a new child, but not to
    # complete it.
    limit = 3 if process in children else process.num_fds()
    with site.neighbours() as neighbours:
        with limited(process, resource.RLIMIT_NOFILE, limit):
            if process not in children:
                for child in children:
                    child.kill()
                happened = site.server.wait_for("process.not_started", 3)
            elif process in site.server.workers():
                happened = site.server.wait_for("process.error", 2)
                assert get(site.server, "/readyz")[0] == 200
            else:
                with site.client() as client:
                    assert client.ask(b"WHY") == b"42"
                before = neighbours.rounds
                with socket.create_connection(("127.0.0.1", site.server.admin_port())):
                    happened = site.server.wait_for("process.error")
                until(lambda: neighbours.rounds > before + 100, "neighbours get replies")
                assert not neighbours.lost
            share = cpu_share(process, 1)
        notes.happened(happened["message"])
        notes.measured("CPU", share * 100, "%")
        assert share < 0.1 * PATIENCE
        site.await_others(children if process not in children else [])


@row("Out of memory", *ALL, quick=None)
def test_a_worker_without_memory_is_replaced_or_recovers(start: Start, notes: Notes) -> None:
    site = start()
    [victim, *_] = site.server.workers()
    site.may_lose = site.may_log_errors = True

    def had_none() -> list[str]:
        with ExitStack() as stack, suppress(OSError):
            for client in [stack.enter_context(site.client()) for _ in range(300)]:
                client.sock.settimeout(1)
                client.send(b"NOPE\n" * 100)
        messages = [str(event["message"]) for event in site.server.events()]
        return [
            text
            for text in messages
            if "MemoryError" in text or f"worker {victim.pid} died" in text
        ]

    with site.neighbours():
        with limited(victim, resource.RLIMIT_AS, victim.memory_info().vms):
            notes.happened(until(had_none, "memory runs out", 4 * LIMIT)[0])
        until(lambda: len(site.server.workers()) == site.variant.workers, "all workers run")


@row("Python interpreter missing for a while", *PLAIN, quick=None)
def test_the_supervisor_retries_while_the_interpreter_is_missing(
    start: Start, notes: Notes, tmp_path: Path
) -> None:
    python, there = tmp_path / "venv/bin/python", Path(sys.executable).resolve()
    python.parent.mkdir(parents=True)
    python.symlink_to(there)
    for name in ("lib", "pyvenv.cfg"):
        (tmp_path / "venv" / name).symlink_to(Path(sys.prefix, name))
    site = start(command=[str(python), *GSERVER[1:], "serve", "--port", "0"])
    with site.neighbours():
        site.may_lose = True
        python.unlink()
        gone = [*site.server.workers(), *site.server.agents()]
        for process in gone:
            process.kill()
        notes.happened(site.server.wait_for("process.not_started", 3)["message"])
        python.symlink_to(there)
        site.await_others(gone)


@row(
    "Broken command module",
    *ALL,
    values={"broken": "import nonsense", "empty": "", "gone": None},
    quick=None,
)
def test_a_broken_module_keeps_the_old_workers(
    start: Start, notes: Notes, tmp_path: Path, kind: str | None
) -> None:
    site = start(env={"PYTHONDONTWRITEBYTECODE": "1"})
    module, workers = tmp_path / "census.py", site.server.workers()
    text = module.read_text()
    with site.neighbours() as neighbours:
        module.unlink() if kind is None else module.write_text(kind)
        site.server.send_signal(signal.SIGHUP)
        notes.happened(site.server.wait_for("server.reload_failed")["message"])
        neighbours.are_served()
        assert site.server.workers()[: len(workers)] == workers
        site.may_lose = True
        workers[0].kill()
        site.server.wait_for("worker.died", 2)
        module.write_text(text)
        site.await_others(workers[:1])


def times(processes: list[psutil.Process]) -> list[float]:
    """Seconds that the main threads of processes have run and have waited for a core."""
    each = [Path(f"/proc/{process.pid}/schedstat").read_text().split()[:2] for process in processes]
    return [sum(map(int, column)) / 1e9 for column in zip(*each, strict=True)]


@row("CPU taken by other programs", *ALL, quick=None)
def test_workers_with_little_processor_time_do_not_count_as_hung(
    start: Start, notes: Notes
) -> None:
    site = start()
    processes = site.server.processes()
    with site.neighbours() as neighbours, ExitStack() as stack:
        for process in processes:
            os.sched_setscheduler(process.pid, os.SCHED_IDLE, os.sched_param(0))
        for _ in range(4 * len(os.sched_getaffinity(0))):
            spin = [sys.executable, "-c", "import time\nwhile time.process_time() < 20: pass"]
            stack.callback(stack.enter_context(subprocess.Popen(spin)).kill)
        before, (run, waited) = neighbours.rounds, times(processes)
        time.sleep(6)
        run, waited = (
            now - then for now, then in zip(times(processes), (run, waited), strict=True)
        )
        notes.happened(
            f"the processes ran for {run:.1f} s, and waited for a core for {waited:.1f} s"
        )
        assert waited > run
        assert neighbours.rounds > before
    assert site.server.processes() == processes
