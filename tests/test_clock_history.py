"""The lease clock's values as moments of this machine."""

import pytest

from gserver.cluster.clock_history import ClockHistory

TTL = 5000


def history(*replies: tuple[int, int], clock: int = 0, sent_at: int = 0) -> ClockHistory:
    found = ClockHistory(TTL, clock, sent_at)
    for reply in replies:
        found.note(*reply)
    return found


@pytest.mark.parametrize(
    ("clock", "moment"),
    [
        (1000, 50_000),
        (1200, 50_200),
        (1499, 50_499),
        (1500, 50_500),
        (1600, 50_600),  # The stall began then, at the latest.
        (1999, 50_999),
        (2000, 60_500),
        (2100, 60_500),  # Not in the future.
        (900, 49_900),  # From before the first reply, as if the clock had not paused.
    ],
)
def test_a_value_had_its_moment_before_a_stall_or_after_it(clock: int, moment: int) -> None:
    stalled = history((1000, 50_000), (1500, 50_500), (2000, 60_500))
    assert stalled.moment_of(clock) == moment


def test_the_next_agent_continues_from_the_last_reply() -> None:
    continued = history((2000, 60_500), clock=1500, sent_at=50_500)
    assert continued.moment_of(1700) == 50_700
    assert continued.moment_of(1400) == 50_400
    assert history((2000, 60_500)).moment_of(1700) == 60_200


def test_a_clock_that_went_back_is_that_of_other_data() -> None:
    assert history((9000, 50_000), (1000, 60_000), (1500, 60_500)).moment_of(1200) == 60_200


def test_of_equal_values_the_first_had_the_moment() -> None:
    """After a failover to a Redis whose clock is behind, no time has passed in the data."""
    assert history((1000, 10_000), (1000, 70_000)).moment_of(1000) == 10_000


def test_a_step_of_the_clock_of_redis_does_not_reach_beyond_the_next_reply() -> None:
    assert history((1000, 10_000), (1700, 10_200), (2000, 10_500)).moment_of(1600) == 10_200


def test_only_the_replies_of_a_ttl_are_kept_and_the_one_before() -> None:
    long = ClockHistory(TTL)
    for number in range(10_000):
        long.note(500 * number, 500 * number)
    assert len(long._replies) == TTL / 500 + 1
    assert long.moment_of(500 * 9999 - TTL) == 500 * 9999 - TTL
