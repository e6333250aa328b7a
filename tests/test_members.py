"""How servers have gone, out of what several Redis say."""

import pytest

from gserver.cluster.members import LEFT, LOST, Departure, _merge_gone

RUN, EARLIER = "b2", "a1"


@pytest.mark.parametrize(
    ("departures", "how"),
    [
        ([(LEFT, RUN, 5)], LEFT),
        ([(LOST, RUN, 5)], LOST),
        # It could not reach the second one any more.
        ([(LEFT, RUN, 9), (LOST, RUN, 5)], LEFT),
        # It left, came back to the first one only, and died.
        ([(LOST, RUN, 5), (LEFT, EARLIER, 900)], LOST),
        ([(LEFT, RUN, 5), (LOST, EARLIER, 900)], LEFT),
    ],
)
def test_the_last_run_of_a_server_decides(departures: list[tuple[str, str, int]], how: str) -> None:
    found = [{"one": Departure(*each)} for each in departures]
    assert _merge_gone(found) == _merge_gone(found[::-1]) == {"one": how}
