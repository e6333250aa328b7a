"""Writes the blocks of docs/reliability.md and docs/faults.md from proof/results/*.json.

A block is the text between a mark and its end: `<!-- name -->` and `<!-- /name -->`.
"""

import json
import re
import textwrap
from collections.abc import Callable
from typing import Any

from bench.page import put
from bench.report import number, table
from lab.machine import shown_source
from lab.running import ROOT
from proof import availability, fuzz_report

LINE_LENGTH = 125
WRAPPING: Any = {"break_long_words": False, "break_on_hyphens": False}
PAGES = ROOT / "docs/reliability.md", ROOT / "docs/faults.md"

#: The tables of faults, and the test files of each.
GROUPS = {
    "What clients send": ["tests/faults/test_wire.py"],
    "What clients do": ["tests/faults/test_clients.py"],
    "Crowds and floods": ["tests/faults/test_limits.py"],
    "TLS": ["tests/faults/test_transport.py"],
    "Handlers of commands": ["tests/faults/test_handlers.py"],
    "Processes and signals": ["tests/faults/test_processes.py"],
    "The machine": ["tests/faults/test_machine.py"],
    "StatsD, log, admin port": ["tests/faults/test_watchers.py"],
    "Redis and Sentinels": [
        "tests/faults/test_redis.py",
        "tests/outer/test_cluster_faults.py",
        "tests/outer/test_cluster_moves.py",
        "tests/outer/test_engines.py",
        "tests/outer/test_cluster_attacks.py",
    ],
    "Networks": ["tests/outer/test_cluster_partition.py"],
    "Servers of a cluster": [
        "tests/faults/test_cluster.py",
        "tests/outer/test_cluster_ids.py",
        "tests/outer/test_cluster.py",
    ],
    "Many at once": ["tests/outer/test_cluster_history.py", "tests/outer/test_reliability.py"],
}

#: A row of the tables that is no fault: it shows that the checker of the histories finds bugs.
CONTROL = "The checker finds deliberate bugs"
#: The outcome of a case that has passed, in the report.
PASSED = "survived"
#: Figures that the pages call otherwise than the report.
SHOWN = {"right replies": "correct replies"}

#: The reports that name the machine, and what the page calls them.
MEASURED = {
    "timelines": "timelines",
    "outages": "costs of faults",
    "soak": "soak",
    "faults": "fault matrix",
}

Report = dict[str, Any]
#: The figures of a fault: from name and unit, the values of its cases.
Figures = dict[tuple[str, str], list[float]]


def faults(report: Report) -> str:
    """Return tables of the matrix: a row for each fault, with the cases passed and figures."""
    found = _by_fault(report)
    parts = [f"{_matrix(report)}."]
    for title, files in GROUPS.items():
        members = {
            fault: cases
            for fault, cases in found.items()
            if cases[0]["test"].partition("::")[0] in files
        }
        if members:
            parts += [f"## {title}", _table(members)]
    return "\n\n".join(parts)


def _table(members: dict[str, list[Report]]) -> str:
    """Return the table of some faults. No cell has two figures: each has a column then."""
    figures = {fault: _figures(cases) for fault, cases in members.items()}
    names = list(dict.fromkeys(name for each in figures.values() for name in each))
    heads = [f"{name}, {unit}" if unit else name for name, unit in names]
    has_columns = any(len(each) > 1 for each in figures.values())
    if not has_columns:
        heads = ["measured"] if names else []
    rows = []
    for fault, cases in members.items():
        each = figures[fault]
        cells = [_ends(each[name]) if name in each else "" for name in names]
        if not has_columns:
            cells = [" ".join(_phrase(name, each[name]) for name in each)] if names else []
        rows.append([fault, _outcomes(cases), *cells])
    return table(["fault", "cases passed", *heads], rows)


def matrix(report: Report) -> str:
    """Return one sentence about the matrix, for the page that links to it."""
    return f"{_matrix(report)}. [faults.md](faults.md) lists them."


def _matrix(report: Report) -> str:
    machine = report["machine"]
    cases = [case for case in report["cases"] if case["fault"] != CONTROL]
    passed = sum(case["outcome"] == PASSED for case in cases)
    count = len({case["fault"] for case in cases})
    made = [*shown_source(machine), f"seed {machine['seed']}"]
    made.append(f"{machine['system']}, Python {machine['python']}")
    return (
        f"{count} faults in {len(cases)} cases: {passed} passed, "
        f"in {report['seconds'] / 60:.0f} minutes ({'; '.join(made)})"
    )


def _by_fault(report: Report) -> dict[str, list[Report]]:
    found: dict[str, list[Report]] = {}
    for case in report["cases"]:
        found.setdefault(case["fault"], []).append(case)
    return found


def _outcomes(cases: list[Report]) -> str:
    passed = sum(case["outcome"] == PASSED for case in cases)
    others = [
        f"{case['outcome']}: {case.get('why', '')}".strip(": ")
        for case in cases
        if case["outcome"] != PASSED
    ]
    return "; ".join([f"{passed} of {len(cases)}", *dict.fromkeys(others)])


def _figures(cases: list[Report]) -> Figures:
    """Return the values of each figure in all cases."""
    figures: Figures = {}
    for case in cases:
        for name, (value, unit) in case.get("measured", {}).items():
            figures.setdefault((SHOWN.get(name, name), unit), []).append(value)
    return figures


def _ends(values: list[float]) -> str:
    """Return the least and the greatest of some values."""
    return " to ".join(dict.fromkeys(map(number, (min(values), max(values)))))


def _phrase(name: tuple[str, str], values: list[float]) -> str:
    text, unit = name
    return f"{text} {_ends(values)} {unit}" if unit else f"{_ends(values)} {text}"


def describe(timeline: Report) -> str:
    """Return a paragraph about a timeline."""
    events = ", ".join(f"{what} at {at:.1f} s" for at, what in timeline["events"])
    return (
        f"{timeline['answers']:,} replies in {timeline['seconds']:.0f} s, the slowest after "
        f"{timeline['slowest ms']} ms. {timeline['broken'] or 'None'} broke the promise of WHO "
        f"(Δ = {timeline['delta']:g} s). Seed {timeline['seed']}: {events}."
    )


def soak(report: Report) -> str:
    """Return a paragraph about a soak."""
    replies = report["replies"]
    count = sum(len(fault["seconds"]) for fault in report["faults"].values())
    hours = f"{report['seconds'] / 3600:.2f} hours"
    if report["is_interrupted"]:
        hours += ", then interrupted"
    lost = (
        f"{replies['lost'] or 'no'} {'reply was' if replies['lost'] < 2 else 'replies were'} lost "
        "unless its own server had a fault"
    )
    return (
        f"{hours}, {count} faults of {len(report['faults'])} kinds. "
        f"{replies['right']:,} replies were right, {replies['wrong'] or 'none'} wrong; "
        f"{lost}. "
        f"Memory, descriptors and greenlets were measured {len(report['censuses'])} times. "
        "[The report](../proof/results/soak.md) has the figures."
    )


def commits(reports: dict[str, Report]) -> str:
    """Return a list item: of which commit each report of the page is."""
    sources = {title: reports[name]["machine"] for name, title in MEASURED.items()}
    sources["WHO with two Redis"] = reports["outages"]["machine_of_two"]
    sources["fuzzing"] = min(reports["fuzz"].values(), key=lambda told: told.get("gserver", ""))
    found: dict[str, list[str]] = {}
    for title, machine in sources.items():
        commit = machine.get("gserver", "").removeprefix("gserver ")
        found.setdefault(commit, []).append(title)
    nameless = found.pop("", [])
    known = "; ".join(f"{', '.join(titles)}: {commit}" for commit, titles in found.items())
    text = f"- **The newest code.** All figures are from earlier commits ({known})."
    if nameless:
        text += f" No commit is recorded for: {', '.join(nameless)}."
    return f"{text} Measure again before a release."


def _machine(report: Report) -> str:
    return "; ".join(report["machine"].values())


def _in(name: str) -> Callable[[Report], str]:
    return lambda report: describe(report[name])


#: For each block, its name, its report, and the function that makes it.
SECTIONS: dict[str, tuple[str, Callable[[Report], str]]] = {
    "faults": ("faults", faults),
    "matrix": ("faults", matrix),
    "fuzz": ("fuzz", fuzz_report.summary),
    "soak": ("soak", soak),
    "failover": ("timelines", _in("failover")),
    "partition": ("timelines", _in("partition")),
    "timelines machine": ("timelines", _machine),
    "replies": ("outages", availability.replies_table),
    "common": ("outages", lambda _: availability.common_table()),
    "who": ("outages", availability.who_page),
    "who of two": ("outages", availability.who_of_two_page),
    "sums": ("outages", availability.sums_table),
    "outages machine": ("outages", _machine),
    "outages machine of two": (
        "outages",
        lambda report: "; ".join(report["machine_of_two"].values()),
    ),
}


def sections() -> dict[str, str]:
    """Return the text of every block for which there is a report."""
    files = {name: ROOT / f"proof/results/{name}.json" for name, _ in SECTIONS.values()}
    reports = {name: json.loads(path.read_text()) for name, path in files.items() if path.exists()}
    texts = {
        mark: write(reports[name]) for mark, (name, write) in SECTIONS.items() if name in reports
    }
    return texts | {"commits": commits(reports)}


def block(mark: str, text: str) -> str:
    """Return the block with its marks."""
    return f"<!-- {mark} -->\n\n{_wrapped(text)}\n\n<!-- /{mark} -->"


def _wrapped(text: str) -> str:
    return "\n".join(
        line if line.startswith("|") else textwrap.fill(line, LINE_LENGTH, **WRAPPING)
        for line in text.splitlines()
    )


def render() -> None:
    """Write all blocks into the pages."""
    texts = sections()
    for path in PAGES:
        page = path.read_text()
        for mark in re.findall(r"<!-- /([\w ]+) -->", page):
            page = put(page, block(mark, texts[mark]))
        path.write_text(page)
