"""Writes tables between their marks in the pages of docs/."""

import re
from collections.abc import Iterable
from pathlib import Path

from bench.goals import goal_table
from bench.peers import ROOT
from bench.report import OTHER_TABLES, TABLES, Results, table

PAGE = ROOT / "docs/performance.md"
#: What names the run that a figure comes from.
SOURCE_KEYS = "commit", "date", "processor"


def tables(results: Results, scenarios: Iterable[str]) -> dict[str, str]:
    """The tables of these scenarios, that of the goals, and what the samples were made on."""
    found = {
        name: f"{item.write(results)}\n\n*{source(results, item.scenarios)}*"
        for name, item in {**TABLES, **OTHER_TABLES}.items()
        if item.scenario in scenarios and all(each in results for each in item.scenarios)
    }
    goals = f"{goal_table(results)}\n\n*{source(results, results)}*"
    return {**found, "goals": goals, "machine": _machine_table(results)}


def source(results: Results, names: Iterable[str]) -> str:
    """Name the commit, the date and the machine of some scenarios."""
    machines = [results[name]["machine"] for name in names]
    runs = [", ".join(machine[key] for key in SOURCE_KEYS) for machine in machines]
    return "; ".join(dict.fromkeys(runs))


def _machine_table(results: Results) -> str:
    """The machine and the versions. What differs between scenarios is named with them."""
    rows = []
    for key in dict.fromkeys(key for result in results.values() for key in result["machine"]):
        found: dict[str, list[str]] = {}
        for name, result in results.items():
            value = str(result["machine"].get(key, "unknown")).removeprefix(f"{key} ")
            found.setdefault(value, []).append(name)
        usual = max(found, key=lambda value: len(found[value]))
        others = [f"{text} ({', '.join(names)})" for text, names in found.items() if text != usual]
        rows.append([key, "; ".join([usual, *others])])
    return table(["", "measured with"], rows)


def marked(text: str) -> list[str]:
    """The names of the tables that a page has marks for."""
    return re.findall(r"<!-- table: ([\w ]+) -->", text)


def pages() -> list[Path]:
    """The pages that have tables of ours."""
    return [page for page in sorted(PAGE.parent.glob("*.md")) if marked(page.read_text())]


def render(results: Results) -> None:
    """Put the tables between their marks in all pages."""
    found = tables(results, results)
    for path in pages():
        page = path.read_text()
        for name in marked(page):
            if name in found:
                start, end = f"<!-- table: {name} -->", "<!-- end -->"
                head, _, rest = page.partition(start)
                page = f"{head}{start}\n\n{found[name]}\n\n{end}{rest.partition(end)[2]}"
        path.write_text(page)
