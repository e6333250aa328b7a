"""The count out of several Redis: which server counts, with which share, and how old it is."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gserver.cluster.union import MAX_ENDS, End, Share, Sum, Total, View, choose, merge

LATE, NOW = 1000, 100_000


def share(clients: int, confirmed: int = NOW, sequence: int = 0, incarnation: str = "a1") -> Share:
    return Share(clients, sequence or confirmed * 1000, incarnation, confirmed, is_proven=True)


def tell(
    view: View, listed: Mapping[str, Share], ends: Mapping[str, End] = {}, **given: bool
) -> None:
    """A reply of this engine."""
    view.note_ends(dict(ends))
    view.apply(listed, **given)


def unproven(clients: int, confirmed: int = NOW) -> Share:
    return share(clients, confirmed)._replace(is_proven=False)


def view(*, is_steady: bool = True, **shares: Share) -> View:
    """An engine that has listed these servers."""
    found = View()
    tell(found, shares)
    found.is_steady = is_steady
    return found


def lost(confirmed: int, incarnation: str = "a1") -> End:
    return End(False, confirmed * 1000, incarnation, confirmed)


def left(at: int, incarnation: str = "a1") -> End:
    return End(True, at * 1000, incarnation, at)


def total(*views: View) -> Total:
    return merge(views, LATE, NOW)


def exact(clients: int, servers: int, confirmed: int = NOW) -> Total:
    """Nothing is doubtful."""
    return Total(clients, servers, confirmed, confirmed)


def test_a_server_that_all_engines_list_counts_once() -> None:
    first = view(one=share(5, NOW - 300), two=share(20))
    second = view(one=share(5, NOW - 100), two=share(20))
    assert total(first, second) == exact(25, 2, NOW - 100)


def test_without_servers_the_count_is_as_old_as_the_last_answer() -> None:
    assert merge([View(), View()], LATE, NOW - 7) == exact(0, 0, NOW - 7)


def test_each_server_counts_if_it_reaches_one_of_the_engines() -> None:
    """The first does not reach A, the second does not reach B; this server reaches both."""
    assert total(view(second=share(20)), view(first=share(5))) == exact(25, 2)


def test_the_latest_share_counts_whichever_engine_has_it() -> None:
    old, new = share(5, NOW - 4000), share(7, NOW - 200)
    assert total(view(one=old), view(one=new)) == exact(7, 1, NOW - 200)
    assert total(view(one=new), view(one=old)) == exact(7, 1, NOW - 200)


def test_of_two_incarnations_the_one_that_reported_last_counts() -> None:
    """Sequence numbers of two incarnations say nothing: they may be of two machines."""
    dead = share(9, NOW - 3000, sequence=10**9, incarnation="a1")
    restarted = share(2, NOW - 100, sequence=7, incarnation="b2")
    assert total(view(one=dead), view(one=restarted)).clients == 2


# Engines that are away.


def test_while_an_engine_is_away_the_other_one_knows_who_has_gone() -> None:
    away = view(is_steady=False, dead=share(20, NOW - 9000), alive=share(5, NOW - 9000))
    there = view(alive=share(6))
    tell(there, {"alive": share(6)}, {"dead": lost(NOW - 9000 - LATE)})
    # It may be alive, and reach only the engine that is away.
    assert total(away, there) == Total(6, 1, NOW, NOW - 9000)
    tell(there, {"alive": share(6)}, {"dead": left(NOW - 5000)})
    assert total(away, there) == exact(6, 1)


def test_a_server_that_had_reported_later_to_the_engine_that_is_away_counts() -> None:
    """It was cut off from the other engine before."""
    away, there = view(is_steady=False, cut_off=share(20, NOW - 9000)), view(one=share(5))
    tell(there, {"one": share(5)}, {"cut_off": lost(NOW - 9000 - LATE - 1)})
    assert total(away, there) == exact(25, 2, NOW - 9000)
    tell(there, {"one": share(5)}, {"cut_off": lost(NOW - 9000 - LATE)})
    assert total(away, there).clients == 5


def test_the_last_heartbeats_tell_who_has_gone_whatever_the_clocks_say() -> None:
    """The lease clock of an engine that was away says nothing of the time meanwhile."""
    back = view(is_steady=False, one=share(20, NOW - 100, sequence=91_000_000))
    there = View()
    tell(there, {}, {"one": left(NOW - 5000)})
    assert total(back, there) == exact(0, 0)
    tell(there, {}, {"one": left(NOW - 5000)._replace(sequence=91_000_000 - 1000 * LATE - 1)})
    assert total(back, there).clients == 20


def test_of_another_incarnation_the_clocks_tell_whether_it_has_gone() -> None:
    first, second = view(one=share(9, NOW - 300, incarnation="b2")), View()
    tell(second, {}, {"one": left(NOW - 300 - LATE - 1)})
    assert total(first, second).clients == 9
    tell(second, {}, {"one": left(NOW - 300 - LATE)})
    assert total(first, second) == exact(0, 0)


def test_while_all_engines_are_away_all_count_as_last_known() -> None:
    first = view(is_steady=False, one=share(5, NOW - 9000), two=share(20, NOW - 9000))
    second = view(is_steady=False, one=share(5, NOW - 8000))
    assert total(first, second) == exact(25, 2, NOW - 9000)


def test_an_engine_that_comes_back_brings_no_dead_server_back() -> None:
    """Its lease clock has paused, so it lists who has died since, for a TTL."""
    back, there = view(dead=share(20, NOW - 9000)), view()
    listed = {"dead": share(20, NOW - 9000)}
    tell(there, {}, {"dead": lost(NOW - 8700)})
    tell(back, listed)
    assert total(back, there).clients == 0


def test_an_unproven_share_counts_only_if_every_steady_engine_lists_the_server() -> None:
    """It may be from a backup."""
    back, there = view(two=unproven(20), one=share(5)), view(one=share(5))
    assert total(back, there) == exact(5, 1)
    tell(back, {"two": share(22), "one": share(5)})
    assert total(back, there) == exact(27, 2)


def test_a_share_is_proven_by_a_later_heartbeat_of_the_same_incarnation() -> None:
    back, there = view(two=unproven(20, NOW - 900)), view()
    assert total(back, there) == Total(0, 0, NOW, NOW - 900)
    tell(back, {"two": unproven(21, NOW - 900)})
    assert total(back, there).clients == 0, "it is the same heartbeat"
    tell(back, {"two": unproven(22, NOW - 100)})
    assert total(back, there) == exact(22, 1, NOW - 100)
    tell(back, {"two": unproven(22, NOW - 100)})
    assert total(back, there) == exact(22, 1, NOW - 100)
    tell(back, {"two": unproven(9, NOW - 50)._replace(incarnation="b2")})
    assert total(back, there).clients == 0


def test_a_server_that_starts_again_with_its_id_counts_at_once() -> None:
    first, second = view(one=share(9, NOW - 3000)), view()
    tell(second, {}, {"one": lost(NOW - 3000)})
    tell(first, {"one": share(2, NOW, 7, "b2")})
    assert total(first, second) == exact(2, 1)


def test_a_server_that_one_engine_has_lost_and_the_other_one_hears_counts() -> None:
    first, second = view(), view(cut_off=share(21, NOW - 100))
    tell(first, {}, {"cut_off": lost(NOW - 6000)})
    assert total(first, second) == exact(21, 1, NOW - 100)


# Loss of data.


def test_an_engine_that_has_lost_its_data_holds_who_is_missing() -> None:
    wiped = view(one=share(5, NOW - 400), two=share(20, NOW - 400))
    tell(wiped, {"one": share(6)}, is_held=True)
    assert total(wiped) == exact(26, 2, NOW - 400)
    tell(wiped, {"one": share(6), "two": share(30)}, is_held=True)
    assert total(wiped) == exact(36, 2)
    tell(wiped, {"one": share(6)}, is_held=False)
    assert total(wiped) == exact(6, 1)


def test_who_is_held_does_not_count_if_another_engine_has_seen_it_go() -> None:
    wiped, there = view(dead=share(20, NOW - 9000)), view()
    tell(there, {}, {"dead": lost(NOW - 8700)})
    tell(wiped, {}, is_held=True)
    assert total(wiped, there).clients == 0
    there.is_steady = False
    assert total(wiped, there).clients == 0


def test_who_does_not_come_back_to_an_engine_that_was_wiped_while_the_other_one_is_away() -> None:
    away, wiped = view(dead=share(20, NOW - 9000)), view(dead=share(20, NOW - 9000))
    tell(wiped, {}, is_held=True)
    assert total(away, wiped).clients == 20
    tell(wiped, {})
    # If the other one answers, it decides.
    assert total(away, wiped).clients == 20
    away.is_away = True
    assert total(away, wiped) == Total(0, 0, NOW, NOW - 9000)


def test_a_hold_does_not_forget_that_a_server_has_left() -> None:
    away, there = (
        view(is_steady=False, dead=share(20, NOW - 9000)),
        view(dead=share(20, NOW - 9000)),
    )
    tell(there, {}, {"dead": left(NOW - 8000)}, is_held=True)
    assert total(away, there).clients == 20, "the hold errs high"
    tell(there, {})
    assert total(away, there) == exact(0, 0)


def test_an_engine_that_comes_back_with_its_data_keeps_who_has_reported_to_it_only() -> None:
    back, there = view(one=share(20, NOW - 9000)), view()
    tell(back, {"one": share(20, NOW - 9000)})
    assert total(back, there).clients == 20
    tell(back, {"one": unproven(19, NOW - 9001)})
    assert total(back, there).clients == 0, "the data are older: they are from a backup"
    tell(back, {"one": share(18, NOW - 100)})
    assert total(back, there) == exact(18, 1, NOW - 100)


def test_who_was_only_in_a_backup_is_not_held() -> None:
    restored = View()
    tell(restored, {"ghost": unproven(50, NOW - 90_000)})
    tell(restored, {"one": share(5)}, is_held=True)
    assert total(restored) == exact(5, 1)


def test_a_server_that_an_engine_misses_without_a_reason_still_counts_by_the_other_one() -> None:
    """The hold of an engine that was wiped has ended before all had reported."""
    wiped, there = view(one=share(5)), view(one=share(5))
    tell(wiped, {})
    assert total(wiped, there) == exact(5, 1)


def test_the_last_servers_that_have_gone_are_remembered_and_those_that_are_needed() -> None:
    there = View()
    for number in range(MAX_ENDS + 2):
        there.note_ends({f"server-{number}": left(number)})
        there.forget_ends({"server-0"})
    assert len(there.ends) == MAX_ENDS
    assert "server-0" in there.ends
    assert "server-1" not in there.ends
    there.note_ends({"new": left(NOW), "newer": left(NOW)})
    assert list(there.ends)[-2:] == ["newer", "new"], "the latest comes first in a reply"
    tell(there, {"new": share(5, NOW + 1)})
    assert "new" not in there.ends


def test_an_engine_that_comes_back_brings_nobody_who_has_left_before_this_agent_came() -> None:
    back, there = View(), View()
    tell(there, {}, {"dead": left(NOW - 5000)})
    tell(back, {"dead": share(20, NOW - 9000)})
    assert total(back, there) == exact(0, 0)


def test_who_left_in_an_earlier_run_may_be_alive_in_a_later_one() -> None:
    first, second, third = View(), View(), view()
    tell(first, {"one": share(5, NOW - 50_000, incarnation="b2")})
    first.is_away = True
    tell(second, {}, {"one": left(NOW - 90_000)})
    tell(third, {}, {"one": lost(NOW - 49_900, "b2")})
    assert total(first, second, third) == Total(0, 0, NOW, NOW - 49_900)
    tell(second, {}, {"one": left(NOW - 49_000, "b2")})
    assert total(first, second, third) == exact(0, 0)


def test_the_age_of_a_doubtful_server_is_that_of_its_last_heartbeat_anywhere() -> None:
    away, there = view(dead=share(20, NOW - 90_000)), View()
    away.is_away = True
    tell(there, {}, {"dead": lost(NOW - 6000)})
    assert total(away, there) == Total(0, 0, NOW, NOW - 6000)


SHARES = st.dictionaries(
    st.sampled_from("abcd"),
    st.builds(
        Share,
        st.integers(0, 9),
        st.integers(1, 9),
        st.sampled_from(["a1", "b2"]),
        st.integers(NOW - 9000, NOW),
        st.booleans(),
    ),
)
ENDS = st.dictionaries(
    st.sampled_from("abcd"),
    st.builds(
        End,
        st.booleans(),
        st.integers(1, 9),
        st.sampled_from(["a1", "b2"]),
        st.integers(NOW - 9000, NOW),
    ),
)
REPLIES = st.lists(st.tuples(SHARES, ENDS, st.booleans()), min_size=1, max_size=3)
Reply = tuple[Mapping[str, Share], Mapping[str, End], bool]


@given(st.lists(st.tuples(st.booleans(), st.booleans(), REPLIES), min_size=1, max_size=3))
def test_whatever_the_engines_say_each_server_counts_at_most_once(
    said: list[tuple[bool, bool, list[Reply]]],
) -> None:
    views = []
    for is_steady, is_away, replies in said:
        each = View()
        each.is_steady, each.is_away = is_steady, is_away
        for listed, gone, is_held in replies:
            tell(each, listed, gone, is_held=is_held)
        views.append(each)
    found = merge(views, LATE, NOW)
    assert found == merge(views[::-1], LATE, NOW), "the order of the engines does not matter"
    known = {key: most(views, key) for each in views for key in (*each.listed, *each.held)}
    assert found.servers <= len(known)
    assert found.clients <= sum(known.values())
    assert found.doubtful <= found.confirmed <= NOW


def most(views: list[View], server_id: str) -> int:
    return max(found.clients for each in views if (found := each.share(server_id)))


GOOD = Sum(True, True, False, servers=3, answered=NOW, clients=30, confirmed=NOW - 300)


@pytest.mark.parametrize(
    "worse",
    [
        GOOD._replace(is_current=False, servers=9, answered=NOW + 1),
        GOOD._replace(is_held=True, servers=9, answered=NOW + 1),
        GOOD._replace(is_steady=False, servers=9, answered=NOW + 1),
        GOOD._replace(servers=2, answered=NOW + 1),
        GOOD._replace(answered=NOW - 1),
    ],
)
def test_of_totals_the_best_is_shown(worse: Sum) -> None:
    worse = worse._replace(clients=99)
    for sums in ([GOOD, worse], [worse, GOOD]):
        assert choose(sums) == exact(30, 2, NOW - 300)
