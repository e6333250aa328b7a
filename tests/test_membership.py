"""What answers to beats mean: each rule alone, and all of them in a simulated cluster with a network full of faults."""

from copy import deepcopy
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gserver.board import SINGLE_CELLS
from gserver.membership import BEAT_ERRORS, STILL_INTERVALS, Membership, Reply, Rivalry
from tests.test_cluster_script import INTERVAL, TTL, Model

#: Of the tables: milliseconds.
TTL_MS = 6000


def reply(total: int, servers: int, clock: int, fresh: int | None = None, was_missing: int = 0) -> Reply:
    return Reply(total, servers, servers if fresh is None else fresh, was_missing, clock, "me", clock + 6000)


def three_of_100(clock: int = 50_000) -> Membership:
    """A server with 5 clients, which knows of two others with 100."""
    membership = Membership(TTL_MS, 0, 0, 0, 0)
    membership.take(reply(105, 3, clock), 5)
    assert (membership.remote, membership.servers, membership.clock) == (100, 3, clock)
    return membership


def test_the_first_answer_is_taken_as_it_is_although_the_server_was_missing() -> None:
    membership = Membership(TTL_MS, 0, 0, 0, 0)
    membership.take(reply(30, 2, 7, was_missing=1), 10)
    assert (membership.remote, membership.servers, membership.clock) == (20, 2, 7)


def test_as_long_as_all_is_well_each_answer_is_taken_as_it_is() -> None:
    membership = three_of_100()
    for total, servers, fresh, remote in ((205, 4, 4, 200), (25, 3, 3, 20), (6, 2, 1, 1), (5, 1, 1, 0)):
        membership.take(reply(total, servers, 50_001, fresh), 5)
        assert (membership.remote, membership.servers) == (remote, servers)


def test_what_is_known_of_others_is_never_less_than_nothing() -> None:
    membership = three_of_100()
    membership.take(reply(3, 3, 50_001), 5)
    assert membership.remote == 0


def test_a_lease_clock_that_stands_still_is_none_that_went_back() -> None:
    membership = three_of_100()
    membership.take(reply(5, 1, 50_000), 5)
    assert (membership.remote, membership.servers) == (0, 1)


def test_when_redis_has_lost_all_the_last_number_stands_until_as_many_are_back() -> None:
    membership = three_of_100()
    membership.take(reply(5, 1, 0, was_missing=1), 5)
    assert (membership.remote, membership.servers, membership.clock) == (100, 3, 0)
    membership.take(reply(45, 2, 500), 5)
    assert (membership.remote, membership.servers, membership.clock) == (100, 3, 500)
    membership.take(reply(85, 3, 1600), 5)
    assert (membership.remote, membership.servers) == (80, 3)
    membership.take(reply(5, 1, 1700), 5)
    assert (membership.remote, membership.servers) == (0, 1), "the hold is over for good"


def test_a_number_that_is_higher_than_the_one_held_is_the_truth_already() -> None:
    membership = three_of_100()
    membership.take(reply(5, 1, 0, was_missing=1), 5)
    membership.take(reply(155, 2, 500), 5)
    assert (membership.remote, membership.servers) == (150, 3)
    membership.take(reply(15, 2, 600), 5)
    assert membership.remote == 100


def test_after_a_ttl_who_is_not_back_is_dead() -> None:
    membership = three_of_100()
    membership.take(reply(5, 1, 0, was_missing=1), 5)
    membership.take(reply(45, 2, 5999), 5)
    assert (membership.remote, membership.servers) == (100, 3)
    membership.take(reply(45, 2, 6000), 5)
    assert (membership.remote, membership.servers) == (40, 2)


def test_an_old_snapshot_is_a_loss_too_and_who_is_only_in_it_has_not_beaten() -> None:
    membership = three_of_100(clock=50_000)
    membership.take(reply(25, 3, 49_000, fresh=1), 5)
    membership.take(reply(65, 3, 50_550, fresh=2), 5)
    assert membership.remote == 100
    membership.take(reply(95, 3, 50_600, fresh=3), 5)
    assert membership.remote == 90


def test_a_server_that_was_dropped_alone_holds_for_a_third_of_the_ttl() -> None:
    membership = three_of_100()
    membership.take(reply(45, 2, 60_000, was_missing=1), 5)
    membership.take(reply(45, 2, 61_999), 5)
    assert (membership.remote, membership.servers) == (100, 3)
    membership.take(reply(45, 2, 62_000), 5)
    assert (membership.remote, membership.servers) == (40, 2)


def test_a_server_that_was_dropped_alone_holds_no_longer_than_until_as_many_are_back() -> None:
    membership = three_of_100()
    membership.take(reply(45, 3, 60_000, was_missing=1), 5)
    assert (membership.remote, membership.servers) == (40, 3)


def test_a_loss_during_a_hold_begins_its_time_anew() -> None:
    membership = three_of_100()
    membership.take(reply(5, 1, 0, was_missing=1), 5)
    membership.take(reply(45, 2, 3000), 5)
    membership.take(reply(5, 1, 0, was_missing=1), 5)
    membership.take(reply(5, 1, 5999), 5)
    assert (membership.remote, membership.servers) == (100, 3)
    membership.take(reply(5, 1, 6000), 5)
    assert (membership.remote, membership.servers) == (0, 1)


def test_a_drop_during_a_hold_does_not_shorten_it() -> None:
    membership = three_of_100()
    membership.take(reply(5, 1, 0, was_missing=1), 5)
    membership.take(reply(5, 1, 500, was_missing=1), 5)
    membership.take(reply(5, 1, 5999), 5)
    assert membership.remote == 100


def test_a_loss_during_a_hold_does_not_take_back_what_was_learned_since() -> None:
    membership = three_of_100()
    membership.take(reply(5, 1, 0, was_missing=1), 5)
    membership.take(reply(155, 2, 500), 5)
    assert membership.remote == 150
    membership.take(reply(5, 1, 0, was_missing=1), 5)
    assert membership.remote == 150


def test_an_agent_that_follows_another_goes_on_from_what_that_one_knew() -> None:
    membership = Membership(TTL_MS, remote=100, servers=3, clock=50_000, hold_until=0)
    assert membership.remote == 100
    membership.take(reply(5, 1, 0, was_missing=1), 5)
    assert (membership.remote, membership.servers, membership.hold_until) == (100, 3, TTL_MS)
    follower = Membership(TTL_MS, membership.remote, membership.servers, membership.clock, membership.hold_until)
    follower.take(reply(5, 1, 5999), 5)
    assert follower.remote == 100
    follower.take(reply(5, 1, 6000), 5)
    assert follower.remote == 0


def test_every_kind_of_error_has_its_cell_on_the_board() -> None:
    assert list(BEAT_ERRORS) == sorted(set(BEAT_ERRORS))
    assert {f"beat_errors.{kind}" for kind in BEAT_ERRORS} <= set(SINGLE_CELLS)


TTL_S, INTERVAL_S = TTL / 1000, INTERVAL / 1000
#: Servers keep an own interval within these parts of the one configured, or a bit more.
PERIODS = st.floats(0.75 * INTERVAL_S, INTERVAL_S)


@dataclass
class Server:
    """A model server of the simulation, whose count only grows while there are faults."""

    name: str
    count: int
    period: float
    next_beat: float
    membership: Membership = field(default_factory=lambda: Membership(TTL, 0, 0, 0, 0))
    is_cut_off: bool = False
    #: Whether others are cut off, whom it may take for dead.
    may_miss_others: bool = False
    #: What it has known before, below which it must not fall.
    least_remote: int = 0


class World:
    """Servers and a Redis, by the clock of the simulation: seconds, of which the script is told the milliseconds."""

    def __init__(self, periods: list[float]) -> None:
        self.script = Model()
        self.now = 100.0
        self.stamp = 0
        self.is_checking = True
        self.servers = [
            Server(f"server-{number}", 10**number, period, self.now + number * period / len(periods))
            for number, period in enumerate(periods)
        ]

    def others(self, server: Server) -> int:
        return sum(other.count for other in self.servers if other is not server)

    def run(self, seconds: float) -> None:
        """Let the servers that reach Redis beat."""
        end = self.now + seconds
        while (server := min(self.servers, key=lambda one: one.next_beat)).next_beat <= end:
            self.now = max(self.now, server.next_beat)
            server.next_beat = self.now + server.period
            if not server.is_cut_off:
                self.stamp += 1
                known = server.membership.clock
                answer = self.script.beat(
                    server.name, server.count, round(self.now * 1000), stamp=self.stamp, known=known
                )
                server.membership.take(answer, server.count)
                if self.is_checking:
                    self.check(server)
        self.now = end

    def check(self, server: Server) -> None:
        """Counts only grow while there are faults: so what a server knows does, too."""
        remote = server.membership.remote
        assert remote <= self.others(server), "nobody sees clients that are not there"
        assert remote >= server.least_remote or server.may_miss_others, "a dip"
        server.least_remote = remote

    def go_away(self, seconds: float) -> None:
        """Redis is away for all. When it is back, each server tries within an interval."""
        self.now += seconds
        for number, server in enumerate(self.servers):
            server.next_beat = max(server.next_beat, self.now + server.period * (number + 1) / len(self.servers))
        self.run(INTERVAL_S)

    def lose(self) -> None:
        """Redis loses its data."""
        self.script.lose_all()

    def restore(self, seconds: float) -> None:
        """Redis comes back with the data that it had before the last so many seconds."""
        snapshot = deepcopy(self.script)
        self.run(seconds)
        self.script = snapshot

    def grow(self, number: int) -> None:
        """A server gets a client, and tells it soon."""
        server = self.servers[number % len(self.servers)]
        server.count += 1
        server.next_beat = min(server.next_beat, self.now + 0.1)

    def be_late(self, number: int, seconds: float) -> None:
        """A server beats after a pause, which is shorter than its lease."""
        self.run(INTERVAL_S)
        server = self.servers[number % len(self.servers)]
        if server.next_beat <= self.now + server.period:  # it is not late already
            server.next_beat += seconds

    def cut_off(self, numbers: set[int], seconds: float) -> None:
        """Redis is away for some, perhaps for longer than their leases, while the others go on."""
        for number, server in enumerate(self.servers):
            server.is_cut_off = number in numbers
            server.may_miss_others = number not in numbers
        self.run(seconds)
        for server in self.servers:
            server.is_cut_off = False
        self.run(2 * INTERVAL_S)
        for server in self.servers:
            server.may_miss_others = False

    def is_exact(self) -> bool:
        return all(
            (server.membership.remote, server.membership.servers) == (self.others(server), len(self.servers))
            for server in self.servers
        )


NUMBER = st.integers(0, 4)
#: What may happen to the simulated cluster while Redis keeps its data: methods of World, and their arguments.
FAULTS = st.one_of(
    st.tuples(st.just(World.run), st.floats(0, INTERVAL_S) | st.floats(0, 2 * TTL_S)),
    st.tuples(st.just(World.go_away), st.floats(0, 100 * TTL_S)),
    st.tuples(st.just(World.grow), NUMBER),
    st.tuples(st.just(World.cut_off), st.sets(NUMBER), st.floats(0, TTL_S / 2) | st.floats(1.2 * TTL_S, 3 * TTL_S)),
    st.tuples(st.just(World.be_late), NUMBER, st.floats(0, TTL_S / 3)),
)
LOSS = st.tuples(st.just(World.lose))
#: The data come back as they were so long ago; nobody can notice less than two intervals.
RESTORE = st.tuples(st.just(World.restore), st.floats(2 * INTERVAL_S, 2 * TTL_S))
PERIODS_OF_ALL = st.lists(PERIODS, min_size=2, max_size=5)


def endure(periods: list[float], faults: list[tuple[Any, ...]]) -> None:
    world = World(periods)
    world.run(2 * INTERVAL_S)
    for fault, *details in faults:
        fault(world, *details)
    world.run(TTL_S + 2 * INTERVAL_S)
    assert world.is_exact(), "all holds are over"
    for number, server in enumerate(world.servers):
        server.count = number
    world.is_checking = False
    world.run(2 * INTERVAL_S)
    assert world.is_exact(), "two intervals after the last change"


@settings(max_examples=400, deadline=None)
@given(periods=PERIODS_OF_ALL, faults=st.lists(FAULTS | LOSS, max_size=20))
@example(periods=[4.5, 4.5], faults=[(World.lose,), (World.run, 2.0), (World.go_away, 58.0)])
def test_whatever_happens_to_redis_no_count_dips_and_all_are_exact_when_it_is_quiet(
    periods: list[float], faults: list[tuple[Any, ...]]
) -> None:
    endure(periods, faults)


@settings(max_examples=200, deadline=None)
@given(periods=PERIODS_OF_ALL, before=st.lists(FAULTS, max_size=8), restore=RESTORE, after=st.lists(FAULTS, max_size=8))
@example(periods=[4.5, 5.0], before=[(World.grow, 0)], restore=(World.restore, 55.0), after=[])
def test_nor_does_a_count_dip_when_redis_comes_back_with_an_old_snapshot(
    periods: list[float], before: list[tuple[Any, ...]], restore: tuple[Any, ...], after: list[tuple[Any, ...]]
) -> None:
    endure(periods, [*before, restore, *after])


def test_a_server_that_dies_is_missed_a_ttl_later_by_all() -> None:
    world = World([INTERVAL_S * 0.8] * 3)
    world.run(2 * INTERVAL_S)
    dead, world.is_checking = world.servers.pop(), False
    world.run(TTL_S - 2 * INTERVAL_S)
    assert [server.membership.servers for server in world.servers] == [3, 3]
    assert [server.membership.remote for server in world.servers] == [10 + dead.count, 1 + dead.count]
    world.run(4 * INTERVAL_S)
    assert world.is_exact()


def held(holder: str, lease: int) -> Reply:
    return Reply(9, 1, 1, 1, 0, holder, lease)


#: The beat interval, and how long a lease must stand still.
BEAT = 0.5
STILL = STILL_INTERVALS * BEAT


@pytest.mark.parametrize("holder", ["", "mine"])
def test_who_holds_his_id_himself_or_finds_it_free_has_no_rival(holder: str) -> None:
    rivalry = Rivalry(BEAT)
    for number in range(10):
        assert not rivalry.watch(held(holder, number), "mine", number * BEAT)
        assert rivalry.replaceable == ""


def test_a_lease_that_was_renewed_twice_is_that_of_a_live_twin() -> None:
    rivalry = Rivalry(BEAT)
    assert [rivalry.watch(held("other", lease), "mine", lease * 0.1) for lease in (1, 1, 2, 2, 3, 3)] == [
        False, False, False, False, True, True,
    ]  # fmt: skip
    assert rivalry.replaceable == ""


def test_one_renewal_may_be_a_late_beat_of_a_dead_one_which_can_then_be_replaced() -> None:
    rivalry = Rivalry(BEAT)
    assert not rivalry.watch(held("other", 1), "mine", 0.0)
    assert not rivalry.watch(held("other", 2), "mine", 0.1)
    assert not rivalry.watch(held("other", 2), "mine", 0.1 + STILL)
    assert rivalry.replaceable == "other"


def test_a_lease_that_stands_still_is_that_of_a_dead_one() -> None:
    rivalry = Rivalry(BEAT)
    for moment, replaceable in ((0.0, ""), (STILL / 2, ""), (STILL - 0.01, ""), (STILL, "other"), (STILL + 1, "other")):
        assert not rivalry.watch(held("other", 1), "mine", 100 + moment)
        assert rivalry.replaceable == replaceable


def test_a_renewal_begins_the_wait_anew() -> None:
    rivalry = Rivalry(BEAT)
    for moment, lease, replaceable in ((0.0, 1, ""), (STILL - 0.01, 2, ""), (STILL, 2, ""), (2 * STILL, 2, "other")):
        assert not rivalry.watch(held("other", lease), "mine", moment)
        assert rivalry.replaceable == replaceable


def test_once_the_dead_one_is_replaced_nobody_is_to_be_replaced() -> None:
    rivalry = Rivalry(BEAT)
    for moment, holder in ((0.0, "other"), (STILL, "other"), (STILL, "mine")):
        assert not rivalry.watch(held(holder, 1), "mine", moment)
    assert rivalry.replaceable == ""


def test_another_holder_is_watched_from_the_beginning() -> None:
    rivalry = Rivalry(BEAT)
    for moment, holder, lease in ((0.0, "one", 1), (0.1, "one", 2), (0.2, "two", 3), (0.3, "two", 4)):
        assert not rivalry.watch(held(holder, lease), "mine", moment)
    assert not rivalry.watch(held("two", 4), "mine", 0.3 + STILL - 0.01)
    assert rivalry.replaceable == ""
    assert not rivalry.watch(held("two", 4), "mine", 0.3 + STILL)
    assert rivalry.replaceable == "two"


def test_a_holder_that_has_left_and_come_back_is_watched_from_the_beginning() -> None:
    rivalry = Rivalry(BEAT)
    for lease, holder in ((1, "one"), (2, "one"), (0, ""), (3, "one"), (4, "one")):
        assert not rivalry.watch(held(holder, lease), "mine", 0.1 * lease)
    assert rivalry.watch(held("one", 5), "mine", 0.5)


@given(
    pauses=st.lists(st.floats(0.75 * BEAT, 0.95 * BEAT), min_size=20, max_size=20),
    watches=st.lists(st.floats(0.1 * BEAT, 0.35 * BEAT), min_size=20, max_size=60),
    last_beat=st.none() | st.integers(0, 1),
)
def test_a_live_twin_is_found_and_never_replaced_a_dead_one_is_replaced_and_never_taken_for_alive(
    pauses: list[float], watches: list[float], last_beat: int | None
) -> None:
    """The holder beats with these pauses, but dies before one of them if `last_beat` is given."""
    beats = list(accumulate(pauses))[:last_beat]
    rivalry = Rivalry(BEAT)
    has_twin, replaceable, moment = False, "", 0.0
    for watch in [*watches, *[0.25 * BEAT] * 20]:
        has_twin = has_twin or rivalry.watch(held("other", sum(beat <= moment for beat in beats)), "mine", moment)
        replaceable = replaceable or rivalry.replaceable
        moment = min(moment + watch, beats[-1]) if last_beat is None else moment + watch
    assert (has_twin, replaceable) == ((True, "") if last_beat is None else (False, "other"))
