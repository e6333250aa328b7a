"""The phases of a server's life, and the processes that each phase needs.

    CHECKING_ID > STARTING > SERVING <> RELOADING; SIGHUP: STARTING > RELOADING
    from each of these:  SIGTERM, SIGINT > DELAY > DRAINING > OVER
                         SIGUSR2         > DELAY > RETIRING > DRAINING > OVER
                         duplicate id    > DRAINING > OVER
    but from CHECKING_ID, without workers: > DRAINING at once
    a second SIGTERM or SIGINT, or a first start that fails: > FORCED > OVER

Pure: no I/O, no log, no clock. The supervisor passes the time in and does what a phase needs. All
times are monotonic seconds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Generic, Protocol, TypeVar

from gserver.certificates import Certificates

#: A stop waits for processes that were killed for so long after the drain timeout. The kernel
#: cannot end one that waits for a disk, for example.
GIVE_UP_SECONDS = 3.0


class Phase(Enum):
    """What the server is doing. Exactly one at a time."""

    CHECKING_ID = "checking id"  # the agent asks the cluster whether the server id is free
    STARTING = "starting"  # no worker has been ready yet
    SERVING = "serving"
    RELOADING = "reloading"  # workers of older generations are replaced one by one
    DELAY = "delay"  # a stop was requested; all goes on for --drain-delay
    RETIRING = "retiring"  # lame duck: the port is closed, connected clients are served
    DRAINING = "draining"  # workers answer what they have received, and end
    FORCED = "forced"  # every process is killed
    OVER = "over"  # the supervisor exits


STOPPING = frozenset({Phase.DELAY, Phase.RETIRING, Phase.DRAINING, Phase.FORCED, Phase.OVER})
PORT_CLOSED = STOPPING - {Phase.DELAY}


class Treatment(Enum):
    """What is done with the workers that are running."""

    KEEP = "keep"
    REPLACE = "replace"  # those of older generations, one by one
    RETIRE = "retire"
    TERMINATE = "terminate"
    KILL = "kill"


@dataclass(frozen=True, slots=True)
class Needs:
    """The processes that a phase needs."""

    #: An agent is started if there is none.
    has_agent: bool
    #: Workers are started up to the number of `--workers`.
    has_workers: bool
    #: What is done with running workers.
    treatment: Treatment


NEEDS = {
    Phase.CHECKING_ID: Needs(has_agent=True, has_workers=False, treatment=Treatment.KEEP),
    Phase.STARTING: Needs(has_agent=True, has_workers=True, treatment=Treatment.KEEP),
    Phase.SERVING: Needs(has_agent=True, has_workers=True, treatment=Treatment.KEEP),
    Phase.RELOADING: Needs(has_agent=True, has_workers=True, treatment=Treatment.REPLACE),
    Phase.DELAY: Needs(has_agent=True, has_workers=True, treatment=Treatment.KEEP),
    Phase.RETIRING: Needs(has_agent=True, has_workers=False, treatment=Treatment.RETIRE),
    Phase.DRAINING: Needs(has_agent=True, has_workers=False, treatment=Treatment.TERMINATE),
    Phase.FORCED: Needs(has_agent=False, has_workers=False, treatment=Treatment.KILL),
    Phase.OVER: Needs(has_agent=False, has_workers=False, treatment=Treatment.KILL),
}


@dataclass(eq=False, slots=True)
class Generation:
    """The workers of one start or one reload. Its number is never used again."""

    number: int
    certificates: Certificates
    #: A worker of it has been ready.
    is_proven: bool = False
    #: What to go back to if it fails. None after the first old worker has been replaced.
    previous: "Generation | None" = None
    #: All workers were of it at one moment, or its reload was given up half way.
    is_complete: bool = False


class Worker(Protocol):
    """What a reload has to know of a worker."""

    @property
    def generation(self) -> Generation:
        """The generation that it was started for."""

    @property
    def has_been_ready(self) -> bool:
        """Whether it has reported that it accepts clients."""


AnyWorker = TypeVar("AnyWorker", bound=Worker)


@dataclass(frozen=True, slots=True)
class Workforce(Generic[AnyWorker]):
    """The workers that there are, and the questions that a phase asks about them.

    `staying` are those that are not about to end, oldest first. `running` also counts those that
    are terminating, but not a process that cannot be killed.
    """

    staying: Sequence[AnyWorker]
    running: int
    wanted: int

    def missing(self, phase: Phase, generation: Generation) -> int:
        """Return how many workers to start now. A reload has one more than usual at a time."""
        needs = NEEDS[phase]
        if not needs.has_workers:
            return 0
        target = self.wanted
        is_replacing = needs.treatment is Treatment.REPLACE and len(self.staying) == self.wanted
        if is_replacing and self._old(generation):
            target += 1
        return max(0, min(target - len(self.staying), self.wanted + 1 - self.running))

    def to_replace(self, generation: Generation) -> AnyWorker | None:
        """Return the worker that hands over now: an old one for which a new one is ready."""
        old = self._old(generation)
        has_spare = len(self.staying) > self.wanted
        if old and has_spare and all(worker.has_been_ready for worker in self.staying):
            return old[0]
        return None

    def is_replaced(self, generation: Generation) -> bool:
        """Return whether the reload is complete: all workers are ready, and of the generation."""
        if len(self.staying) != self.wanted or self.running != len(self.staying):
            return False
        are_ready = all(worker.has_been_ready for worker in self.staying)
        return are_ready and not self._old(generation)

    def _old(self, generation: Generation) -> list[AnyWorker]:
        return [worker for worker in self.staying if worker.generation is not generation]


class Lifecycle:
    """The state machine: the phase, its one deadline, and the generation of workers."""

    def __init__(
        self,
        certificates: Certificates,
        *,
        drain_delay_seconds: float,
        drain_timeout_seconds: float,
        id_check_until: float | None = None,
    ) -> None:
        self._delay_seconds = drain_delay_seconds
        self._timeout_seconds = drain_timeout_seconds
        self.phase = Phase.STARTING if id_check_until is None else Phase.CHECKING_ID
        #: When the phase ends if nothing ends it before; infinity if it lasts.
        self.deadline = math.inf if id_check_until is None else id_check_until
        #: When the phase began; -infinity for the first one.
        self.since = -math.inf
        #: The generation that new workers belong to. The first one replaces nothing.
        self.generation = Generation(0, certificates, is_complete=True)
        #: The newest generation that is proven, or else the first one.
        self._proven = self.generation
        self._last_number = 0
        self._phase_after_delay = Phase.DRAINING
        self._has_stop_signal = False
        #: The end was forced by a second signal, or by a start that failed.
        self.was_forced = False

    @classmethod
    def resume(
        cls,
        generations: Mapping[int, Generation],
        *,
        current: int,
        proven: int,
        last_number: int,
        drain_delay_seconds: float,
        drain_timeout_seconds: float,
    ) -> "Lifecycle":
        """Return the life cycle of a running server, which another program has begun."""
        made = cls(
            Certificates(),
            drain_delay_seconds=drain_delay_seconds,
            drain_timeout_seconds=drain_timeout_seconds,
        )
        made.generation, made._proven = generations[current], generations[proven]
        made._last_number = last_number
        made._enter_running_phase()
        return made

    def state(self) -> dict[str, int]:
        """Return what `resume` needs beside the generations. Only before a stop."""
        return {
            "current": self.generation.number,
            "proven": self._proven.number,
            "last_number": self._last_number,
        }

    @property
    def generations(self) -> tuple[Generation, Generation]:
        """The generation that new workers belong to, and the newest one that is proven."""
        return self.generation, self._proven

    @property
    def is_stopping(self) -> bool:
        """Whether the server is about to end, now or later."""
        return self.phase in STOPPING

    @property
    def is_port_closed(self) -> bool:
        """Whether the server accepts no more clients."""
        return self.phase in PORT_CLOSED

    # What happens to the processes.

    def advance(
        self, now: float, *, is_id_checked: bool, has_workers: bool, has_children: bool
    ) -> bool:
        """Move to the next phase if this one is over; return whether it was."""
        is_late = now >= self.deadline
        match self.phase:
            case Phase.CHECKING_ID if is_late or is_id_checked:
                self._enter_running_phase()
            case Phase.DELAY if is_late:
                self._enter(self._phase_after_delay, now)
            case Phase.RETIRING if is_late or not has_workers:
                self._enter(Phase.DRAINING, now)
            case Phase.DRAINING | Phase.FORCED if is_late or not has_children:
                self._enter(Phase.OVER, now)
            case _:
                return False
        return True

    def note_ready(self, generation: Generation) -> None:
        """Take a generation for proven: a worker of it is ready."""
        generation.is_proven = True
        if generation.number > self._proven.number:
            generation.previous = self._proven if self._proven.is_proven else None
            self._proven = generation
        if self.phase is Phase.STARTING:
            self._enter_running_phase()

    def note_replaced(self, generation: Generation) -> None:
        """Note that a worker of this generation has taken the place of an old one."""
        generation.previous = None

    # Reloads.

    def begin_reload(self, certificates: Certificates) -> None:
        """Replace all workers by those of a new generation."""
        self._last_number += 1
        self.generation = Generation(self._last_number, certificates)
        if self.phase is not Phase.CHECKING_ID:
            self._enter_running_phase()

    def would_end_reload(self, generation: Generation) -> bool:
        """Return whether a reload ends if a worker of this generation fails now."""
        is_tried = generation is self._proven and generation.previous is None
        return generation is self.generation and not is_tried

    def give_up_reload(self) -> None:
        """Go back to the newest proven generation. Its own reload goes on if it is not complete.

        If the generation is that one, and has replaced some workers, the others stay.
        """
        if self.generation is self._proven and self.generation.previous:
            self._proven = self.generation.previous
        if self.generation is self._proven:
            self.generation.is_complete = True
        self.generation = self._proven
        if not self.is_stopping and self.phase is not Phase.CHECKING_ID:
            self._enter_running_phase()

    def complete_reload(self) -> None:
        """End the reload: every worker is a new one."""
        self.note_replaced(self.generation)
        self.generation.is_complete = True
        self._enter_running_phase()

    # Stops.

    def stop(self, now: float) -> None:
        """Act on SIGTERM or SIGINT: drain after the delay. At the second one, force the end."""
        if self._has_stop_signal:
            self.force(now)
            return
        self._has_stop_signal = True
        if self.is_stopping:
            self.drain(now)
        else:
            self._begin_stop(Phase.DRAINING, now)

    def retire(self, now: float) -> None:
        """Act on SIGUSR2: become a lame duck after the delay. Ignored in a stop."""
        if not self.is_stopping:
            self._begin_stop(Phase.RETIRING, now)

    def drain(self, now: float) -> None:
        """Drain now, without a delay."""
        if self.phase not in (Phase.DRAINING, Phase.FORCED, Phase.OVER):
            self._enter(Phase.DRAINING, now)

    def force(self, now: float) -> None:
        """Kill every process."""
        if self.phase not in (Phase.FORCED, Phase.OVER):
            self._enter(Phase.FORCED, now)

    # How phases begin.

    def _enter_running_phase(self) -> None:
        """Enter the phase that the generation is in. These phases have no deadline."""
        if not self.generation.is_complete:
            self.phase = Phase.RELOADING
        elif self._proven.is_proven:
            self.phase = Phase.SERVING
        else:
            self.phase = Phase.STARTING
        self.deadline = math.inf

    def _begin_stop(self, phase_after_delay: Phase, now: float) -> None:
        """Begin the delay. Without workers, which a check of the id still prevents, it is over."""
        if self.phase is Phase.CHECKING_ID:
            self._enter(Phase.DRAINING, now)
        else:
            self._phase_after_delay = phase_after_delay
            self._enter(Phase.DELAY, now)

    def _enter(self, phase: Phase, now: float) -> None:
        """Begin a phase of the stop."""
        match phase:
            case Phase.DELAY:
                self.deadline = now + self._delay_seconds
            case Phase.RETIRING:
                self.deadline = now + self._timeout_seconds
            case Phase.DRAINING:
                self.deadline = now + self._timeout_seconds + GIVE_UP_SECONDS
            case Phase.FORCED:
                # A phase that was already draining is not prolonged.
                is_draining = self.phase is Phase.DRAINING
                limit = now + GIVE_UP_SECONDS
                self.deadline = min(self.deadline, limit) if is_draining else limit
                self.was_forced = True
        self.phase = phase
        self.since = now
