"""The supervisor: starts, watches and replaces the processes; owns the listening socket and the
scoreboard.

It serves nobody and imports neither gevent nor anything that talks to a network, so that next to
nothing in it can break. Signal handlers only take note; the loop acts. All its times are monotonic.
"""

import logging
import selectors
import signal
from time import monotonic

from gserver import certificates, logs
from gserver.boot import Instructions
from gserver.config import Config, show_address
from gserver.errors import EXIT_CLEAN, EXIT_RUNTIME, FatalError, UsageError
from gserver.scoreboard import Scoreboard
from gserver.supervise import listener, privileges, systemd
from gserver.supervise.child import (
    AGENT,
    SHORT_LIFE_SECONDS,
    WATCH_SECONDS,
    WORKER,
    Child,
    Pacing,
    reap_strangers,
)
from gserver.supervise.phases import Orders
from gserver.supervise.signals import SignalNotes

#: Parts of the drain timeout by which workers, then the agent, are killed if they are still there.
WORKERS_SHARE, AGENT_SHARE = 0.85, 0.92
#: How long after it should have found out whether the server's id is free the first workers wait
#: for the agent.
ID_CHECK_SECONDS = 0.7


class Supervisor:
    """One server, from bind to exit."""

    def __init__(self, config: Config) -> None:
        #: The last generation of which a worker has been ready, and what that and later ones are
        #: given.
        self._proven, self._certificates = 0, {0: certificates.read(config)}
        self._manager = systemd.Manager()
        # The admin port too, so that it stays open while one agent follows another.
        config, self._socket, self._admin = listener.open_ports(config, self._manager.sockets)
        privileges.become(config.user)
        self._config = config
        # One column more than workers: a reload starts the new one before the old one goes.
        self._scoreboard = Scoreboard.create(config.workers + 1, config.address_cells)
        self._children: list[Child] = []
        self._pacing = {WORKER: Pacing(), AGENT: Pacing()}
        self._was_ready = self._is_draining = False
        self._failure: FatalError | None = None
        self._orders = Orders(config.drain_delay_seconds, config.drain_timeout_seconds)
        self._id_check_until = (
            monotonic() + config.settle_seconds + ID_CHECK_SECONDS if config.redis_url else 0.0
        )
        self._signals = SignalNotes(
            signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2, signal.SIGUSR1
        )
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._signals.fd, selectors.EVENT_READ, None)

    def run(self) -> int:
        """Serve until told to stop; return the exit code. Raises `FatalError` when the first start is refused."""
        try:
            while not self._orders.is_stopping or (
                self._children and monotonic() < self._orders.over_at
            ):
                self._reconcile(monotonic())
                self._wait()
                # Signals first: taking them empties the pipe that a death has woken the loop by.
                self._heed_signals(monotonic())
                self._reap(monotonic())
                self._watch(monotonic())
                self._scoreboard.put("workers", sum(child.accepts for child in self._of(WORKER)))
                self._tell_manager(monotonic())
        finally:
            self._end_now()
        if self._failure:
            raise self._failure
        left = "".join(f"; {child.role} {child.pid} cannot be ended" for child in self._children)
        logs.event(
            logging.INFO, "server.stopped", "stopped" + ", forced" * self._orders.is_forced + left
        )
        return EXIT_RUNTIME if self._orders.is_forced or left else EXIT_CLEAN

    def _reconcile(self, now: float) -> None:
        """Start and dismiss what it takes to come a step nearer to what there should be."""
        # One agent at a time: the next one goes on where the last one has ended.
        is_wanted = not (
            self._failure
            or self._orders.is_forced
            or (self._orders.is_stopping and not self._of(WORKER))
        )
        if self._config.needs_agent and is_wanted and not self._of(AGENT):
            self._start(AGENT, now)
        if now >= self._orders.drain_at:
            self._drain(self._orders.drain_at)
            return
        if now >= self._orders.retire_at:
            self._retire(now)
            return
        if now < self._id_check_until and any(child.ready_at is None for child in self._of(AGENT)):
            return
        workers, wanted = self._staying(WORKER), self._config.workers
        for _ in range(wanted - len(workers)):
            self._start(WORKER, now)
        stale = [child for child in workers if child.generation < self._orders.reloads]
        if stale and len(workers) == wanted:
            self._start(WORKER, now)
        elif stale and len(workers) > wanted and all(child.ready_at for child in workers):
            stale[0].dismiss(now + self._config.drain_timeout_seconds)
        elif (
            self._orders.is_reloading
            and [bool(child.ready_at) for child in self._of(WORKER)] == [True] * wanted
        ):
            self._scoreboard.add("reloads", 1)
            self._orders.end_reload()
            for child in self._staying(AGENT):
                child.dismiss(now + self._config.drain_timeout_seconds)

    def _of(self, role: str) -> list[Child]:
        return [child for child in self._children if child.role == role]

    def _staying(self, role: str) -> list[Child]:
        return [child for child in self._of(role) if not child.is_leaving]

    def _start(self, role: str, now: float) -> None:
        slot, listener_fd = -1, self._admin.fileno() if self._admin else -1
        if role == WORKER:
            free = set(range(self._scoreboard.slots)) - {child.slot for child in self._children}
            if not free:
                return
            slot, listener_fd = min(free), self._socket.fileno()
        if now < self._pacing[role].spawn_at:
            return
        pems = self._certificates[self._orders.reloads]
        told = Instructions(
            self._config, pems, slot, self._scoreboard.slots, self._scoreboard.fd, listener_fd
        )
        try:
            child = Child.start(role, self._orders.reloads, told)
        except OSError as error:
            self._pacing[role].spawn_at = now + SHORT_LIFE_SECONDS
            logs.warn_ratelimited(
                "process.not_started", f"cannot start the {role}: {error}", logs.error_fields(error)
            )
            return
        self._scoreboard.add("agent_starts", role == AGENT)
        self._children.append(child)
        self._selector.register(child.report_fd, selectors.EVENT_READ, child)

    def _close_port(self) -> None:
        self._scoreboard.put("draining", 1)
        self._scoreboard.put("workers", 0)  # that accept
        self._socket.close()

    def _retire(self, now: float) -> None:
        """Accept no more, and let each worker end when its clients have gone: the last one's end begins the drain."""
        self._close_port()
        for child in self._staying(WORKER):
            child.retire()
        if not self._of(WORKER):
            self._orders.drain(now)

    def _drain(self, began_at: float) -> None:
        """Accept no more, end the workers, and last the agent, with the final figures."""
        timeout = self._config.drain_timeout_seconds
        kill_at = began_at + timeout * WORKERS_SHARE
        if not self._is_draining:
            self._is_draining = True
            self._close_port()
            for child in (
                self._children
            ):  # Who leaves already, after a reload, has no longer than the others.
                child.kill_at = child.kill_at and min(child.kill_at, kill_at)
        # An agent that leaves after a reload says no goodbye: one that does starts only while there
        # are workers.
        must_wait = (
            any(child.is_leaving for child in self._of(AGENT))
            and monotonic() < kill_at - timeout / 2
        )
        for child in [] if must_wait else self._staying(WORKER):
            child.dismiss(kill_at)
        if not self._of(WORKER):
            for child in self._staying(AGENT):
                child.kill_at = began_at + timeout * AGENT_SHARE
                if (
                    child.ready_at
                ):  # SIGTERM would end one that still starts, with the last figures untold.
                    child.dismiss(child.kill_at)

    def _wait(self) -> None:
        """Wait for a report, a signal or the next moment at which something is due."""
        now = monotonic()
        due = [self._manager.due_at, *(child.due_at for child in self._children)]
        moments = (
            self._orders.retire_at,
            self._orders.drain_at,
            *(each.spawn_at for each in self._pacing.values()),
        )
        due += [at for at in moments if at > now]
        for key, _ in self._selector.select(max(0.0, min([now + WATCH_SECONDS, *due]) - now)):
            if key.data is not None:
                self._listen_to(key.data)

    def _listen_to(self, child: Child) -> None:
        if child.read_report():
            self._pacing[child.role].failures = 0
            if child.role == WORKER and child.generation > self._proven and not child.is_leaving:
                self._proven = child.generation
                self._certificates = {
                    at: those for at, those in self._certificates.items() if at >= self._proven
                }
            if child.role == WORKER and not self._was_ready:
                self._was_ready = True
                listener.announce(self._config)
        if child.has_hung_up:
            child.hang_up(self._selector)

    def _reap(self, now: float) -> None:
        for child in [child for child in self._children if child.has_ended()]:
            self._listen_to(child)  # Its last words.
            child.hang_up(self._selector)
            self._children.remove(child)
            lost = self._scoreboard.clear_dead_worker(child.slot) if child.role == WORKER else 0
            if not child.has_ended_as_asked:
                self._pacing[child.role].note_death(child, now)
                self._judge(child, lost, now)
        reap_strangers([child.pid for child in self._children])

    def _judge(self, child: Child, lost: int, now: float) -> None:
        """Decide what the unexpected end of a child means."""
        fields = {
            "gserver.child_pid": child.pid,
            "process.exit_code": child.process.returncode,
            "gserver.lost": lost,
        }
        is_first = child.role == WORKER and child.generation == self._orders.reloads > self._proven
        if child.refusal and not self._was_ready:
            self._failure = UsageError(child.refusal)
            self._end_now()
        elif child.is_unwanted:
            self._failure = UsageError(child.refusal)
            self._orders.drain(now)
            logs.event(logging.ERROR, "server.draining", f"draining: {child.refusal}", fields)
        elif is_first:
            self._give_up_reload(self._proven, f"a new one did not start: {child.end}", fields)
            for other in [each for each in self._staying(WORKER) if each.generation > self._proven]:
                other.dismiss(now + self._config.drain_timeout_seconds)
        else:
            is_replaced = child.role == AGENT or now < min(
                self._orders.retire_at, self._orders.drain_at
            )
            self._scoreboard.add("worker_restarts", child.role == WORKER and is_replaced)
            message = (
                f"{child.role} {child.pid} died ({child.end})"
                + ", another takes its place" * is_replaced
            )
            logs.event(logging.WARNING, f"{child.role}.died", message, fields)

    def _give_up_reload(self, generation: int, reason: str, fields: dict[str, object]) -> None:
        self._orders.give_up_reload(generation, reason, fields)
        self._scoreboard.add("reload_failures", 1)

    def _watch(self, now: float) -> None:
        logs.report_suppressed()
        listener.keep(self._config, self._socket, self._admin)
        for child in self._children:
            beat_at = self._scoreboard.cells[self._scoreboard.heartbeat_cell(child.slot)] / 1e9
            child.watch(now, beat_at, self._config.hang_seconds(is_agent=child.role == AGENT))

    def _heed_signals(self, now: float) -> None:
        reloads = self._orders.reloads
        for number in self._signals.take():
            self._orders.heed(number, now)
            self._scoreboard.put("stopping", int(self._orders.is_stopping))
        if self._orders.reloads > reloads:
            self._pacing = {
                WORKER: Pacing(),
                AGENT: Pacing(),
            }  # The cause of earlier failures may be mended.
            try:
                self._certificates[self._orders.reloads] = certificates.read(self._config)
            except UsageError as misuse:
                self._give_up_reload(reloads, str(misuse), {})
        if self._orders.is_forced:
            self._end_now()

    def _tell_manager(self, now: float) -> None:
        self._manager.keep_heartbeat(now)
        if self._orders.is_stopping:
            self._manager.tell(systemd.STOPPING, f"stopping, clients: {self._scoreboard.clients()}")
        elif self._orders.is_reloading:
            self._manager.tell(systemd.RELOADING, "replacing the workers one by one")
        elif self._was_ready:
            where = show_address(self._config.host, self._config.port)
            failure = (
                self._orders.reload_failure
                and f"; the last reload was given up: {self._orders.reload_failure}"
            )
            self._manager.tell(
                systemd.READY, f"listening on {where}, workers: {self._config.workers}{failure}"
            )

    def _end_now(self) -> None:
        self._orders.drain(0.0)
        for child in self._children:
            child.kill()
