"""The supervisor: starts, watches and replaces the other processes.

It owns the listening sockets and the scoreboard. `phases` decides which processes there should be;
the loop here starts and ends them. Signal handlers only take note; the loop acts. All times are
monotonic seconds.
"""

import logging
import os
import re
import selectors
import signal
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from time import monotonic, monotonic_ns

from gserver import __version__, certificates, logs
from gserver.boot import Instructions, room_for_clients
from gserver.config import AGENT_SHARE, OLD_AGENT_SHARE, WORKERS_SHARE, Config
from gserver.errors import EXIT_CLEAN, EXIT_RUNTIME, OTHER_VERSION, FatalError, UsageError
from gserver.scoreboard import Scoreboard
from gserver.supervise import listener, privileges, systemd, upgrade
from gserver.supervise.child import (
    AGENT,
    HAND_OVER_AGAIN_SECONDS,
    SECOND_LOOK_SECONDS,
    STUCK_SECONDS,
    WATCH_SECONDS,
    WORKER,
    Backoff,
    Child,
    Finding,
    reap_orphans,
    resume_children,
)
from gserver.supervise.phases import NEEDS, Lifecycle, Phase, Treatment, Workforce
from gserver.supervise.signals import PendingSignals

#: How long the agent may take to leave the cluster after stuck workers have delayed a stop.
LATE_AGENT_SECONDS = 1.0
#: The agent has this much longer to become ready than its check of the server id may take.
ID_CHECK_SECONDS = 0.7
#: Pause after the system could not start a process.
START_RETRY_SECONDS = 1.0
#: Slots of the scoreboard beyond `--workers`. A reload starts a new worker before it ends an old
#: one, and a worker that cannot be killed keeps its slot.
SPARE_SLOTS = 2
#: Time for a handover itself. Beside it, a worker has the drain timeout twice: for clients that
#: stay with it, and for its drain.
HANDOVER_SECONDS = 10.0
#: What the admin port shows as recent events.
KEPT_EVENTS = (
    *("server.draining", "server.retiring", "server.reloaded", "server.upgraded"),
    *("server.reload_failed", "server.port_closed", "process.not_started", "log.dropped"),
    *(f"{role}.{end}" for role in (WORKER, AGENT) for end in ("died", "hung", "killed", "stuck")),
)
#: How long events of the level debug are logged after SIGUSR1.
DEBUG_SECONDS = 600.0
#: What the service manager shows during a reload.
RELOADING_STATUS = "replacing the workers one by one"


class Supervisor:
    """One server, from bind to exit."""

    def __init__(
        self,
        config: Config,
        manager: systemd.Manager,
        ports: listener.Ports,
        scoreboard: Scoreboard,
        lifecycle: Lifecycle,
        children: Sequence[Child] = (),
    ) -> None:
        self._config = config
        self._manager = manager
        #: The endpoints of each generation: a reload makes socket files that were lost again.
        self._endpoints_of = {lifecycle.generation.number: ports.endpoints}
        self._admin_ports = ports.admin
        self._scoreboard = scoreboard
        self._scoreboard.put("supervisor_heartbeat", monotonic_ns())
        self._lifecycle = lifecycle
        self._children = list(children)
        self._backoff = {WORKER: Backoff(), AGENT: Backoff()}
        #: A worker has been ready, so the server's address was announced.
        self._is_announced = bool(children)
        #: The files of the package when this program was started.
        self._code_version = upgrade.code_version()
        #: The trial of a new version, while it runs.
        self._trial: upgrade.Trial | None = None
        #: Why the last reload was given up; "" if it was not.
        self._reload_error = ""
        #: Why the server ends, if that is an error.
        self._failure: FatalError | None = None
        self._signals = PendingSignals(
            signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2, signal.SIGUSR1
        )
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._signals.fd, selectors.EVENT_READ, None)
        for child in self._children:
            if child.control.fileno() >= 0:
                self._selector.register(child.control, selectors.EVENT_READ, child)
        logs.keep_events(KEPT_EVENTS, partial(scoreboard.keep_event, is_agent=False))

    @classmethod
    def start(cls, config: Config) -> "Supervisor":
        """Open the ports, and become the user of `--user`. Raises `FatalError` if that fails."""
        pems = certificates.read(config)
        manager = systemd.Manager.from_environment()
        # The admin port is opened here too, so that it stays open while agents are replaced.
        config, ports = listener.open_ports(config, manager.sockets)
        # A service manager may have passed more endpoints than the options name.
        room = config.workers * room_for_clients(config)
        config = replace(config, max_clients=max(1, min(config.max_clients, room)))
        try:
            privileges.become(config.user)
            scoreboard = Scoreboard.create(config.workers + SPARE_SLOTS, config.address_cells)
        except BaseException:
            listener.close_all(ports.endpoints)
            raise
        id_check_until = None
        if config.redis_url:
            id_check_until = monotonic() + config.settle_seconds + ID_CHECK_SECONDS
        lifecycle = Lifecycle(
            pems,
            drain_delay_seconds=config.drain_delay_seconds,
            drain_timeout_seconds=config.drain_timeout_seconds,
            id_check_until=id_check_until,
        )
        return cls(config, manager, ports, scoreboard, lifecycle)

    @classmethod
    def resume(cls, state: upgrade.State) -> "Supervisor":
        """Take over from the program that this one has replaced, and reload."""
        config = state.config
        supervisor = cls(
            config,
            systemd.Manager(**state.manager),
            listener.inherit(
                state.endpoint_fds, state.endpoint_files, state.admin_fds, config.backlog
            ),
            Scoreboard.attach(state.scoreboard_fd, state.slots, may_extend=True),
            _resume_lifecycle(state),
            resume_children(state.children, state.generations),
        )
        supervisor._code_version = state.code_version
        supervisor._is_announced = True
        message = f"upgraded: {upgrade.describe_versions(state.version)}"
        logs.event(logging.INFO, "server.upgraded", message)
        supervisor._begin_reload()
        return supervisor

    def run(self) -> int:
        """Serve until a signal ends it; return the exit code.

        Raises `FatalError` if the first start fails, or if another server has this one's id.
        """
        try:
            while self._lifecycle.phase is not Phase.OVER:
                self._publish()
                self._reconcile(monotonic())
                if not self._advance(monotonic()):
                    self._wait()
                    self._take_in(monotonic())
        finally:
            self._end_trial()
            for child in self._children:
                child.kill(monotonic())
            self._signals.ignore()
        if self._failure:
            raise self._failure
        return self._report_end()

    def close_endpoints(self) -> None:
        """Accept no more clients. The second call does nothing."""
        listener.close_all(chain.from_iterable(self._endpoints_of.values()))

    def _report_end(self) -> int:
        was_forced = self._lifecycle.was_forced
        message = "stopped, forced" if was_forced else "stopped"
        for child in self._children:
            message += f"; {child.role} {child.pid} could not be killed"
        logs.report_suppressed(is_last=True)
        logs.event(logging.INFO, "server.stopped", message)
        return EXIT_RUNTIME if was_forced or self._children else EXIT_CLEAN

    def _take_in(self, now: float) -> None:
        """Take in what has happened since the last turn: signals, deaths, silence."""
        # Signals first: this empties the pipe by which a death has woken the loop.
        for number, is_stop in self._signals.take():
            self._handle_signal(number, now, is_stop=is_stop)
        self._reap(now)
        self._watch(now)
        self._check_trial(now)
        for port in (*self._endpoints, *self._admin_ports):
            port.reopen_if_closed()
        self._scoreboard.put("endpoints_lost", sum(port.is_lost for port in self._endpoints))
        logs.report_suppressed()
        logs.log_debug(is_on=self._scoreboard.get("debug_ends_at") > now * 1e9)
        self._notify_manager(now)

    def _publish(self) -> None:
        """Put the state of the server on the scoreboard, before its processes are changed.

        So `/readyz` answers 503 before the port is closed.
        """
        accepting = 0
        if not self._lifecycle.is_port_closed:
            accepting = sum(child.is_accepting for child in self._not_stuck(WORKER))
        self._scoreboard.put("supervisor_heartbeat", monotonic_ns())
        self._scoreboard.put("workers", accepting)
        self._scoreboard.put("stopping", int(self._lifecycle.is_stopping))
        self._scoreboard.put("port_closed", int(self._lifecycle.is_port_closed))
        if self._lifecycle.phase is Phase.DRAINING:
            self._scoreboard.put("drain_started_at", round(self._lifecycle.since * 1e9))

    # Which processes there should be.

    def _not_stuck(self, role: str) -> list[Child]:
        """Return the children of a role, without those that cannot be killed."""
        return [child for child in self._children if child.role == role and not child.is_stuck]

    def _staying(self, role: str) -> list[Child]:
        """Return those that are not terminating."""
        return [child for child in self._not_stuck(role) if child.is_staying]

    def _workforce(self) -> Workforce[Child]:
        return Workforce(self._staying(WORKER), len(self._not_stuck(WORKER)), self._config.workers)

    def _advance(self, now: float) -> bool:
        """Move to the next phase if this one is over; return whether it was."""
        return self._lifecycle.advance(
            now,
            # An agent that has found another server with this id ends, and is never ready.
            is_id_checked=any(agent.has_been_ready for agent in self._not_stuck(AGENT)),
            # The agent after one that a reload ends leaves the cluster; a lame duck waits for it.
            has_workers=bool(self._not_stuck(WORKER)) or self._has_old_agent,
            has_children=bool(self._not_stuck(WORKER) or self._not_stuck(AGENT)),
        )

    def _reconcile(self, now: float) -> None:
        """Take one step towards the processes that the phase needs."""
        needs = NEEDS[self._lifecycle.phase]
        if needs.has_agent:
            self._keep_agent(now)
        if self._lifecycle.is_port_closed:
            self.close_endpoints()
        match needs.treatment:
            case Treatment.REPLACE:
                self._replace_workers(now)
            case Treatment.RETIRE:
                self._retire_workers()
            case Treatment.TERMINATE:
                self._drain(now)
            case Treatment.KILL:
                self._kill_all(now)
        generation = self._lifecycle.generation
        for _ in range(self._workforce().missing(self._lifecycle.phase, generation)):
            self._start_worker(now)

    def _keep_agent(self, now: float) -> None:
        """Start the agent if there is none. One at a time: each continues the one before it."""
        is_draining_last = self._lifecycle.phase is Phase.DRAINING and not self._not_stuck(WORKER)
        is_needed = self._config.needs_agent and not (is_draining_last or self._failure)
        if is_needed and not self._not_stuck(AGENT):
            self._start(AGENT, -1, now)

    def _replace_workers(self, now: float) -> None:
        """Take a step of the reload, apart from starting workers."""
        lifecycle, workforce = self._lifecycle, self._workforce()
        kill_at = now + self._config.drain_timeout_seconds
        if old := workforce.to_replace(lifecycle.generation):
            self._hand_over(old, workforce.staying[-1], now)
        elif workforce.is_replaced(lifecycle.generation):
            lifecycle.complete_reload()
            number = lifecycle.generation.number
            self._forget_endpoints([each for each in self._endpoints_of if each < number])
            self._scoreboard.add("reloads", 1)
            if not self._reload_error:  # Not for a later one that has failed.
                self._scoreboard.put("reload_failed_at", 0)
            logs.event(logging.INFO, "server.reloaded", "reloaded: all workers were replaced")
            for child in self._staying(AGENT):
                child.terminate(kill_at)

    def _hand_over(self, old: Child, successor: Child, now: float) -> None:
        if old.is_handing_over or now < old.hand_over_at:
            return  # It will report soon that its last handover has failed; or it just has.
        if old.is_control_closed or successor.is_control_closed:
            return  # One of the two has died, and is reaped soon.
        kill_at = now + 2 * self._config.drain_timeout_seconds + HANDOVER_SECONDS
        try:
            old.hand_over(successor, kill_at)
        except (BrokenPipeError, ConnectionResetError):
            return  # One of the two has just died, which will be noticed.
        except OSError as error:
            reason = f"the clients cannot be handed over: {error}"
            if self._has_heirs(old):
                old.hand_over_at = now + HAND_OVER_AGAIN_SECONDS
                logs.warn_ratelimited("process.not_started", reason, logs.error_fields(error))
            else:
                self._give_up_reload(reason)

    def _has_heirs(self, old: Child) -> bool:
        """Whether a newer worker may have clients of this one: a handover has stopped half way."""
        kept_at = old.hand_over_at - HAND_OVER_AGAIN_SECONDS
        newer = (each for each in self._staying(WORKER) if each.generation is not old.generation)
        return any(each.spawned_at < kept_at for each in newer)

    def _retire_workers(self) -> None:
        for child in self._staying(WORKER):
            child.retire()

    def _drain(self, now: float) -> None:
        """End the workers, and after them the agent, which sends the final figures."""
        timeout_seconds, began_at = self._config.drain_timeout_seconds, self._lifecycle.since
        kill_at = began_at + timeout_seconds * WORKERS_SHARE
        if not self._not_stuck(WORKER):
            self._end_agent(now)
            return
        for child in self._children:  # Those that a reload is terminating get no more time.
            if child.kill_at is not None:
                child.kill_at = min(child.kill_at, kill_at)
        # An agent that ends because of a reload does not leave the cluster. The next one does, and
        # it is started only while there are workers.
        if not self._has_old_agent or now >= began_at + timeout_seconds * OLD_AGENT_SHARE:
            for child in self._not_stuck(WORKER):
                if child.is_staying or child.is_handing_over:
                    child.terminate(kill_at)

    @property
    def _has_old_agent(self) -> bool:
        """Whether an agent is ending, because of a reload for example."""
        return len(self._staying(AGENT)) < len(self._not_stuck(AGENT))

    def _end_agent(self, now: float) -> None:
        kill_at = self._lifecycle.since + self._config.drain_timeout_seconds * AGENT_SHARE
        if any(child.is_stuck for child in self._children):
            kill_at = max(kill_at, now + LATE_AGENT_SECONDS)
        for child in self._staying(AGENT):
            if child.has_been_ready:
                child.terminate(kill_at)
            elif child.kill_at is None:
                # No SIGTERM yet: it would end before it has sent the final figures.
                child.kill_at = kill_at

    def _kill_all(self, now: float) -> None:
        for child in self._children:
            if child.killed_at is None:
                child.kill(now)
                if not self._failure:
                    self._log_killed(child, "second signal")

    # Starting.

    def _start_worker(self, now: float) -> None:
        slots = set(range(self._scoreboard.slots)) - {child.slot for child in self._children}
        if slots:
            self._start(WORKER, min(slots), now)
            return
        stuck = sum(child.is_stuck for child in self._children)
        reason = f"no free slot: {stuck} workers were killed and have not ended"
        if self._lifecycle.phase is Phase.RELOADING:
            self._give_up_reload(reason)
        else:
            logs.warn_ratelimited("process.not_started", f"cannot start a worker: {reason}")

    def _start(self, role: str, slot: int, now: float) -> None:
        if now < self._backoff[role].spawn_at:
            return
        generation = self._lifecycle.generation
        ports = self._endpoints if role == WORKER else self._admin_ports
        # Each child gets only the secrets that it needs.
        instructions = Instructions(
            self._config.for_worker() if role == WORKER else self._config,
            generation.certificates if role == WORKER else certificates.Certificates(),
            slot,
            self._scoreboard.slots,
            self._scoreboard.fd,
            [port.sock.fileno() for port in ports],
        )
        try:
            child = Child.start(role, generation, instructions)
        except OSError as error:
            self._backoff[role].spawn_at = now + START_RETRY_SECONDS
            message = f"cannot start the {role}: {error}"
            logs.warn_ratelimited("process.not_started", message, logs.error_fields(error))
            return
        if role == AGENT:
            self._scoreboard.add("agent_starts", 1)
        self._children.append(child)
        self._selector.register(child.control, selectors.EVENT_READ, child)

    # What happens to them.

    def _wait(self) -> None:
        """Wait for a report, a signal, or the next moment at which something is due."""
        now = monotonic()
        due = [now + WATCH_SECONDS, self._manager.due_at]
        if self._trial:
            due.append(self._trial.give_up_at)
        due += [child.due_at for child in self._children]
        later = [self._lifecycle.deadline, *(each.spawn_at for each in self._backoff.values())]
        due += [at for at in later if at > now]
        for key, _ in self._selector.select(max(0.0, min(due) - now)):
            if key.data is not None:
                self._read_report(key.data)

    def _read_report(self, child: Child) -> None:
        if child.read_report():
            self._backoff[child.role].failures = 0
            if child.role == WORKER:
                self._note_ready(child)
        for line, fd in child.queries:
            for worker in self._not_stuck(WORKER) if child.role == AGENT else ():
                worker.pass_on(line, fd)
            os.close(fd)
        child.queries.clear()
        if child.kept_because:
            reason, child.kept_because = child.kept_because, ""
            self._end_failed_handover(child.kept_by, reason)
        if child.is_control_closed:
            child.close_control(self._selector)

    def _end_failed_handover(self, successor: Child | None, reason: str) -> None:
        """Give up the reload, or only this successor if a later reload goes on."""
        if self._lifecycle.is_port_closed:
            return  # Both serve what they have until they have left.
        if not successor or successor.generation is self._lifecycle.generation:
            self._give_up_reload(reason)
        elif successor.is_staying:
            successor.terminate(monotonic() + self._config.drain_timeout_seconds)

    def _note_ready(self, worker: Child) -> None:
        if worker.is_staying:
            self._lifecycle.note_ready(worker.generation)
        if not self._is_announced:
            self._is_announced = True
            listener.announce(self._config)

    def _reap(self, now: float) -> None:
        for child in [child for child in self._children if child.has_ended()]:
            self._read_report(child)  # Its last report may be unread.
            child.close_control(self._selector)
            child.release()
            self._children.remove(child)
            has_died = not child.has_ended_as_requested
            self._end_handover(child)
            lost = 0
            if child.role == WORKER:
                lost = self._scoreboard.clear_dead_worker(child.slot, has_died=has_died)
            if has_died:
                if not child.is_stuck:
                    self._backoff[child.role].note_death(child, now)
                self._handle_death(child, lost, now)
        trial = [self._trial.pid] if self._trial else []
        reap_orphans([*trial, *(child.pid for child in self._children)])

    def _end_handover(self, ended: Child) -> None:
        """Note what the end of one of two workers means for a handover between them."""
        if ended.successor in self._children:
            self._lifecycle.note_replaced(ended.successor.generation)
        self._orphan(ended)

    def _orphan(self, gone: Child) -> None:
        for child in self._children:
            if child.successor is gone and child.is_handing_over:
                child.note_successor_gone()

    def _handle_death(self, child: Child, lost: int, now: float) -> None:
        """Act on the unexpected end of a child."""
        fields = {
            "gserver.child_pid": child.pid,
            "process.exit_code": child.process.returncode,
            "gserver.lost": lost,
        }
        is_worker = child.role == WORKER
        if child.error and not self._is_announced:
            self._failure = UsageError(child.error)
            self._lifecycle.force(now)
        elif child.has_duplicate_id:
            self._failure = UsageError(child.error)
            self._lifecycle.drain(now)
            logs.event(logging.ERROR, "server.duplicate_id", f"draining: {child.error}", fields)
        elif is_worker and self._ends_reload(child):
            problem = "ended early" if child.has_been_ready else "did not start"
            self._give_up_reload(f"a new worker {problem}: {child.end_reason}", fields)
        else:
            message = f"{child.role} {child.pid} died ({child.end_reason})"
            if self._is_replaced(child):
                message += ": starting another"
                if child.role == WORKER:
                    self._scoreboard.add("worker_restarts", 1)
            logs.event(logging.WARNING, f"{child.role}.died", message, fields)

    def _ends_reload(self, worker: Child) -> bool:
        """Return whether a reload is given up because this worker has ended.

        It goes on if another new worker has clients already: they would be closed.
        """
        lifecycle = self._lifecycle
        if lifecycle.is_port_closed or not lifecycle.would_end_reload(worker.generation):
            return False
        successors = [each.successor for each in self._children if each.is_handing_over]
        return not any(
            each is not worker
            and each.generation is worker.generation
            and (each in successors or self._clients(each))
            for each in self._not_stuck(WORKER)
        )

    def _is_replaced(self, child: Child) -> bool:
        """Return whether another process is started because this one ended, or cannot end."""
        needs = NEEDS[self._lifecycle.phase]
        if child.is_stuck or child.should_end:  # There is one already.
            return False
        return needs.has_workers if child.role == WORKER else needs.has_agent

    def _watch(self, now: float) -> None:
        for child in self._children:
            heartbeat_at = self._heartbeat_at(child)
            limit = self._config.hang_seconds(is_agent=child.role == AGENT)
            self._spare_old_worker(child, now)
            match child.watch(now, heartbeat_at, limit):
                case Finding.HUNG:
                    self._log_hung(child, child.silence(now, heartbeat_at))
                case Finding.LATE:
                    self._log_killed(child, "drain timeout")
                case Finding.STUCK:
                    self._orphan(child)
                    self._handle_stuck(child)

    def _heartbeat_at(self, child: Child) -> float:
        return self._scoreboard.cells[self._scoreboard.heartbeat_cell(child.slot)] / 1e9

    def _spare_old_worker(self, child: Child, now: float) -> None:
        """If a handover takes too long because the successor hangs, kill that one first."""
        successor = child.successor
        if successor is None or successor.killed_at is not None:
            return
        is_due = child.is_handing_over and child.kill_at is not None and now >= child.kill_at
        if is_due and child.overdue_at is None:  # Perhaps all processes were frozen.
            child.overdue_at, child.kill_at = now, now + HANDOVER_SECONDS
        is_late = child.overdue_at is not None and now >= child.overdue_at + SECOND_LOOK_SECONDS
        # In a drain, the old worker needs the batch back that its successor does not take.
        is_draining = not child.has_left and self._lifecycle.phase is Phase.DRAINING
        silence = successor.silence(now, self._heartbeat_at(successor))
        if (is_late or is_draining) and silence > WATCH_SECONDS:
            child.kill_at = now + 2 * STUCK_SECONDS
            successor.kill_hung(now)
            self._log_hung(successor, silence)

    def _clients(self, child: Child) -> int:
        """Return how many clients a worker has; 0 for the agent."""
        if child.role == AGENT:
            return 0
        return self._scoreboard.cells[self._scoreboard.cell("clients", child.slot)]

    def _log_hung(self, child: Child, silence: float) -> None:
        message = f"{child.role} {child.pid} was killed: no heartbeat for {silence:.1f} s"
        fields: dict[str, object] = {"gserver.child_pid": child.pid}
        fields["gserver.clients"] = self._clients(child)
        if stack := child.stack():
            place = re.sub(r'File "(.+)", line (\d+) in (.+)', r"\3 (\1, line \2)", stack[-1])
            message += f"; it was in {place}"
            fields[logs.STACK] = "\n".join(stack)
        logs.event(logging.ERROR, f"{child.role}.hung", message, fields)

    def _log_killed(self, child: Child, reason: str) -> None:
        clients = self._clients(child)
        message = f"{child.role} {child.pid} was killed ({reason})"
        if clients:
            message += f"; clients cut off: {clients}"
        fields = {
            "gserver.child_pid": child.pid,
            "gserver.reason": reason,
            "gserver.clients": clients,
        }
        logs.event(logging.WARNING, f"{child.role}.killed", message, fields)

    def _handle_stuck(self, child: Child) -> None:
        """Do without a child that the kernel does not end."""
        message = (
            f"{child.role} {child.pid} has not ended {STUCK_SECONDS:g} s after SIGKILL:"
            " it is stuck in the kernel, and the server goes on without it"
        )
        fields = {"gserver.child_pid": child.pid, "gserver.clients": self._clients(child)}
        logs.event(logging.ERROR, f"{child.role}.stuck", message, fields)
        has_workers = NEEDS[self._lifecycle.phase].has_workers
        if child.role == WORKER and has_workers and not child.should_end:
            self._scoreboard.add("worker_restarts", 1)

    # Signals.

    def _handle_signal(self, number: signal.Signals, now: float, *, is_stop: bool) -> None:
        if is_stop:
            self._stop(number.name, now)
        elif self._lifecycle.is_stopping:
            message = f"{number.name} ignored: the server is stopping"
            logs.event(logging.INFO, "server.signal_ignored", message)
        elif number == signal.SIGHUP:
            self._reload()
        elif number == signal.SIGUSR2:
            self._retire(now)
        elif number == signal.SIGUSR1:
            self._log_debug(now)

    def _log_debug(self, now: float) -> None:
        """Make all processes log at debug level for a while."""
        self._scoreboard.put("debug_ends_at", round((now + DEBUG_SECONDS) * 1e9))
        logs.log_debug(is_on=True)
        message = f"SIGUSR1: logging at debug level for {DEBUG_SECONDS / 60:.0f} minutes"
        logs.event(logging.INFO, "server.debug_logging", message)

    def _retire(self, now: float) -> None:
        self._lifecycle.retire(now)
        delay_seconds = self._config.drain_delay_seconds
        delay = f" after {delay_seconds:g} s" if delay_seconds else ""
        message = (
            f"SIGUSR2: accepting no new clients{delay}; stopping when the last client has left,"
            f" at most {self._config.drain_timeout_seconds:g} s later"
        )
        logs.event(logging.INFO, "server.retiring", message)

    def _stop(self, name: str, now: float) -> None:
        was_forced = self._lifecycle.was_forced
        self._lifecycle.stop(now)
        if not self._lifecycle.was_forced:
            delay_seconds = self._config.drain_delay_seconds
            message = f"{name}: draining"
            if self._lifecycle.phase is Phase.DELAY and delay_seconds:
                message = f"{name}: draining in {delay_seconds:g} s; clients are served until then"
            logs.event(logging.INFO, "server.draining", message)
        elif not was_forced:
            logs.event(logging.WARNING, "server.forced", f"{name} again: killing all processes")

    def _reload(self) -> None:
        logs.event(logging.INFO, "server.reloading", "SIGHUP: replacing the workers one by one")
        if self._lifecycle.phase is Phase.SERVING:
            # The manager waits for this, even if the reload fails at once.
            self._manager.notify(systemd.RELOADING, RELOADING_STATUS)
        # The cause of earlier failures may be fixed: no pause.
        self._backoff = {WORKER: Backoff(), AGENT: Backoff()}
        self._reload_error = ""
        self._end_trial()
        is_running = self._lifecycle.phase in (Phase.SERVING, Phase.RELOADING)
        if is_running and upgrade.code_version() != self._code_version:
            self._try_upgrade()
        else:
            self._begin_reload()

    def _begin_reload(self) -> None:
        endpoints = self._endpoints
        try:
            self._lifecycle.begin_reload(certificates.read(self._config))
        except UsageError as error:
            self._log_failed_reload(str(error))
        else:
            number = self._lifecycle.generation.number
            self._endpoints_of[number] = listener.renew(self._config, endpoints)

    @property
    def _endpoints(self) -> tuple[listener.Listener, ...]:
        """The endpoints of new workers."""
        return self._endpoints_of[self._lifecycle.generation.number]

    def _forget_endpoints(self, generations: Iterable[int]) -> None:
        """Close the listeners that only these generations have."""
        gone = [each for number in generations for each in self._endpoints_of.pop(number)]
        kept = {each for endpoints in self._endpoints_of.values() for each in endpoints}
        listener.close_all(each for each in gone if each not in kept)

    # Upgrades.

    def _try_upgrade(self) -> None:
        """Start the installed version, to see whether it could take over."""
        try:
            self._trial = upgrade.Trial(self._state())
        except OSError as error:
            self._log_failed_reload(f"the new version cannot be started: {error}")

    def _check_trial(self, now: float) -> None:
        """Let the new version take over if its trial has succeeded."""
        trial = self._trial
        problem = trial.result(now) if trial else None
        if trial is None or problem is None:
            return
        if not self._signals.try_block():
            return  # A signal that this program knows of would be lost.
        self._end_trial()
        if self._lifecycle.phase not in (Phase.SERVING, Phase.RELOADING):
            pass  # The server is stopping by now.
        elif problem:
            self._log_failed_reload(f"the new version cannot run: {problem}")
        else:
            self._upgrade(trial.code_version)
        self._signals.unblock()

    def _end_trial(self) -> None:
        if self._trial:
            self._trial.end()
            self._trial = None

    def _upgrade(self, code_version: str) -> None:
        """Replace this program by the new version, if the files are still those that were tried."""
        logs.report_suppressed(is_last=True)
        state = self._state()
        if state.code_version != code_version:
            self._try_upgrade()  # The files are changing at this moment.
            return
        logs.stop()
        try:
            upgrade.execute(state)
        except OSError as error:
            config = self._config
            with suppress(FatalError):  # Without a thread there is no log, but there is a server.
                logs.start(config.log_level, config.log_format, config.server_id)
            self._log_failed_reload(f"the new version cannot be started: {error}")

    def _state(self) -> upgrade.State:
        """Return all that the new program must know."""
        generations = [*self._lifecycle.generations, *(each.generation for each in self._children)]
        return upgrade.State(
            config=self._config,
            version=__version__,
            code_version=upgrade.code_version(),
            slots=self._scoreboard.slots,
            scoreboard_fd=self._scoreboard.fd,
            endpoint_fds=[each.sock.fileno() for each in self._endpoints],
            endpoint_files=[each.file for each in self._endpoints],
            admin_fds=[port.sock.fileno() for port in self._admin_ports],
            manager=self._manager.state(),
            generations=upgrade.with_previous(generations),
            lifecycle=self._lifecycle.state(),
            children=[child.save() for child in self._children],
        )

    def _give_up_reload(self, reason: str, fields: dict[str, object] | None = None) -> None:
        self._lifecycle.give_up_reload()
        number = self._lifecycle.generation.number
        # Those from before an upgrade have the endpoints that it found.
        self._endpoints_of.setdefault(number, self._endpoints_of[min(self._endpoints_of)])
        self._forget_endpoints([each for each in self._endpoints_of if each > number])
        kill_at = monotonic() + self._config.drain_timeout_seconds
        for place, worker in enumerate(self._staying(WORKER)):
            is_newer = worker.generation.number > self._lifecycle.generation.number
            if is_newer or place >= self._config.workers:
                worker.terminate(kill_at)
        self._log_failed_reload(reason, fields)

    def _log_failed_reload(self, reason: str, fields: dict[str, object] | None = None) -> None:
        self._reload_error = reason
        self._scoreboard.add("reload_failures", 1)
        self._scoreboard.put("reload_failed_at", round(monotonic() * 1e9))
        is_reloading = self._lifecycle.phase is Phase.RELOADING
        rest = "the previous reload continues" if is_reloading else "the old workers stay"
        message = f"reload failed, {rest}: {reason}"
        logs.event(logging.ERROR, "server.reload_failed", message, fields)

    # The service manager.

    def _notify_manager(self, now: float) -> None:
        self._manager.keep_heartbeat(now)
        if self._lifecycle.is_stopping:
            clients = self._scoreboard.clients()
            self._manager.notify(systemd.STOPPING, f"stopping, clients: {clients}")
        elif self._lifecycle.phase is Phase.RELOADING or self._trial:
            self._manager.notify(systemd.RELOADING, RELOADING_STATUS)
        elif self._lifecycle.phase is Phase.SERVING:
            where = listener.describe(self._config)
            status = f"listening on {where}, workers: {self._config.workers}"
            if self._reload_error:
                status += f"; the last reload failed: {self._reload_error}"
            self._manager.notify(systemd.READY, status)


def try_state(text: str) -> None:
    """Raise `UsageError` if this version cannot take over from a supervisor with this state."""
    state = upgrade.State.decode(text)
    Scoreboard.check(state.scoreboard_fd, state.slots)
    try:
        for file in filter(None, state.endpoint_files):
            listener.SocketFile._make(file)
    except TypeError as error:
        raise UsageError(OTHER_VERSION) from error
    if len(state.endpoint_files) != len(state.config.endpoints):
        raise UsageError(OTHER_VERSION)
    systemd.Manager(**state.manager)
    _resume_lifecycle(state)
    # Their descriptors are not passed to a trial.
    children = [{**child, "control_fd": -1, "stack_fd": -1} for child in state.children]
    resume_children(children, state.generations)


def _resume_lifecycle(state: upgrade.State) -> Lifecycle:
    return Lifecycle.resume(
        state.generations,
        **state.lifecycle,
        drain_delay_seconds=state.config.drain_delay_seconds,
        drain_timeout_seconds=state.config.drain_timeout_seconds,
    )
