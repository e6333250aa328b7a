"""Deadlines by ticks: none is missed, none is early, and stale entries are dropped."""

from dataclasses import dataclass
from math import inf
from random import Random

from gserver.serve.deadlines import MIN_ENTRIES, TICKS_PER_SECOND, Deadlines


@dataclass(eq=False)
class Thing:
    deadline: float = inf


def test_all_expired_deadlines_are_returned_and_no_others() -> None:
    seed = Random().randrange(1 << 32)
    print(f"seed {seed}")  # noqa: T201 (pytest shows it if the test fails)
    chance, deadlines = Random(seed), Deadlines[Thing]()
    things = [Thing() for _ in range(50)]
    now = 1000.0
    for _ in range(3000):
        thing = chance.choice(things)
        at = chance.choice((inf, now + chance.random(), now - chance.random()))
        if at < inf:
            deadlines.put(thing, at)
            assert at <= thing.deadline <= at + 1.01 / TICKS_PER_SECOND
        else:
            thing.deadline = inf
        now += chance.random() / 100
        if chance.random() < 0.3:
            late = {each for each in things if each.deadline <= now}
            due = deadlines.pop(now)
            assert set(due) == late
            for each in due:
                each.deadline = inf
    left = {each for each in things if each.deadline < inf}
    assert set(deadlines.pop(now + 3)) == left


def test_deadlines_of_one_tick_share_a_number_with_one_entry_per_client() -> None:
    deadlines, things = Deadlines[Thing](), [Thing() for _ in range(10)]
    for number, thing in enumerate(things):
        deadlines.put(thing, 5.0 + number / 10_000)
        deadlines.put(thing, 5.0)
    assert len({id(thing.deadline) for thing in things}) == 1
    assert deadlines.entries == 10


def test_many_deadlines_are_rarely_scanned() -> None:
    deadlines, looks_at = Deadlines[Thing](), set()
    for _ in range(16 * MIN_ENTRIES):
        deadlines.put(Thing(), 5.0)
        looks_at.add(deadlines._max_entries)
    assert looks_at == {MIN_ENTRIES * times for times in (1, 2, 4, 8, 16, 32)}


def test_the_order_is_kept_when_stale_entries_are_dropped() -> None:
    chance, deadlines, things = Random(1), Deadlines[Thing](), [Thing() for _ in range(100)]
    for _ in range(MIN_ENTRIES):
        deadlines.put(chance.choice(things), chance.uniform(1.0, 9.0))
    assert deadlines.entries < MIN_ENTRIES
    moments = []
    for _ in range(1000):
        moments += [thing.deadline for thing in deadlines.pop(deadlines.next_at)]
        if deadlines.next_at == inf:
            break
    assert set(moments) == {thing.deadline for thing in things}
    assert moments == sorted(moments)


def test_the_next_wakeup_is_at_the_first_tick() -> None:
    deadlines = Deadlines[Thing]()
    assert deadlines.next_at == inf
    for at in (5.0, 3.0, 4.0):
        deadlines.put(Thing(), at)
    assert 3.0 <= deadlines.next_at <= 3.0 + 1.5 / TICKS_PER_SECOND
    assert deadlines.pop(3.0) == []
    assert [thing.deadline for thing in deadlines.pop(deadlines.next_at)] == [3.01]
    assert [thing.deadline for thing in deadlines.pop(4.5)] == [4.01]
    assert deadlines.next_at >= 5.0


def test_stale_entries_and_entries_of_one_tick_do_not_pile_up() -> None:
    deadlines, others = Deadlines[Thing](), [Thing() for _ in range(2000)]
    for other in others:
        deadlines.put(other, 700.0)
    thing, again = Thing(), Thing()
    for number in range(20_000):
        deadlines.put(thing, 5 + number / 100)
        deadlines.put(again, 600.0)
        again.deadline = inf
        assert deadlines.entries <= 2 * 2001 + MIN_ENTRIES
    deadlines.put(again, 600.0)
    assert set(deadlines.pop(650.0)) == {thing, again}
    assert deadlines.pop(701.0) == others
    assert deadlines.entries == 0
