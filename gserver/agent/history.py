"""The figures of the last hour: by the second for five minutes, by ten seconds for all of it.

They are in shared memory, so a new agent continues them. A row's place follows from its time.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gserver.metrics import HISTORY_COLUMNS, members_of, percentile
from gserver.protocol import FAILURES, TOO_MANY_CLIENTS
from gserver.scoreboard import BUCKETS, HISTORY_CELLS, HISTORY_SECONDS, HISTORY_TENS, Scoreboard

FAILURE_NAMES = frozenset(error.name for error in FAILURES)
#: Of each of the two parts: the seconds in a row, the first row, and how many rows there are.
PARTS = ((1, 0, HISTORY_SECONDS), (10, HISTORY_SECONDS, HISTORY_TENS))

Totals = Mapping[str, int]


class History:
    """Writes the rows, once a second, and reads them."""

    def __init__(self, scoreboard: Scoreboard) -> None:
        self._scoreboard = scoreboard
        #: The totals at the end of the last row of each part, and when that was.
        self._before: dict[int, tuple[int, Totals]] = {}

    def note(self, totals: Totals, unix_seconds: float) -> None:
        """Write the rows that are over. Call this once a second."""
        for length, first, rows in PARTS:
            number = int(unix_seconds) // length
            last_number, before = self._before.get(length, (None, totals))
            if number == last_number:
                continue
            self._before[length] = number, totals
            if last_number is not None:  # Also after a step of the clock.
                row = _row(before, totals, round(unix_seconds * 1000))
                start = (first + number % rows) * HISTORY_CELLS
                for offset, value in enumerate(row):
                    self._scoreboard.history[start + offset] = value

    def document(self, unix_seconds: float) -> dict[str, Any]:
        """Return the document of `/history.json`: the rows of each part, the oldest first."""
        seconds, tens = (
            sorted(self._rows(part, unix_seconds), key=lambda row: row[0]) for part in PARTS
        )
        return {"columns": HISTORY_COLUMNS, "seconds": seconds, "tens": tens}

    def sums(self, seconds: float, unix_seconds: float) -> dict[str, int]:
        """Return how many mistakes, failures and rejections the last seconds had."""
        since_ms = (unix_seconds - seconds) * 1000
        rows = [row for row in self._rows(PARTS[0], unix_seconds) if row[0] > since_ms]
        return {
            name: sum(row[HISTORY_COLUMNS.index(name)] for row in rows)
            for name in ("mistakes", "failures", "rejected")
        }

    def last(self, unix_seconds: float) -> dict[str, int] | None:
        """Return the row of the last second by column; None if there is none yet."""
        rows = self._rows(PARTS[0], unix_seconds)
        row = max(rows, key=lambda row: row[0], default=None)
        return None if row is None else dict(zip(HISTORY_COLUMNS, row, strict=True))

    def _rows(self, part: tuple[int, int, int], unix_seconds: float) -> Iterator[list[int]]:
        length, first, rows = part
        oldest_ms = (unix_seconds - length * rows) * 1000
        for number in range(first, first + rows):
            start = number * HISTORY_CELLS
            row = self._scoreboard.history[start : start + HISTORY_CELLS].tolist()
            if oldest_ms < row[0] <= unix_seconds * 1000 + 1000:
                yield row


def _row(before: Totals, totals: Totals, at_ms: int) -> list[int]:
    """Return what has happened between two totals, in the order of HISTORY_COLUMNS."""
    errors = _increase("error_replies", before, totals)
    failures = sum(count for name, count in errors.items() if name in FAILURE_NAMES)
    buckets = _buckets(before, totals)
    return [
        at_ms,
        totals["clients"],
        totals.get("cluster_clients", -1),
        sum(_increase("commands", before, totals).values()),
        sum(errors.values()) - failures,
        failures,
        errors[TOO_MANY_CLIENTS.name],
        _microseconds(percentile(buckets, 50)),
        _microseconds(percentile(buckets, 99)),
        totals.get("cluster_age_ms", -1),
    ]


def _increase(family: str, before: Totals, totals: Totals) -> dict[str, int]:
    earlier = members_of(family, before)
    return {
        name: count - earlier.get(name, 0) for name, count in members_of(family, totals).items()
    }


def _buckets(before: Totals, totals: Totals) -> Sequence[int]:
    """Return the increase of the buckets of all commands together."""
    buckets = [0] * BUCKETS
    for name, count in _increase("command_buckets", before, totals).items():
        buckets[int(name.rpartition(".")[2])] += count
    return buckets


def _microseconds(seconds: float | None) -> int:
    return -1 if seconds is None else round(seconds * 1e6)
