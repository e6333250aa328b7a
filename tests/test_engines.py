"""Which of two servers with one id gives way, if there are several Redis."""

import time

import pytest

from gserver.cluster.engines import Engines
from gserver.config import Config
from gserver.scoreboard import Scoreboard

TWO = Config(redis_url="redis://x redis://y", server_id="one")


def engines(incarnation: int, members: tuple[bool, bool]) -> Engines:
    """Return those of a server that holds its id at these Redis."""
    scoreboard = Scoreboard.create(2)
    scoreboard.put("incarnation", incarnation)
    found = Engines(TWO, scoreboard)
    found.id_is_known.set()
    for sender, is_member in zip(found.senders, members, strict=True):
        sender.is_member = is_member
        sender.answered_at_ms = time.monotonic_ns() // 1_000_000
    return found


@pytest.mark.parametrize("incarnations", [(1, 2), (2, 1), (7, 7)], ids=["", "reversed", "clone"])
def test_of_two_servers_that_each_hold_their_id_at_one_redis_one_gives_way(
    incarnations: tuple[int, int],
) -> None:
    first, second = (
        engines(incarnation, members)
        for incarnation, members in zip(incarnations, ((True, False), (False, True)), strict=True)
    )
    marks = ("*", "*") if incarnations[0] == incarnations[1] else ("", "")
    gives_way = (
        first.should_give_way(first.senders[1], f"{incarnations[1]:x}.1{marks[1]}"),
        second.should_give_way(second.senders[0], f"{incarnations[0]:x}.0{marks[0]}"),
    )
    assert sorted(gives_way) == [False, True]


@pytest.mark.parametrize(("own", "other"), [(1, 2), (2, 1), (7, 7)])
def test_a_server_that_holds_its_id_nowhere_gives_way(own: int, other: int) -> None:
    newcomer = engines(own, (False, False))
    for number, sender in enumerate(newcomer.senders):
        assert newcomer.should_give_way(sender, f"{other:x}.{number}")


def test_a_server_that_has_only_started_gives_way() -> None:
    newcomer = engines(1, (True, False))
    newcomer.id_is_known.clear()
    assert newcomer.should_give_way(newcomer.senders[1], "2.1")


def test_a_redis_that_is_away_does_not_count() -> None:
    server = engines(1, (True, False))
    assert not server.should_give_way(server.senders[1], "2.1")
    server.senders[0].answered_at_ms -= 1001
    assert server.should_give_way(server.senders[1], "2.1")
