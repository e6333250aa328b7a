"""How a child process begins: what the supervisor hands it, and how the child takes it.

A child is a new interpreter (`python -m gserver child ROLE`), not a fork: gevent starts clean in
it, and a reload brings new code. Its instructions come as JSON on its stdin, so that neither
arguments nor environment carry them; it reports through a pipe: `ready`; or `refused` and the
reason; or `unwanted`, when the whole server cannot stay.
"""

import ctypes
import errno
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from gserver import logs
from gserver.certificates import Certificates
from gserver.config import Config
from gserver.errors import EXIT_CLEAN, EXIT_RUNTIME, DuplicateIdError, FatalError, UsageError
from gserver.scoreboard import Scoreboard

#: Descriptors that a process needs beside its clients: standard ones, scoreboard, listener, event
#: loop, logs, name look-ups, and clients that are being turned away.
RESERVED_FILES = 64
HEARTBEAT_SECONDS = 0.25
#: Errors after which a process can no longer accept on its listening socket.
FATAL_ACCEPT_ERRORS = errno.EBADF, errno.ENOTSOCK
#: Its business alone, whoever sends them to all processes of the name: blocked in a child until it
#: ignores them. The last would stop who writes to a terminal that has `stty tostop`.
SUPERVISORS_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR2, signal.SIGUSR1, signal.SIGTTOU)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Instructions:
    """What a child is told. Descriptors are inherited under the same numbers; -1 stands for none."""

    config: Config
    certificates: Certificates
    slot: int
    slots: int
    scoreboard_fd: int
    listener_fd: int
    supervisor_pid: int = -1
    report_fd: int = -1

    def scoreboard(self) -> Scoreboard:
        """Map the shared scoreboard."""
        return Scoreboard.attach(self.scoreboard_fd, self.slots)

    def report(self, text: str) -> None:
        """Tell the supervisor, in one line."""
        os.write(
            self.report_fd,
            " ".join(text.split()).encode("ascii", "backslashreplace")[:4000] + b"\n",
        )


def begin() -> Instructions:
    """In a child: tie its life to the supervisor's, read the instructions, start its logs."""
    # Killed by the kernel when the supervisor dies, even if this process hangs. (A check below
    # closes the gap before.)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    try:
        told = {} if sys.stdin.isatty() else json.load(sys.stdin)
        parts = {
            "config": Config(**told["config"]),
            "certificates": Certificates(**told["certificates"]),
        }
        instructions = Instructions(**{**told, **parts})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            "a child process is started by a `gserver serve` of the same version, not by hand"
        ) from error
    leave_if_orphaned(instructions)
    with open(os.devnull) as nothing:  # Programs that a handler starts must not read secrets there.
        os.dup2(nothing.fileno(), 0)
    for number in SUPERVISORS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for fd in (instructions.scoreboard_fd, instructions.listener_fd, instructions.report_fd):
        if fd >= 0:
            os.set_inheritable(fd, False)  # A program that a handler starts must not hold the port.
    config = instructions.config
    # Handlers may print. Their lines go to stderr at once, not between the events on stdout.
    log_fd = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr  # It is line-buffered; stdout would be block-buffered.
    logs.start(config.log_level, config.log_format, config.server_id, log_fd)
    return instructions


def leave_if_orphaned(instructions: Instructions) -> None:
    """End this process at once when the supervisor is no longer its parent."""
    if os.getppid() != instructions.supervisor_pid:
        os._exit(EXIT_RUNTIME)


def keep_heartbeat(instructions: Instructions, scoreboard: Scoreboard) -> None:
    """Give signs of life for ever: to be run in a greenlet of its own."""
    heartbeat = scoreboard.heartbeat_cell(instructions.slot)
    while True:
        leave_if_orphaned(instructions)
        scoreboard.cells[heartbeat] = time.monotonic_ns()
        logs.report_suppressed()
        time.sleep(HEARTBEAT_SECONDS)


def fatal_on_error(function: Callable[[], object]) -> Callable[[], None]:
    """Return it so that its failure ends the process: for what everybody depends on, since another
    can take its place.

    gevent would go on without what has failed, and the process would seem well. For a SystemError
    it ends `main`.
    """

    def run() -> None:
        try:
            function()
        except Exception as error:
            raise SystemError(
                f"{function.__qualname__} has failed: another process is to take over"
            ) from error

    return run


def run_role(role: Callable[[Instructions], None]) -> int:
    """Run a role to its end and return the exit code; a `FatalError` is reported, not raised."""
    try:
        instructions = begin()
    except FatalError as failure:
        sys.stderr.write(f"gserver: {failure}\n")
        return failure.exit_code
    try:
        role(instructions)
    except FatalError as failure:
        instructions.report(
            f"{'unwanted' if isinstance(failure, DuplicateIdError) else 'refused'} {failure}"
        )
        return failure.exit_code
    return EXIT_CLEAN


def raise_file_limit() -> int:
    """Raise the limit of open files to the hard one, for this process and its children; return it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
