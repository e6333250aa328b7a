"""Whether another incarnation that holds the server id is alive or dead."""

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gserver.cluster.duplicate_id import DuplicateIdDetector
from gserver.cluster.membership import LATE_AFTER_INTERVALS, Reply

#: Seconds: the heartbeat interval, and the silence after which a holder is dead.
INTERVAL = 0.5
SILENCE = LATE_AFTER_INTERVALS * INTERVAL


def new_detector() -> DuplicateIdDetector:
    return DuplicateIdDetector("mine", round(INTERVAL * 1000))


def observe(detector: DuplicateIdDetector, holder: str, lease_end: int, moment: float) -> bool:
    return detector.observe(Reply(9, 1, 0, round(moment * 1000), 1, holder, lease_end, 0, 0, 0))


@pytest.mark.parametrize("holder", ["", "mine"])
def test_a_free_id_or_the_servers_own_is_not_a_duplicate(holder: str) -> None:
    detector = new_detector()
    assert detector.replaceable_incarnation == ""
    for number in range(10):
        assert not observe(detector, holder, number, number * INTERVAL)
        assert detector.replaceable_incarnation == ""


def test_a_lease_that_was_renewed_twice_belongs_to_a_live_server() -> None:
    detector = new_detector()
    found = [observe(detector, "other", lease, lease * 0.1) for lease in (1, 1, 2, 2, 3, 3)]
    assert found == [False, False, False, False, True, True]
    assert detector.replaceable_incarnation == ""


def test_one_renewal_may_be_a_late_heartbeat_of_a_dead_server_which_can_then_be_replaced() -> None:
    detector = new_detector()
    assert not observe(detector, "other", 1, 0.0)
    assert not observe(detector, "other", 2, 0.1)
    assert not observe(detector, "other", 2, 0.1 + SILENCE)
    assert detector.replaceable_incarnation == "other"


def test_a_lease_that_is_not_renewed_belongs_to_a_dead_server() -> None:
    detector = new_detector()
    for moment, replaceable in (
        (0.0, ""),
        (SILENCE / 2, ""),
        (SILENCE - 0.01, ""),
        (SILENCE, "other"),
        (SILENCE + 1, "other"),
    ):
        assert not observe(detector, "other", 1, 100 + moment)
        assert detector.replaceable_incarnation == replaceable


def test_a_renewal_restarts_the_wait() -> None:
    detector = new_detector()
    for moment, lease_end, replaceable in (
        (0.0, 1, ""),
        (SILENCE - 0.01, 2, ""),
        (SILENCE, 2, ""),
        (2 * SILENCE, 2, "other"),
    ):
        assert not observe(detector, "other", lease_end, moment)
        assert detector.replaceable_incarnation == replaceable


def test_after_a_dead_server_was_replaced_no_incarnation_is_replaceable() -> None:
    detector = new_detector()
    for moment, holder in ((0.0, "other"), (SILENCE, "other"), (SILENCE, "mine")):
        assert not observe(detector, holder, 1, moment)
    assert detector.replaceable_incarnation == ""


def test_a_new_holder_is_observed_from_the_beginning() -> None:
    detector = new_detector()
    for moment, holder, lease_end in (
        (0.0, "one", 1),
        (0.1, "one", 2),
        (0.2, "two", 3),
        (0.3, "two", 4),
    ):
        assert not observe(detector, holder, lease_end, moment)
    assert not observe(detector, "two", 4, 0.3 + SILENCE - 0.01)
    assert detector.replaceable_incarnation == ""
    assert not observe(detector, "two", 4, 0.3 + SILENCE)
    assert detector.replaceable_incarnation == "two"


def test_a_holder_that_returns_is_observed_from_the_beginning() -> None:
    detector = new_detector()
    for lease_end, holder in ((1, "one"), (2, "one"), (0, ""), (3, "one"), (4, "one")):
        assert not observe(detector, holder, lease_end, 0.1 * lease_end)
    assert observe(detector, "one", 5, 0.5)


@given(
    pauses=st.lists(st.floats(0.75 * INTERVAL, 0.95 * INTERVAL), min_size=20, max_size=20),
    watches=st.lists(st.floats(0.1 * INTERVAL, 0.35 * INTERVAL), min_size=20, max_size=60),
    heartbeats_left=st.none() | st.integers(0, 1),
)
def test_a_live_holder_is_never_replaced_and_a_dead_one_always_is(
    pauses: list[float], watches: list[float], heartbeats_left: int | None
) -> None:
    """The holder sends heartbeats with these pauses, endlessly or `heartbeats_left` times."""
    heartbeats = list(accumulate(pauses))[:heartbeats_left]
    detector = new_detector()
    is_duplicate, replaceable, moment = False, "", 0.0
    for pause in [*watches, *[0.25 * INTERVAL] * 20]:
        renewals = sum(heartbeat <= moment for heartbeat in heartbeats)
        is_duplicate = observe(detector, "other", renewals, moment) or is_duplicate
        replaceable = replaceable or detector.replaceable_incarnation
        moment += pause
        if heartbeats_left is None:
            moment = min(moment, heartbeats[-1])
    if heartbeats_left is None:
        assert (is_duplicate, replaceable) == (True, "")
    else:
        assert (is_duplicate, replaceable) == (False, "other")
