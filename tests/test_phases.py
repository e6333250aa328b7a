"""The state machine of phases, and which processes a phase needs. No process runs here."""

import math
from dataclasses import dataclass

import pytest

from gserver.certificates import Certificates
from gserver.supervise.phases import (
    GIVE_UP_SECONDS,
    NEEDS,
    Generation,
    Lifecycle,
    Phase,
    Treatment,
    Workforce,
)

DELAY, TIMEOUT = 10.0, 40.0


def lifecycle(phase: Phase = Phase.SERVING) -> Lifecycle:
    """A server that has reached a phase, at time 100 if the phase belongs to a stop."""
    made = Lifecycle(
        Certificates(),
        drain_delay_seconds=DELAY,
        drain_timeout_seconds=TIMEOUT,
        id_check_until=5.0 if phase is Phase.CHECKING_ID else None,
    )
    if phase in (Phase.CHECKING_ID, Phase.STARTING):
        return made
    made.note_ready(made.generation)
    if phase is Phase.RELOADING:
        made.begin_reload(Certificates("new"))
    elif phase is Phase.DELAY:
        made.stop(100.0)
    elif phase is Phase.RETIRING:
        made.retire(100.0 - DELAY)
        advance(made, 100.0)
    elif phase is Phase.DRAINING:
        made.drain(100.0)
    elif phase is Phase.FORCED:
        made.force(100.0)
    assert made.phase is phase
    return made


def advance(server: Lifecycle, now: float, **seen: bool) -> bool:
    """Advance; all processes run, and the id is not checked, unless `seen` says otherwise."""
    usual = {"is_id_checked": False, "has_workers": True, "has_children": True}
    return server.advance(now, **{**usual, **seen})


# Starts.


def test_without_a_cluster_workers_start_at_once_and_the_first_one_serves() -> None:
    server = lifecycle(Phase.STARTING)
    assert not advance(server, 1e9)
    server.note_ready(server.generation)
    assert (server.phase, server.deadline) == (Phase.SERVING, math.inf)


def test_in_a_cluster_workers_wait_a_limited_time_for_the_id_check() -> None:
    for seen, now in (({"is_id_checked": True}, 1.0), ({}, 5.0)):
        server = lifecycle(Phase.CHECKING_ID)
        assert not NEEDS[server.phase].has_workers
        assert not advance(server, 4.9)
        assert advance(server, now, **seen)
        assert (server.phase, server.deadline) == (Phase.STARTING, math.inf)


def test_a_reload_does_not_end_the_id_check() -> None:
    server = lifecycle(Phase.CHECKING_ID)
    server.begin_reload(Certificates())
    assert not advance(server, 4.9)
    assert not NEEDS[server.phase].has_workers
    advance(server, 5.0)
    assert server.phase is Phase.RELOADING


# Stops.


def test_a_stop_drains_after_the_delay_and_ends_with_the_last_process() -> None:
    server = lifecycle()
    server.stop(100.0)
    assert (server.phase, server.deadline) == (Phase.DELAY, 110.0)
    assert not advance(server, 109.9)
    assert not advance(server, 109.9, has_workers=False, has_children=False), (
        "a process is being started"
    )
    assert advance(server, 110.0)
    assert (server.phase, server.since) == (Phase.DRAINING, 110.0)
    assert not advance(server, 111.0, has_workers=False)
    assert advance(server, 112.0, has_workers=False, has_children=False)
    assert (server.phase, server.was_forced) == (Phase.OVER, False)


def test_a_stop_during_the_id_check_has_no_delay() -> None:
    for stop in (Lifecycle.stop, Lifecycle.retire):
        server = lifecycle(Phase.CHECKING_ID)
        stop(server, 1.0)
        assert server.phase is Phase.DRAINING


@pytest.mark.parametrize("phase", [Phase.DRAINING, Phase.FORCED])
def test_a_stop_ends_after_its_deadline_even_if_processes_remain(phase: Phase) -> None:
    server = lifecycle(phase)
    limit = GIVE_UP_SECONDS + (TIMEOUT if phase is Phase.DRAINING else 0.0)
    assert server.deadline == 100.0 + limit
    assert not advance(server, server.deadline - 0.1)
    assert advance(server, server.deadline)
    assert server.phase is Phase.OVER


def test_a_second_stop_signal_forces_the_end_and_extends_no_deadline() -> None:
    for first in (Phase.DELAY, Phase.DRAINING):
        server = lifecycle()
        server.stop(100.0)
        if first is Phase.DRAINING:
            advance(server, 110.0)
        server.stop(111.0)
        assert (server.phase, server.was_forced) == (Phase.FORCED, True)
        assert server.deadline == 111.0 + GIVE_UP_SECONDS
        server.stop(112.0)
        assert server.deadline == 111.0 + GIVE_UP_SECONDS
    late = lifecycle(Phase.DRAINING)
    late.force(late.deadline - 1.0)
    assert late.deadline == 100.0 + TIMEOUT + GIVE_UP_SECONDS


def test_a_lame_duck_begins_after_the_delay_and_drains_after_the_timeout() -> None:
    server = lifecycle()
    server.retire(100.0)
    assert (server.phase, server.deadline) == (Phase.DELAY, 110.0)
    advance(server, 110.0)
    assert (server.phase, server.deadline) == (Phase.RETIRING, 110.0 + TIMEOUT)
    server.retire(120.0)
    assert server.deadline == 110.0 + TIMEOUT
    assert not advance(server, 149.9)
    assert advance(server, 150.0)
    assert (server.phase, server.since) == (Phase.DRAINING, 150.0)


def test_a_lame_duck_drains_when_its_workers_have_ended() -> None:
    server = lifecycle(Phase.RETIRING)
    assert advance(server, 101.0, has_workers=False)
    assert server.phase is Phase.DRAINING


@pytest.mark.parametrize("moment", [101.0, 111.0])
def test_a_stop_signal_makes_a_lame_duck_drain_at_once(moment: float) -> None:
    server = lifecycle()
    server.retire(100.0)
    advance(server, moment)
    server.stop(moment)
    assert (server.phase, server.since, server.was_forced) == (Phase.DRAINING, moment, False)
    server.stop(moment + 1)
    assert server.phase is Phase.FORCED


def test_a_lame_duck_request_does_not_change_a_stop() -> None:
    server = lifecycle(Phase.DELAY)
    server.retire(101.0)
    advance(server, 110.0)
    assert server.phase is Phase.DRAINING


def test_the_first_stop_signal_during_another_drain_forces_nothing() -> None:
    server = lifecycle(Phase.DRAINING)
    server.stop(101.0)
    assert (server.phase, server.since) == (Phase.DRAINING, 100.0)
    server.stop(102.0)
    assert server.phase is Phase.FORCED


def test_a_drain_never_restarts() -> None:
    for phase in (Phase.DRAINING, Phase.FORCED):
        server = lifecycle(phase)
        deadline = server.deadline
        server.drain(101.0)
        assert (server.phase, server.deadline) == (phase, deadline)


# Reloads.


def test_a_reload_starts_a_new_generation_and_ends_when_it_is_complete() -> None:
    server = lifecycle()
    first = server.generation
    server.begin_reload(Certificates("new"))
    assert server.phase is Phase.RELOADING
    assert server.generation is not first
    assert server.generation.certificates == Certificates("new")
    server.note_ready(server.generation)
    server.complete_reload()
    assert NEEDS[server.phase].treatment is Treatment.KEEP


def test_an_abandoned_reload_rolls_back_and_its_number_is_not_reused() -> None:
    server = lifecycle()
    first = server.generation
    numbers = {first.number}
    for _ in range(3):
        server.begin_reload(Certificates())
        assert server.generation.number not in numbers
        numbers.add(server.generation.number)
        assert server.would_end_reload(server.generation)
        assert not server.would_end_reload(first)
        server.give_up_reload()
        assert server.phase is Phase.SERVING
        assert server.generation is first


def test_an_abandoned_reload_rolls_back_to_the_previous_unfinished_one() -> None:
    server = lifecycle()
    server.begin_reload(Certificates("one"))
    one = server.generation
    server.begin_reload(Certificates("two"))
    server.note_ready(one)
    assert server.would_end_reload(server.generation)
    server.give_up_reload()
    assert server.generation is one
    assert server.phase is Phase.RELOADING
    server.note_replaced(one)
    assert not server.would_end_reload(one), "it cannot be rolled back any more"


def test_a_reload_rolls_back_until_a_new_worker_has_the_place_of_an_old_one() -> None:
    server = lifecycle()
    first = server.generation
    server.begin_reload(Certificates("new"))
    server.note_ready(server.generation)
    assert server.would_end_reload(server.generation)
    server.give_up_reload()
    assert (server.phase, server.generation) == (Phase.SERVING, first)
    server.begin_reload(Certificates("newer"))
    server.note_ready(server.generation)
    assert server.would_end_reload(server.generation)


def test_a_proven_reload_that_cannot_continue_keeps_the_current_workers() -> None:
    server = lifecycle(Phase.RELOADING)
    new = server.generation
    server.note_ready(new)
    server.note_replaced(new)
    server.give_up_reload()
    assert (server.phase, server.generation) == (Phase.SERVING, new)


def test_a_reload_before_any_worker_is_ready_can_be_abandoned_too() -> None:
    server = lifecycle(Phase.STARTING)
    server.begin_reload(Certificates())
    server.give_up_reload()
    assert server.phase is Phase.STARTING


@pytest.mark.parametrize("phase", [Phase.DELAY, Phase.RETIRING, Phase.DRAINING])
def test_a_reload_abandoned_during_a_stop_does_not_change_the_phase(phase: Phase) -> None:
    server = lifecycle(Phase.RELOADING)
    server.retire(0.0)
    if phase is not Phase.DELAY:
        advance(server, DELAY)
    if phase is Phase.DRAINING:
        server.drain(20.0)
    deadline = server.deadline
    server.give_up_reload()
    assert (server.phase, server.deadline) == (phase, deadline)


# Which processes should run.

OLD, NEW = Generation(0, Certificates()), Generation(1, Certificates())


@dataclass
class Worker:
    generation: Generation
    has_been_ready: bool = True


def workforce(*staying: Worker, ending: int = 0) -> Workforce[Worker]:
    """Workers, of which two are wanted."""
    return Workforce(staying, len(staying) + ending, 2)


READY_OLD, READY_NEW, STARTING_NEW = Worker(OLD), Worker(NEW), Worker(NEW, has_been_ready=False)


@pytest.mark.parametrize("phase", Phase)
def test_missing_workers_are_started_until_the_port_is_closed(phase: Phase) -> None:
    starts = (Phase.STARTING, Phase.SERVING, Phase.RELOADING, Phase.DELAY)
    missing = workforce(READY_OLD).missing(phase, OLD)
    assert missing == (1 if phase in starts else 0)
    assert workforce(READY_OLD, READY_OLD).missing(phase, OLD) == 0


def test_every_phase_declares_its_processes() -> None:
    assert set(NEEDS) == set(Phase)
    replacing = {phase for phase in Phase if NEEDS[phase].treatment is Treatment.REPLACE}
    assert replacing == {Phase.RELOADING}, "a stop ends a reload"


@pytest.mark.parametrize(
    ("workers", "starts", "replaced", "is_complete"),
    [
        (workforce(READY_OLD, READY_OLD), 1, None, False),
        (workforce(READY_OLD, READY_OLD, STARTING_NEW), 0, None, False),
        (workforce(READY_OLD, READY_OLD, READY_NEW), 0, READY_OLD, False),
        (workforce(READY_OLD, READY_NEW, ending=1), 0, None, False),
        (workforce(READY_OLD, READY_NEW), 1, None, False),
        (workforce(READY_NEW, READY_NEW, ending=1), 0, None, False),
        (workforce(READY_NEW, READY_NEW), 0, None, True),
        (workforce(READY_OLD), 1, None, False),
        (workforce(READY_OLD, STARTING_NEW), 1, None, False),
        (workforce(), 2, None, False),
        (workforce(STARTING_NEW, STARTING_NEW), 0, None, False),
    ],
)
def test_a_reload_replaces_one_worker_at_a_time(
    workers: Workforce[Worker], starts: int, replaced: Worker | None, is_complete: bool
) -> None:
    assert workers.missing(Phase.RELOADING, NEW) == starts
    assert workers.to_replace(NEW) is replaced
    assert workers.is_replaced(NEW) is is_complete


# Upgrades.


def resumed(server: Lifecycle) -> Lifecycle:
    """The same life cycle in a program that has taken over."""
    return Lifecycle.resume(
        {each.number: each for each in server.generations},
        **server.state(),
        drain_delay_seconds=DELAY,
        drain_timeout_seconds=TIMEOUT,
    )


def test_a_program_that_takes_over_goes_on_in_the_same_phase() -> None:
    serving = resumed(lifecycle(Phase.SERVING))
    assert serving.phase is Phase.SERVING
    reloading = resumed(lifecycle(Phase.RELOADING))
    assert reloading.phase is Phase.RELOADING
    reloading.stop(100.0)
    assert (reloading.phase, reloading.deadline) == (Phase.DELAY, 100.0 + DELAY)


def test_no_two_generations_of_a_server_have_the_same_number() -> None:
    server, numbers = lifecycle(Phase.SERVING), [0]
    for _ in range(3):
        server.begin_reload(Certificates())
        numbers.append(server.generation.number)
        server.note_ready(server.generation)
        server.complete_reload()
        server = resumed(server)
    assert len(set(numbers)) == len(numbers)


def test_a_complete_reload_cannot_be_undone_even_if_the_old_workers_died() -> None:
    server = lifecycle(Phase.RELOADING)
    server.note_ready(server.generation)
    server.complete_reload()
    assert server.generation.previous is None
    assert not server.would_end_reload(server.generation)
