"""Which of two servers with one id gives way, if there are several Redis."""

import time

import pytest

from gserver.cluster.engines import MAX_LISTED, Engines
from gserver.cluster.union import MAX_ENDS, End
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


# A new agent, after the one before it has hung, or has been replaced.


def after(**cells: int) -> Engines:
    """The next agent, with these cells on the scoreboard."""
    scoreboard = Scoreboard.create(2)
    for name, value in cells.items():
        scoreboard.put(name.replace("_of_", "."), value)
    return Engines(TWO, scoreboard)


def note(found: Engines, number: int, **membership: int) -> int:
    """Let a Redis answer; return the clients that are published then."""
    sender = found.senders[number]
    sender.answered_at_ms = sender.sent_at_ms = time.monotonic_ns() // 1_000_000
    for name, value in membership.items():
        setattr(sender.membership, name, value)
    found.note(sender)
    return found._scoreboard.get("remote_clients")


@pytest.mark.parametrize("seconds_ago", [0.5, 60])
def test_nothing_is_published_before_all_have_answered_that_had_answered_last(
    seconds_ago: float,
) -> None:
    """However long the agent before it hung."""
    then = time.monotonic_ns() - round(seconds_ago * 1e9)
    known = {"remote_clients": 47, "cluster_servers": 3}
    found = after(**known, engine_updated_at_of_0=then, engine_updated_at_of_1=then)
    assert note(found, 0, remote_clients=7, servers=2) == 47
    assert note(found, 1, remote_clients=50, servers=3) == 50
    found = after(**known, engine_updated_at_of_0=then, engine_updated_at_of_1=then - 2 * 10**9)
    assert note(found, 0, remote_clients=7, servers=2) == 7, "the other one was away before"


def test_in_a_hold_of_all_the_count_of_the_agent_before_stays() -> None:
    """Each Redis holds what it had itself, and its servers are not listed before the end."""
    now = time.monotonic_ns() // 1_000_000
    given = {"hold_until": now + 9000, "servers": 2, "confirmed_monotonic": now}
    # The newest of the shares that all of them had.
    found = after(remote_clients=47, cluster_servers=3, cluster_confirmed_at=now + 200)
    assert note(found, 0, remote_clients=7, **given) == 47
    assert note(found, 1, remote_clients=40, **given) == 47
    assert note(found, 1, remote_clients=48, **given | {"servers": 3}) == 48, "a higher new one"
    assert note(found, 1, remote_clients=5, **given | {"hold_until": 0}) == 5, "it has all its data"


def test_in_a_hold_an_engine_that_was_away_for_long_says_nothing() -> None:
    now = time.monotonic_ns() // 1_000_000
    found = after(remote_clients=10, cluster_servers=3, cluster_confirmed_at=now - 300)
    old = {"hold_until": now + 9000, "servers": 9, "confirmed_monotonic": now - 3_600_000}
    assert note(found, 0, remote_clients=1000, **old) == 10


def test_while_one_holds_a_part_that_the_agent_before_knew_the_count_does_not_fall() -> None:
    """The other one does not have the servers that reach only this one."""
    now = time.monotonic_ns() // 1_000_000
    found = after(remote_clients=47, cluster_servers=3, cluster_confirmed_at=now)
    held = {"hold_until": now + 9000, "servers": 3, "confirmed_monotonic": now}
    found.senders[0].is_list_awaited = True
    assert note(found, 0, remote_clients=47, **held) == 47
    assert note(found, 1, remote_clients=7, servers=2, confirmed_monotonic=now) == 47
    assert note(found, 1, remote_clients=48, servers=2, confirmed_monotonic=now) == 48
    found.senders[0].is_list_awaited = False
    assert note(found, 1, remote_clients=7, servers=2, confirmed_monotonic=now) == 7


def doubtful_at(found: Engines) -> int:
    return found._scoreboard.get("cluster_doubtful_at")


@pytest.mark.parametrize("doubted_ms", [6001, 100_000])
def test_a_server_that_was_doubtful_is_so_until_the_redis_that_knows_it_answers(
    doubted_ms: int,
) -> None:
    now = time.monotonic_ns() // 1_000_000
    then = now - doubted_ms
    found = after(
        cluster_servers=2,
        cluster_confirmed_at=now,
        cluster_doubtful_at=then,
        engine_updated_at_of_0=now * 10**6,
        engine_updated_at_of_1=then * 10**6,
    )
    for _ in range(2):
        note(found, 0, servers=2, confirmed_monotonic=now)
        assert doubtful_at(found) == then
    note(found, 1, servers=2, confirmed_monotonic=now)
    assert doubtful_at(found) == now


@pytest.mark.parametrize("doubted_ms", [0, 6000])
def test_a_doubt_of_a_moment_is_not_inherited(doubted_ms: int) -> None:
    now = time.monotonic_ns() // 1_000_000
    found = after(
        cluster_servers=2,
        cluster_confirmed_at=now,
        cluster_doubtful_at=now - doubted_ms,
        engine_updated_at_of_0=now * 10**6,
        engine_updated_at_of_1=(now - 60_000) * 10**6,
    )
    note(found, 0, servers=2, confirmed_monotonic=now)
    assert doubtful_at(found) == now


def test_how_servers_have_gone_is_forgotten_in_a_cluster_too_large_for_lists() -> None:
    now = time.monotonic_ns() // 1_000_000
    found = after()
    for number in range(2 * MAX_ENDS):
        end = End(True, number, "1", now)
        found.senders[0].view.note_ends({f"server-{number}": end})
        note(found, 0, servers=MAX_LISTED + 1)
    assert len(found.senders[0].view.ends) == MAX_ENDS
