"""The pages that tests compare with the code, and their chapters and tables."""

import re

from lab.running import ROOT

OPERATIONS = (ROOT / "docs/operations.md").read_text()
DEPLOYING = (ROOT / "docs/deploying.md").read_text()
PROTOCOL = (ROOT / "docs/protocol.md").read_text()
README = (ROOT / "README.md").read_text()


def section(title: str, text: str = OPERATIONS) -> str:
    """One chapter of a page."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert found, f"no chapter {title}"
    return found[1]


def rows(title: str, text: str = OPERATIONS) -> dict[str, list[str]]:
    """The table of a chapter: the other columns by the name in the first."""
    table: dict[str, list[str]] = {}
    for line in section(title, text).splitlines():
        first, *rest = [cell.strip() for cell in line.strip("| ").split(" | ")]
        for name in re.findall(r"`([^`]+)`", first) if line.startswith("| `") else []:
            assert name not in table, f"{name} is listed twice"
            table[name] = rest
    return table


def prometheus_type(name: str) -> str:
    """The type of a metric in the table, by the sentence above it."""
    sentence = re.search(
        r"Names in `_total` are counters, `(\w+)` is\sa histogram, `(\w+)` is an info, "
        r"and the others are gauges\.",
        section("Metrics"),
    )
    assert sentence
    others = {sentence[1]: "histogram", sentence[2]: "info"}
    name = name.partition("{")[0]
    return "counter" if name.endswith("_total") else others.get(name, "gauge")


def statsd_metrics() -> dict[str, str]:
    """StatsD's metrics and their kinds. REASON and KIND stand for the names in their own tables."""
    members = {
        "REASON": rows("Reasons of error replies"),
        "KIND": rows("Kinds of heartbeat errors"),
    }
    table: dict[str, str] = {}
    for prometheus, (cell, _) in rows("Metrics").items():
        found = re.fullmatch(r"`([\w.]+)`(?: \((.+)\))?|-", cell)
        assert found, cell
        name, own_kind = found.groups()
        if name:
            prefix, _, last = name.rpartition(".")
            names = (
                [f"{prefix}.{member}" for member in members[last]] if last in members else [name]
            )
            table |= dict.fromkeys(names, own_kind or prometheus_type(prometheus))
    return table
