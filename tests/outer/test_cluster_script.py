"""The heartbeat script on a real Redis: each promise of its header, and a model of it in Python.

The script reads the clock of Redis, which the tests cannot set. But it only uses the time since the
last heartbeat, which it stores in `heartbeat_at`. The tests move that to let time pass without a
sleep.
"""

import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from gserver.cluster.membership import UNKNOWN_SEQUENCE, Heartbeat, Reply
from gserver.cluster.redis_link import HEARTBEAT_SCRIPT, RedisLink
from gserver.config import Config
from lab.redises import Redis, free_port
from lab.running import LIMIT, ROOT, until
from lab.script_model import INTERVAL, TTL, Model

TTL_INTERVALS = TTL // INTERVAL
RECOUNT = 60_000
#: Of a server that knows the clock already, so that its first heartbeat needs no repetition.
LATER_CLOCK = 10**14
MEMBERS, LEASES, STATE = KEYS = RedisLink(
    Config(redis_url="redis://127.0.0.1", cluster_name="test")
).keys


class Cluster:
    """The script on an otherwise empty Redis."""

    def __init__(self, server: Redis) -> None:
        self.server = server
        self.redis: Any = redis.Redis(port=server.port, decode_responses=True)
        self.redis.flushall()
        self.run = self.redis.register_script(HEARTBEAT_SCRIPT)
        self.sequence = 0

    def heartbeat(
        self, server_id: str, clients: int | str, incarnation: str = "a1", **more: Any
    ) -> Reply:
        """Send a heartbeat, which has a later `sequence` than the last one.

        Unless it is given, `acked_sequence` is 1 if `last_clock` is known. The first heartbeat of a
        server is repeated with the clock that it is told.
        """
        self.sequence += 1
        given: dict[str, Any] = {
            "sequence": self.sequence,
            "acked_sequence": int(more.get("last_clock", 0) != 0),
        }
        given |= {"ttl_ms": TTL, "interval_ms": INTERVAL, **more}
        heartbeat = Heartbeat(server_id, incarnation, clients=clients, **given)
        reply = self.send(heartbeat)
        is_first = not heartbeat.acked_sequence and "told_clock" not in more
        if reply.is_late and is_first:
            reply = self.send(heartbeat._replace(told_clock=reply.clock))
        return reply

    def send(self, heartbeat: Heartbeat) -> Reply:
        values: list[Any] = self.run(keys=KEYS, args=heartbeat)
        *numbers, listed, gone = values
        return Reply._make([*numbers, tuple(listed), gone.encode()])

    def elapse(self, milliseconds: int) -> None:
        """Let time pass without heartbeats; negative if the clock of Redis is set back."""
        self.redis.hincrby(STATE, "heartbeat_at", -milliseconds)

    def now(self) -> int:
        """Redis's time at the last heartbeat."""
        return int(self.redis.hget(STATE, "heartbeat_at"))

    def counts(self) -> dict[str, int]:
        return {
            server_id: int(entry.split()[0])
            for server_id, entry in self.redis.hgetall(MEMBERS).items()
        }

    def keys(self) -> list[str]:
        return sorted(self.redis.keys("*"))

    def contents(self) -> dict[str, bytes]:
        """All keys and their values, as DUMP returns them."""
        return {
            key: self.redis.execute_command("DUMP", key, NEVER_DECODE=True) for key in self.keys()
        }


def totals(reply: Reply) -> tuple[int, int]:
    return reply.total_clients, reply.servers


def after_loss(cluster: Cluster, last_clock: int, total_clients: int = 1) -> Reply:
    """The reply to the first server that reports after a loss of data: it has returned, alone."""
    clock = clock_after_loss(cluster, last_clock)
    return Reply(total_clients, 1, 1, clock, clock, "a1", clock + TTL, 1, 0, 0)


def clock_after_loss(cluster: Cluster, last_clock: int) -> int:
    """The start of the lease clock after a loss of data that the last heartbeat found."""
    return max(last_clock + 1, cluster.now())


def restore(cluster: Cluster, contents: dict[str, bytes]) -> None:
    cluster.redis.flushall()
    for key, value in contents.items():
        cluster.redis.restore(key, 0, value)


class Member:
    """A server that remembers the last reply, as gserver does."""

    def __init__(self, cluster: Cluster, server_id: str, incarnation: str = "a1") -> None:
        self._cluster = cluster
        self._server_id, self._incarnation = server_id, incarnation
        self.acked_sequence = self.last_clock = 0

    def heartbeat(self, clients: int | str, *, is_reply_lost: bool = False) -> Reply:
        reply = self._send(clients)
        if reply.is_late:
            reply = self._send(clients, reply.clock)
        if not is_reply_lost:
            self.acked_sequence, self.last_clock = self._cluster.sequence, reply.clock
        return reply

    def _send(self, clients: int | str, told_clock: int = 0) -> Reply:
        return self._cluster.heartbeat(
            self._server_id,
            clients,
            self._incarnation,
            acked_sequence=self.acked_sequence,
            last_clock=self.last_clock,
            told_clock=told_clock,
        )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    with Redis(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def cluster(server: Redis) -> Iterator[Cluster]:
    cluster = Cluster(server)
    with cluster.redis:
        yield cluster


def test_the_first_heartbeat_of_the_first_server_founds_the_cluster(cluster: Cluster) -> None:
    reply, now = cluster.heartbeat("one", 5), cluster.now()
    assert reply == Reply(
        5,
        1,
        returned_servers=0,
        clock=now,
        lost_at=now,
        holder="a1",
        lease_end=now + TTL,
        was_missing=0,
        oldest_lease_end=0,
        is_late=0,
    )
    assert cluster.redis.hgetall(MEMBERS) == {"one": "5 1 a1"}
    assert cluster.redis.zrange(LEASES, 0, -1, withscores=True) == [("one", now + TTL)]


#: Heartbeats: a server, its clients, and in the reply the total and the number of servers.
STORIES = {
    "a new count replaces the old one": "one:5=5/1 one:7=7/1 one:0=0/1",
    "the total is the sum over all servers": "one:1=1/1 two:20=21/2 three:300=321/3 one:2=322/3",
    "a server that leaves is removed": "one:1=1/1 two:20=21/2 two:leave=1/1 one:1=1/1 two:3=4/2",
    "leaving without an entry changes nothing": "one:1=1/1 two:leave=1/1 one:1=1/1",
}


@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES)
def test_each_reply_has_the_total_and_the_number_of_servers(cluster: Cluster, story: str) -> None:
    counts: dict[str, int] = {}
    for server_id, clients, total_clients, servers in re.findall(r"(\w+):(\w+)=(\d+)/(\d+)", story):
        reply = cluster.heartbeat(server_id, clients)
        assert totals(reply) == (int(total_clients), int(servers))
        assert (reply.lease_end == 0) == (clients == "leave")
        counts.pop(server_id, None)
        counts |= {server_id: int(clients)} if clients != "leave" else {}
        assert cluster.counts() == counts
        assert set(cluster.redis.zrange(LEASES, 0, -1)) == set(counts)


def test_a_server_that_was_acknowledged_and_has_no_entry_is_reported_as_missing(
    cluster: Cluster,
) -> None:
    cluster.heartbeat("one", 5)
    last_clock = cluster.heartbeat("two", 7).clock
    cluster.heartbeat("two", "leave")
    missing = []
    for server_id, acked_sequence in (("three", 0), ("one", 1), ("two", 1), ("two", 1)):
        reply = cluster.heartbeat(
            server_id, 1, acked_sequence=acked_sequence, last_clock=last_clock
        )
        missing.append(reply.was_missing)
    assert missing == [0, 0, 1, 0]


def test_a_server_whose_entry_was_deleted_by_hand_is_counted_once_when_it_is_back(
    cluster: Cluster,
) -> None:
    two = Member(cluster, "two")
    cluster.heartbeat("one", 1)
    two.heartbeat(20)
    cluster.redis.hdel(MEMBERS, "two")
    cluster.redis.zrem(LEASES, "two")
    assert totals(two.heartbeat(20)) == totals(cluster.heartbeat("one", 1)) == (21, 2)


def test_how_servers_have_gone_is_kept_the_latest_first(cluster: Cluster) -> None:
    for server_id in ("one", "two", "three"):
        cluster.heartbeat(server_id, 1)
    left_at = cluster.heartbeat("two", "leave").clock
    clock = left_at
    while clock <= left_at + TTL:
        cluster.elapse(INTERVAL)
        clock = cluster.heartbeat("one", 1).clock
    lines = [line.split() for line in cluster.redis.hget(STATE, "gone").splitlines()]
    assert [line[:2] for line in lines] == [["three", "lost"], ["two", "left"]]
    assert int(lines[1][2]) == left_at
    assert [line[3:] for line in lines] == [["3", "a1"], ["4", "a1"]]
    for number in range(700):
        cluster.heartbeat(f"server-{number}", 1)
        cluster.heartbeat(f"server-{number}", "leave")
    lines = cluster.redis.hget(STATE, "gone").splitlines()
    assert lines[0].startswith("server-699 left ")
    assert len(lines) < 700
    assert {len(line.split()) for line in lines} == {5}, "no line is cut"


def test_the_lease_clock_continues_after_the_last_server_has_left(cluster: Cluster) -> None:
    cluster.heartbeat("one", 1)
    cluster.elapse(1000)
    clock = cluster.heartbeat("one", "leave").clock
    assert clock >= 1000
    assert cluster.keys() == [STATE]
    assert cluster.heartbeat("two", 2).clock >= clock


def test_a_silent_server_is_dropped_when_its_lease_ends_and_not_before(cluster: Cluster) -> None:
    lease_end = cluster.heartbeat("dead", 9).lease_end
    replies = []
    for _ in range(TTL_INTERVALS):
        cluster.elapse(INTERVAL)
        replies.append(cluster.heartbeat("one", 1))
    assert [(reply.total_clients, reply.servers) for reply in replies] == [(10, 2)] * (
        TTL_INTERVALS - 1
    ) + [(1, 1)]
    assert replies[-2].clock < lease_end <= replies[-1].clock
    assert cluster.counts() == {"one": 1}
    assert totals(cluster.heartbeat("dead", 9)) == (10, 2)


def test_a_short_ttl_ends_in_real_time(cluster: Cluster) -> None:
    cluster.heartbeat("dead", 9, ttl_ms=200, interval_ms=20)
    before = cluster.now()
    until(
        lambda: cluster.heartbeat("one", 1, ttl_ms=200, interval_ms=20).servers == 1,
        "the dead server is dropped",
    )
    assert cluster.now() - before >= 200


def test_a_server_that_sends_heartbeats_is_never_dropped(cluster: Cluster) -> None:
    for _ in range(20):
        for server_id in ("one", "two"):
            cluster.elapse(INTERVAL)
            reply = cluster.heartbeat(server_id, 1)
    assert reply.servers == 2
    assert reply.clock >= 39 * INTERVAL


def test_one_heartbeat_drops_at_most_500_servers_and_the_next_ones_drop_the_rest(
    cluster: Cluster,
) -> None:
    for number in range(1200):
        cluster.heartbeat(f"dead-{number}", 1)
    cluster.redis.zadd(LEASES, {f"dead-{number}": 0 for number in range(1200)}, xx=True)
    replies = [cluster.heartbeat("one", 5, told_clock=LATER_CLOCK) for _ in range(4)]
    expected = [(701, 705), (201, 205), (1, 5), (1, 5)]
    assert [(reply.servers, reply.total_clients) for reply in replies] == expected
    assert cluster.counts() == {"one": 5}


def test_after_an_outage_of_any_length_no_server_is_dropped_before_it_could_report(
    cluster: Cluster,
) -> None:
    members = ["one", "two", "three"]
    for server_id in members:
        cluster.heartbeat(server_id, 1)
    for members_in_order in (members, members[::-1]):
        cluster.elapse(1000 * TTL)
        for server_id in members_in_order:
            reply = cluster.heartbeat(server_id, 1)
            assert totals(reply) == (3, 3)


def test_the_lease_clock_advances_by_the_time_between_heartbeats(cluster: Cluster) -> None:
    clock, began = cluster.heartbeat("one", 1).clock, cluster.now()
    replies = [cluster.heartbeat("one", 1) for _ in range(300)]
    until(lambda: cluster.heartbeat("one", 1).clock > clock, "the clock advances")
    assert cluster.heartbeat("one", 1).clock - clock == cluster.now() - began
    assert [reply.clock for reply in replies] == sorted(reply.clock for reply in replies)


def test_the_moment_of_a_heartbeat_is_the_time_of_redis(cluster: Cluster) -> None:
    def now() -> int:
        seconds, microseconds = cluster.redis.time()
        return int(seconds * 1000 + microseconds // 1000)

    before = now()
    cluster.heartbeat("one", 1)
    assert before <= cluster.now() <= now()


@pytest.mark.parametrize("pause", [INTERVAL, INTERVAL + 1, TTL, 1000 * TTL])
def test_after_a_pause_the_lease_clock_advances_by_one_interval(
    cluster: Cluster, pause: int
) -> None:
    clock = cluster.heartbeat("one", 1).clock
    cluster.elapse(pause)
    assert cluster.heartbeat("one", 1).clock == clock + INTERVAL


def test_a_reply_counts_the_servers_that_returned_after_a_loss_but_no_new_ones(
    cluster: Cluster,
) -> None:
    for server_id in ("one", "two", "three"):
        last_clock = cluster.heartbeat(server_id, 1).clock
    assert cluster.heartbeat("one", 1, last_clock=last_clock).returned_servers == 0, (
        "no data has been lost yet"
    )
    cluster.redis.flushall()
    replies: list[Reply] = []
    for server_id, given_clock in (
        ("one", last_clock),
        ("two", last_clock),
        ("one", None),
        ("new", 0),
        ("new", None),
        ("three", last_clock),
    ):
        cluster.elapse(1000)
        replies.append(
            cluster.heartbeat(
                server_id, 1, last_clock=replies[-1].clock if given_clock is None else given_clock
            )
        )
    expected = [(1, 1), (2, 2), (2, 2), (3, 2), (3, 2), (4, 3)]
    assert [(reply.servers, reply.returned_servers) for reply in replies] == expected
    assert len({reply.lost_at for reply in replies}) == 1


def test_a_server_that_comes_later_from_the_former_primary_has_returned_too(
    cluster: Cluster,
) -> None:
    one, two = Member(cluster, "one"), Member(cluster, "two")
    one.heartbeat(1)
    two.heartbeat(20)
    cluster.redis.flushall()
    two.last_clock = one.heartbeat(1).lost_at + 1000
    assert two.heartbeat(20).returned_servers == 2


def test_a_return_whose_reply_was_lost_is_counted_once(cluster: Cluster) -> None:
    one = Member(cluster, "one")
    one.heartbeat(1)
    cluster.redis.flushall()
    replies = [one.heartbeat(1, is_reply_lost=True) for _ in range(3)]
    assert [reply.returned_servers for reply in replies] == [1, 1, 1]


@pytest.mark.parametrize("jump", [TTL, 1000 * TTL])
def test_a_clock_of_redis_that_is_set_back_does_not_set_back_the_lease_clock(
    cluster: Cluster, jump: int
) -> None:
    cluster.heartbeat("one", 1)
    cluster.elapse(INTERVAL)
    clock, before = cluster.heartbeat("one", 1).clock, cluster.now()
    cluster.elapse(-jump)
    assert cluster.heartbeat("one", 1).clock == clock
    assert cluster.now() < before + jump, "the time of Redis is stored unchanged"
    cluster.elapse(1000)
    assert clock + 1000 <= cluster.heartbeat("one", 1).clock <= clock + INTERVAL


def test_a_late_heartbeat_changes_nothing(cluster: Cluster) -> None:
    lease_end = cluster.heartbeat("one", 5, sequence=10).lease_end
    cluster.elapse(1000)
    for clients, sequence in ((3, 9), (3, 10), ("leave", 9), ("leave", 10)):
        late = cluster.heartbeat("one", clients, sequence=sequence)
        assert totals(late) == (5, 1)
        assert (late.holder, late.lease_end) == ("a1", lease_end)
    assert cluster.redis.hgetall(MEMBERS) == {"one": "5 10 a1"}
    assert cluster.heartbeat("one", 3, sequence=11).total_clients == 3


@pytest.mark.parametrize("clients", [7, "leave"])
def test_another_incarnation_changes_nothing_while_the_holder_has_an_entry(
    cluster: Cluster, clients: int | str
) -> None:
    founded = cluster.heartbeat("one", 5, incarnation="a1", sequence=10)
    cluster.elapse(1000)
    for replaced_incarnation in ("", "c3"):
        reply = cluster.heartbeat(
            "one", clients, incarnation="b2", sequence=99, replaced_incarnation=replaced_incarnation
        )
        assert totals(reply) == (5, 1)
        assert (reply.holder, reply.lease_end) == ("a1", founded.lease_end)
        assert reply.clock >= founded.clock + 1000
    assert cluster.redis.hgetall(MEMBERS) == {"one": "5 10 a1"}


def test_another_incarnation_sees_the_holder_renew_its_lease(cluster: Cluster) -> None:
    cluster.heartbeat("one", 5)
    first = cluster.heartbeat("one", 0, incarnation="b2").lease_end
    cluster.elapse(1000)
    cluster.heartbeat("one", 5)
    assert cluster.heartbeat("one", 0, incarnation="b2").lease_end >= first + 1000


def test_data_older_than_the_last_acknowledged_heartbeat_of_the_caller_are_discarded(
    cluster: Cluster,
) -> None:
    one = Member(cluster, "one")
    cluster.heartbeat("two", 20)
    one.heartbeat(1)
    assert totals(one.heartbeat(2)) == (22, 2)
    one.acked_sequence += 1
    reply, last_clock = one.heartbeat(3, is_reply_lost=True), one.last_clock
    assert reply == after_loss(cluster, last_clock, 3)
    assert cluster.redis.hgetall(MEMBERS) == {"one": f"3 {cluster.sequence} a1"}


def test_a_heartbeat_whose_reply_was_lost_discards_nothing(cluster: Cluster) -> None:
    one = Member(cluster, "one")
    cluster.heartbeat("two", 20)
    one.heartbeat(1)
    one.heartbeat(2, is_reply_lost=True)
    assert totals(one.heartbeat(3)) == (23, 2)


def test_data_without_an_entry_of_the_caller_whose_lease_cannot_have_ended_are_discarded(
    cluster: Cluster,
) -> None:
    one, two = Member(cluster, "one"), Member(cluster, "two")
    old = two.heartbeat(20)
    backup = cluster.contents()
    joined = one.heartbeat(1)
    restore(cluster, backup)
    # Recent heartbeats: the caller may have joined on the other side of a split.
    assert totals(one.heartbeat("leave", is_reply_lost=True)) == (20, 1)
    cluster.elapse(INTERVAL + 1)
    reply = one.heartbeat(1)
    assert totals(reply) == (1, 1)
    assert reply.lost_at == clock_after_loss(cluster, joined.clock) > old.lost_at
    # The other server learns of that loss, and causes no further one.
    cluster.elapse(1000)
    assert totals(two.heartbeat(20)) == (21, 2)


@pytest.mark.parametrize("intervals", [TTL_INTERVALS, TTL_INTERVALS + 1])
def test_a_caller_without_an_entry_because_its_lease_has_ended_discards_nothing(
    cluster: Cluster, intervals: int
) -> None:
    one = Member(cluster, "one")
    one.heartbeat(1)
    for _ in range(intervals):
        cluster.elapse(INTERVAL)
        cluster.heartbeat("two", 20)
    cluster.elapse(INTERVAL + 1)
    assert totals(one.heartbeat(1)) == (21, 2)


def test_a_late_heartbeat_of_a_dead_server_does_not_bring_it_back(cluster: Cluster) -> None:
    """It may be held up on its way: by a proxy that stalls, say."""
    dead = cluster.heartbeat("dead", 9)
    for _ in range(TTL_INTERVALS + 1):
        cluster.elapse(INTERVAL)
        cluster.heartbeat("one", 1)
    before = cluster.contents()[MEMBERS]
    late = cluster.heartbeat("dead", 9, acked_sequence=1, last_clock=dead.clock)
    assert (totals(late), late.is_late, late.holder, late.lease_end) == ((1, 1), 1, "", 0)
    assert totals(cluster.heartbeat("dead", "leave", last_clock=dead.clock)) == (1, 1)
    assert cluster.contents()[MEMBERS] == before
    assert totals(cluster.heartbeat("one", 1)) == (1, 1)


@pytest.mark.parametrize("acked_sequence", [0, 1])
def test_a_late_heartbeat_of_a_server_that_has_left_does_not_bring_it_back(
    cluster: Cluster, acked_sequence: int
) -> None:
    cluster.heartbeat("one", 1)
    first = cluster.heartbeat("gone", 9, sequence=10)
    cluster.heartbeat("gone", "leave", sequence=12)
    last_clock = first.clock * acked_sequence
    known: dict[str, Any] = {"acked_sequence": acked_sequence, "last_clock": last_clock}
    late = cluster.heartbeat("gone", 9, sequence=11, told_clock=0, **known)
    assert (totals(late), late.is_late, late.lease_end) == ((1, 1), 1, 0)
    # Another run of it counts, and so would a server that is alive after all.
    assert totals(cluster.heartbeat("gone", 9, "b2", sequence=1)) == (10, 2)
    cluster.heartbeat("gone", "leave", "b2", sequence=2)
    assert totals(cluster.heartbeat("gone", 9, sequence=13, **known)) == (10, 2)


@pytest.mark.parametrize("silence", [INTERVAL + 1, 10 * TTL])
def test_a_heartbeat_of_a_server_that_has_left_discards_nothing_after_a_silence(
    cluster: Cluster, silence: int
) -> None:
    cluster.heartbeat("one", 1)
    last_clock = cluster.heartbeat("gone", 9, sequence=10).clock
    cluster.heartbeat("gone", "leave", sequence=12)
    cluster.elapse(silence)
    late = cluster.heartbeat("gone", 9, sequence=11, last_clock=last_clock)
    assert (totals(late), late.is_late) == ((1, 1), 1)


def test_a_server_whose_machine_goes_back_to_an_earlier_state_counts_again(
    cluster: Cluster,
) -> None:
    cluster.heartbeat("one", 1)
    reverted = Member(cluster, "reverted")
    reverted.heartbeat(9)
    cluster.heartbeat("reverted", "leave", sequence=10**6)
    cluster.elapse(10)
    assert totals(reverted.heartbeat(9)) == (10, 2)


def test_a_heartbeat_behind_the_leave_without_an_entry_does_not_bring_its_server_back(
    cluster: Cluster,
) -> None:
    cluster.heartbeat("one", 1)
    last_clock = cluster.heartbeat("gone", 9).clock
    cluster.redis.flushall()
    cluster.heartbeat("one", 1)
    known: dict[str, Any] = {"acked_sequence": 1, "last_clock": last_clock}
    cluster.heartbeat("gone", "leave", sequence=12, **known)
    late = cluster.heartbeat("gone", 9, sequence=11, **known)
    assert (totals(late), late.is_late) == ((1, 1), 1)


@pytest.mark.parametrize("told_behind", [None, TTL, 10 * TTL])
def test_a_first_heartbeat_is_refused_unless_it_was_told_the_clock_within_a_ttl(
    cluster: Cluster, told_behind: int | None
) -> None:
    """A proxy may have held it up, and its server may be dead by now."""
    clock = cluster.heartbeat("one", 1).clock
    told_clock = 0 if told_behind is None else clock - told_behind
    first = cluster.heartbeat("new", 9, told_clock=told_clock)
    assert (totals(first), first.is_late, first.lease_end) == ((1, 1), 1, 0)


def test_the_lease_of_a_repeated_heartbeat_begins_with_the_clock_that_it_was_told(
    cluster: Cluster,
) -> None:
    told = cluster.heartbeat("one", 1)
    for _ in range(3):
        cluster.elapse(INTERVAL)
        cluster.heartbeat("one", 1)
    reply = cluster.heartbeat("new", 9, told_clock=told.clock)
    assert (totals(reply), reply.lease_end) == ((10, 2), told.clock + TTL)


def test_a_clock_from_before_a_loss_does_not_shorten_a_lease(cluster: Cluster) -> None:
    told = cluster.heartbeat("one", 1)
    cluster.redis.flushall()
    cluster.elapse(INTERVAL)
    reply = cluster.heartbeat("new", 9, told_clock=told.clock)
    assert reply.lease_end == reply.clock + TTL


def test_a_heartbeat_that_comes_twice_is_that_of_no_copy(cluster: Cluster) -> None:
    """Over an old and a new connection: a Redis that wakes from a freeze runs both."""
    cluster.heartbeat("one", 5, sequence=10)
    for _ in range(2):
        reply = cluster.heartbeat("one", 7, sequence=11, last_sent_sequence=10)
        assert (reply.holder, totals(reply)) == ("a1", (7, 1))


def test_who_has_left_is_known_to_the_first_server_that_comes_then(cluster: Cluster) -> None:
    """Another Redis, which was away, may still list them."""
    cluster.heartbeat("old", 9)
    cluster.heartbeat("old", "leave")
    assert cluster.heartbeat("new", 1, max_listed=9).gone.startswith(b"old left ")
    assert cluster.heartbeat("new", 1, max_listed=9).gone.startswith(b"old left ")


def test_a_heartbeat_that_was_held_up_renews_the_lease_from_when_it_was_sent(
    cluster: Cluster,
) -> None:
    first = cluster.heartbeat("held-up", 9)
    for _ in range(4):
        cluster.elapse(INTERVAL)
        last = cluster.heartbeat("one", 1)
    reply = cluster.heartbeat("held-up", 7, last_clock=first.clock, last_clock_age_ms=1000)
    assert reply.lease_end == first.clock + 1000 + TTL < last.clock + TTL
    reply = cluster.heartbeat("held-up", 7, last_clock=last.clock, last_clock_age_ms=INTERVAL)
    assert last.clock + TTL <= reply.lease_end == reply.clock + TTL


def test_a_lease_that_began_after_a_loss_does_not_end_by_a_clock_from_before_it(
    cluster: Cluster,
) -> None:
    """The lease clock starts again at the time of Redis, far ahead of one that was paused."""
    known: dict[str, Any] = {"acked_sequence": 1, "last_clock": 1000, "last_clock_age_ms": 500}
    cluster.heartbeat("one", 7, **known)  # Its reply is lost.
    cluster.heartbeat("two", 1)
    reply = cluster.heartbeat("one", 7, **known)
    assert (totals(reply), reply.lease_end) == ((8, 2), reply.clock + TTL)


def one_dropped(cluster: Cluster) -> tuple[Member, Member, Reply]:
    """A server whose lease has ended, one that has reported meanwhile, and its last reply."""
    away, there = Member(cluster, "away"), Member(cluster, "there")
    away.heartbeat(9)
    for _ in range(TTL_INTERVALS + 1):
        cluster.elapse(INTERVAL)
        last = there.heartbeat(1)
    return away, there, last


def test_the_repeated_heartbeat_of_a_server_that_was_dropped_discards_nothing(
    cluster: Cluster,
) -> None:
    away, there, last = one_dropped(cluster)
    cluster.elapse(3 * INTERVAL)
    Member(cluster, "new").heartbeat(30)  # It does not vouch for the data, ...
    there.heartbeat(1)  # ... and this one does.
    reply = away.heartbeat(9)
    assert (totals(reply), reply.lost_at) == ((40, 3), last.lost_at)


def test_a_repeated_heartbeat_that_gets_no_reply_leaves_nothing_to_discard(
    cluster: Cluster,
) -> None:
    away, _, last = one_dropped(cluster)
    assert cluster.heartbeat("away", 9, "a1", last_clock=away.last_clock).is_late
    cluster.elapse(2 * INTERVAL)
    reply = away.heartbeat(9)
    assert (totals(reply), reply.lost_at) == ((10, 2), last.lost_at)


def test_a_server_that_knew_the_data_vouches_for_them_after_a_new_one(cluster: Cluster) -> None:
    one, two = Member(cluster, "one"), Member(cluster, "two")
    old = two.heartbeat(20)
    backup = cluster.contents()
    one.heartbeat(1)
    restore(cluster, backup)
    cluster.elapse(3 * INTERVAL)
    Member(cluster, "new").heartbeat(300)
    two.heartbeat(20)
    # So the caller comes from elsewhere: from the other side of a split, say.
    reply = one.heartbeat(1)
    assert (totals(reply), reply.lost_at) == ((321, 3), old.lost_at)


@pytest.mark.parametrize("is_late", [False, True])
def test_a_heartbeat_that_is_refused_does_not_vouch_for_a_backup(
    cluster: Cluster, is_late: bool
) -> None:
    one, two = Member(cluster, "one"), Member(cluster, "two")
    one.heartbeat(1)
    backup = cluster.contents()
    for _ in range(5):
        cluster.elapse(INTERVAL)
        last = two.heartbeat(20)
    restore(cluster, backup)
    cluster.elapse(6 * INTERVAL)
    if is_late:
        assert cluster.heartbeat("dead", 5, acked_sequence=1, last_clock=1).is_late
    else:
        assert cluster.heartbeat("one", 5, "b2").holder == "a1"
    reply = two.heartbeat(20)
    assert totals(reply) == (20, 1)
    assert reply.lost_at > last.clock


def test_a_live_server_whose_lease_has_ended_is_told_the_clock_and_reports_again(
    cluster: Cluster,
) -> None:
    away = Member(cluster, "away")
    away.heartbeat(9)
    for _ in range(TTL_INTERVALS + 1):
        cluster.elapse(INTERVAL)
        cluster.heartbeat("one", 1)
    reply = away.heartbeat(9)
    assert (totals(reply), reply.is_late, reply.was_missing) == ((10, 2), 0, 1)


@pytest.mark.parametrize("is_in_backup", [False, True])
def test_a_new_server_does_not_vouch_for_a_backup(cluster: Cluster, is_in_backup: bool) -> None:
    """Its heartbeats make the backup look as if it were in use."""
    one = Member(cluster, "one")
    cluster.heartbeat("gone", 50)
    if is_in_backup:
        one.heartbeat(10)
    backup = cluster.contents()
    cluster.heartbeat("gone", "leave")
    for _ in range(5):
        cluster.elapse(INTERVAL)
        last = one.heartbeat(10)
    restore(cluster, backup)
    cluster.elapse(6 * INTERVAL)
    new = Member(cluster, "new")
    for _ in range(3):
        cluster.elapse(INTERVAL // 4)
        assert new.heartbeat(3).total_clients >= 53
    reply = one.heartbeat(10)
    assert (totals(reply), reply.was_missing) == ((10, 1), 1)
    assert reply.lost_at > last.clock
    assert totals(new.heartbeat(3)) == (13, 2)


def test_the_reply_has_the_end_of_the_oldest_lease_of_another_server(cluster: Cluster) -> None:
    assert cluster.heartbeat("one", 1).oldest_lease_end == 0
    one = cluster.heartbeat("one", 1)
    cluster.elapse(1000)
    two = cluster.heartbeat("two", 1)
    assert two.oldest_lease_end == one.lease_end
    cluster.elapse(1000)
    three = cluster.heartbeat("three", 1)
    assert three.oldest_lease_end == one.lease_end
    assert cluster.heartbeat("one", 1).oldest_lease_end == two.lease_end
    assert cluster.heartbeat("two", 1).oldest_lease_end == three.lease_end


def test_the_other_servers_are_listed_if_there_are_few_enough(cluster: Cluster) -> None:
    one = cluster.heartbeat("one", 7, max_listed=1)
    assert one.listed == ()
    two = cluster.heartbeat("two", 20, "b2", max_listed=2, admin_url="http://h/")
    assert [str(each) for each in two.listed] == ["one", str(one.lease_end), "7 1 a1"]
    again = cluster.heartbeat("one", 8, max_listed=2)
    assert [str(each) for each in again.listed] == ["two", str(two.lease_end), "20 2 b2 http://h/"]
    two = cluster.heartbeat("two", "leave", "b2")
    again = cluster.heartbeat("one", 8, max_listed=2)
    assert (again.listed, again.gone) == ((), f"two left {two.clock} 4 b2".encode())
    for known_until, gone in ((two.clock, again.gone), (two.clock + 1, b"")):
        reply = cluster.heartbeat("one", 8, max_listed=2, ends_known_until=known_until)
        assert reply.gone == gone
    for number in range(2):
        cluster.heartbeat(f"more-{number}", 1)
    many = cluster.heartbeat("one", 8, max_listed=2)
    assert (many.listed, many.gone) == ((), again.gone)
    assert cluster.heartbeat("one", 8).gone == b""
    assert cluster.heartbeat("one", 8).listed == ()


@pytest.mark.parametrize("lease", ["inf", "1e300"])
def test_an_invalid_lease_has_no_end(cluster: Cluster, lease: str) -> None:
    cluster.heartbeat("one", 1)
    cluster.heartbeat("two", 1)
    cluster.redis.zadd(LEASES, {"two": lease})
    assert cluster.heartbeat("one", 1).oldest_lease_end == 0


def test_sequence_numbers_of_another_incarnation_say_nothing_about_the_age_of_the_data(
    cluster: Cluster,
) -> None:
    cluster.heartbeat("two", 20)
    cluster.heartbeat("one", 1, "a1", sequence=10)
    for replaced_incarnation, total_clients in (("", 21), ("a1", 22)):
        reply = cluster.heartbeat(
            "one",
            2,
            "b2",
            sequence=99,
            replaced_incarnation=replaced_incarnation,
            acked_sequence=98,
        )
        assert totals(reply) == (total_clients, 2)


TWO = 2 * INTERVAL


@pytest.mark.parametrize(
    ("behind", "pause", "is_outdated"),
    [
        (0, TTL, False),
        (TWO, TTL, False),
        (TWO + 1, TTL, True),
        (TWO + 1, TWO + 1, True),
        (TTL, TWO - 1000, False),
    ],
)
def test_data_whose_clock_is_two_intervals_behind_without_a_heartbeat_for_two_are_discarded(
    cluster: Cluster, behind: int, pause: int, is_outdated: bool
) -> None:
    """With recent heartbeats of others, the caller comes from the other side of a split."""
    cluster.heartbeat("one", 1)
    cluster.elapse(1000)
    clock = cluster.heartbeat("two", 20).clock
    cluster.elapse(pause)
    last_clock = clock + behind
    founded = int(cluster.redis.hget(STATE, "lost_at"))
    reply = cluster.heartbeat("one", 1, last_clock=last_clock)
    assert totals(reply) == ((1, 1) if is_outdated else (21, 2))
    assert reply.lost_at == (clock_after_loss(cluster, last_clock) if is_outdated else founded)
    assert reply.clock == (
        clock_after_loss(cluster, last_clock) if is_outdated else clock + INTERVAL
    )


@pytest.mark.parametrize("last_clock", [0, 7, 10**12, 10**13, 10**14])
def test_without_data_the_clock_begins_after_the_callers_last_clock_and_not_before_redis_time(
    cluster: Cluster, last_clock: int
) -> None:
    reply = cluster.heartbeat("one", 1, last_clock=last_clock)
    clock_at_loss = clock_after_loss(cluster, last_clock)
    expected = (clock_at_loss, clock_at_loss, clock_at_loss + TTL)
    assert (reply.clock, reply.lost_at, reply.lease_end) == expected
    cluster.elapse(1000)
    later = cluster.heartbeat("one", 1, last_clock=clock_at_loss)
    assert later.clock >= clock_at_loss + 1000
    assert later.lost_at == clock_at_loss, "the time of the loss stays until the next loss"


@pytest.mark.parametrize("last_clock", ["-1", "nan", "inf", str(10**15), str(10**300)])
def test_an_impossible_clock_of_a_caller_is_ignored(cluster: Cluster, last_clock: str) -> None:
    cluster.heartbeat("two", 20)
    reply = cluster.heartbeat("one", 5, last_clock=last_clock, acked_sequence=0)
    assert totals(reply) == (25, 2)


def test_a_server_that_returns_late_with_an_older_clock_discards_nothing(cluster: Cluster) -> None:
    late = cluster.heartbeat("late", 300, sequence=1)
    for _ in range(TTL_INTERVALS + 5):
        cluster.elapse(INTERVAL)
        last = cluster.heartbeat("one", 1)
    assert last.servers == 1
    cluster.elapse(TTL)  # Without a heartbeat.
    refused = cluster.heartbeat("late", 300, acked_sequence=1, last_clock=late.clock)
    assert (totals(refused), refused.is_late, refused.holder) == ((1, 1), 1, "")
    reply = cluster.heartbeat(
        "late", 300, acked_sequence=1, last_clock=late.clock, told_clock=refused.clock
    )
    assert (totals(reply), reply.is_late, reply.was_missing) == ((301, 2), 0, 1)
    assert reply.lost_at == late.lost_at
    assert reply.clock >= last.clock


def test_two_losses_in_a_row_have_different_moments(cluster: Cluster) -> None:
    last_clock, losses = cluster.heartbeat("one", 1).clock, []
    for _ in range(4):
        cluster.redis.flushall()
        reply = cluster.heartbeat("one", 1, last_clock=last_clock)
        last_clock = reply.clock
        losses.append(reply.lost_at)
    assert losses == sorted(set(losses))


def test_when_a_new_server_reports_first_after_a_loss_the_others_join_it(cluster: Cluster) -> None:
    one, new = Member(cluster, "one"), Member(cluster, "new")
    first = one.heartbeat(1)
    until(lambda: cluster.heartbeat("one", 1).clock > first.clock, "the clock advances")
    cluster.redis.flushall()
    founded = new.heartbeat(20)
    assert founded.clock == founded.lost_at == cluster.now()
    joined = one.heartbeat(1)
    assert joined.lost_at not in (0, first.lost_at)
    assert joined.returned_servers == 1
    again = new.heartbeat(20)
    assert (totals(again), again.returned_servers) == ((21, 2), 1)


def test_an_old_backup_whose_clock_is_ahead_brings_no_server_back(cluster: Cluster) -> None:
    """The backup's clock continues another server's; the new clock continues this one's."""
    one, dead = Member(cluster, "one"), Member(cluster, "dead")
    one.heartbeat(1)
    for _ in range(4):
        ahead = dead.heartbeat(20).clock
        cluster.elapse(INTERVAL)
    backup = cluster.contents()
    cluster.redis.flushall()
    last_clock = one.heartbeat(1).clock
    assert last_clock + 2 * INTERVAL < ahead
    restore(cluster, backup)
    again = one.heartbeat(1)
    assert totals(again) == (1, 1)
    assert again.lost_at == clock_after_loss(cluster, last_clock)


def test_an_old_backup_without_the_caller_brings_no_server_back(cluster: Cluster) -> None:
    one = Member(cluster, "one")
    cluster.heartbeat("dead", 20)
    backup = cluster.contents()
    for _ in range(4):
        last = one.heartbeat(1)
        cluster.elapse(INTERVAL)
    restore(cluster, backup)
    cluster.elapse(3 * INTERVAL)
    reply = one.heartbeat(1)
    assert totals(reply) == (1, 1)
    assert reply.lost_at == clock_after_loss(cluster, last.clock) > last.lost_at


def test_a_replica_that_lagged_by_one_heartbeat_is_noticed_by_the_acknowledged_server(
    cluster: Cluster,
) -> None:
    one = Member(cluster, "one")
    one.heartbeat(1)
    cluster.heartbeat("two", 20)
    replica = cluster.contents()
    one.heartbeat(1)
    cluster.heartbeat("new", 300)
    restore(cluster, replica)
    assert totals(one.heartbeat(1)) == (1, 1)


@pytest.mark.parametrize(("acked_sequence", "behind"), [(11, 0), (10, 2 * INTERVAL + 1)])
def test_leaving_outdated_data_leaves_nothing_behind(
    cluster: Cluster, acked_sequence: int, behind: int
) -> None:
    cluster.heartbeat("one", 1, sequence=10)
    clock = cluster.heartbeat("dead", 20).clock
    cluster.elapse(TTL)
    last_clock = clock + behind
    reply = cluster.heartbeat(
        "one", "leave", sequence=12, acked_sequence=acked_sequence, last_clock=last_clock
    )
    at_loss = clock_after_loss(cluster, last_clock)
    assert reply == Reply(0, 0, 0, at_loss, at_loss, "", 0, int(acked_sequence > 0), 0, 0)
    assert cluster.keys() == [STATE]
    assert totals(cluster.heartbeat("two", 5, last_clock=clock)) == (5, 1)


def test_an_incarnation_replaces_the_one_that_it_names(cluster: Cluster) -> None:
    cluster.heartbeat("one", 5, incarnation="a1", sequence=10)
    cluster.heartbeat("two", 20)
    reply = cluster.heartbeat("one", 7, incarnation="b2", sequence=1, replaced_incarnation="a1")
    assert totals(reply) == (27, 2)
    assert reply.holder == "b2"
    assert cluster.heartbeat("one", 5, incarnation="a1", sequence=11).holder == "b2"
    assert cluster.counts() == {"one": 7, "two": 20}


JUNK: dict[str, Callable[[Any, str], object]] = {
    "a string": lambda client, key: client.set(key, "x"),
    "a list": lambda client, key: client.rpush(key, "x"),
    "a hash": lambda client, key: client.hset(key, "x", "y"),
    "a sorted set": lambda client, key: client.zadd(key, {"x": 1, "y": 2, "z": 3}),
}


def replace(key: str, junk: str, client: Any) -> None:
    client.delete(key)
    JUNK[junk](client, key)


BAD_ENTRIES = ("", " ", "x", "7", "7 1", "-7 1 a1", "7 1 a1 ", "7 x a1", "1e99 1 a1", "nan", "\0")
#: Damage to the keys by another program, a person or an eviction.
DAMAGE: dict[str, Callable[[Any], object]] = {
    **{f"{key} holds {junk}": partial(replace, key, junk) for key in KEYS for junk in JUNK},
    **{f"{key} is missing": methodcaller("delete", key) for key in KEYS},
    **{
        f"the entry of the caller is {entry!r}": methodcaller("hset", MEMBERS, "one", entry)
        for entry in BAD_ENTRIES
    },
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_data_are_discarded_and_the_cluster_starts_again(
    cluster: Cluster, damage: str
) -> None:
    cluster.heartbeat("one", 1)
    last_clock = cluster.heartbeat("two", 20).clock
    DAMAGE[damage](cluster.redis)
    reply = cluster.heartbeat("one", 1, last_clock=last_clock)
    assert reply == after_loss(cluster, last_clock)
    assert totals(cluster.heartbeat("two", 20)) == (21, 2)
    assert cluster.counts() == {"one": 1, "two": 20}


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("key", KEYS)
def test_junk_before_the_first_heartbeat_is_discarded(
    cluster: Cluster, key: str, junk: str
) -> None:
    JUNK[junk](cluster.redis, key)
    assert totals(cluster.heartbeat("one", 1)) == (1, 1)
    assert totals(cluster.heartbeat("one", 2)) == (2, 1)


@pytest.mark.parametrize("entry", ["", "x", "-7 1 a1", "nan", "\0"])
def test_a_junk_entry_without_a_server_is_dropped_when_its_lease_ends(
    cluster: Cluster, entry: str
) -> None:
    cluster.heartbeat("one", 1)
    cluster.redis.hset(MEMBERS, "junk", entry)
    cluster.redis.zadd(LEASES, {"junk": TTL})
    for _ in range(TTL_INTERVALS + 1):
        cluster.elapse(INTERVAL)
        reply = cluster.heartbeat("one", 1)
    assert totals(reply) == (1, 1)
    assert cluster.counts() == {"one": 1}


@pytest.mark.parametrize("junk", ["x", "", "nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "field", ["total", "clock", "lost_at", "returned", "heartbeat_at", "recount_at"]
)
def test_junk_in_the_state_does_no_harm_after_the_recount(
    cluster: Cluster, field: str, junk: str
) -> None:
    cluster.heartbeat("one", 1)
    cluster.heartbeat("two", 20)
    cluster.redis.hset(STATE, field, junk)
    for server_id, clients in (("one", 1), ("two", 20)):
        cluster.heartbeat(server_id, clients)
    cluster.redis.hset(STATE, "recount_at", cluster.now() - RECOUNT)
    cluster.elapse(1000)
    reply = cluster.heartbeat("one", 1)
    assert totals(reply) == (21, 2)
    assert reply.clock >= reply.lost_at + 1000 >= cluster.now() - TTL


@pytest.mark.parametrize("since", [RECOUNT, 1000 * RECOUNT, -RECOUNT - 30_000])
def test_a_wrong_total_is_corrected_by_a_recount_after_a_minute(
    cluster: Cluster, since: int
) -> None:
    cluster.heartbeat("one", 1)
    cluster.heartbeat("two", 20)
    cluster.redis.hset(STATE, "total", 999)
    assert cluster.heartbeat("one", 2).total_clients == 1000, (
        "the members are not counted at each heartbeat"
    )
    cluster.redis.hset(STATE, "recount_at", cluster.now() - since)
    assert cluster.heartbeat("one", 3).total_clients == 23
    assert int(cluster.redis.hget(STATE, "recount_at")) == cluster.now()
    cluster.redis.hset(STATE, "total", 999)
    assert cluster.heartbeat("one", 3).total_clients == 999, "a recount runs only once a minute"


@pytest.mark.parametrize("junk", ["x", "nan", "inf", "-inf", "1e999"])
def test_a_wrong_total_is_corrected_even_if_the_time_of_the_last_recount_is_junk(
    cluster: Cluster, junk: str
) -> None:
    cluster.heartbeat("one", 1)
    cluster.redis.hset(STATE, mapping={"total": 999, "recount_at": junk})
    assert cluster.heartbeat("one", 2).total_clients == 2


LIES: dict[str, Callable[[Any], object]] = {
    "a lease without an end": lambda client: client.zadd(LEASES, {"ghost": "inf"}),
    "no lease, but one of another id": lambda client: client.zadd(LEASES, {"other": "inf"}),
    "a lease on a clock that was ahead": lambda client: client.zadd(LEASES, {"ghost": 10**14}),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_entry_without_a_server_is_dropped_at_the_recount_at_the_latest(
    cluster: Cluster, lie: str
) -> None:
    cluster.heartbeat("one", 1)
    last_clock = cluster.heartbeat("two", 20).clock
    cluster.redis.hset(MEMBERS, "ghost", "300 1 a1")
    LIES[lie](cluster.redis)
    cluster.redis.hset(STATE, "recount_at", cluster.now() - RECOUNT)
    for server_id, clients in (("one", 1), ("two", 20), ("one", 1)):
        reply = cluster.heartbeat(server_id, clients, last_clock=last_clock)
    assert totals(reply) == (21, 2)
    assert cluster.counts() == {"one": 1, "two": 20}


def test_without_members_the_total_is_zero_whatever_the_state_says(cluster: Cluster) -> None:
    cluster.heartbeat("one", 1)
    cluster.heartbeat("one", "leave")
    cluster.redis.hset(STATE, "total", 999)
    assert cluster.heartbeat("one", 2).total_clients == 2


def test_only_the_state_of_a_cluster_without_servers_expires(cluster: Cluster) -> None:
    """Redis evicts keys that expire before all others, if it evicts any."""
    for clients in (1, 2):
        cluster.heartbeat("one", clients)
        cluster.heartbeat("two", clients)
        cluster.heartbeat("one", "leave")
        assert [cluster.redis.ttl(key) for key in KEYS] == [-1, -1, -1]
        cluster.heartbeat("two", "leave")
        assert cluster.keys() == [STATE]
        assert 86_400 - LIMIT < cluster.redis.ttl(STATE) <= 86_400


def fill(client: Any) -> None:
    for number in range(100):
        client.set(f"other-{number}", "x" * 100_000)


def test_the_keys_survive_a_redis_that_evicts_what_expires(cluster: Cluster) -> None:
    cluster.heartbeat("one", 7)
    try:
        cluster.redis.config_set("maxmemory-policy", "volatile-lru")
        cluster.redis.set("cache", "x" * 500_000, ex=60)
        used = cluster.redis.info("memory")["used_memory"]
        cluster.redis.config_set("maxmemory", used + 300_000)
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            fill(cluster.redis)
        assert not cluster.redis.exists("cache")
        assert set(KEYS) <= set(cluster.keys())
    finally:
        cluster.redis.config_set("maxmemory", 0)
        cluster.redis.config_set("maxmemory-policy", "noeviction")
    assert totals(cluster.heartbeat("two", 1)) == (8, 2)


PREPARE: dict[str, Callable[[Any], object]] = {
    "nothing else": lambda client: None,
    "a lease has ended": lambda client: client.zadd(LEASES, {"two": 0}),
    "a recount is due": lambda client: client.hset(STATE, "recount_at", 0),
    "junk": lambda client: client.set(STATE, "x"),
}
SENDERS: dict[str, tuple[str, int | str, str]] = {
    "a member": ("one", 2, "a1"),
    "a new server": ("new", 2, "a1"),
    "a server that leaves": ("one", "leave", "a1"),
    "another incarnation": ("one", 2, "b2"),
}


#: How Redis is made to refuse writes, how to undo it, and its error.
REFUSALS: dict[str, tuple[Callable[[Redis], None], Callable[[Redis], None], type[Exception]]] = {
    "no memory": (Redis.out_of_memory, Redis.enough_memory, redis.OutOfMemoryError),
    "read only": (Redis.read_only, Redis.writable, redis.ReadOnlyError),
}


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("prepare", PREPARE)
@pytest.mark.parametrize("sender", SENDERS)
def test_without_writes_a_heartbeat_runs_completely_or_changes_nothing(
    cluster: Cluster, sender: str, prepare: str, refusal: str
) -> None:
    begin, end, error = REFUSALS[refusal]
    cluster.heartbeat("one", 1)
    cluster.heartbeat("two", 20)
    PREPARE[prepare](cluster.redis)
    before = cluster.contents()
    begin(cluster.server)
    try:
        reply = cluster.heartbeat(*SENDERS[sender], told_clock=LATER_CLOCK)
    except error:
        assert (refusal, sender) != ("no memory", "a server that leaves"), "leaving needs no memory"
        assert cluster.contents() == before
    else:
        assert refusal == "no memory"
        assert reply.total_clients == sum(cluster.counts().values())
    finally:
        end(cluster.server)
    cluster.heartbeat("one", 1)
    assert cluster.heartbeat("two", 20).total_clients == sum(cluster.counts().values())


def test_without_memory_an_ordinary_heartbeat_is_refused(cluster: Cluster) -> None:
    cluster.heartbeat("one", 1)
    cluster.server.out_of_memory()
    try:
        with pytest.raises(redis.OutOfMemoryError):
            cluster.heartbeat("one", 2)
    finally:
        cluster.server.enough_memory()


INCARNATION = st.sampled_from(["a1", "b2"])
HEARTBEAT = st.builds(
    Heartbeat,
    server_id=st.sampled_from(["one", "two", "three", "four"]),
    incarnation=INCARNATION,
    sequence=st.integers(1, 20),
    clients=st.integers(0, 10**7) | st.just("leave"),
    ttl_ms=st.sampled_from([TTL, TTL * 7 // 10]),
    interval_ms=st.just(INTERVAL),
    replaced_incarnation=st.just("") | INCARNATION,
    acked_sequence=st.integers(0, 20),
    last_clock=st.just(0),
    last_sent_sequence=st.just(UNKNOWN_SEQUENCE),
    admin_url=st.sampled_from(["", "http://h/?a=%d+"]),
    max_listed=st.just(0),
    ends_known_until=st.just(0),
)
AHEAD = [-(10**15), -TTL, 0, 2 * INTERVAL, 2 * INTERVAL + 1, 10 * TTL]
TOLD_BEHIND = [10**15, 10**15, TTL, 1, 0]


class Machine(RuleBasedStateMachine):
    """Any sequence of heartbeats, pauses and losses: script and model agree."""

    cluster: Cluster

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.cluster.redis.flushall()
        self.keep()

    @rule(
        heartbeat=HEARTBEAT, ahead=st.sampled_from(AHEAD), told_behind=st.sampled_from(TOLD_BEHIND)
    )
    def heartbeat(self, heartbeat: Heartbeat, ahead: int, told_behind: int) -> None:
        """Send a heartbeat whose last clock is `ahead` of the clock, or 0 if that is negative.

        It was told a clock that is `told_behind`; likewise.
        """
        last_clock = max(0, self.model.clock + ahead) if self.model.clock else 0
        told_clock = max(0, self.model.clock - told_behind)
        heartbeat = heartbeat._replace(last_clock=last_clock, told_clock=told_clock)
        reply = self.cluster.send(heartbeat)
        assert reply == self.model.apply(heartbeat, self.cluster.now())

    # No preconditions: real time decides whether an entry still exists, and Hypothesis needs
    # repeatable runs.
    @rule(milliseconds=st.sampled_from([-TTL, -1, 1, INTERVAL // 2, INTERVAL, 10 * TTL]))
    def elapse(self, milliseconds: int) -> None:
        if self.model.heartbeat_at is not None:
            self.cluster.elapse(milliseconds)
            self.model.heartbeat_at = self.cluster.now()

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
        if self.model.heartbeat_at is not None:
            self.cluster.redis.hset(STATE, "recount_at", 0)

    @invariant()
    def the_total_is_the_sum_of_the_members(self) -> None:
        if self.model.heartbeat_at is not None:
            counts = self.cluster.counts()
            assert counts == {
                server_id: entry.clients for server_id, entry in self.model.entries.items()
            }
            assert int(self.cluster.redis.hget(STATE, "total")) == sum(counts.values())
            leases = {server_id: entry.lease_end for server_id, entry in self.model.entries.items()}
            assert dict(self.cluster.redis.zrange(LEASES, 0, -1, withscores=True)) == leases


def test_after_any_sequence_the_total_is_the_sum_of_the_members(cluster: Cluster) -> None:
    class ThisMachine(Machine):
        pass

    ThisMachine.cluster = cluster
    run_state_machine_as_test(
        ThisMachine, settings=settings(max_examples=60, stateful_step_count=40)
    )


def test_the_document_names_the_script_and_the_fields_of_its_keys(cluster: Cluster) -> None:
    page = (ROOT / "docs/cluster.md").read_text()
    rows = dict(re.findall(r"^\| `\{gserver:NAME\}:(\w+)` \| [\w ]+ \| (.*) \|$", page, re.M))
    assert set(rows) == {key.rpartition(":")[2] for key in KEYS}
    cluster.heartbeat("one", 1)
    cluster.heartbeat("one", "leave")
    assert set(re.findall(r"`(\w+)`", rows["state"])) == set(cluster.redis.hkeys(STATE))
    assert "`clients sequence incarnation`" in rows["members"]
    (script,) = set(re.findall(r"`(gserver/[\w/]+\.lua)`", page))
    assert (ROOT / script).read_text() == HEARTBEAT_SCRIPT


def test_the_script_runs_on_a_redis_cluster_as_all_keys_are_in_one_slot(tmp_path: Path) -> None:
    with Redis(tmp_path, cluster_enabled="yes", cluster_port=free_port()) as server:
        server.command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        until(
            lambda: "cluster_state:ok" in repr(server.command("CLUSTER", "INFO")),
            "all slots are served",
        )
        with pytest.raises(redis.ResponseError, match="same slot"):
            server.command("MGET", "one", "two")
        link = RedisLink(Config(redis_url=server.url, cluster_name="of.many:parts"))
        assert totals(link.send(Heartbeat("one", "a1", 1, 5, TTL, INTERVAL))) == (5, 1)
        two = Heartbeat("two", "a1", 1, 20, TTL, INTERVAL, told_clock=LATER_CLOCK)
        assert totals(link.send(two)) == (25, 2)
        link.drop()
        keys = server.command("KEYS", "*")
        assert sorted(keys) == [
            f"{{gserver:of.many:parts}}:{name}" for name in ("leases", "members", "state")
        ]
        assert len({server.command("CLUSTER", "KEYSLOT", key) for key in keys}) == 1


def test_a_servers_next_heartbeat_is_not_mistaken_for_a_copys(cluster: Cluster) -> None:
    for sequence, last_sent_sequence, holder in ((10, 9, "a1"), (11, 10, "a1"), (12, 10, "a1*")):
        reply = cluster.heartbeat(
            "one", 5, sequence=sequence, last_sent_sequence=last_sent_sequence
        )
        assert reply.holder == holder
