"""Deadlines by ticks: none is missed, none comes early, and stale entries do not stay."""

from dataclasses import dataclass
from math import inf
from random import Random

from gserver.serve.deadlines import TICKS_PER_SECOND, Deadlines


@dataclass(eq=False)
class Thing:
    deadline: float = inf


def test_a_deadline_that_is_over_comes_at_most_a_tick_late() -> None:
    seed = Random().randrange(1 << 32)
    print(f"seed {seed}")  # noqa: T201 (pytest shows it if the test fails)
    chance, deadlines = Random(seed), Deadlines[Thing]()
    things = [Thing() for _ in range(50)]
    now = 1000.0
    for _ in range(3000):
        thing = chance.choice(things)
        thing.deadline = chance.choice((inf, now + chance.random(), now - chance.random()))
        if thing.deadline < inf:
            deadlines.add(thing)
        now += chance.random() / 100
        if chance.random() < 0.3:
            late = [each for each in things if each.deadline <= now - 1 / TICKS_PER_SECOND]
            due = deadlines.pop(now)
            assert all(each.deadline <= now for each in due)
            assert set(late) <= set(due)
            for each in due:
                each.deadline = inf
        if chance.random() < 0.01:
            deadlines.drop_stale()
            assert deadlines.entries <= sum(each.deadline < inf for each in things) + 50
    assert all(each.deadline > now - 1 for each in things if each.deadline < inf)


def test_the_next_moment_is_that_of_the_first_tick() -> None:
    deadlines = Deadlines[Thing]()
    assert deadlines.next_at == inf
    for at in (5.0, 3.0, 4.0):
        deadlines.add(Thing(at))
    assert 3.0 <= deadlines.next_at <= 3.0 + 1.5 / TICKS_PER_SECOND
    assert [thing.deadline for thing in deadlines.pop(4.5)] == [3.0, 4.0]
    assert deadlines.next_at >= 5.0


def test_stale_entries_are_dropped() -> None:
    deadlines = Deadlines[Thing]()
    thing, other = Thing(), Thing(7.0)
    deadlines.add(other)
    for number in range(1000):
        thing.deadline = 5 + number / 100
        deadlines.add(thing)
    deadlines.drop_stale()
    assert deadlines.entries == 2
    thing.deadline = inf
    deadlines.drop_stale()
    assert deadlines.pop(100.0) == [other]
