"""The supervisor: starts, watches and replaces the processes; owns the listening socket and the board.

It serves nobody and imports neither gevent nor anything that talks to a network, so that next to nothing in
it can break. Signal handlers only take note; the loop acts. All its times are monotonic.
"""

import logging
import os
import selectors
import signal
import subprocess
from dataclasses import dataclass, replace
from time import monotonic

from gserver import listener, logs
from gserver.board import Board
from gserver.config import Config
from gserver.errors import EXIT_CLEAN, EXIT_RUNTIME, Failure, Misuse
from gserver.process import Instructions, spawn

#: How often to look at the heartbeats, at least.
WATCH_SECONDS = 1.0
#: A child that is not ready by then is taken for hung.
BOOT_SECONDS = 30.0
#: Pause before the next try after a child that died before it was ready: doubled each time, up to the maximum.
FIRST_PAUSE_SECONDS = 0.1
MAX_PAUSE_SECONDS = 10.0
#: One that was ready is replaced at once; after this pause if it did not live for a second.
SHORT_LIFE_SECONDS = 1.0
SHORT_LIFE_PAUSE_SECONDS = 0.2
#: Parts of the drain timeout by which workers, then the agent, are killed if they are still there.
WORKERS_SHARE = 0.9
AGENT_SHARE = 0.97

WORKER, AGENT = "worker", "agent"


@dataclass(eq=False)
class Child:
    """A process as its supervisor sees it."""

    role: str
    slot: int
    generation: int
    process: subprocess.Popen[bytes]
    report_fd: int
    spawned_at: float
    ready_at: float | None = None
    is_leaving: bool = False
    kill_at: float | None = None
    refusal: str = ""

    def dismiss(self, kill_at: float) -> None:
        """Ask it to end, and note when to stop asking."""
        self.is_leaving = True
        self.kill_at = kill_at
        self.process.send_signal(signal.SIGTERM)


@dataclass
class Pacing:
    """When a role may be started again."""

    failures: int = 0
    spawn_at: float = 0.0

    def note_death(self, child: Child, now: float) -> None:
        """Set the pause that its death calls for."""
        if child.ready_at is None:
            pause = min(FIRST_PAUSE_SECONDS * 2**self.failures, MAX_PAUSE_SECONDS)
            self.failures += 1
        else:
            pause = SHORT_LIFE_PAUSE_SECONDS if now - child.ready_at < SHORT_LIFE_SECONDS else 0.0
            self.failures = 0
        self.spawn_at = now + pause


class Supervisor:
    """One server, from bind to exit."""

    def __init__(self, config: Config) -> None:
        self._socket = listener.bind(config.host, config.port, config.backlog)
        self._config = replace(config, port=self._socket.getsockname()[1])
        # One column more than workers: a reload starts the new one before the old one goes.
        self._board = Board.create(config.workers + 1)
        self._children: list[Child] = []
        self._pacing = {WORKER: Pacing(), AGENT: Pacing()}
        self._generation = self._reloaded = 0
        self._was_ready = False
        self._failure: Failure | None = None
        self._drain_at: float | None = None
        self._was_forced = False
        self._looked_at = monotonic()
        self._signals: list[int] = []
        self._had_terminal = os.isatty(0)
        self._selector = selectors.DefaultSelector()

    def run(self) -> int:
        """Serve until told to stop; return the exit code. Raises `Failure` when the first start is refused."""
        self._take_note_of_signals()
        try:
            while self._children or not self._is_stopping:
                self._reconcile(monotonic())
                self._wait()
                self._reap(monotonic())
                self._heed_signals(monotonic())
                self._watch(monotonic())
        finally:
            for child in self._children:
                child.process.kill()
        if self._failure is not None:
            raise self._failure
        logs.event(logging.INFO, "server.stopped", "stopped" + (", forced" if self._was_forced else ""))
        return EXIT_RUNTIME if self._was_forced else EXIT_CLEAN

    # What there should be, and what there is.

    def _reconcile(self, now: float) -> None:
        """Start and dismiss what it takes to come nearer to what there should be."""
        if self._drain_at is not None and now >= self._drain_at:
            self._dismiss_all(self._drain_at)
            return
        workers = self._of(WORKER)
        for _ in range(self._config.workers - len(workers)):
            self._start(WORKER, now)
        stale = [child for child in workers if child.generation < self._generation]
        if stale and len(workers) == self._config.workers:
            self._start(WORKER, now)
        elif stale and all(child.ready_at for child in workers):
            stale[0].dismiss(now + self._config.drain_timeout_seconds)
        elif not stale and self._reloaded < self._generation and len(workers) == self._config.workers:
            self._finish_reload(now)
        if self._config.needs_agent and not self._of(AGENT):
            self._start(AGENT, now)

    def _of(self, role: str) -> list[Child]:
        return [child for child in self._children if child.role == role and not child.is_leaving]

    def _start(self, role: str, now: float) -> None:
        free = set(range(self._board.slots)) - {child.slot for child in self._children if child.role == WORKER}
        if now < self._pacing[role].spawn_at or (role == WORKER and not free):
            return
        slot = min(free) if role == WORKER else -1
        report_fd, child_report_fd = os.pipe()
        os.set_blocking(report_fd, False)
        listener_fd = self._socket.fileno() if role == WORKER else -1
        instructions = Instructions(
            self._config, slot, self._board.slots, os.getpid(), self._board.fd, listener_fd, child_report_fd
        )
        try:
            process = spawn(role, instructions)
        except OSError as error:
            os.close(report_fd)
            self._pacing[role].spawn_at = now + SHORT_LIFE_SECONDS
            logs.complain(f"{role}.not_started", f"cannot start a process: {error}", logs.error_fields(error))
            return
        finally:
            os.close(child_report_fd)
        self._add("agent_starts", role == AGENT)
        child = Child(role, slot, self._generation, process, report_fd, now)
        self._children.append(child)
        self._selector.register(report_fd, selectors.EVENT_READ, child)

    def _finish_reload(self, now: float) -> None:
        self._reloaded = self._generation
        self._add("reloads", 1)
        logs.event(logging.INFO, "server.reloaded", "reloaded: every worker is a new one")
        for child in self._of(AGENT):
            child.dismiss(now + self._config.drain_timeout_seconds)

    # What the children say and do.

    def _wait(self) -> None:
        """Wait for a report, a signal or the next moment that something is due."""
        now = monotonic()
        due = [child.kill_at for child in self._children if child.kill_at is not None]
        due += [pacing.spawn_at for pacing in self._pacing.values() if pacing.spawn_at > now]
        due += [self._drain_at] if self._drain_at is not None and self._drain_at > now else []
        for key, _ in self._selector.select(max(0.0, min([now + WATCH_SECONDS, *due]) - now)):
            if isinstance(key.data, Child):
                self._read_report(key.data)
            else:
                os.read(key.fd, 4096)

    def _read_report(self, child: Child) -> None:
        try:
            report = os.read(child.report_fd, 8192).decode()
        except BlockingIOError:
            return
        if not report:
            self._selector.unregister(child.report_fd)
            os.close(child.report_fd)
            child.report_fd = -1
        elif report.startswith("refused "):
            child.refusal = report.removeprefix("refused ").strip()
        else:
            child.ready_at = monotonic()
            fields = {"process.pid": child.process.pid}
            logs.event(logging.INFO, f"{child.role}.ready", f"{child.role} {child.process.pid} is ready", fields)
            if child.role == WORKER and not self._was_ready:
                self._was_ready = True
                self._announce()
            self._count_workers()

    def _reap(self, now: float) -> None:
        for child in [child for child in self._children if child.process.poll() is not None]:
            while child.report_fd >= 0:
                self._read_report(child)  # Its last words, and then the end that its exit has made.
            self._children.remove(child)
            lost = self._board.settle(child.slot) if child.role == WORKER else 0
            self._add("lost", lost)
            self._count_workers()
            if not child.is_leaving:
                self._pacing[child.role].note_death(child, now)
                self._on_death(child, lost)

    def _on_death(self, child: Child, lost: int) -> None:
        code = child.process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        reason = child.refusal or how
        fields = {"process.pid": child.process.pid, "process.exit_code": code, "gserver.clients": lost}
        if child.refusal and not self._was_ready:
            self._failure = self._failure or Misuse(reason)
            self._stop(now=monotonic(), delay=0.0)
            self._kill_all()
        elif child.role == WORKER and child.ready_at is None and self._reloaded < self._generation:
            self._reloaded = self._generation
            for other in self._of(WORKER):
                other.generation = self._generation
            message = f"reload given up, the old workers stay: a new one did not start: {reason}"
            logs.event(logging.ERROR, "server.reload_failed", message, fields)
        else:
            self._add("worker_restarts", child.role == WORKER)
            message = f"{child.role} {child.process.pid} died ({reason}), another takes its place"
            logs.event(logging.WARNING, f"{child.role}.died", message, fields)

    def _watch(self, now: float) -> None:
        """Kill who has not turned its loop for too long, and who was asked to end and did not."""
        if now - self._looked_at > 2 * WATCH_SECONDS:
            # This process itself was stopped, and so, perhaps, were the others: all start afresh.
            for child in self._children:
                child.spawned_at = now
        self._looked_at = now
        limit = self._config.hang_timeout_seconds
        for child in self._children:
            if child.kill_at is not None:
                if now >= child.kill_at:
                    child.process.kill()
                continue
            beat_at = max(child.spawned_at, self._board.heartbeat(child.slot) / 1e9)
            allowed = limit if child.ready_at else max(limit, BOOT_SECONDS)
            if limit and now - beat_at > allowed:
                child.process.kill()
                child.kill_at = now + WATCH_SECONDS
                message = f"{child.role} {child.process.pid} has hung for {now - beat_at:.1f} s: killed"
                logs.event(logging.ERROR, f"{child.role}.hung", message, {"process.pid": child.process.pid})

    def _add(self, name: str, amount: int) -> None:
        self._board.cells[self._board.single[name]] += amount

    def _count_workers(self) -> None:
        self._board.cells[self._board.single["workers"]] = sum(bool(child.ready_at) for child in self._of(WORKER))

    def _announce(self) -> None:
        config = self._config
        where = listener.show_address(config.host, config.port)
        fields = {
            "server.address": config.host,
            "server.port": config.port,
            "gserver.workers": config.workers,
            "gserver.max_clients": config.max_clients,
        }
        logs.event(logging.INFO, "server.listening", f"listening on {where}", fields)
        if config.log_format == "text":
            logs.say(f"  talk to it:  gserver ask WHO --server {where}   or   nc {config.host} {config.port}")
            logs.say("  stop it:     Ctrl-C")

    # Signals, and the end.

    def _take_note_of_signals(self) -> None:
        read_fd, write_fd = os.pipe()
        os.set_blocking(read_fd, False)
        os.set_blocking(write_fd, False)
        self._selector.register(read_fd, selectors.EVENT_READ, None)
        signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, _frame: self._signals.append(number))
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)  # It only has to wake the loop.

    def _heed_signals(self, now: float) -> None:
        while self._signals:
            number = self._signals.pop(0)
            name = signal.Signals(number).name
            # A terminal that is closed sends SIGHUP too: then it is no terminal any more.
            if number != signal.SIGHUP or (self._had_terminal and not os.isatty(0)):
                if self._is_stopping:
                    self._was_forced = True
                    logs.event(logging.WARNING, "server.forced", f"{name} again: ending now")
                    self._kill_all()
                else:
                    logs.event(logging.INFO, "server.draining", f"{name}: draining")
                    self._stop(now, self._config.drain_delay_seconds)
            elif not self._is_stopping:
                self._generation += 1
                logs.event(logging.INFO, "server.reloading", "SIGHUP: replacing the workers one by one")

    @property
    def _is_stopping(self) -> bool:
        return self._drain_at is not None

    def _stop(self, now: float, delay: float) -> None:
        if self._drain_at is None:
            self._drain_at = now + delay

    def _dismiss_all(self, began_at: float) -> None:
        """The drain: no new connections, the workers end, and the agent last, with the final figures."""
        self._socket.close()
        timeout = self._config.drain_timeout_seconds
        for child in self._of(WORKER):
            child.dismiss(began_at + timeout * WORKERS_SHARE)
        if not any(child.role == WORKER for child in self._children):
            for child in self._of(AGENT):
                child.dismiss(began_at + timeout * AGENT_SHARE)

    def _kill_all(self) -> None:
        self._drain_at = min(self._drain_at or 0.0, monotonic())
        for child in self._children:
            child.is_leaving = True
            child.process.kill()


def run(config: Config) -> int:
    """Serve with this configuration and return the exit code."""
    return Supervisor(config).run()
