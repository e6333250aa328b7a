"""A process as its supervisor knows it: how it is started, watched and ended, what it says, when to start the next."""

import contextlib
import json
import logging
import math
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic

from gserver import logs
from gserver.boot import SUPERVISORS_SIGNALS, Instructions

#: Pause before the next try after a child that died before it was ready: doubled each time, up to
#: the maximum.
FIRST_PAUSE_SECONDS = 0.1
MAX_PAUSE_SECONDS = 10.0
#: One that was ready is replaced at once; after this pause if it did not live for a second.
SHORT_LIFE_SECONDS = 1.0
SHORT_LIFE_PAUSE_SECONDS = 0.2

#: How often to look at a child, at least.
WATCH_SECONDS = 1.0
#: Who seems to hang is looked at once more before it is killed: the whole machine may have stood
#: still.
SECOND_LOOK_SECONDS = 0.4
#: A child that is not ready by then is taken for hung.
BOOT_SECONDS = 30.0

WORKER, AGENT = "worker", "agent"
ROOT = str(Path(__file__).parents[2])


@dataclass(eq=False)
class Child:
    """One child. Its `slot` is its column of the scoreboard, -1 for the agent; its times are monotonic seconds."""

    role: str
    slot: int
    generation: int
    process: subprocess.Popen[bytes]
    report_fd: int
    spawned_at: float
    ready_at: float | None = None
    is_retired: bool = False
    is_leaving: bool = False
    kill_at: float | None = None
    is_killed: bool = False
    suspected_at: float | None = None
    refusal: str = ""
    is_unwanted: bool = False
    has_hung_up: bool = False

    @classmethod
    def start(cls, role: str, generation: int, instructions: Instructions) -> "Child":
        """Start a process, told its supervisor and its pipe besides; raise OSError when the system cannot."""
        report_fd, its_end = os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, SUPERVISORS_SIGNALS)
        told = replace(instructions, supervisor_pid=os.getpid(), report_fd=its_end)
        try:
            # A file, for a pipe has room for 64 KB, and a child that never reads it would hold the
            # supervisor up.
            with open(os.memfd_create("gserver-instructions"), "w+") as stdin:
                json.dump(asdict(told), stdin)
                stdin.seek(0)
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "gserver", "child", role, str(instructions.slot)],
                    stdin=stdin,
                    pass_fds=[
                        fd
                        for fd in (instructions.scoreboard_fd, instructions.listener_fd, its_end)
                        if fd >= 0
                    ],
                    process_group=0,  # so that a terminal's Ctrl-C reaches the supervisor alone
                    env={
                        **os.environ,
                        "PYTHONPATH": os.pathsep.join(
                            filter(None, (ROOT, os.environ.get("PYTHONPATH")))
                        ),
                    },
                )
        except OSError:
            os.close(report_fd)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SUPERVISORS_SIGNALS)
            os.close(its_end)
        os.set_blocking(report_fd, False)
        return cls(role, instructions.slot, generation, process, report_fd, monotonic())

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def end(self) -> str:
        """Why it ended: what it said itself, or its exit code."""
        code = self.process.returncode
        name = next(
            (number.name for number in signal.Signals if number == -code), f"signal {-code}"
        )
        return self.refusal or (f"killed by {name}" if code < 0 else f"exit code {code}")

    @property
    def accepts(self) -> bool:
        """Whether a worker takes new clients, as far as is known."""
        return self.ready_at is not None and not (self.is_retired or self.is_leaving)

    @property
    def _fields(self) -> dict[str, object]:
        return {"gserver.child_pid": self.pid}

    def has_ended(self) -> bool:
        """Whether it has. With one that did not end by itself goes what its handlers have started in its group."""
        if self.process.poll():
            with contextlib.suppress(OSError):  # There is nobody.
                os.killpg(self.pid, signal.SIGKILL)
        return self.process.returncode is not None

    @property
    def has_ended_as_asked(self) -> bool:
        """Whether the end that it has come to is the one that it was asked for."""
        return self.is_leaving or (self.is_retired and self.process.returncode == 0)

    def read_report(self) -> bool:
        """Note what it says; return whether that is that it is ready."""
        try:
            report = (
                os.read(self.report_fd, 8192).decode("ascii", "replace")
                if self.report_fd >= 0
                else ""
            )
        except BlockingIOError:
            return False
        self.has_hung_up, was_ready = not report, self.ready_at
        for line in report.splitlines():
            kind, _, reason = line.partition(" ")
            if kind == "ready":
                self.ready_at = monotonic()
                logs.event(
                    logging.INFO,
                    f"{self.role}.ready",
                    f"{self.role} {self.pid} is ready",
                    self._fields,
                )
            else:
                self.refusal, self.is_unwanted = reason, kind == "unwanted"
        return self.ready_at != was_ready

    def hang_up(self, selector: selectors.BaseSelector) -> None:
        """Listen to it no more: close its pipe, after taking it out of the selector."""
        if self.report_fd >= 0:
            selector.unregister(self.report_fd)
            os.close(self.report_fd)
            self.report_fd = -1

    @property
    def due_at(self) -> float:
        """When `watch` has something to do, if nothing happens before; infinity for never."""
        look_at = math.inf if self.suspected_at is None else self.suspected_at + SECOND_LOOK_SECONDS
        return look_at if self.kill_at is None else min(look_at, self.kill_at)

    def watch(self, now: float, beat_at: float, limit: float) -> None:
        """Kill it if it was asked to end and did not, or has not turned its loop for `limit` seconds; 0 = no limit."""
        silence = now - max(self.spawned_at, beat_at)
        if self.kill_at is not None and now >= self.kill_at:
            self._kill_by(now + WATCH_SECONDS)
        elif (
            not limit
            or self.is_killed
            or silence <= max(limit, WATCH_SECONDS if self.ready_at else BOOT_SECONDS)
        ):
            self.suspected_at = None
        elif self.suspected_at is None:
            self.suspected_at = now
        elif now - self.suspected_at >= SECOND_LOOK_SECONDS:
            self._kill_by(now + WATCH_SECONDS)
            message = f"{self.role} {self.pid} has hung for {silence:.1f} s: killed"
            logs.event(logging.ERROR, f"{self.role}.hung", message, self._fields)

    def _kill_by(self, again_at: float) -> None:
        self.process.kill()
        self.kill_at, self.is_killed, self.suspected_at = again_at, True, None

    def retire(self) -> None:
        """Ask a worker, once it can hear it, to accept no more, and to end when its clients have gone."""
        if self.ready_at and not self.is_retired:
            self.is_retired = True
            self.process.send_signal(signal.SIGUSR2)

    def dismiss(self, kill_at: float) -> None:
        """Ask it to end, and note when to stop asking."""
        self.is_leaving = True
        self.kill_at = kill_at
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it now."""
        self.is_leaving = True
        self.process.kill()


def reap_strangers(known: Collection[int]) -> None:
    """Bury the dead that are none of the known children: orphans, which the first process of a container gets."""
    with contextlib.suppress(ChildProcessError):  # It has no children at all.
        while (
            dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        ) and dead.si_pid not in known:
            os.waitpid(dead.si_pid, 0)


@dataclass
class Pacing:
    """When a role may be started again; `failures` are the deaths since one was ready."""

    failures: int = 0
    spawn_at: float = 0.0

    def note_death(self, child: Child, now: float) -> None:
        """Set the pause that its death calls for."""
        if child.ready_at is None:
            if child.spawned_at < self.spawn_at:
                return  # It was started with one that has died already: their pause is set.
            pause = min(FIRST_PAUSE_SECONDS * 2 ** min(self.failures, 10), MAX_PAUSE_SECONDS)
            self.failures += 1
        else:
            pause = SHORT_LIFE_PAUSE_SECONDS if now - child.ready_at < SHORT_LIFE_SECONDS else 0.0
        self.spawn_at = now + pause
