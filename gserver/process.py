"""How a child process begins: what the supervisor hands it, and how the child takes it.

A child is a new interpreter (`python -m gserver child ROLE`), not a fork: gevent starts clean in it, and a
reload brings new code. Its instructions come as JSON on its stdin, so that neither arguments nor
environment carry them; it reports through a pipe: `ready`, or `refused` and the reason.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, cast

from gserver import logs
from gserver.board import Board
from gserver.config import Config
from gserver.errors import EXIT_RUNTIME, Failure, Misuse

#: Descriptors that a process needs beside its clients: standard ones, board, listener, event loop, logs,
#: name look-ups, and clients that are being turned away.
RESERVED_FILES = 64
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Instructions:
    """What a child is told. Descriptors are inherited under the same numbers; -1 stands for none."""

    config: Config
    slot: int
    slots: int
    supervisor_pid: int
    board_fd: int
    listener_fd: int
    report_fd: int

    def board(self) -> Board:
        """Map the shared board."""
        return Board.attach(self.board_fd, self.slots)

    def report(self, text: str) -> None:
        """Tell the supervisor, in one line."""
        os.write(self.report_fd, " ".join(text.split()).encode()[:4000] + b"\n")


def spawn(role: str, instructions: Instructions) -> subprocess.Popen[bytes]:
    """Start a child in a process group of its own, so that a terminal's Ctrl-C reaches the supervisor alone."""
    fds = (instructions.board_fd, instructions.listener_fd, instructions.report_fd)
    root = str(Path(__file__).parent.parent)
    path = os.environ.get("PYTHONPATH")
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "gserver", "child", role, str(instructions.slot)],
        stdin=subprocess.PIPE,
        pass_fds=[fd for fd in fds if fd >= 0],
        process_group=0,
        env={**os.environ, "PYTHONPATH": root if not path else f"{root}{os.pathsep}{path}"},
    )
    # A child that is dead already is found out by its exit, like any other.
    with contextlib.suppress(BrokenPipeError), cast(IO[bytes], child.stdin) as stdin:
        stdin.write(json.dumps(asdict(instructions)).encode())
    return child


def begin(start_thread: Callable[..., Any]) -> Instructions:
    """In a child: tie its life to the supervisor's, read the instructions, start its logs."""
    # Killed by the kernel when the supervisor dies, even if this process hangs. (A check below closes the gap before.)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    try:
        told = {} if sys.stdin.isatty() else json.load(sys.stdin)
        instructions = Instructions(**{**told, "config": Config(**told["config"])})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Misuse("a child process is started by `gserver serve`, not by hand") from error
    leave_if_orphaned(instructions)
    # These two are the supervisor's business, even when somebody sends them to all processes of the name.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for fd in (instructions.board_fd, instructions.listener_fd, instructions.report_fd):
        if fd >= 0:
            os.set_inheritable(fd, False)  # A program that a handler starts must not hold the port.
    config = instructions.config
    logs.start(config.log_level, config.log_format, config.server_id, start_thread)
    return instructions


def leave_if_orphaned(instructions: Instructions) -> None:
    """End this process at once when the supervisor is no longer its parent."""
    if os.getppid() != instructions.supervisor_pid:
        os._exit(EXIT_RUNTIME)


def run_child(role: Callable[[Instructions], None], start_thread: Callable[..., Any]) -> int:
    """Run a role to its end and return the exit code; a `Failure` is reported, not raised."""
    try:
        instructions = begin(start_thread)
    except Misuse as misuse:
        sys.stderr.write(f"gserver: {misuse}\n")
        return misuse.exit_code
    try:
        role(instructions)
    except Failure as failure:
        instructions.report(f"refused {failure}")
        return failure.exit_code
    except Exception as error:  # noqa: BLE001 (a bug: logged as one event, not printed)
        logs.unhandled(role, type(error), error, error.__traceback__)
        return EXIT_RUNTIME
    finally:
        logs.stop(instructions.config.drain_timeout_seconds * 0.05)
    return 0


def open_file_limit() -> int:
    """Return how many files this process may hold open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_file_limit() -> None:
    """Raise the limit of open files to the hard one, for this process and its children."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
