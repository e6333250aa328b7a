"""A child as its supervisor knows it: what it says, and the pauses between two tries."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Thread
from time import monotonic

import psutil
import pytest

from gserver.boot import Instructions
from gserver.certificates import Certificates
from gserver.config import Config
from gserver.scoreboard import Scoreboard
from gserver.supervise.child import (
    FIRST_PAUSE_SECONDS,
    MAX_PAUSE_SECONDS,
    SECOND_LOOK_SECONDS,
    WATCH_SECONDS,
    WORKER,
    Child,
    Pacing,
    reap_strangers,
)
from tests.running import LIMIT, until


def child(says: str, *, exit_code: int = 0) -> Child:
    """A process that says something on its report pipe and ends."""
    report_fd, its_end = os.pipe()
    os.set_blocking(report_fd, False)
    code = f"import os, sys; os.write({its_end}, {says.encode()!r}); sys.exit({exit_code})"
    process = subprocess.Popen([sys.executable, "-c", code], pass_fds=[its_end])
    os.close(its_end)
    return Child(WORKER, 0, 0, process, report_fd, monotonic())


def test_ready_is_noted_once_and_then_the_end() -> None:
    started = child("ready\n")
    until(started.read_report, "it is ready")
    assert started.ready_at is not None
    until(lambda: started.read_report() or started.has_hung_up, "its end")
    assert started.process.wait(LIMIT) == 0
    assert started.end == "exit code 0"
    os.close(started.report_fd)


def test_what_is_said_at_once_is_all_heard() -> None:
    started = child("ready\nunwanted another has its id\n")
    until(started.read_report, "it is ready")
    assert (started.is_unwanted, started.refusal) == (True, "another has its id")
    assert started.process.wait(LIMIT) == 0
    os.close(started.report_fd)


def test_one_that_never_reads_what_it_is_told_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    told = Instructions(
        Config(), Certificates(chain="x" * 1_000_000), 0, 1, Scoreboard.create(1).fd, -1
    )
    started: list[Child] = []
    starting = Thread(target=lambda: started.append(Child.start(WORKER, 0, told)), daemon=True)
    starting.start()
    starting.join(LIMIT)
    assert len(started) == 1
    started[0].kill()
    started[0].process.wait(LIMIT)
    os.close(started[0].report_fd)


def test_a_refusal_is_its_reason_and_not_that_it_is_ready() -> None:
    refusing = child("refused it is Monday\n", exit_code=2)
    assert refusing.process.wait(LIMIT) == 2
    assert not refusing.read_report()
    assert refusing.ready_at is None
    assert refusing.end == "it is Monday"
    os.close(refusing.report_fd)


@pytest.mark.parametrize(("number", "shown"), [(signal.SIGKILL, "SIGKILL"), (40, "signal 40")])
def test_a_signal_that_ends_it_is_named(number: int, shown: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    process.send_signal(number)
    process.wait(LIMIT)
    assert Child(WORKER, 0, 0, process, -1, 0.0).end == f"killed by {shown}"


def test_a_silence_is_looked_at_twice_before_it_ends_the_child_and_killing_is_said_again() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    silent = Child(WORKER, 0, 0, process, -1, spawned_at=100.0, ready_at=100.0)
    silent.watch(102.0, beat_at=100.0, limit=5.0)
    assert silent.due_at == math.inf
    silent.watch(106.0, beat_at=100.0, limit=5.0)
    assert silent.due_at == pytest.approx(106.0 + SECOND_LOOK_SECONDS)
    silent.watch(106.1, beat_at=106.0, limit=5.0)
    assert silent.due_at == math.inf, "it has moved"
    silent.watch(112.0, beat_at=106.0, limit=5.0)
    silent.watch(112.1, beat_at=106.0, limit=5.0)
    assert process.poll() is None
    silent.watch(112.0 + SECOND_LOOK_SECONDS, beat_at=106.0, limit=5.0)
    assert process.wait(LIMIT) == -signal.SIGKILL
    assert silent.due_at == pytest.approx(112.0 + SECOND_LOOK_SECONDS + WATCH_SECONDS)
    assert not silent.has_ended_as_asked


def test_without_a_limit_no_silence_is_too_long() -> None:
    silent = Child(
        WORKER, 0, 0, subprocess.Popen([sys.executable, "-c", ""]), -1, spawned_at=0.0, ready_at=0.0
    )
    silent.watch(1e6, beat_at=0.0, limit=0.0)
    assert silent.due_at == math.inf
    silent.process.wait(LIMIT)


def test_only_one_that_is_ready_is_asked_to_retire_and_once() -> None:
    code = """
import signal, sys
asked = []
signal.signal(signal.SIGUSR2, lambda *_: asked.append(1))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(len(asked)))
print("it can hear", flush=True)
while True:
    signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        retiring = Child(WORKER, 0, 0, process, -1, 0.0)
        retiring.retire()
        assert not retiring.is_retired
        assert process.stdout
        process.stdout.readline()
        retiring.ready_at = 1.0
        retiring.retire()
        retiring.retire()
        retiring.dismiss(2.0)
        assert process.wait(LIMIT) == 1
        assert retiring.has_ended_as_asked


def test_strangers_are_buried_and_children_are_left_to_who_waits_for_them() -> None:
    own = subprocess.Popen([sys.executable, "-c", "import sys; sys.exit(7)"])
    stranger = os.posix_spawn(sys.executable, [sys.executable, "-c", ""], os.environ)
    for pid in (own.pid, stranger):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # It is dead, and not buried.
    known = [child.pid for child in psutil.Process().children() if child.pid != stranger]
    reap_strangers(known)
    assert own.wait() == 7
    reap_strangers(known)
    with pytest.raises(ChildProcessError):
        os.waitpid(stranger, os.WNOHANG)


def dying(lived_seconds: float | None, now: float) -> Child:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(LIMIT)
    ready_at = None if lived_seconds is None else now - lived_seconds
    return Child(WORKER, 0, 0, process, -1, now, ready_at=ready_at)


def test_deaths_before_it_is_ready_double_the_pause_up_to_a_limit() -> None:
    pacing, pauses = Pacing(), []
    for _ in range(12):
        now = pacing.spawn_at
        pacing.note_death(dying(None, now), now)
        pauses.append(pacing.spawn_at - now)
    assert pauses[:4] == pytest.approx([FIRST_PAUSE_SECONDS * 2**n for n in range(4)])
    assert pauses[-1] == pytest.approx(MAX_PAUSE_SECONDS)
    pacing.failures = 100_000  # Nor is there a number of them at which the reckoning itself fails.
    pacing.note_death(dying(None, 500.0), 500.0)
    assert pacing.spawn_at == pytest.approx(500.0 + MAX_PAUSE_SECONDS)


def test_a_crowd_that_dies_together_is_one_failure() -> None:
    pacing = Pacing(spawn_at=1.0)
    for child in [dying(None, 1.0) for _ in range(8)]:
        pacing.note_death(child, 2.0)
    assert pacing.spawn_at == pytest.approx(2.0 + FIRST_PAUSE_SECONDS)


@pytest.mark.parametrize(("lived", "pause"), [(0.5, 0.2), (2.0, 0.0)])
def test_one_that_was_ready_is_replaced_at_once_or_nearly(lived: float, pause: float) -> None:
    pacing = Pacing()
    pacing.note_death(dying(lived, 100.0), 100.0)
    assert pacing.spawn_at == pytest.approx(100.0 + pause)
