"""The supervisor: starts, watches and replaces the processes; owns the listening socket and the board.

It serves nobody and imports neither gevent nor anything that talks to a network, so that next to nothing in
it can break. Signal handlers only take note; the loop acts. All its times are monotonic.
"""

import logging
import os
import selectors
import signal
from dataclasses import replace
from time import monotonic

from gserver import certificates, listener, logs
from gserver.board import Board
from gserver.children import AGENT, SHORT_LIFE_SECONDS, WORKER, Child, Pacing
from gserver.config import Config
from gserver.errors import EXIT_CLEAN, EXIT_RUNTIME, Failure, Misuse
from gserver.process import Instructions
from gserver.signals import SignalNotes

#: How often to look at the heartbeats, at least.
WATCH_SECONDS = 1.0
#: Who seems to hang is looked at once more before it is killed: the whole machine may have stood still.
SECOND_LOOK_SECONDS = 0.4
#: A child that is not ready by then is taken for hung.
BOOT_SECONDS = 30.0
#: Parts of the drain timeout by which workers, then the agent, are killed if they are still there.
WORKERS_SHARE = 0.85
AGENT_SHARE = 0.92
#: How long after it should have found out whether the server's id is free the first workers wait for the agent.
ID_CHECK_SECONDS = 0.7


class Supervisor:
    """One server, from bind to exit."""

    def __init__(self, config: Config) -> None:
        #: Those that a new worker gets, and those that workers have been found to start with.
        self._certificates = self._good_certificates = certificates.read(config)
        self._socket = listener.bind(config.host, config.port, config.backlog)
        config = replace(config, port=self._socket.getsockname()[1])
        self._admin = None
        if config.admin_port >= 0:  # Bound here, so that it stays open while one agent follows another.
            self._admin = listener.bind(config.admin_host, config.admin_port, prefix="--admin-")
            config = replace(config, admin_port=self._admin.getsockname()[1])
        self._config = config
        # One column more than workers: a reload starts the new one before the old one goes.
        self._board = Board.create(config.workers + 1)
        self._board.put("begun_at", round(monotonic() * 1e9))
        self._children: list[Child] = []
        self._pacing = {WORKER: Pacing(), AGENT: Pacing()}
        self._generation = self._reloaded = 0
        self._was_ready = self._was_forced = False
        self._failure: Failure | None = None
        self._drain_at: float | None = None
        self._id_check_until = monotonic() + config.settle_seconds + ID_CHECK_SECONDS if config.redis_url else 0.0
        self._signals = SignalNotes(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        self._had_terminal = os.isatty(0)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._signals.fd, selectors.EVENT_READ, None)

    def run(self) -> int:
        """Serve until told to stop; return the exit code. Raises `Failure` when the first start is refused."""
        try:
            while self._children or self._drain_at is None:
                self._reconcile(monotonic())
                self._wait()
                # Signals first: taking them empties the pipe that a death has woken the loop by.
                self._heed_signals(monotonic())
                self._reap(monotonic())
                self._watch(monotonic())
                self._board.put("workers", sum(bool(child.ready_at) for child in self._staying(WORKER)))
        finally:
            self._end_now()
        if self._failure is not None:
            raise self._failure
        logs.event(logging.INFO, "server.stopped", "stopped" + (", forced" if self._was_forced else ""))
        return EXIT_RUNTIME if self._was_forced else EXIT_CLEAN

    def _reconcile(self, now: float) -> None:
        """Start and dismiss what it takes to come a step nearer to what there should be."""
        # One agent at a time: the next one goes on where the last one has ended.
        is_wanted = self._failure is None and (self._drain_at is None or bool(self._of(WORKER)))
        if self._config.needs_agent and is_wanted and not self._of(AGENT):
            self._start(AGENT, now)
        if self._drain_at is not None and now >= self._drain_at:
            self._drain(self._drain_at)
            return
        if now < self._id_check_until and any(child.ready_at is None for child in self._of(AGENT)):
            return
        workers, wanted = self._staying(WORKER), self._config.workers
        for _ in range(wanted - len(workers)):
            self._start(WORKER, now)
        stale = [child for child in workers if child.generation < self._generation]
        if stale and len(workers) == wanted:
            self._start(WORKER, now)
        elif stale and len(workers) > wanted and all(child.ready_at for child in workers):
            stale[0].dismiss(now + self._config.drain_timeout_seconds)
        elif self._reloaded < self._generation and [bool(c.ready_at) for c in self._of(WORKER)] == [True] * wanted:
            self._reloaded = self._generation
            self._good_certificates = self._certificates
            self._board.add("reloads", 1)
            logs.event(logging.INFO, "server.reloaded", "reloaded: every worker is a new one")
            for child in self._staying(AGENT):
                child.dismiss(now + self._config.drain_timeout_seconds)

    def _of(self, role: str) -> list[Child]:
        return [child for child in self._children if child.role == role]

    def _staying(self, role: str) -> list[Child]:
        return [child for child in self._of(role) if not child.is_leaving]

    def _start(self, role: str, now: float) -> None:
        slot, listener_fd = -1, self._admin.fileno() if self._admin else -1
        if role == WORKER:
            free = set(range(self._board.slots)) - {child.slot for child in self._children}
            if not free:
                return
            slot, listener_fd = min(free), self._socket.fileno()
        if now < self._pacing[role].spawn_at:
            return
        board = self._board
        instructions = Instructions(
            self._config, self._certificates, slot, board.slots, os.getpid(), board.fd, listener_fd
        )
        try:
            child = Child.start(role, self._generation, instructions)
        except OSError as error:
            self._pacing[role].spawn_at = now + SHORT_LIFE_SECONDS
            logs.complain("process.not_started", f"cannot start the {role}: {error}", logs.error_fields(error))
            return
        self._board.add("agent_starts", role == AGENT)
        self._children.append(child)
        self._selector.register(child.report_fd, selectors.EVENT_READ, child)

    def _drain(self, began_at: float) -> None:
        """Accept no more, end the workers, and last the agent, with the final figures."""
        timeout = self._config.drain_timeout_seconds
        kill_at = began_at + timeout * WORKERS_SHARE
        if self._socket.fileno() >= 0:
            self._socket.close()
            self._board.put("draining", 1)
            for child in self._children:  # Who leaves already, after a reload, has no longer than the others.
                child.kill_at = child.kill_at and min(child.kill_at, kill_at)
        for child in self._staying(WORKER):
            child.dismiss(kill_at)
        if not self._of(WORKER):
            for child in self._staying(AGENT):
                child.kill_at = began_at + timeout * AGENT_SHARE
                if child.ready_at:  # SIGTERM would end one that still starts, with the last figures untold.
                    child.dismiss(child.kill_at)

    def _wait(self) -> None:
        """Wait for a report, a signal or the next moment at which something is due."""
        now = monotonic()
        due = [child.kill_at for child in self._children if child.kill_at is not None]
        due += [child.suspected_at + SECOND_LOOK_SECONDS for child in self._children if child.suspected_at is not None]
        due += [at for at in (*(pacing.spawn_at for pacing in self._pacing.values()), self._drain_at or 0) if at > now]
        for key, _ in self._selector.select(max(0.0, min([now + WATCH_SECONDS, *due]) - now)):
            if key.data is not None:
                self._listen_to(key.data)

    def _listen_to(self, child: Child) -> None:
        if child.read_report():
            self._pacing[child.role].failures = 0
            if child.role == WORKER and not self._was_ready:
                self._was_ready = True
                listener.announce(self._config)
            fields = {"gserver.child_pid": child.pid}
            logs.event(logging.INFO, f"{child.role}.ready", f"{child.role} {child.pid} is ready", fields)
        if child.has_hung_up:
            self._hang_up(child)

    def _hang_up(self, child: Child) -> None:
        if child.report_fd >= 0:
            self._selector.unregister(child.report_fd)
            os.close(child.report_fd)
            child.report_fd = -1

    def _reap(self, now: float) -> None:
        for child in [child for child in self._children if child.process.poll() is not None]:
            self._listen_to(child)  # Its last words.
            self._hang_up(child)
            self._children.remove(child)
            lost = self._board.settle(child.slot) if child.role == WORKER else 0
            self._board.add("lost", lost)
            if not child.is_leaving:
                self._pacing[child.role].note_death(child, now)
                self._judge(child, lost, now)

    def _judge(self, child: Child, lost: int, now: float) -> None:
        """Decide what the unexpected end of a child means."""
        fields = {"gserver.child_pid": child.pid, "process.exit_code": child.process.returncode, "gserver.lost": lost}
        is_new = child.role == WORKER and child.ready_at is None and child.generation == self._generation
        is_reload = is_new and self._reloaded < self._generation
        if child.refusal and not self._was_ready:
            self._failure = Misuse(child.refusal)
            self._end_now()
        elif child.is_unwanted:
            self._failure = Misuse(child.refusal)
            self._drain_at = now
            logs.event(logging.ERROR, "server.draining", f"draining: {child.refusal}", fields)
        elif is_reload:
            self._reloaded = self._generation
            self._certificates = self._good_certificates
            for other in self._staying(WORKER):
                other.generation = self._generation
            message = f"reload given up, the old workers stay: a new one did not start: {child.end}"
            logs.event(logging.ERROR, "server.reload_failed", message, fields)
        else:
            self._board.add("worker_restarts", child.role == WORKER)
            message = f"{child.role} {child.pid} died ({child.end}), another takes its place"
            logs.event(logging.WARNING, f"{child.role}.died", message, fields)

    def _watch(self, now: float) -> None:
        """Kill who has not turned its loop for too long, and who was asked to end and did not."""
        logs.report_left_out()
        for child in self._children:
            if child.kill_at is not None:
                if now >= child.kill_at:
                    child.process.kill()
                    child.kill_at = now + WATCH_SECONDS
                continue
            limit = self._config.hang_seconds(is_agent=child.role == AGENT)
            silence = now - max(child.spawned_at, self._board.cells[self._board.heartbeat_cell(child.slot)] / 1e9)
            if not limit or silence <= max(limit, WATCH_SECONDS if child.ready_at else BOOT_SECONDS):
                child.suspected_at = None
            elif child.suspected_at is None:
                child.suspected_at = now
            elif now - child.suspected_at >= SECOND_LOOK_SECONDS:
                child.process.kill()
                child.kill_at = now + WATCH_SECONDS
                message = f"{child.role} {child.pid} has hung for {silence:.1f} s: killed"
                logs.event(logging.ERROR, f"{child.role}.hung", message, {"gserver.child_pid": child.pid})

    def _heed_signals(self, now: float) -> None:
        for number in self._signals.take():
            # A terminal that is closed sends SIGHUP too, more than once: then it is no terminal any more.
            if self._drain_at is None and number == signal.SIGHUP and self._had_terminal <= os.isatty(0):
                try:
                    self._certificates = certificates.read(self._config)
                except Misuse as misuse:
                    message = f"reload given up, the workers stay: {misuse}"
                    logs.event(logging.ERROR, "server.reload_failed", message)
                    continue
                self._generation += 1
                self._pacing = {WORKER: Pacing(), AGENT: Pacing()}  # The cause of earlier failures may be mended.
                logs.event(logging.INFO, "server.reloading", "SIGHUP: replacing the workers one by one")
            elif self._drain_at is None:
                self._drain_at = now + self._config.drain_delay_seconds
                self._board.put("stopping", 1)
                logs.event(logging.INFO, "server.draining", f"{number.name}: draining")
            elif number != signal.SIGHUP:
                self._was_forced = True
                logs.event(logging.WARNING, "server.forced", f"{number.name} again: ending now")
                self._end_now()

    def _end_now(self) -> None:
        self._drain_at = 0.0
        for child in self._children:
            child.kill()
