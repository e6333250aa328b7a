"""The script of a beat, run as it is on a real Redis: each promise of its header, and a model of it
in Python.

Its clock is that of Redis, which the tests cannot set. But the script only looks at how long ago
the last beat was, and writes into `beat_at` what it has taken for now: by moving that, time passes
without a sleep.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from gserver.cluster.membership import Reply
from gserver.cluster.redis_link import SCRIPT, RedisLink
from gserver.config import Config
from tests.redises import Redis, free_port
from tests.running import until

#: So long that no lease is over because a machine is slow. An interval is all that a beat moves the
#: clock.
TTL, INTERVAL = 60_000, 6000
TTL_INTERVALS = TTL // INTERVAL
RECOUNT = 60_000
MEMBERS, LEASES, STATE = KEYS = RedisLink(
    Config(redis_url="redis://127.0.0.1", cluster_name="test")
).keys


@dataclass
class Entry:
    count: int
    stamp: int
    incarnation: str
    until: int


class Model:
    """What the script does, in Python, with the time given: for clusters in whose keys nobody else
    writes.
    """

    def __init__(self) -> None:
        self.lose_all()

    def lose_all(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.clock = self.lost_at = 0
        self.back: list[str] = []
        self.beat_at: int | None = None

    def beat(
        self,
        member: str,
        count: int | str,
        now: int,
        incarnation: str = "a1",
        stamp: int = 0,
        replaced: str = "",
        answered: int = 0,
        known: int = 0,
        ttl: int = TTL,
    ) -> Reply:
        before = self.entries.get(member)
        is_older = (
            before is not None and before.incarnation == incarnation and answered > before.stamp
        )
        # It was told so lately that it was a member that its lease cannot be over.
        is_gone = (
            before is None and answered > 0 and known >= self.lost_at and self.clock - known < ttl
        )
        is_older |= is_gone and self.beat_at is not None and now - self.beat_at > INTERVAL
        if (
            self.beat_at is None
            or is_older
            or min(known - self.clock, now - self.beat_at) > 2 * INTERVAL
        ):
            self.lose_all()
            self.clock = self.lost_at = max(known + 1, now)
            before = None
        if self.beat_at is not None:
            self.clock += max(0, min(now - self.beat_at, INTERVAL))
        self.beat_at = now
        holder = before.incarnation if before else ""
        is_mine, was_missing = holder == incarnation, before is None and answered > 0
        if not before or holder == replaced or (is_mine and stamp > before.stamp):
            if count == "leave":
                self.entries.pop(member, None)
            else:
                if was_missing:
                    self.back.append(incarnation)
                self.entries[member] = Entry(int(count), stamp, incarnation, self.clock + ttl)
                holder = incarnation
        self.entries = {
            name: entry for name, entry in self.entries.items() if entry.until > self.clock
        }
        total = sum(entry.count for entry in self.entries.values())
        lease = self.entries[member].until if member in self.entries else 0
        holder = holder if lease else ""
        return Reply(
            total,
            len(self.entries),
            len(self.back),
            self.clock,
            self.lost_at,
            holder,
            lease,
            int(was_missing),
        )


class Cluster:
    """The script on a Redis that is otherwise empty."""

    def __init__(self, server: Redis) -> None:
        self.server = server
        self.redis: Any = redis.Redis(port=server.port, decode_responses=True)
        self.redis.flushall()
        self.run = self.redis.register_script(SCRIPT)
        self.stamp = 0

    def beat(
        self,
        member: str,
        count: int | str,
        incarnation: str = "a1",
        stamp: int | None = None,
        replaced: str = "",
        times: tuple[int, int] = (TTL, INTERVAL),
        answered: int | None = None,
        known: int = 0,
    ) -> Reply:
        """Who knows of the clock has been answered before, with its first beat if nothing else is
        said.
        """
        self.stamp += 1
        stamp = self.stamp if stamp is None else stamp
        answered = int(known > 0) if answered is None else answered
        arguments = [member, incarnation, stamp, count, *times, replaced, answered, known]
        return Reply(*self.run(keys=KEYS, args=arguments))

    def elapse(self, milliseconds: int) -> None:
        """Let time pass in which nobody beats; less than none for a clock of Redis that was set
        back.
        """
        self.redis.hincrby(STATE, "beat_at", -milliseconds)

    def now(self) -> int:
        """What the last beat took for the time."""
        return int(self.redis.hget(STATE, "beat_at"))

    def counts(self) -> dict[str, int]:
        return {
            member: int(entry.split()[0]) for member, entry in self.redis.hgetall(MEMBERS).items()
        }

    def keys(self) -> list[str]:
        return sorted(self.redis.keys("*"))

    def contents(self) -> dict[str, bytes]:
        """All that is stored, in Redis' own form."""
        return {
            key: self.redis.execute_command("DUMP", key, NEVER_DECODE=True) for key in self.keys()
        }


def anew(cluster: Cluster, known: int) -> int:
    """Where the lease clock begins after a loss of data that a beat with this knowledge has noticed
    just now.
    """
    return max(known + 1, cluster.now())


def seen(reply: Reply) -> tuple[int, int]:
    return reply.total, reply.servers


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    with Redis(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def cluster(server: Redis) -> Iterator[Cluster]:
    cluster = Cluster(server)
    with cluster.redis:
        yield cluster


def test_the_first_beat_of_the_first_server_founds_the_cluster(cluster: Cluster) -> None:
    reply, now = cluster.beat("one", 5), cluster.now()
    assert reply == Reply(
        5, 1, back=0, clock=now, lost_at=now, holder="a1", lease=now + TTL, was_missing=0
    )
    assert cluster.redis.hgetall(MEMBERS) == {"one": "5 1 a1"}
    assert cluster.redis.zrange(LEASES, 0, -1, withscores=True) == [("one", now + TTL)]


def test_a_server_that_is_there_is_not_missing_and_its_new_count_replaces_the_old(
    cluster: Cluster,
) -> None:
    cluster.beat("one", 5)
    second, third = cluster.beat("one", 7), cluster.beat("one", 0)
    assert seen(second) == (7, 1)
    assert seen(third) == (0, 1)


def test_a_server_that_had_been_answered_and_is_there_no_more_is_told_so(cluster: Cluster) -> None:
    cluster.beat("one", 5)
    known = cluster.beat("two", 7).clock
    cluster.beat("two", "leave")
    told = [cluster.beat(member, 1, answered=answered, known=known).was_missing for member, answered in
            (("three", 0), ("one", 1), ("two", 1), ("two", 1))]  # fmt: skip
    assert told == [0, 0, 1, 0]


def test_each_server_is_told_the_total_and_the_number_of_all(cluster: Cluster) -> None:
    replies = [
        cluster.beat(member, count)
        for member, count in (("one", 1), ("two", 20), ("three", 300), ("one", 2))
    ]
    assert [seen(reply) for reply in replies] == [(1, 1), (21, 2), (321, 3), (322, 3)]


def test_who_leaves_is_gone_at_once_with_its_clients(cluster: Cluster) -> None:
    cluster.beat("one", 1)
    cluster.beat("two", 20)
    left = cluster.beat("two", "leave")
    assert (left.total, left.servers, left.lease) == (1, 1, 0)
    assert cluster.counts() == {"one": 1}
    assert cluster.redis.zrange(LEASES, 0, -1) == ["one"]
    assert seen(cluster.beat("two", 3)) == (4, 2)


def test_who_was_taken_out_by_somebody_else_is_counted_once_when_it_is_back(
    cluster: Cluster,
) -> None:
    cluster.beat("one", 1)
    known = cluster.beat("two", 20).clock
    cluster.redis.hdel(MEMBERS, "two")
    cluster.redis.zrem(LEASES, "two")
    assert seen(cluster.beat("two", 20, answered=1, known=known)) == (21, 2)
    assert seen(cluster.beat("one", 1)) == (21, 2)


def test_who_leaves_without_being_there_changes_nothing(cluster: Cluster) -> None:
    cluster.beat("one", 1)
    assert seen(cluster.beat("two", "leave")) == (1, 1)
    assert cluster.counts() == {"one": 1}


def test_the_clock_goes_on_from_where_it_was_after_the_last_server_has_left(
    cluster: Cluster,
) -> None:
    cluster.beat("one", 1)
    cluster.elapse(1000)
    clock = cluster.beat("one", "leave").clock
    assert clock >= 1000
    assert cluster.keys() == [STATE]
    assert cluster.beat("two", 2).clock >= clock


def test_a_server_that_beats_no_more_is_dropped_when_its_lease_is_over_and_not_before(
    cluster: Cluster,
) -> None:
    lease = cluster.beat("dead", 9).lease
    replies = []
    for _ in range(TTL_INTERVALS):
        cluster.elapse(INTERVAL)
        replies.append(cluster.beat("one", 1))
    assert [(reply.total, reply.servers) for reply in replies] == [(10, 2)] * (
        TTL_INTERVALS - 1
    ) + [(1, 1)]
    assert replies[-2].clock < lease <= replies[-1].clock
    assert cluster.counts() == {"one": 1}
    assert seen(cluster.beat("dead", 9)) == (10, 2)


def test_a_short_ttl_is_over_in_real_time(cluster: Cluster) -> None:
    cluster.beat("dead", 9, times=(200, 20))
    before = cluster.now()
    until(lambda: cluster.beat("one", 1, times=(200, 20)).servers == 1, "the dead one is dropped")
    assert cluster.now() - before >= 200


def test_a_server_that_beats_is_never_dropped(cluster: Cluster) -> None:
    for _ in range(20):
        for member in ("one", "two"):
            cluster.elapse(INTERVAL)
            reply = cluster.beat(member, 1)
    assert reply.servers == 2
    assert reply.clock >= 39 * INTERVAL


def test_at_most_500_are_dropped_at_once_and_the_rest_by_the_next_beats(cluster: Cluster) -> None:
    for number in range(1200):
        cluster.beat(f"dead-{number}", 1)
    cluster.redis.zadd(LEASES, {f"dead-{number}": 0 for number in range(1200)}, xx=True)
    replies = [cluster.beat("one", 5) for _ in range(4)]
    assert [(reply.servers, reply.total) for reply in replies] == [
        (701, 705),
        (201, 205),
        (1, 5),
        (1, 5),
    ]
    assert cluster.counts() == {"one": 5}


def test_after_an_outage_of_any_length_nobody_is_dropped_before_it_could_beat(
    cluster: Cluster,
) -> None:
    members = ["one", "two", "three"]
    for member in members:
        cluster.beat(member, 1)
    for members_in_order in (members, members[::-1]):
        cluster.elapse(1000 * TTL)
        for member in members_in_order:
            reply = cluster.beat(member, 1)
            assert seen(reply) == (3, 3)


def test_the_clock_runs_as_the_time_between_beats_does(cluster: Cluster) -> None:
    clock, began = cluster.beat("one", 1).clock, cluster.now()
    replies = [cluster.beat("one", 1) for _ in range(300)]
    until(lambda: cluster.beat("one", 1).clock > clock, "the clock goes on")
    assert cluster.beat("one", 1).clock - clock == cluster.now() - began
    assert [reply.clock for reply in replies] == sorted(reply.clock for reply in replies)


@pytest.mark.parametrize("pause", [INTERVAL, INTERVAL + 1, TTL, 1000 * TTL])
def test_after_a_pause_the_clock_is_moved_on_by_one_interval(cluster: Cluster, pause: int) -> None:
    clock = cluster.beat("one", 1).clock
    cluster.elapse(pause)
    assert cluster.beat("one", 1).clock == clock + INTERVAL


def test_it_is_told_how_many_are_back_since_data_was_lost_and_newcomers_are_not_counted(
    cluster: Cluster,
) -> None:
    for member in ("one", "two", "three"):
        known = cluster.beat(member, 1).clock
    assert cluster.beat("one", 1, known=known).back == 0, "nothing was lost yet"
    cluster.redis.flushall()
    replies: list[Reply] = []
    for member, told in (
        ("one", known),
        ("two", known),
        ("one", None),
        ("new", 0),
        ("new", None),
        ("three", known),
    ):
        cluster.elapse(1000)
        replies.append(cluster.beat(member, 1, known=replies[-1].clock if told is None else told))
    assert [(reply.servers, reply.back) for reply in replies] == [
        (1, 1),
        (2, 2),
        (2, 2),
        (3, 2),
        (3, 2),
        (4, 3),
    ]
    assert len({reply.lost_at for reply in replies}) == 1


def test_who_comes_over_later_from_the_primary_before_is_back_too(cluster: Cluster) -> None:
    known = cluster.beat("one", 1).clock
    cluster.beat("two", 20)
    cluster.redis.flushall()
    reply = cluster.beat("one", 1, known=known)
    assert (
        cluster.beat("two", 20, answered=1, known=reply.lost_at + 1000).back == reply.back + 1 == 2
    )


def test_a_return_whose_answer_was_lost_is_counted_once(cluster: Cluster) -> None:
    known = cluster.beat("one", 1).clock
    cluster.redis.flushall()
    assert [cluster.beat("one", 1, known=known).back for _ in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("jump", [TTL, 1000 * TTL])
def test_a_clock_of_redis_that_was_set_back_does_not_turn_the_lease_clock(
    cluster: Cluster, jump: int
) -> None:
    cluster.beat("one", 1)
    cluster.elapse(INTERVAL)
    clock, before = cluster.beat("one", 1).clock, cluster.now()
    cluster.elapse(-jump)
    assert cluster.beat("one", 1).clock == clock
    assert cluster.now() < before + jump, "Redis' time was taken as it is"
    cluster.elapse(1000)
    assert clock + 1000 <= cluster.beat("one", 1).clock <= clock + INTERVAL


def test_a_beat_that_was_overtaken_undoes_nothing(cluster: Cluster) -> None:
    lease = cluster.beat("one", 5, stamp=10).lease
    cluster.elapse(1000)
    for count, stamp in ((3, 9), (3, 10), ("leave", 9), ("leave", 10)):
        late = cluster.beat("one", count, stamp=stamp)
        assert seen(late) == (5, 1)
        assert (late.holder, late.lease) == ("a1", lease)
    assert cluster.redis.hgetall(MEMBERS) == {"one": "5 10 a1"}
    assert cluster.beat("one", 3, stamp=11).total == 3


@pytest.mark.parametrize("count", [7, "leave"])
def test_another_incarnation_changes_nothing_while_the_holder_is_there(
    cluster: Cluster, count: int | str
) -> None:
    founded = cluster.beat("one", 5, incarnation="a1", stamp=10)
    cluster.elapse(1000)
    for replaced in ("", "c3"):
        reply = cluster.beat("one", count, incarnation="b2", stamp=99, replaced=replaced)
        assert seen(reply) == (5, 1)
        assert (reply.holder, reply.lease) == ("a1", founded.lease)
        assert reply.clock >= founded.clock + 1000
    assert cluster.redis.hgetall(MEMBERS) == {"one": "5 10 a1"}


def test_a_watcher_sees_the_lease_of_the_holder_move(cluster: Cluster) -> None:
    cluster.beat("one", 5)
    first = cluster.beat("one", 0, incarnation="b2").lease
    cluster.elapse(1000)
    cluster.beat("one", 5)
    assert cluster.beat("one", 0, incarnation="b2").lease >= first + 1000


def test_data_with_an_older_beat_of_the_caller_than_one_that_was_answered_are_as_good_as_none(
    cluster: Cluster,
) -> None:
    cluster.beat("two", 20)
    known = cluster.beat("one", 1, stamp=10).clock
    assert seen(cluster.beat("one", 2, stamp=12, answered=10, known=known)) == (22, 2)
    reply = cluster.beat("one", 3, stamp=14, answered=13, known=known)
    began = anew(cluster, known)
    assert reply == Reply(3, 1, 1, began, began, "a1", began + TTL, 1)
    assert cluster.redis.hgetall(MEMBERS) == {"one": "3 14 a1"}


def test_a_beat_that_was_carried_out_but_not_answered_is_no_reason_to_drop_anything(
    cluster: Cluster,
) -> None:
    cluster.beat("two", 20)
    cluster.beat("one", 1, stamp=10)
    cluster.beat("one", 2, stamp=11, answered=10)
    assert seen(cluster.beat("one", 3, stamp=12, answered=10)) == (23, 2)


def test_data_in_which_the_caller_is_missing_though_its_lease_cannot_be_over_are_as_good_as_none(
    cluster: Cluster,
) -> None:
    old = cluster.beat("two", 20)
    backup = cluster.contents()
    joined = cluster.beat("one", 1, stamp=10)
    restore(cluster, backup)
    # Where others beat, it may have joined on the other side of a split.
    assert seen(cluster.beat("one", "leave", stamp=11, answered=10, known=joined.clock)) == (20, 1)
    cluster.elapse(INTERVAL + 1)
    reply = cluster.beat("one", 1, stamp=12, answered=10, known=joined.clock)
    assert seen(reply) == (1, 1)
    assert reply.lost_at == anew(cluster, joined.clock) > old.lost_at
    # The other one learns of that loss, and causes no other.
    cluster.elapse(1000)
    assert seen(cluster.beat("two", 20, stamp=13, answered=1, known=old.clock)) == (21, 2)


def test_who_is_missing_since_its_lease_is_over_drops_nothing(cluster: Cluster) -> None:
    known = cluster.beat("one", 1, stamp=10).clock
    for _ in range(TTL_INTERVALS + 1):
        cluster.elapse(INTERVAL)
        cluster.beat("two", 20)
    assert seen(cluster.beat("one", 1, stamp=11, answered=10, known=known)) == (21, 2)


def test_the_stamps_of_another_incarnation_say_nothing_of_the_age_of_the_data(
    cluster: Cluster,
) -> None:
    cluster.beat("two", 20)
    cluster.beat("one", 1, incarnation="a1", stamp=10)
    assert seen(cluster.beat("one", 2, incarnation="b2", stamp=99, answered=98)) == (21, 2)
    assert seen(cluster.beat("one", 2, incarnation="b2", stamp=99, answered=98, replaced="a1")) == (
        22,
        2,
    )


TWO = 2 * INTERVAL


@pytest.mark.parametrize(
    ("behind", "pause", "is_older"),
    [
        (0, TTL, False),
        (TWO, TTL, False),
        (TWO + 1, TTL, True),
        (TWO + 1, TWO + 1, True),
        (TTL, TWO - 1000, False),
    ],
)
def test_data_whose_clock_is_two_intervals_behind_and_in_which_nobody_has_beaten_for_two_are_as_good_as_none(
    cluster: Cluster, behind: int, pause: int, is_older: bool
) -> None:
    """Where others beat, it is the caller who comes from elsewhere: from the other side of a split."""
    cluster.beat("one", 1)
    cluster.elapse(1000)
    clock = cluster.beat("two", 20).clock
    cluster.elapse(pause)
    known = clock + behind
    founded = int(cluster.redis.hget(STATE, "lost_at"))
    reply = cluster.beat("one", 1, known=known)
    assert seen(reply) == ((1, 1) if is_older else (21, 2))
    assert reply.lost_at == (anew(cluster, known) if is_older else founded)
    assert reply.clock == (anew(cluster, known) if is_older else clock + INTERVAL)


@pytest.mark.parametrize("known", [0, 7, 10**12, 10**13, 10**14])
def test_where_nothing_is_the_clock_begins_after_what_the_caller_knew_and_not_before_redis_time(
    cluster: Cluster, known: int
) -> None:
    reply = cluster.beat("one", 1, known=known)
    began = anew(cluster, known)
    assert (reply.clock, reply.lost_at, reply.lease) == (began, began, began + TTL)
    cluster.elapse(1000)
    later = cluster.beat("one", 1, known=began)
    assert later.clock >= began + 1000
    assert later.lost_at == began, "it tells of the loss as long as there is no other"


@pytest.mark.parametrize("known", ["-1", "nan", "inf", str(10**15), str(10**300)])
def test_a_clock_that_cannot_be_is_not_taken_from_a_caller(cluster: Cluster, known: str) -> None:
    cluster.beat("two", 20)
    arguments: list[Any] = ["one", "a1", 1, 5, TTL, INTERVAL, "", 0, known]
    assert seen(Reply(*cluster.run(keys=KEYS, args=arguments))) == (25, 2)


def test_who_returns_late_and_knows_only_an_older_clock_drops_nothing(cluster: Cluster) -> None:
    late = cluster.beat("late", 300, stamp=1)
    for _ in range(TTL_INTERVALS + 5):
        cluster.elapse(INTERVAL)
        last = cluster.beat("one", 1)
    assert last.servers == 1
    cluster.elapse(TTL)  # And nobody has beaten for a while.
    reply = cluster.beat("late", 300, answered=1, known=late.clock)
    assert seen(reply) == (301, 2)
    assert reply.lost_at == late.lost_at
    assert reply.clock >= last.clock


def test_two_losses_in_a_row_are_told_apart(cluster: Cluster) -> None:
    known, told = cluster.beat("one", 1).clock, []
    for _ in range(4):
        cluster.redis.flushall()
        reply = cluster.beat("one", 1, known=known)
        known = reply.clock
        told.append(reply.lost_at)
    assert told == sorted(set(told))


def test_when_a_newcomer_beats_first_after_a_loss_the_others_join_it(cluster: Cluster) -> None:
    known, founded = (
        cluster.beat("one", 1, stamp=10).clock,
        int(cluster.redis.hget(STATE, "lost_at")),
    )
    until(lambda: cluster.beat("one", 1, stamp=10).clock > known, "the clock goes on")
    cluster.redis.flushall()
    new = cluster.beat("new", 20, stamp=20)
    assert new.clock == new.lost_at == cluster.now()
    back = cluster.beat("one", 1, stamp=11, answered=10, known=known)
    assert back.lost_at not in (0, founded)
    assert back.back == 1
    again = cluster.beat("new", 20, stamp=21, answered=20, known=new.clock)
    assert (seen(again), again.back) == ((21, 2), 1)


def restore(cluster: Cluster, contents: dict[str, bytes]) -> None:
    cluster.redis.flushall()
    for key, value in contents.items():
        cluster.redis.restore(key, 0, value)


def test_an_old_backup_whose_clock_is_ahead_brings_nobody_back(cluster: Cluster) -> None:
    """The clock went on in it from what another server knew, and then anew from what this one does."""
    known = cluster.beat("one", 1, stamp=10).clock
    cluster.beat("dead", 20, known=known)
    for _ in range(3):
        cluster.elapse(INTERVAL)
        ahead = cluster.beat("dead", 20).clock
    backup = cluster.contents()
    cluster.redis.flushall()
    reply = cluster.beat("one", 1, stamp=11, answered=10, known=known)
    assert reply.clock + 2 * INTERVAL < ahead
    restore(cluster, backup)
    again = cluster.beat("one", 1, stamp=12, answered=11, known=reply.clock)
    assert seen(again) == (1, 1)
    assert again.lost_at == anew(cluster, reply.clock)


def test_an_old_backup_in_which_the_caller_is_not_brings_nobody_back(cluster: Cluster) -> None:
    cluster.beat("dead", 20)
    backup = cluster.contents()
    cluster.beat("one", 1)
    for _ in range(3):
        cluster.elapse(INTERVAL)
        last = cluster.beat("one", 1, stamp=10)
    restore(cluster, backup)
    cluster.elapse(3 * INTERVAL)
    reply = cluster.beat("one", 1, stamp=11, answered=10, known=last.clock)
    assert seen(reply) == (1, 1)
    assert reply.lost_at == anew(cluster, last.clock) > last.lost_at


def test_a_replica_that_lagged_by_one_beat_is_noticed_by_the_server_that_was_told_more(
    cluster: Cluster,
) -> None:
    cluster.beat("one", 1, stamp=10)
    cluster.beat("two", 20)
    replica = cluster.contents()
    known = cluster.beat("one", 1, stamp=11, answered=10).clock
    cluster.beat("new", 300)
    restore(cluster, replica)
    assert seen(cluster.beat("one", 1, stamp=12, answered=11, known=known)) == (1, 1)


@pytest.mark.parametrize(("answered", "behind"), [(11, 0), (10, 2 * INTERVAL + 1)])
def test_who_leaves_where_the_data_are_older_leaves_nothing_behind(
    cluster: Cluster, answered: int, behind: int
) -> None:
    cluster.beat("one", 1, stamp=10)
    clock = cluster.beat("dead", 20).clock
    cluster.elapse(TTL)
    known = clock + behind
    reply = cluster.beat("one", "leave", stamp=12, answered=answered, known=known)
    assert reply == Reply(
        0, 0, 0, anew(cluster, known), anew(cluster, known), "", 0, int(answered > 0)
    )
    assert cluster.keys() == [STATE]
    assert seen(cluster.beat("two", 5, known=clock)) == (5, 1)


def test_an_incarnation_takes_the_place_of_the_one_it_names(cluster: Cluster) -> None:
    cluster.beat("one", 5, incarnation="a1", stamp=10)
    cluster.beat("two", 20)
    reply = cluster.beat("one", 7, incarnation="b2", stamp=1, replaced="a1")
    assert seen(reply) == (27, 2)
    assert reply.holder == "b2"
    assert cluster.beat("one", 5, incarnation="a1", stamp=11).holder == "b2"
    assert cluster.counts() == {"one": 7, "two": 20}


JUNK: dict[str, Callable[[Any, str], object]] = {
    "a string": lambda client, key: client.set(key, "x"),
    "a list": lambda client, key: client.rpush(key, "x"),
    "a hash": lambda client, key: client.hset(key, "x", "y"),
    "a sorted set": lambda client, key: client.zadd(key, {"x": 1, "y": 2, "z": 3}),
}


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("key", KEYS)
def test_keys_that_are_somebody_elses_are_as_good_as_none(
    cluster: Cluster, key: str, junk: str
) -> None:
    cluster.beat("one", 1)
    known = cluster.beat("two", 20).clock
    cluster.redis.delete(key)
    JUNK[junk](cluster.redis, key)
    reply = cluster.beat("one", 1, known=known)
    began = anew(cluster, known)
    assert reply == Reply(1, 1, 1, began, began, "a1", began + TTL, 1)
    assert seen(cluster.beat("two", 20)) == (21, 2)
    assert cluster.counts() == {"one": 1, "two": 20}


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("key", KEYS)
def test_junk_where_no_cluster_was_is_in_nobodys_way(cluster: Cluster, key: str, junk: str) -> None:
    JUNK[junk](cluster.redis, key)
    assert seen(cluster.beat("one", 1)) == (1, 1)
    assert seen(cluster.beat("one", 2)) == (2, 1)


@pytest.mark.parametrize("key", KEYS)
def test_when_one_key_was_evicted_all_begin_anew(cluster: Cluster, key: str) -> None:
    for member, count in (("one", 1), ("two", 20), ("three", 300)):
        cluster.beat(member, count)
    known = cluster.beat("one", 1).clock
    assert cluster.redis.delete(key) == 1
    reply = cluster.beat("two", 20, known=known)
    began = anew(cluster, known)
    assert reply == Reply(20, 1, 1, began, began, "a1", began + TTL, 1)
    assert seen(cluster.beat("one", 1)) == (21, 2)


@pytest.mark.parametrize(
    "entry", ["", " ", "x", "7", "7 1", "-7 1 a1", "7 1 a1 ", "7 x a1", "1e99 1 a1", "nan", "\0"]
)
def test_when_the_own_entry_is_junk_all_begin_anew(cluster: Cluster, entry: str) -> None:
    cluster.beat("one", 1)
    known = cluster.beat("two", 20).clock
    cluster.redis.hset(MEMBERS, "one", entry)
    reply = cluster.beat("one", 1, known=known)
    began = anew(cluster, known)
    assert reply == Reply(1, 1, 1, began, began, "a1", began + TTL, 1)
    assert seen(cluster.beat("two", 20)) == (21, 2)


@pytest.mark.parametrize("entry", ["", "x", "-7 1 a1", "nan", "\0"])
def test_an_entry_that_is_junk_and_nobodys_is_dropped_when_its_lease_is_over(
    cluster: Cluster, entry: str
) -> None:
    cluster.beat("one", 1)
    cluster.redis.hset(MEMBERS, "junk", entry)
    cluster.redis.zadd(LEASES, {"junk": TTL})
    for _ in range(TTL_INTERVALS + 1):
        cluster.elapse(INTERVAL)
        reply = cluster.beat("one", 1)
    assert seen(reply) == (1, 1)
    assert cluster.counts() == {"one": 1}


@pytest.mark.parametrize("junk", ["x", "", "nan", "inf", "-inf"])
@pytest.mark.parametrize("field", ["total", "clock", "lost_at", "back", "beat_at", "recount_at"])
def test_junk_in_the_state_does_no_harm_for_longer_than_until_the_recount(
    cluster: Cluster, field: str, junk: str
) -> None:
    cluster.beat("one", 1)
    cluster.beat("two", 20)
    cluster.redis.hset(STATE, field, junk)
    for member, count in (("one", 1), ("two", 20)):
        cluster.beat(member, count)
    cluster.redis.hset(STATE, "recount_at", cluster.now() - RECOUNT)
    cluster.elapse(1000)
    reply = cluster.beat("one", 1)
    assert seen(reply) == (21, 2)
    assert reply.clock >= reply.lost_at + 1000 >= cluster.now() - TTL


@pytest.mark.parametrize("since", [RECOUNT, 1000 * RECOUNT, -RECOUNT - 30_000])
def test_a_wrong_total_is_put_right_by_a_recount_after_a_minute(
    cluster: Cluster, since: int
) -> None:
    cluster.beat("one", 1)
    cluster.beat("two", 20)
    cluster.redis.hset(STATE, "total", 999)
    assert cluster.beat("one", 2).total == 1000, "the members are not counted at each beat"
    cluster.redis.hset(STATE, "recount_at", cluster.now() - since)
    assert cluster.beat("one", 3).total == 23
    assert int(cluster.redis.hget(STATE, "recount_at")) == cluster.now()
    cluster.redis.hset(STATE, "total", 999)
    assert cluster.beat("one", 3).total == 999, "only once a minute"


@pytest.mark.parametrize("junk", ["x", "nan", "inf", "-inf", "1e999"])
def test_a_wrong_total_is_put_right_whatever_the_state_says_of_the_last_recount(
    cluster: Cluster, junk: str
) -> None:
    cluster.beat("one", 1)
    cluster.redis.hset(STATE, mapping={"total": 999, "recount_at": junk})
    assert cluster.beat("one", 2).total == 2


LIES: dict[str, Callable[[Any], object]] = {
    "a lease for ever": lambda client: client.zadd(LEASES, {"ghost": "inf"}),
    "no lease, but another one too many": lambda client: client.zadd(LEASES, {"other": "inf"}),
    "a lease of a clock that was ahead": lambda client: client.zadd(LEASES, {"ghost": 10**14}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_is_none_is_dropped_at_the_recount_at_the_latest(
    cluster: Cluster, lie: str
) -> None:
    cluster.beat("one", 1)
    known = cluster.beat("two", 20).clock
    cluster.redis.hset(MEMBERS, "ghost", "300 1 a1")
    LIES[lie](cluster.redis)
    cluster.redis.hset(STATE, "recount_at", cluster.now() - RECOUNT)
    for member, count in (("one", 1), ("two", 20), ("one", 1)):
        reply = cluster.beat(member, count, known=known)
    assert seen(reply) == (21, 2)
    assert cluster.counts() == {"one": 1, "two": 20}


def test_where_nobody_is_the_total_is_nothing_whatever_the_state_says(cluster: Cluster) -> None:
    cluster.beat("one", 1)
    cluster.beat("one", "leave")
    cluster.redis.hset(STATE, "total", 999)
    assert cluster.beat("one", 2).total == 2


def test_the_first_beat_and_each_recount_let_the_keys_live_for_a_day(cluster: Cluster) -> None:
    cluster.beat("one", 1)
    assert all(86_400 - 3000 < cluster.redis.ttl(key) <= 86_400 for key in KEYS)
    for _ in range(2):
        for key in KEYS:
            cluster.redis.expire(key, 3000)
        cluster.redis.hincrby(STATE, "recount_at", -RECOUNT)
        cluster.beat("one", 1)
        assert all(86_400 - 3000 < cluster.redis.ttl(key) <= 86_400 for key in KEYS)


PREPARE: dict[str, Callable[[Any], object]] = {
    "nothing else": lambda client: None,
    "a lease over": lambda client: client.zadd(LEASES, {"two": 0}),
    "a recount due": lambda client: client.hset(STATE, "recount_at", 0),
    "junk": lambda client: client.set(STATE, "x"),
}
SENDERS: dict[str, tuple[str, int | str, str]] = {
    "a member": ("one", 2, "a1"),
    "a newcomer": ("new", 2, "a1"),
    "one that leaves": ("one", "leave", "a1"),
    "a stranger": ("one", 2, "b2"),
}


@pytest.mark.parametrize("prepare", PREPARE)
@pytest.mark.parametrize("sender", SENDERS)
def test_without_memory_a_beat_is_carried_out_whole_or_changes_nothing(
    cluster: Cluster, sender: str, prepare: str
) -> None:
    member, count, incarnation = SENDERS[sender]
    cluster.beat("one", 1)
    cluster.beat("two", 20)
    PREPARE[prepare](cluster.redis)
    before = cluster.contents()
    cluster.server.out_of_memory()
    try:
        total = cluster.beat(member, count, incarnation).total
    except redis.OutOfMemoryError:
        assert sender != "one that leaves", "there is always memory for having less"
        assert cluster.contents() == before
    else:
        assert total == sum(cluster.counts().values())
    finally:
        cluster.server.enough_memory()
    cluster.beat("one", 1)
    assert cluster.beat("two", 20).total == sum(cluster.counts().values())


def test_without_memory_an_ordinary_beat_is_refused(cluster: Cluster) -> None:
    cluster.beat("one", 1)
    cluster.server.out_of_memory()
    try:
        with pytest.raises(redis.OutOfMemoryError):
            cluster.beat("one", 2)
    finally:
        cluster.server.enough_memory()


@pytest.mark.parametrize("prepare", PREPARE)
@pytest.mark.parametrize("sender", SENDERS)
def test_a_redis_that_may_not_write_changes_nothing(
    cluster: Cluster, sender: str, prepare: str
) -> None:
    member, count, incarnation = SENDERS[sender]
    cluster.beat("one", 1)
    cluster.beat("two", 20)
    PREPARE[prepare](cluster.redis)
    before = cluster.contents()
    cluster.server.read_only()
    try:
        with pytest.raises(redis.ReadOnlyError):
            cluster.beat(member, count, incarnation)
        assert cluster.contents() == before
    finally:
        cluster.server.writable()


MEMBER = st.sampled_from(["one", "two", "three", "four"])
INCARNATION = st.sampled_from(["a1", "b2"])


class Machine(RuleBasedStateMachine):
    """Any sequence of beats, pauses and losses: the script and the model stay the same."""

    cluster: Cluster

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.cluster.redis.flushall()
        self.keep()

    @rule(
        member=MEMBER,
        count=st.integers(0, 10**7) | st.just("leave"),
        incarnation=INCARNATION,
        stamp=st.integers(1, 20),
        replaced=st.just("") | INCARNATION,
        answered=st.integers(0, 20),
        ttl=st.sampled_from([TTL, TTL * 7 // 10]),
        ahead=st.sampled_from([-(10**15), -TTL, 0, 2 * INTERVAL, 2 * INTERVAL + 1, 10 * TTL]),
    )
    def beat(
        self,
        member: str,
        count: int | str,
        incarnation: str,
        stamp: int,
        replaced: str,
        answered: int,
        ttl: int,
        ahead: int,
    ) -> None:
        """A server beats that knew the clock to be so far ahead of where it is (or nothing, if that
        is less).
        """
        known = max(0, self.model.clock + ahead) if self.model.clock else 0
        reply = self.cluster.beat(
            member, count, incarnation, stamp, replaced, (ttl, INTERVAL), answered, known
        )
        now = self.cluster.now()
        assert reply == self.model.beat(
            member, count, now, incarnation, stamp, replaced, answered, known, ttl
        )

    # No preconditions: real time decides whether an entry is still there, and Hypothesis wants runs
    # that it can repeat.
    @rule(milliseconds=st.sampled_from([-TTL, -1, 1, INTERVAL // 2, INTERVAL, 10 * TTL]))
    def elapse(self, milliseconds: int) -> None:
        if self.model.beat_at is not None:
            self.cluster.elapse(milliseconds)
            self.model.beat_at = self.cluster.now()

    @rule(key=st.sampled_from(KEYS))
    def lose(self, key: str) -> None:
        if self.model.entries:
            self.cluster.redis.delete(key)
            self.model.lose_all()

    @rule()
    def keep(self) -> None:
        self.kept = (self.cluster.contents(), deepcopy(self.model))

    @rule()
    def come_back_with_what_was_kept(self) -> None:
        contents, model = self.kept
        restore(self.cluster, contents)
        self.model = deepcopy(model)

    @rule()
    def recount(self) -> None:
        if self.model.beat_at is not None:
            self.cluster.redis.hset(STATE, "recount_at", 0)

    @invariant()
    def the_total_is_the_sum_of_the_members(self) -> None:
        if self.model.beat_at is not None:
            counts = self.cluster.counts()
            assert counts == {member: entry.count for member, entry in self.model.entries.items()}
            assert int(self.cluster.redis.hget(STATE, "total")) == sum(counts.values())
            leases = {member: entry.until for member, entry in self.model.entries.items()}
            assert dict(self.cluster.redis.zrange(LEASES, 0, -1, withscores=True)) == leases


def test_after_any_sequence_the_total_is_the_sum_of_the_members(cluster: Cluster) -> None:
    class ThisMachine(Machine):
        pass

    ThisMachine.cluster = cluster
    run_state_machine_as_test(
        ThisMachine, settings=settings(max_examples=60, stateful_step_count=40, deadline=None)
    )


def test_the_script_is_short() -> None:
    assert len(SCRIPT.splitlines()) < 65


def test_it_runs_on_a_redis_cluster_where_all_its_keys_are_in_one_slot(tmp_path: Path) -> None:
    with Redis(tmp_path, cluster_enabled="yes", cluster_port=free_port()) as server:
        server.command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        until(
            lambda: "cluster_state:ok" in repr(server.command("CLUSTER", "INFO")),
            "all slots are served",
        )
        with pytest.raises(redis.ResponseError, match="same slot"):
            server.command("MGET", "one", "two")
        link = RedisLink(Config(redis_url=server.url, cluster_name="of.many:parts"))
        assert seen(link.call("one", "a1", 1, 5, TTL, INTERVAL, "", 0, 0)) == (5, 1)
        assert seen(link.call("two", "a1", 1, 20, TTL, INTERVAL, "", 0, 0)) == (25, 2)
        link.drop()
        keys = server.command("KEYS", "*")
        assert sorted(keys) == [
            f"{{gserver:of.many:parts}}:{name}" for name in ("leases", "members", "state")
        ]
        assert len({server.command("CLUSTER", "KEYSLOT", key) for key in keys}) == 1
