"""The verdict of a soak: from its report to its problems and its page. Pure functions."""

import json
import re
from collections.abc import Iterator
from itertools import groupby
from statistics import median
from typing import Any, NamedTuple

from bench.report import table

#: Allowed growth of memory from the first quarter of a process's censuses to the last.
MAX_GROWTH = 0.02
#: Censuses that a process needs for its memory to be judged: earlier, allocators and caches fill.
LEAST_CENSUSES = 8

Report = dict[str, Any]


class Life(NamedTuple):
    """The resources of a process at each census after its warm-up."""

    name: str  #: server, role and pid
    resident: list[int]  #: bytes
    descriptors: list[int]
    greenlets: list[int]  #: 0 if the process is not a worker

    @property
    def growth(self) -> float | None:
        """Growth from the median of the first quarter to that of the last; None for too few."""
        if len(self.resident) < LEAST_CENSUSES:
            return None
        quarter = len(self.resident) // 4
        return median(self.resident[-quarter:]) / median(self.resident[:quarter]) - 1


def lives(report: Report) -> list[Life]:
    """The processes seen in at least two censuses.

    The first census of a process and those of the warm-up do not count.
    """
    censuses = report["censuses"]
    warm = len(censuses) // 5
    found: dict[str, list[tuple[int, list[int]]]] = {}
    for number, census in enumerate(censuses):
        for name, held in census["held"].items():
            found.setdefault(name, []).append((number, held))
    kept = {
        name: [held for number, held in all_held[1:] if number >= warm]
        for name, all_held in found.items()
    }
    return [
        Life(name, *map(list, zip(*held, strict=True)))
        for name, held in kept.items()
        if len(held) > 1
    ]


def problems(report: Report) -> Iterator[str]:
    """Yield the problems."""
    yield from report["failures"]
    for life in lives(report):
        for what, counts in (("descriptors", life.descriptors), ("greenlets", life.greenlets)):
            if len(set(counts)) > 1:
                changes = ", ".join(str(count) for count, _ in groupby(counts))
                yield f"{life.name}: {what} were {changes}"
        if life.growth is not None and life.growth > MAX_GROWTH:
            yield f"{life.name}: memory grew by {life.growth:.1%}"
    for census in report["censuses"]:
        who, clients = census["who"], census["clients"]
        if set(who.values()) != {clients}:
            yield f"at {census['at']:.0f} s, with {clients} clients, WHO replied {who}"


def written(report: Report) -> str:
    """Return the report as JSON, with each list of numbers on one line."""
    text = json.dumps(report, indent=1) + "\n"
    return re.sub(
        r"\[[\s\d.,]+\]", lambda numbers: "[" + " ".join(numbers[0][1:-1].split()) + "]", text
    )


def _seconds(times: list[float]) -> str:
    return f"{median(times):.1f} (at most {max(times):.1f})" if times else ""


PAGE = """\
# A soak under faults

`{command}` ({machine}).

Three servers with two workers each (`three` with TLS), a Redis, two replicas and three Sentinels,
under a mixed load and one fault after another. `one` may be restarted, processes of `two` may die,
and those of `three` survive the whole run.
This page is generated from the report, `soak.json`.

The soak ran for {hours:.2f} hours{interrupted}: {count} faults, {censuses} censuses. {verdict}

## Replies

Each reply is checked: WHERE is the server's id, WHY is 42, and WHO counts all clients that are
certainly connected and none that cannot be. At each census, without other clients, WHO is exact on
all three servers. A connection may be lost only at a server whose fault breaks it.

{replies}

{kinds}

## Faults

A server has recovered when all its workers and its agent run, the servers know each other, their
figures are fresh, and each client of the load has been served again.

{faults}

## Resources

Measured at each census after the warm-up, with exactly one client for each worker, for processes
that were present in at least two. Memory is the median of the first and of the last quarter, in MB.
It may grow by {growth:g} %, and is judged from {least} censuses on. Descriptors and greenlets must
not change.

{held}
"""


def render(report: Report) -> str:
    """Make the page."""
    is_judged = any(life.growth is not None for life in lives(report))
    wrong, replies, faults = (
        list(problems(report)),
        report["replies"],
        sorted(report["faults"].items()),
    )
    return PAGE.format(
        command=report["command"],
        machine="; ".join(f"{name}: {value}" for name, value in report["machine"].items()),
        hours=report["seconds"] / 3600,
        interrupted=", and was interrupted" * report["is_interrupted"],
        count=sum(len(fault["seconds"]) for _, fault in faults),
        censuses=len(report["censuses"]),
        verdict="\n- ".join(
            ["**Wrong:**", *(" ".join(text.split()) for text in wrong)]
            if wrong
            else [
                "Nothing was wrong."
                if is_judged
                else "Nothing was wrong. Memory was not judged: the soak was too short."
            ]
        ),
        replies=table(
            ["correct", "wrong", "connections lost to a fault of their server", "otherwise lost"],
            [[f"{replies[name]:,}" for name in ("right", "wrong", "excused", "lost")]],
        ),
        kinds=table(
            ["kind of client", "correct replies"],
            [
                [kind.replace("_", " "), f"{number:,}"]
                for kind, number in sorted(report["kinds"].items())
            ],
        ),
        faults=table(
            ["fault", "times", "seconds from its end until all servers had recovered", "evidence"],
            [
                [name, str(len(each["seconds"])), _seconds(each["seconds"]), each["happened"]]
                for name, each in faults
            ],
        ),
        growth=100 * MAX_GROWTH,
        least=LEAST_CENSUSES,
        held=table(
            ["process", "censuses", "memory, first", "last", "growth", "descriptors", "greenlets"],
            [
                _row(life)
                for life in sorted(lives(report), key=lambda life: (-len(life.resident), life.name))
            ],
        ),
    )


def _row(life: Life) -> list[str]:
    quarter = max(1, len(life.resident) // 4)
    memory = [
        f"{median(part) / 1e6:.2f}" for part in (life.resident[:quarter], life.resident[-quarter:])
    ]
    counts = [
        " to ".join(str(count) for count, _ in groupby(each))
        for each in (life.descriptors, life.greenlets)
    ]
    return [
        life.name,
        str(len(life.resident)),
        *memory,
        "" if life.growth is None else f"{life.growth:+.1%}",
        *counts,
    ]
