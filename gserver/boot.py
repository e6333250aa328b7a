"""What worker and agent share: how they take the supervisor's instructions, report and live.

A child is a new interpreter (`python -P gserver/ child ROLE SLOT`), not a fork: gevent starts clean
in it, and a reload brings new code. Its instructions come as JSON on its stdin, so neither
arguments nor environment carry them. It reports through a socket, in lines: `ready`;
`error REASON` if it cannot go on; `duplicate_id REASON` if the whole server cannot; or
`kept [REASON]` if a handover has failed, and it serves on; or `leaving` if it drains at the end of
one. Through the same socket come orders for workers, in lines: `hand_over` and `take_over`, each
with one end of a socket pair between two workers, or `keep` if the other worker is dead. A line of
the agent that begins with `query` has a descriptor, and is passed on to the workers as it is.
"""

import atexit
import ctypes
import faulthandler
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from errno import EBADF, ENOTSOCK
from typing import Any, TextIO

from gserver import logs
from gserver.certificates import Certificates
from gserver.config import Config
from gserver.errors import (
    EXIT_CLEAN,
    EXIT_RUNTIME,
    OTHER_VERSION,
    DuplicateIdError,
    FatalError,
    UsageError,
)
from gserver.scoreboard import Scoreboard

#: First words of a report.
READY, ERROR, DUPLICATE_ID = "ready", "error", "duplicate_id"
KEPT, LEAVING = "kept", "leaving"
#: Orders.
HAND_OVER, TAKE_OVER, KEEP = "hand_over", "take_over", "keep"
#: Both: a request of the agent to the workers, which the supervisor passes on.
QUERY = "query"
#: What the agent may request: a list of all clients, or to close those with an id or an address.
LIST, CLOSE = "list", "close"
#: A report is cut to this: it is written as a whole.
MAX_REPORT_BYTES = 4000
#: Descriptors that a process needs beside those of its clients: standard streams, scoreboard, one
#: listener, event loop, logs, name look-ups, and clients that are being rejected.
RESERVED_FILES = 64
HEARTBEAT_SECONDS = 0.25
#: Errors after which a process can no longer accept on its listening socket.
FATAL_ACCEPT_ERRORS = EBADF, ENOTSOCK
#: Signals for the supervisor only (`pkill -HUP gserver` reaches every process): blocked while a
#: child is started, then ignored by it. SIGTTOU would stop a child that writes to a terminal with
#: `stty tostop`.
SUPERVISOR_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR2, signal.SIGUSR1, signal.SIGTTOU)
#: Makes a child write its Python stack, for the log of a hang. Nothing else sends it.
STACK_SIGNAL = signal.SIGRTMIN
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Instructions:
    """What a child has to know. Descriptors are inherited with the same numbers; -1 = none."""

    config: Config
    certificates: Certificates
    slot: int
    slots: int
    scoreboard_fd: int
    #: Of a worker, those of the endpoints, in their order; of the agent, that of the admin port.
    listener_fds: Sequence[int]
    supervisor_pid: int = -1
    control_fd: int = -1
    #: A file in memory, into which the child writes where it is when it gets STACK_SIGNAL.
    stack_fd: int = -1

    @property
    def fds(self) -> tuple[int, ...]:
        """All descriptors; -1 = none."""
        return self.scoreboard_fd, *self.listener_fds, self.control_fd, self.stack_fd

    def scoreboard(self) -> Scoreboard:
        """Map the shared scoreboard."""
        return Scoreboard.attach(self.scoreboard_fd, self.slots)

    def as_file(self) -> TextIO:
        """Return a file in memory from which `_read_instructions` reads these instructions.

        A pipe holds 64 KB, and a child that never reads would block the supervisor.
        """
        return file_in_memory("gserver-instructions", json.dumps(asdict(self)))

    def report(self, kind: str, text: str = "") -> None:
        """Send the supervisor one line: READY, or one of the others with the reason."""
        _report(self.control_fd, kind, text)


def file_in_memory(name: str, text: str) -> TextIO:
    """Return an open file with this text, at its beginning. It is gone once it is closed."""
    file = open(os.memfd_create(name), "w+")  # noqa: SIM115 - the caller closes it
    file.write(text)
    file.seek(0)
    return file


def begin() -> Instructions:
    """Begin as a child: end with the supervisor, read the instructions, start the logs.

    Raises `UsageError` if there are no instructions, or those of another version.
    """
    # The kernel kills this process when the supervisor dies, even if it hangs. (A supervisor that
    # died before this call is found below.)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    instructions = _read_instructions()
    exit_if_orphaned(instructions)
    with open(os.devnull) as empty:  # Programs that a handler starts must not read secrets there.
        os.dup2(empty.fileno(), 0)
    for number in SUPERVISOR_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    if instructions.stack_fd >= 0:
        # Written by the signal handler itself, so it works in a loop and in C code.
        faulthandler.register(STACK_SIGNAL, instructions.stack_fd, all_threads=False)
    for fd in instructions.fds:
        if fd >= 0:
            os.set_inheritable(fd, False)  # A program that a handler starts must not hold the port.
    config = instructions.config
    # Handlers may print. Their lines go to stderr at once, not between the events on stdout.
    log_fd = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr  # It is line-buffered; stdout would be block-buffered.
    # It runs after the exit handler of `logs`, which writes the last lines.
    atexit.register(count_dropped_lines, instructions, is_last=True)
    logs.start(config.log_level, config.log_format, config.server_id, log_fd)
    return instructions


def _read_instructions() -> Instructions:
    payload: dict[str, Any] = {}
    try:
        payload |= {} if sys.stdin.isatty() else json.load(sys.stdin)
        config, certificates = Config(**payload["config"]), Certificates(**payload["certificates"])
        return Instructions(**payload | {"config": config, "certificates": certificates})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        control_fd = payload.get("control_fd")
        if not isinstance(control_fd, int):
            raise UsageError(
                "`child` is internal: only a `gserver serve` of the same version can start it"
            ) from error
        _report(control_fd, ERROR, OTHER_VERSION)
        raise UsageError(OTHER_VERSION) from error


def _report(control_fd: int, kind: str, text: str) -> None:
    line = " ".join([kind, *text.split()]).encode("ascii", "backslashreplace")
    os.write(control_fd, line[:MAX_REPORT_BYTES] + b"\n")


def exit_if_orphaned(instructions: Instructions) -> None:
    """End this process at once if the supervisor is no longer its parent."""
    if os.getppid() != instructions.supervisor_pid:
        os._exit(EXIT_RUNTIME)


def keep_heartbeat(instructions: Instructions, scoreboard: Scoreboard) -> None:
    """Write this process's heartbeat until the supervisor has gone. Runs in a greenlet of its own.

    It also logs how many warnings were suppressed, and logs at debug level while that is wanted.
    """
    heartbeat = scoreboard.heartbeat_cell(instructions.slot)
    while True:
        exit_if_orphaned(instructions)
        now_ns = scoreboard.cells[heartbeat] = time.monotonic_ns()
        logs.log_debug(is_on=scoreboard.get("debug_ends_at") > now_ns)
        logs.report_suppressed()
        count_dropped_lines(instructions)
        time.sleep(HEARTBEAT_SECONDS)


def count_dropped_lines(instructions: Instructions, *, is_last: bool = False) -> None:
    """Count the log lines that a worker has dropped since the last call."""
    if instructions.slot >= 0 and (dropped := logs.newly_dropped_lines(is_last=is_last)):
        scoreboard = instructions.scoreboard()
        scoreboard.cells[scoreboard.cell("log_lines_dropped", instructions.slot)] += dropped


def fatal_on_error(function: Callable[..., object]) -> Callable[..., None]:
    """Wrap a callback whose failure must end the process, so that another takes its place.

    gevent would log the error and go on, and the process would look well. A SystemError is raised
    in `main` and ends it.
    """

    def run(*arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception as error:
            raise SystemError(
                f"{function.__qualname__} failed: this process exits and is replaced"
            ) from error

    return run


def run_role(role: Callable[[Instructions], None]) -> int:
    """Run a role to its end and return the exit code. A `FatalError` is reported, not raised."""
    try:
        instructions = begin()
    except FatalError as failure:
        sys.stderr.write(f"gserver: {failure}\n")
        return failure.exit_code
    try:
        role(instructions)
    except FatalError as failure:
        kind = DUPLICATE_ID if isinstance(failure, DuplicateIdError) else ERROR
        instructions.report(kind, str(failure))
        return failure.exit_code
    finally:
        logs.report_suppressed(is_last=True)
    return EXIT_CLEAN


def room_for_clients(config: Config) -> int:
    """Raise the limit of open files, and return for how many clients a worker has descriptors."""
    return raise_file_limit() - RESERVED_FILES - (len(config.endpoints) - 1)


def raise_file_limit() -> int:
    """Raise the limit of open files to the hard one, which is returned. Children inherit it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
