"""docs/reliability.md: what stands between its marks is written from proof/results/*.json."""

import json
import re
from collections.abc import Callable
from typing import Any

from bench.report import number, table
from lab.running import ROOT
from proof import availability, fuzz_report

PAGE = ROOT / "docs/reliability.md"

#: Of what shows that a fault was there, so many characters.
MAX_TOLD = 120
#: The tables of faults, and the files of tests that are in each.
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

Report = dict[str, Any]


def faults(report: Report) -> str:
    """A row for each fault of the matrix: what was done, the variants survived, and figures."""
    found: dict[str, list[Report]] = {}
    for case in report["cases"]:
        found.setdefault(case["fault"], []).append(case)
    cases, machine = report["cases"], report["machine"]
    survived = sum(case["outcome"] == "survived" for case in cases)
    head = f"{len(found)} faults; {survived} of {len(cases)} cases survived"
    head += f", in {report['seconds'] / 60:.0f} minutes"
    parts = [f"{head} (seed {machine['seed']}; {machine['system']}, Python {machine['python']})."]
    for title, files in GROUPS.items():
        rows = [
            [fault, _told(cases), _outcomes(cases), _figures(cases)]
            for fault, cases in found.items()
            if cases[0]["test"].partition("::")[0] in files
        ]
        if rows:
            parts += [f"**{title}**", table(["fault", "it happened", "survived", "figures"], rows)]
    return "\n\n".join(parts)


def _told(cases: list[Report]) -> str:
    """What showed that it was there, of the first case that says so."""
    told: list[str] = next((case["happened"] for case in cases if case.get("happened")), ["-"])
    text = re.sub(r"/tmp/pytest-of-\w+/\S+/", "", "; ".join(told).replace("\n", " "))
    return (text if len(text) <= MAX_TOLD else text[:MAX_TOLD] + " ...").replace("|", "\\|")


def _outcomes(cases: list[Report]) -> str:
    survived = sum(case["outcome"] == "survived" for case in cases)
    others = [
        f"{case['outcome']}: {case.get('why', '')}".strip(": ")
        for case in cases
        if case["outcome"] != "survived"
    ]
    return "; ".join([f"{survived} of {len(cases)}", *dict.fromkeys(others)])


def _figures(cases: list[Report]) -> str:
    """Of each figure the least and the greatest of all cases."""
    values: dict[tuple[str, str], list[float]] = {}
    for case in cases:
        for name, (value, unit) in case.get("measured", {}).items():
            values.setdefault((name, unit), []).append(value)
    return ", ".join(
        f"{name} {' .. '.join(dict.fromkeys(map(number, (min(each), max(each)))))} {unit}"
        for (name, unit), each in values.items()
    )


def told(timeline: Report) -> str:
    """What a timeline shows, in a line."""
    events = ", ".join(f"{what} at {at:.1f} s" for at, what in timeline["events"])
    asked = f"{timeline['answers']:,} answers in {timeline['seconds']:.0f} s"
    slowest = f"the slowest after {timeline['slowest ms']} ms"
    promise = f"the promise of WHO, with a Δ of {timeline['delta']:g} s"
    return (
        f"{asked}, {slowest}; {timeline['broken'] or 'none'} broke {promise}. "
        f"Seed {timeline['seed']}: {events}."
    )


def soak(report: Report) -> str:
    """What hours of load and faults have shown, in a line."""
    replies = report["replies"]
    count = sum(len(fault["seconds"]) for fault in report["faults"].values())
    hours = f"{report['seconds'] / 3600:.2f} hours"
    if report["is_interrupted"]:
        hours += ", then interrupted"
    return (
        f"{hours}, {count} faults of {len(report['faults'])} kinds; "
        f"{replies['right']:,} right replies, {replies['wrong'] or 'none'} wrong, "
        f"{replies['lost'] or 'none'} lost but to a fault of their own server; "
        "all that is held was measured "
        f"{len(report['censuses'])} times meanwhile. "
        "[soak.md](../proof/results/soak.md) has the figures."
    )


def _machine(report: Report) -> str:
    return "; ".join(report["machine"].values())


def _in(name: str) -> Callable[[Report], str]:
    return lambda report: told(report[name])


#: What stands between the marks of each name, and which report it is written from.
SECTIONS: dict[str, tuple[str, Callable[[Report], str]]] = {
    "faults": ("faults", faults),
    "fuzz": ("fuzz", fuzz_report.section),
    "soak": ("soak", soak),
    "failover": ("timelines", _in("failover")),
    "partition": ("timelines", _in("partition")),
    "timelines machine": ("timelines", _machine),
    "replies": ("outages", availability.replies_table),
    "common": ("outages", lambda _: availability.common_table()),
    "who": ("outages", availability.who_table),
    "sums": ("outages", availability.sums_table),
    "outages machine": ("outages", _machine),
}


def sections() -> dict[str, str]:
    """All that there is a report for."""
    files = {name: ROOT / f"proof/results/{name}.json" for name, _ in SECTIONS.values()}
    reports = {name: json.loads(path.read_text()) for name, path in files.items() if path.exists()}
    return {
        mark: write(reports[name]) for mark, (name, write) in SECTIONS.items() if name in reports
    }


def render() -> None:
    """Write them into the page."""
    page = PAGE.read_text()
    for mark, text in sections().items():
        begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
        assert begin in page, begin
        head, _, rest = page.partition(begin)
        page = f"{head}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(page)
