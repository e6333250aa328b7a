"""A child process as the supervisor sees it: reports, exit, and the pauses between restarts."""

import math
import os
import signal
import socket
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
    STUCK_SECONDS,
    WORKER,
    Backoff,
    Child,
    Finding,
    State,
    reap_orphans,
)
from gserver.supervise.phases import Generation
from lab.running import LIMIT, until

GENERATION = Generation(0, Certificates())
PAUSE = "import signal; signal.pause()"


def child_of(process: subprocess.Popen[bytes], spawned_at: float = 0.0) -> Child:
    """A worker without reports."""
    with socket.socket() as control:
        return Child(WORKER, 0, GENERATION, process, control, spawned_at)


def running(code: str = PAUSE) -> Child:
    """A worker that runs this code in its own process group."""
    return child_of(subprocess.Popen([sys.executable, "-c", code], process_group=0))


def reporting(text: str, *, exit_code: int = 0) -> Child:
    """A worker that reports this text and exits."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with theirs:
        code = (
            f"import os, sys; os.write({theirs.fileno()}, {text.encode()!r}); sys.exit({exit_code})"
        )
        process = subprocess.Popen([sys.executable, "-c", code], pass_fds=[theirs.fileno()])
    return Child(WORKER, 0, GENERATION, process, ours, monotonic())


# Starts and reports.


def test_a_child_that_never_reads_its_instructions_does_not_block_the_supervisor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep(600)\n")
    instructions = Instructions(
        Config(), Certificates(chain="x" * 1_000_000), 0, 1, Scoreboard.create(1).fd, ()
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    started: list[Child] = []

    def start() -> None:
        started.append(Child.start(WORKER, GENERATION, instructions))

    starting = Thread(target=start, daemon=True)
    starting.start()
    starting.join(LIMIT)
    assert len(started) == 1
    started[0].kill(0.0)
    until(started[0].has_ended, "the child has ended")
    started[0].control.close()


def test_readiness_is_reported_once_and_then_their_end() -> None:
    started = reporting("ready\n")
    assert (started.state, started.is_accepting) == (State.STARTING, False)
    until(started.read_report, "the worker is ready")
    assert (started.state, started.is_accepting) == (State.READY, True)
    until(lambda: started.read_report() or started.is_control_closed, "the end of the reports")
    until(started.has_ended, "the child has ended")
    assert started.end_reason == "exit code 0"
    assert not started.has_ended_as_requested
    started.control.close()


def test_reports_that_arrive_together_are_all_read() -> None:
    started = reporting("ready\nduplicate_id another has its id\n")
    until(started.read_report, "the worker is ready")
    assert (started.has_duplicate_id, started.error) == (True, "another has its id")
    until(started.has_ended, "the child has ended")
    started.control.close()


def test_a_reported_error_is_the_end_reason_and_not_readiness() -> None:
    failing = reporting("error it is Monday\n", exit_code=2)
    until(failing.has_ended, "the child has ended")
    assert not failing.read_report()
    assert not failing.has_been_ready
    assert failing.end_reason == "it is Monday"
    failing.control.close()


# Ends.


@pytest.mark.parametrize(("number", "shown"), [(signal.SIGKILL, "SIGKILL"), (40, "signal 40")])
def test_the_signal_that_ends_a_child_is_named(number: int, shown: str) -> None:
    child = running()
    os.kill(child.pid, number)
    until(child.has_ended, "the child has ended")
    assert child.end_reason == f"killed by {shown}"
    assert not child.has_ended_as_requested


def test_processes_of_a_dead_worker_are_killed_before_its_pid_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A group has the pid of its first process, which may be reused once that is reaped."""
    child = running("import os, signal; os.fork() and os.abort(); signal.pause()")
    killpg, states = os.killpg, []

    def watched(group: int, number: int) -> None:
        states.append(psutil.Process(group).status())
        killpg(group, number)

    monkeypatch.setattr(os, "killpg", watched)
    until(child.has_ended, "the process has ended")
    assert states == [psutil.STATUS_ZOMBIE]
    assert child.process.returncode == -signal.SIGABRT


def test_sending_a_signal_does_not_reap_a_child_that_has_ended() -> None:
    child = running("import os; os.abort()")
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    child.terminate(1.0)
    assert psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE
    assert child.has_ended()


def test_only_a_ready_worker_is_told_to_retire_and_only_once() -> None:
    code = """
import signal, sys
numbers = signal.SIGUSR2, signal.SIGTERM
signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
print("signals wait", flush=True)
for count in range(9):
    if signal.sigwait(numbers) == signal.SIGTERM:
        sys.exit(count)
    print("told", flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        retiring = child_of(process)
        retiring.retire()
        assert retiring.state is State.STARTING
        assert process.stdout
        process.stdout.readline()
        retiring.state = State.READY
        retiring.retire()
        process.stdout.readline()
        retiring.retire()
        assert (retiring.state, retiring.is_staying) == (State.RETIRED, True)
        retiring.terminate(2.0)
        assert (retiring.state, retiring.is_staying) == (State.TERMINATING, False)
        until(retiring.has_ended, "the worker has ended")
        assert retiring.process.returncode == 1
        assert retiring.has_ended_as_requested


@pytest.mark.parametrize(
    ("state", "code", "is_requested"),
    [
        (State.READY, "sys.exit(0)", False),
        (State.TERMINATING, "sys.exit(0)", True),
        (State.TERMINATING, "sys.exit(2)", True),
        (State.TERMINATING, "os.kill(os.getpid(), 15)", True),
        (State.TERMINATING, "os.abort()", False),
        (State.RETIRED, "sys.exit(0)", True),
        (State.RETIRED, "sys.exit(2)", False),
        (State.RETIRED, "os.kill(os.getpid(), 15)", False),
        (State.KILLED, "os.kill(os.getpid(), 9)", True),
    ],
)
def test_the_state_decides_whether_an_end_was_requested(
    state: State, code: str, is_requested: bool
) -> None:
    ending = running(f"import os, sys; {code}")
    ending.state = state
    until(ending.has_ended, "the worker has ended")
    assert ending.has_ended_as_requested is is_requested


# Hangs.


def test_a_silent_child_is_checked_twice_before_it_is_killed() -> None:
    silent = running()
    silent.spawned_at = silent.ready_at = 100.0
    assert silent.watch(102.0, heartbeat_at=100.0, hang_seconds=5.0) is None
    assert silent.due_at == math.inf
    assert silent.watch(106.0, heartbeat_at=100.0, hang_seconds=5.0) is None
    assert silent.due_at == pytest.approx(106.0 + SECOND_LOOK_SECONDS)
    assert silent.watch(106.1, heartbeat_at=106.0, hang_seconds=5.0) is None
    assert silent.due_at == math.inf, "the heartbeat has advanced"
    assert silent.watch(112.0, heartbeat_at=106.0, hang_seconds=5.0) is None
    assert silent.watch(112.1, heartbeat_at=106.0, hang_seconds=5.0) is None
    assert not silent.has_ended()
    killed_at = 112.0 + SECOND_LOOK_SECONDS
    assert silent.watch(killed_at, heartbeat_at=106.0, hang_seconds=5.0) is Finding.HUNG
    assert (silent.state, silent.is_staying) == (State.HUNG, True), "until it is replaced"
    until(silent.has_ended, "the child has ended")
    assert silent.end_reason == "killed by SIGKILL"
    assert not silent.has_ended_as_requested


def test_a_child_that_survives_sigkill_is_reported_as_stuck_once() -> None:
    hung = running()
    assert hung.watch(100.0, heartbeat_at=0.0, hang_seconds=5.0) is None
    assert hung.watch(101.0, heartbeat_at=0.0, hang_seconds=5.0) is Finding.HUNG
    assert hung.due_at == 101.0 + STUCK_SECONDS
    assert hung.watch(101.1, heartbeat_at=0.0, hang_seconds=5.0) is None
    stuck_at = 101.0 + STUCK_SECONDS
    assert hung.watch(stuck_at, heartbeat_at=0.0, hang_seconds=5.0) is Finding.STUCK
    assert hung.watch(stuck_at + 9, heartbeat_at=0.0, hang_seconds=5.0) is None
    assert (hung.is_staying, hung.due_at) == (False, math.inf)
    until(hung.has_ended, "the child has ended")


def test_a_killed_hung_child_stays_hung_even_if_asked_to_end() -> None:
    hung = running()
    assert hung.watch(100.0, heartbeat_at=0.0, hang_seconds=5.0) is None
    assert hung.watch(101.0, heartbeat_at=0.0, hang_seconds=5.0) is Finding.HUNG
    hung.terminate(kill_at=110.0)
    assert hung.state is State.HUNG
    until(hung.has_ended, "the child has ended")
    assert not hung.has_ended_as_requested, "its clients are lost"


def test_a_child_that_does_not_end_in_time_is_killed() -> None:
    code = "import signal; signal.signal(15, signal.SIG_IGN); print(flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        late = child_of(process)
        assert process.stdout
        process.stdout.readline()
        late.terminate(kill_at=50.0)
        assert late.due_at == 50.0
        assert late.watch(49.9, heartbeat_at=49.0, hang_seconds=5.0) is None
        assert late.watch(50.0, heartbeat_at=50.0, hang_seconds=5.0) is Finding.LATE
        until(late.has_ended, "the child has ended")
        assert late.process.returncode == -signal.SIGKILL
        assert late.has_ended_as_requested


def test_a_child_that_hangs_while_ending_has_ended_as_requested() -> None:
    child = running()
    child.state, child.kill_at = State.TERMINATING, 1e9
    assert child.watch(100.0, heartbeat_at=0.0, hang_seconds=5.0) is None
    assert child.watch(101.0, heartbeat_at=0.0, hang_seconds=5.0) is Finding.HUNG
    assert child.state is State.KILLED
    until(child.has_ended, "the child has ended")
    assert child.has_ended_as_requested


def test_without_a_hang_timeout_no_child_counts_as_hung() -> None:
    silent = running("")
    silent.ready_at = 0.0
    assert silent.watch(1e6, heartbeat_at=0.0, hang_seconds=0.0) is None
    assert silent.due_at == math.inf
    until(silent.has_ended, "the child has ended")


# Orphans.


def test_orphans_are_reaped_and_known_children_are_not() -> None:
    own = subprocess.Popen([sys.executable, "-c", "import sys; sys.exit(7)"])
    orphan = os.posix_spawn(sys.executable, [sys.executable, "-c", ""], os.environ)
    for pid in (own.pid, orphan):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # The process is dead but not reaped.
    known = [child.pid for child in psutil.Process().children() if child.pid != orphan]
    reap_orphans(known)
    assert own.wait() == 7
    reap_orphans(known)
    with pytest.raises(ChildProcessError):
        os.waitpid(orphan, os.WNOHANG)


# Pauses.


def dying(lived_seconds: float | None, now: float) -> Child:
    """A worker that has died `lived_seconds` after it was ready; None if it never was."""
    child = running("")
    child.process.wait()
    child.spawned_at = now
    child.ready_at = None if lived_seconds is None else now - lived_seconds
    return child


def test_deaths_before_a_child_is_ready_double_the_pause_up_to_a_limit() -> None:
    backoff, pauses = Backoff(), []
    for _ in range(12):
        now = backoff.spawn_at
        backoff.note_death(dying(None, now), now)
        pauses.append(backoff.spawn_at - now)
    assert pauses[:4] == pytest.approx([FIRST_PAUSE_SECONDS * 2**n for n in range(4)])
    assert pauses[-1] == pytest.approx(MAX_PAUSE_SECONDS)
    backoff.failures = 100_000  # 2 to this power would not be a float.
    backoff.note_death(dying(None, 500.0), 500.0)
    assert backoff.spawn_at == pytest.approx(500.0 + MAX_PAUSE_SECONDS)


def test_children_that_die_together_count_as_one_failure() -> None:
    backoff = Backoff(spawn_at=1.0)
    for child in [dying(None, 1.0) for _ in range(8)]:
        backoff.note_death(child, 2.0)
    assert backoff.spawn_at == pytest.approx(2.0 + FIRST_PAUSE_SECONDS)


@pytest.mark.parametrize(("lived", "pause"), [(0.5, 0.2), (2.0, 0.0)])
def test_a_child_that_was_ready_is_replaced_almost_at_once(lived: float, pause: float) -> None:
    backoff = Backoff()
    backoff.note_death(dying(lived, 100.0), 100.0)
    assert backoff.spawn_at == pytest.approx(100.0 + pause)


def test_a_worker_that_hangs_while_it_hands_over_has_died() -> None:
    hung = running()
    hung.state = State.HANDING_OVER
    assert hung.watch(100.0, heartbeat_at=0.0, hang_seconds=5.0) is None
    assert hung.watch(101.0, heartbeat_at=0.0, hang_seconds=5.0) is Finding.HUNG
    assert hung.state is State.HUNG
    until(hung.has_ended, "the child has ended")
    assert not hung.has_ended_as_requested, "its clients are lost"
