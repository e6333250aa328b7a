"""The history of the figures: rows of a second and of ten, kept over agents, for an hour."""

from itertools import pairwise
from typing import Any

from gserver.agent.history import History
from gserver.metrics import HISTORY_COLUMNS, METRICS
from gserver.protocol import ERROR_REPLIES, FAILURES
from gserver.scoreboard import BUCKETS_OFFSET, Scoreboard

START = 1_800_000_000


def rows(scoreboard: Scoreboard, part: str, now: float) -> list[dict[str, int]]:
    document = History(scoreboard).document(now)
    assert document["columns"] == HISTORY_COLUMNS
    return [dict(zip(HISTORY_COLUMNS, row, strict=True)) for row in document[part]]


def add(scoreboard: Scoreboard, name: str, count: int) -> None:
    scoreboard.cells[scoreboard.cell(name, 0)] += count


def test_a_row_has_what_happened_in_its_second() -> None:
    scoreboard = Scoreboard.create(2)
    history = History(scoreboard)
    first = scoreboard.command_cell("WHO", 0)
    history.note(scoreboard.totals(), START + 0.2)
    add(scoreboard, "clients", 7)
    scoreboard.cells[first] += 10
    scoreboard.cells[first + BUCKETS_OFFSET] += 9  # up to 5 us
    scoreboard.cells[first + BUCKETS_OFFSET + 4] += 1  # up to 100 us
    add(scoreboard, "error_replies.unknown_command", 3)
    add(scoreboard, "error_replies.internal", 2)
    add(scoreboard, "error_replies.too_many_clients", 1)
    history.note(scoreboard.totals(), START + 1.2)
    scoreboard.put("cluster_updated_at", 1)
    scoreboard.put("remote_clients", 5)
    history.note(scoreboard.totals(), START + 2.2)
    one, two = rows(scoreboard, "seconds", START + 2.3)
    assert one | {"p50_us": 3, "p99_us": 90} == {
        "at_ms": (START + 1) * 1000 + 200,
        "clients": 7,
        "cluster_clients": -1,
        "commands": 10,
        "mistakes": 3,
        "failures": 3,
        "rejected": 1,
        "p50_us": 3,
        "p99_us": 90,
        "age_ms": -1,
    }
    assert 2 <= one["p50_us"] <= 5
    assert 50 < one["p99_us"] <= 100
    assert (two["commands"], two["mistakes"], two["p50_us"]) == (0, 0, -1)
    assert two["cluster_clients"] == 12
    assert two["age_ms"] > 0


def test_sums_are_those_of_the_last_seconds() -> None:
    scoreboard = Scoreboard.create(1)
    history = History(scoreboard)
    for second in range(100):
        add(scoreboard, "error_replies.too_many_clients", 1)
        add(scoreboard, "error_replies.idle", 2)
        history.note(scoreboard.totals(), START + second)
    expected = {"mistakes": 120, "failures": 60, "rejected": 60}
    assert history.sums(60, START + 99) == expected
    assert history.sums(60, START + 99 + 1000) == dict.fromkeys(expected, 0)


def test_the_last_five_minutes_are_kept_by_the_second_and_the_hour_by_ten() -> None:
    scoreboard = Scoreboard.create(1)
    history = History(scoreboard)
    for second in range(2 * 3600):
        if second == 5000:  # A new agent goes on.
            history = History(scoreboard)
            history.note(scoreboard.totals(), START + second - 0.5)
        add(scoreboard, "error_replies.idle", 1)
        history.note(scoreboard.totals(), START + second)
    now = START + 2 * 3600 - 1
    seconds = rows(scoreboard, "seconds", now)
    assert [row["at_ms"] for row in seconds] == [1000 * at for at in range(now - 299, now + 1)]
    assert {row["mistakes"] for row in seconds} == {1}
    tens = rows(scoreboard, "tens", now)
    assert len(tens) == 360
    assert all(later["at_ms"] - earlier["at_ms"] == 10_000 for earlier, later in pairwise(tens))
    assert {row["mistakes"] for row in tens} <= {10, 9, 1}


def test_after_a_step_of_the_clock_rows_are_written_again() -> None:
    scoreboard = Scoreboard.create(1)
    history = History(scoreboard)
    for at in (3610, 3611, 3612, 11, 12, 13):
        history.note(scoreboard.totals(), START + at)
    assert [row["at_ms"] // 1000 - START for row in rows(scoreboard, "seconds", START + 13)] == [
        *(11, 12, 13)
    ]


def test_failures_are_those_errors_for_which_no_client_is_to_blame() -> None:
    names = {error.name for error in FAILURES}
    assert names == {"internal", "timeout", "busy", "cluster_unavailable", "too_many_clients"}
    assert names < {error.name for error in ERROR_REPLIES}
    values: dict[str, Any] = {metric.name: metric for metric in METRICS}
    assert values["error_replies"].members == tuple(error.name for error in ERROR_REPLIES)
