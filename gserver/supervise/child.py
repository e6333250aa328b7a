"""One child process: how it is started, watched and ended, what it reports, when it is retried."""

import contextlib
import logging
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from time import monotonic
from typing import Any

from gserver import logs
from gserver.boot import (
    DUPLICATE_ID,
    HAND_OVER,
    KEEP,
    KEPT,
    LEAVING,
    QUERY,
    READY,
    STACK_SIGNAL,
    SUPERVISOR_SIGNALS,
    TAKE_OVER,
    Instructions,
)
from gserver.config import SECRETS, environment_names
from gserver.supervise.phases import Generation

#: Pause before the next try after a child that died before it was ready: doubled each time, up to
#: the maximum.
FIRST_PAUSE_SECONDS = 0.1
MAX_PAUSE_SECONDS = 10.0
#: A child that was ready is replaced at once; if it was ready for less than a second, after a
#: pause.
SHORT_LIFE_SECONDS = 1.0
SHORT_LIFE_PAUSE_SECONDS = 0.2

#: A child is looked at this often, at least.
WATCH_SECONDS = 1.0
#: A process that looks hung is checked once more before SIGKILL: the machine may have been
#: suspended.
SECOND_LOOK_SECONDS = 0.4
#: Most bytes that are read of the stack of a process that hangs.
MAX_STACK_BYTES = 65_536
#: A child that is not ready after this time counts as hung.
BOOT_SECONDS = 30.0
#: Pause after a handover that was given up.
HAND_OVER_AGAIN_SECONDS = 1.0
#: A child that has not ended by then after SIGKILL is stuck in the kernel: it is not waited for.
STUCK_SECONDS = 2.0

WORKER, AGENT = "worker", "agent"
PACKAGE = str(Path(__file__).parents[1])


class State(Enum):
    """What a child is doing, as far as the supervisor knows."""

    STARTING = "starting"
    READY = "ready"
    # It accepts no more, and ends once another worker has its clients
    HANDING_OVER = "handing over"
    RETIRED = "retired"  # SIGUSR2 was sent: it accepts no more, and ends after its last client
    TERMINATING = "terminating"  # SIGTERM was sent
    HUNG = "hung"  # killed because its heartbeat stopped
    KILLED = "killed"  # killed because its time was over, or by a second stop signal


class Finding(Enum):
    """What a look at a child has found."""

    HUNG = "hung"  # it was killed
    LATE = "late"  # it did not end in time after SIGTERM, and was killed
    STUCK = "stuck"  # it did not end after SIGKILL


@dataclass
class Inherited:
    """A process that this one has started before it replaced its own program. Like a Popen."""

    pid: int
    returncode: int | None = None

    def wait(self) -> None:
        """Reap it; block until it has ended."""
        _, status = os.waitpid(self.pid, 0)
        self.returncode = os.waitstatus_to_exitcode(status)


@dataclass(eq=False)
class Child:
    """One child. Times are monotonic seconds.

    `slot` is its slot of the scoreboard, -1 for the agent.
    """

    role: str
    slot: int
    generation: Generation
    process: subprocess.Popen[bytes] | Inherited
    #: Its reports, and orders for it. Closed once it has closed its end.
    control: socket.socket
    spawned_at: float
    state: State = State.STARTING
    ready_at: float | None = None
    #: When it is killed if it has not ended; None if it may live on.
    kill_at: float | None = None
    killed_at: float | None = None
    suspected_at: float | None = None
    is_stuck: bool = False
    #: The error that it has reported; "" for none.
    error: str = ""
    has_duplicate_id: bool = False
    #: It has closed its end of `control`.
    is_control_closed: bool = False
    #: Why it could not hand its clients over, if nothing has moved and the reason is not the death
    #: of the successor; and that one.
    kept_because: str = ""
    kept_by: "Child | None" = None
    #: It has handed over what it could, and ends: it waits for no answer of its successor.
    has_left: bool = False
    #: When its handover was found to take too long. Its end is put off once.
    overdue_at: float | None = None
    #: Not before this moment is it told again to hand its clients over.
    hand_over_at: float = 0.0
    #: The worker that it hands its clients over to.
    successor: "Child | None" = None
    #: Queries of the agent that were not passed on yet: lines with a descriptor.
    queries: list[tuple[str, int]] = field(default_factory=list)
    #: A file in memory, into which it writes its Python stack when it looks hung; -1 = none.
    stack_fd: int = -1

    @classmethod
    def start(cls, role: str, generation: Generation, instructions: Instructions) -> "Child":
        """Start a process; raise OSError if the system cannot.

        The supervisor's process id and the control socket are added to the instructions.
        """
        ours, theirs = socket.socketpair()
        stack_fd = -1
        signal.pthread_sigmask(signal.SIG_BLOCK, SUPERVISOR_SIGNALS)
        try:
            stack_fd = os.memfd_create("gserver-stack")
            payload = replace(
                instructions,
                supervisor_pid=os.getpid(),
                control_fd=theirs.fileno(),
                stack_fd=stack_fd,
            )
            with payload.as_file() as stdin:
                process = subprocess.Popen(  # noqa: S603 - the arguments are ours
                    # By its folder, so that no PYTHONPATH is needed to find the package: programs
                    # that handlers start would inherit that.
                    [sys.executable, "-P", PACKAGE, "child", role, str(instructions.slot)],
                    stdin=stdin,
                    pass_fds=[fd for fd in payload.fds if fd >= 0],
                    process_group=0,  # A terminal's Ctrl-C must reach the supervisor only.
                    env=child_environment(),
                )
        except OSError:
            ours.close()
            if stack_fd >= 0:
                os.close(stack_fd)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SUPERVISOR_SIGNALS)
            theirs.close()
        ours.setblocking(False)
        return cls(
            role, instructions.slot, generation, process, ours, monotonic(), stack_fd=stack_fd
        )

    def save(self) -> dict[str, Any]:
        """Return what `resume_children` needs, as JSON."""
        own = {"generation", "process", "control", "state", "successor", "kept_by", "queries"}
        own |= {"has_left", "overdue_at"}
        names = {each.name for each in fields(self)} - own
        rest = {name: getattr(self, name) for name in names}
        return {
            **rest,
            "generation": self.generation.number,
            "pid": self.pid,
            "control_fd": self.control.fileno(),
            "state": self.state.value,
            "successor_pid": self.successor.pid if self.successor else -1,
        }

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def has_been_ready(self) -> bool:
        """Whether it has reported that it is ready."""
        return self.ready_at is not None

    @property
    def is_accepting(self) -> bool:
        """Whether a worker takes new clients, as far as is known."""
        return self.state is State.READY

    @property
    def is_handing_over(self) -> bool:
        """Whether a worker hands its clients over to another one."""
        return self.state is State.HANDING_OVER

    @property
    def is_orphaned(self) -> bool:
        """Whether a worker has lost its successor during a handover.

        It serves on and reports KEPT, unless it drains already.
        """
        other = self.successor
        is_lost = other is None or other.is_stuck or other.process.returncode is not None
        return self.is_handing_over and is_lost

    @property
    def should_end(self) -> bool:
        """Whether the supervisor wants it to end."""
        return self.state in (State.HANDING_OVER, State.TERMINATING, State.KILLED)

    @property
    def is_staying(self) -> bool:
        """Whether it keeps its place: it should not end, and is not stuck."""
        is_ending = self.should_end and not self.is_orphaned
        return not (is_ending or self.is_stuck)

    @property
    def end_reason(self) -> str:
        """Why it ended: the error that it reported, or its signal or exit code."""
        if self.error:
            return self.error
        code = self._exit_code
        if code >= 0:
            return f"exit code {code}"
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"

    @property
    def _exit_code(self) -> int:
        """Its exit code, or its signal as a negative number, once it has ended."""
        return self.process.returncode or 0

    @property
    def has_ended_as_requested(self) -> bool:
        """Whether it has ended in the way that the supervisor's signal requests."""
        code = self._exit_code
        match self.state:
            case State.KILLED:
                return True
            case State.TERMINATING:
                return code >= 0 or code == -signal.SIGTERM
            case State.RETIRED | State.HANDING_OVER:
                return bool(code == 0)
        return False

    def has_ended(self) -> bool:
        """Return whether it has ended; if so, reap it.

        If it did not end by itself and cleanly, the programs that its handlers have started end
        with it. They are killed before it is reaped: after that its number, which is that of the
        group, may belong to another process.
        """
        if self.process.returncode is not None:
            return True
        end = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if end is None:
            return False
        if (end.si_code, end.si_status) != (os.CLD_EXITED, 0):
            with contextlib.suppress(OSError):  # There are none, or they are another user's.
                os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()
        return True

    def read_report(self) -> bool:
        """Take in what it reports; return whether it has become ready by that."""
        if self.control.fileno() < 0:
            return False
        fds: list[int] = []
        try:
            data, fds, _, _ = socket.recv_fds(self.control, 8192, 4, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return False
        except ConnectionResetError:  # It has died with an order unread.
            data = b""
        self.is_control_closed = not data
        was_ready = self.has_been_ready
        for line in data.decode("ascii", "replace").splitlines():
            if line.startswith(f"{QUERY} "):
                # Without its descriptor, for which there was no room, it cannot be answered.
                self.queries += [(line, fds.pop())] if fds else []
            else:
                self._take_report(line)
        for fd in fds:
            os.close(fd)
        return self.has_been_ready and not was_ready

    def _take_report(self, line: str) -> None:
        kind, _, reason = line.partition(" ")
        if kind == READY:
            self._note_ready()
        elif kind == KEPT and self.is_handing_over:
            self._keep()
            self.kept_because = reason
        elif kind == LEAVING:
            self.has_left = True
            if self.is_handing_over:
                self.state = State.TERMINATING
        elif kind != KEPT:
            self.error = reason
            self.has_duplicate_id = kind == DUPLICATE_ID

    def pass_on(self, line: str, fd: int) -> None:
        """Send a worker a query of the agent, with its descriptor, if it can take it."""
        if self.has_been_ready and self.control.fileno() >= 0:
            with contextlib.suppress(OSError):  # It is dead, or too busy.
                socket.send_fds(self.control, [f"{line}\n".encode()], [fd])

    def _note_ready(self) -> None:
        self.ready_at = monotonic()
        if self.state is State.STARTING:
            self.state = State.READY
        message = f"{self.role} {self.pid} is ready"
        fields = {"gserver.child_pid": self.pid}
        logs.event(logging.INFO, f"{self.role}.ready", message, fields)

    def close_control(self, selector: selectors.BaseSelector) -> None:
        """Stop reading its reports."""
        if self.control.fileno() >= 0:
            selector.unregister(self.control)
            self.control.close()

    def release(self) -> None:
        """Close what is left of it, once it has ended."""
        if self.stack_fd >= 0:
            os.close(self.stack_fd)
            self.stack_fd = -1

    def stack(self) -> list[str]:
        """Return the lines of the stack that it has written, the innermost call last."""
        if self.stack_fd < 0:
            return []
        text = os.pread(self.stack_fd, MAX_STACK_BYTES, 0).decode("utf-8", "replace")
        lines = [line.strip() for line in text.splitlines() if line.startswith("  File ")]
        return lines[::-1]

    def _ask_for_stack(self) -> None:
        if self.stack_fd >= 0 and self.has_been_ready:  # Before that, the signal would end it.
            os.ftruncate(self.stack_fd, 0)
            os.lseek(self.stack_fd, 0, os.SEEK_SET)
            self._send(STACK_SIGNAL)

    @property
    def due_at(self) -> float:
        """When `watch` has something to do, if nothing happens before; infinity for never."""
        if self.killed_at is not None:
            return math.inf if self.is_stuck else self.killed_at + STUCK_SECONDS
        due_at = math.inf if self.kill_at is None else self.kill_at
        if self.suspected_at is not None:
            due_at = min(due_at, self.suspected_at + SECOND_LOOK_SECONDS)
        return due_at

    def silence(self, now: float, heartbeat_at: float) -> float:
        """Return for how many seconds its heartbeat has been missing."""
        return now - max(self.spawned_at, heartbeat_at)

    def watch(self, now: float, heartbeat_at: float, hang_seconds: float) -> Finding | None:
        """Kill it if it did not end in time, or if its heartbeat stopped; return what was found.

        `heartbeat_at` is its last heartbeat, `hang_seconds` the longest silence, 0 = no limit.
        Each finding is returned once.
        """
        if self.killed_at is not None:
            if self.is_stuck or now < self.killed_at + STUCK_SECONDS:
                return None
            self.is_stuck = True
            return Finding.STUCK
        if self.kill_at is not None and now >= self.kill_at:
            self.kill(now)
            return Finding.LATE
        if self._is_hung(now, heartbeat_at, hang_seconds):
            is_ending = self.should_end and not self.is_handing_over
            self._kill(State.KILLED if is_ending else State.HUNG, now)
            return Finding.HUNG
        return None

    def _is_hung(self, now: float, heartbeat_at: float, hang_seconds: float) -> bool:
        """Return whether it was silent for too long at two looks in a row."""
        limit = max(hang_seconds, WATCH_SECONDS if self.has_been_ready else BOOT_SECONDS)
        if not hang_seconds or self.silence(now, heartbeat_at) <= limit:
            self.suspected_at = None
            return False
        if self.suspected_at is None:
            self.suspected_at = now
            self._ask_for_stack()
        return now - self.suspected_at >= SECOND_LOOK_SECONDS

    def retire(self) -> None:
        """Send a worker SIGUSR2: it accepts no more, and ends when its clients have left.

        Does nothing before it is ready: SIGUSR2 would be ignored.
        """
        if self.state is State.READY:
            self.state = State.RETIRED
            self._send(signal.SIGUSR2)

    def hand_over(self, successor: "Child", kill_at: float) -> None:
        """Make a worker hand its clients over, and end. It is killed if it has not ended by then.

        Raises OSError if the system has no socket pair, or if one of the two cannot be told.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            socket.send_fds(successor.control, [f"{TAKE_OVER}\n".encode()], [theirs.fileno()])
            socket.send_fds(self.control, [f"{HAND_OVER}\n".encode()], [ours.fileno()])
        self.state, self.successor, self.kill_at = State.HANDING_OVER, successor, kill_at
        self.overdue_at = None

    def _keep(self) -> None:
        """Note that a worker serves and accepts again: it could not hand its clients over."""
        self.kept_by = self.successor
        self.hand_over_at = monotonic() + HAND_OVER_AGAIN_SECONDS
        self.state, self.successor, self.kill_at = State.READY, None, None

    def note_successor_gone(self) -> None:
        """Tell a worker that its successor is dead, or stuck in the kernel for ever.

        It usually knows; but another process may hold the successor's end of the pair.
        """
        with contextlib.suppress(OSError):
            self.control.send(f"{KEEP}\n".encode())

    def terminate(self, kill_at: float) -> None:
        """Send SIGTERM, and note when it is killed if it has not ended."""
        if self.killed_at is None:
            self.state = State.TERMINATING
            self.kill_at = kill_at
            self._send(signal.SIGTERM)

    def kill(self, now: float) -> None:
        """End it now."""
        self._kill(State.KILLED, now)

    def kill_hung(self, now: float) -> None:
        """End it now, because its heartbeat has stopped."""
        self._kill(State.HUNG, now)

    def _kill(self, state: State, now: float) -> None:
        if self.suspected_at is None and self.stack_fd >= 0:
            os.ftruncate(self.stack_fd, 0)  # It holds the stack of an earlier suspicion.
        self.state = state
        self.suspected_at = None
        if self.killed_at is None:
            self.killed_at = now
            self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        # Not `Popen.send_signal`, which reaps a process that has ended. One that is not reaped
        # keeps its number.
        if self.process.returncode is None:
            os.kill(self.pid, number)


def child_environment() -> dict[str, str]:
    """Return this process's environment without secrets, which programs of handlers would see."""
    secret = {name for option in SECRETS for name in environment_names(option)}
    return {name: value for name, value in os.environ.items() if name not in secret}


def resume_children(
    saved: Iterable[dict[str, Any]], generations: Mapping[int, Generation]
) -> list[Child]:
    """Return the children that a supervisor has saved before it replaced its own program."""
    found: dict[int, Child] = {}
    successors: dict[int, int] = {}
    for each in saved:
        pid, control_fd = each.pop("pid"), each.pop("control_fd")
        successors[pid] = each.pop("successor_pid")
        # A process that has closed its end has no socket any more.
        control = socket.socket(fileno=control_fd) if control_fd >= 0 else _closed_socket()
        if control_fd >= 0:
            control.setblocking(False)
            control.set_inheritable(False)
        if each.get("stack_fd", -1) >= 0:
            os.set_inheritable(each["stack_fd"], False)
        found[pid] = Child(
            **each
            | {
                "generation": generations[each["generation"]],
                "state": State(each["state"]),
                "process": Inherited(pid),
                "control": control,
                # An upgrade never happens in a stop.
                "has_left": each["state"] == State.TERMINATING.value,
            }
        )
    for pid, successor_pid in successors.items():
        found[pid].successor = found.get(successor_pid)
    return list(found.values())


def _closed_socket() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.close()
    return sock


def reap_orphans(known: Collection[int]) -> None:
    """Reap dead processes that are not in `known`: the orphans that PID 1 of a container gets."""
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    with contextlib.suppress(ChildProcessError):  # There are no children at all.
        while (dead := os.waitid(os.P_ALL, 0, flags)) and dead.si_pid not in known:
            os.waitpid(dead.si_pid, 0)


@dataclass
class Backoff:
    """When a role may be started again; `failures` are the deaths since one was ready."""

    failures: int = 0
    spawn_at: float = 0.0

    def note_death(self, child: Child, now: float) -> None:
        """Set the pause that follows its death."""
        if child.ready_at is None:
            if child.spawned_at < self.spawn_at:
                return  # It was started together with one that has died already.
            pause = min(FIRST_PAUSE_SECONDS * 2 ** min(self.failures, 10), MAX_PAUSE_SECONDS)
            self.failures += 1
        elif now - child.ready_at < SHORT_LIFE_SECONDS:
            pause = SHORT_LIFE_PAUSE_SECONDS
        else:
            pause = 0.0
        self.spawn_at = now + pause
