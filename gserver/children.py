"""A process as its supervisor knows it: how it is started, what it has said, how it ended, when to start the next."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic
from typing import IO, cast

from gserver.process import Instructions

#: Pause before the next try after a child that died before it was ready: doubled each time, up to the maximum.
FIRST_PAUSE_SECONDS = 0.1
MAX_PAUSE_SECONDS = 10.0
#: One that was ready is replaced at once; after this pause if it did not live for a second.
SHORT_LIFE_SECONDS = 1.0
SHORT_LIFE_PAUSE_SECONDS = 0.2

WORKER, AGENT = "worker", "agent"
ROOT = str(Path(__file__).parent.parent)


@dataclass(eq=False)
class Child:
    """One child. Its `slot` is its column of the board, -1 for the agent; its times are monotonic seconds."""

    role: str
    slot: int
    generation: int
    process: subprocess.Popen[bytes]
    report_fd: int
    spawned_at: float
    ready_at: float | None = None
    is_leaving: bool = False
    kill_at: float | None = None
    suspected_at: float | None = None
    refusal: str = ""
    is_unwanted: bool = False
    has_hung_up: bool = False

    @classmethod
    def start(cls, role: str, generation: int, instructions: Instructions) -> "Child":
        """Start a process, with a pipe to report by added to its instructions; raise OSError when the system cannot."""
        report_fd, its_end = os.pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "gserver", "child", role, str(instructions.slot)],
                stdin=subprocess.PIPE,
                pass_fds=[fd for fd in (instructions.board_fd, instructions.listener_fd, its_end) if fd >= 0],
                process_group=0,  # so that a terminal's Ctrl-C reaches the supervisor alone
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))},
            )
        except OSError:
            os.close(report_fd)
            raise
        finally:
            os.close(its_end)
        os.set_blocking(report_fd, False)
        told = replace(instructions, report_fd=its_end)
        # A child that is dead already is found out by its exit, like any other.
        with contextlib.suppress(BrokenPipeError), cast(IO[bytes], process.stdin) as stdin:
            stdin.write(json.dumps(asdict(told)).encode())
        return cls(role, instructions.slot, generation, process, report_fd, monotonic())

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def end(self) -> str:
        """Why it ended: what it said itself, or its exit code."""
        code = self.process.returncode
        name = next((number.name for number in signal.Signals if number == -code), f"signal {-code}")
        return self.refusal or (f"killed by {name}" if code < 0 else f"exit code {code}")

    def read_report(self) -> bool:
        """Note what it says; return whether that is that it is ready."""
        try:
            report = os.read(self.report_fd, 8192).decode("ascii", "replace") if self.report_fd >= 0 else ""
        except BlockingIOError:
            return False
        self.has_hung_up = not report
        if report.startswith(("refused ", "unwanted ")):
            kind, _, self.refusal = report.strip().partition(" ")
            self.is_unwanted = kind == "unwanted"
        elif report:
            self.ready_at = monotonic()
        return bool(report) and not self.refusal

    def dismiss(self, kill_at: float) -> None:
        """Ask it to end, and note when to stop asking."""
        self.is_leaving = True
        self.kill_at = kill_at
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it now."""
        self.is_leaving = True
        self.process.kill()


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
