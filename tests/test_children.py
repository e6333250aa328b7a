"""A child as its supervisor knows it: what it says, and the pauses between two tries."""

import os
import signal
import subprocess
import sys
from time import monotonic

import pytest

from gserver.children import FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS, WORKER, Child, Pacing
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


def test_a_refusal_is_its_reason_and_not_that_it_is_ready() -> None:
    refusing = child("refused it is Monday\n", exit_code=2)
    assert refusing.process.wait(LIMIT) == 2
    assert not refusing.read_report()
    assert refusing.ready_at is None
    assert refusing.end == "it is Monday"
    os.close(refusing.report_fd)


def test_a_signal_that_ends_it_is_named() -> None:
    killed = child("")
    killed.process.send_signal(signal.SIGKILL)
    assert killed.process.wait(LIMIT) in (-signal.SIGKILL, 0)
    if killed.process.returncode:
        assert killed.end == "killed by SIGKILL"
    os.close(killed.report_fd)


def dying(lived_seconds: float | None, now: float) -> Child:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(LIMIT)
    ready_at = None if lived_seconds is None else now - lived_seconds
    return Child(WORKER, 0, 0, process, -1, now, ready_at=ready_at)


def test_deaths_before_it_is_ready_double_the_pause_up_to_a_limit() -> None:
    pacing, pauses = Pacing(), []
    unready = dying(None, 100.0)
    for _ in range(12):
        pacing.note_death(unready, 100.0)
        pauses.append(pacing.spawn_at - 100.0)
    assert pauses[:4] == pytest.approx([FIRST_PAUSE_SECONDS * 2**n for n in range(4)])
    assert pauses[-1] == pytest.approx(MAX_PAUSE_SECONDS)
    for _ in range(2000):  # Nor is there a number of failures at which the reckoning itself fails.
        pacing.note_death(unready, 100.0)
    assert pacing.spawn_at == pytest.approx(100.0 + MAX_PAUSE_SECONDS)


@pytest.mark.parametrize(("lived", "pause"), [(0.5, 0.2), (2.0, 0.0)])
def test_one_that_was_ready_is_replaced_at_once_or_nearly(lived: float, pause: float) -> None:
    pacing = Pacing()
    pacing.note_death(dying(lived, 100.0), 100.0)
    assert pacing.spawn_at == pytest.approx(100.0 + pause)
