"""A pytest plugin that reports the fault matrix: a table at the end, and a file. See bin/faults."""

import json
import platform
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

import pytest
from rich.console import Console
from rich.table import Table

from lab.machine import source
from lab.rows import seedless
from lab.site import SEED

OUTCOMES: Final = {"passed": "survived", "failed": "FAILED", "skipped": "SKIPPED"}

Case = dict[str, Any]


class Matrix:
    """The cases of a run, in the order in which they end."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._faults: dict[str, str] = {}
        self._cases: dict[str, Case] = {}
        self._began = time.monotonic()

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self._session = session

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        if mark := item.get_closest_marker("fault"):
            self._faults[item.nodeid] = mark.args[0]
            item.extra_keyword_matches.add(mark.args[0])  # Makes -k find a fault by its name.

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid not in self._faults:
            return
        case = self._cases.setdefault(
            report.nodeid,
            {"fault": self._faults[report.nodeid], "test": report.nodeid, "seconds": 0.0}
            | {
                "outcome": "not ended",
                "happened": [],
                "measured": {},
            },  # the outcome if the run is interrupted
        )
        case["seconds"] = round(case["seconds"] + report.duration, 1)
        if (report.when == "call" or report.outcome != "passed") and not self._session.shouldstop:
            case["outcome"] = OUTCOMES[report.outcome]
            case["happened"] = [text for name, text in report.user_properties if name == "happened"]
            case["measured"] = {
                name: [float(f"{value:.3g}"), unit]
                for name, value, unit in _measured(report.user_properties)
            }
            if report.skipped and isinstance(report.longrepr, tuple):
                case["why"] = report.longrepr[2].removeprefix("Skipped: ")

    def pytest_terminal_summary(self) -> None:
        if not self._cases:
            return
        table = Table("fault", "variant", "outcome", "s", "measured", title="Faults")
        cases = sorted(
            self._cases.values(), key=lambda case: list(self._faults.values()).index(case["fault"])
        )
        for case, before in zip(cases, [None, *cases], strict=False):
            fault = case["fault"] if before is None or before["fault"] != case["fault"] else ""
            details = case.get("why") or ", ".join(
                f"{name} {value:g} {unit}" if unit else f"{value:g} {name}"
                for name, (value, unit) in case["measured"].items()
            )
            table.add_row(fault, _variant(case), case["outcome"], f"{case['seconds']:.1f}", details)
        console = Console()
        console.print(table)
        outcomes = Counter(case["outcome"] for case in cases)
        faults = len({case["fault"] for case in cases})
        console.print(
            f"{faults} fault{'s' * (faults > 1)}, {len(cases)} case{'s' * (len(cases) > 1)}: "
            + ", ".join(f"{n} {name}" for name, n in outcomes.items())
        )
        if self._path:
            machine = {
                **source(),
                "system": platform.platform(),
                "python": platform.python_version(),
                "seed": SEED,
            }
            report: dict[str, Any] = {
                "machine": machine,
                "seconds": round(time.monotonic() - self._began),
                "cases": cases,
            }
            if self._path.exists():  # From other parts of the matrix, or an earlier run.
                before = json.loads(self._path.read_text())
                report["seconds"] += before["seconds"]
                again = set(map(seedless, self._cases))
                others = [case for case in before["cases"] if seedless(case["test"]) not in again]
                report["cases"] = others + cases
                if others and before["machine"].get("gserver") != machine["gserver"]:
                    machine["gserver"] = f"{machine['gserver']}, some rows with earlier commits"
            # One case a line, so that two reports can be compared.
            lines = ",\n".join(map(json.dumps, report["cases"]))
            head = json.dumps(report | {"cases": []}).removesuffix("[]}")
            self._path.write_text(f"{head}[\n{lines}\n]}}\n")
            console.print(f"written to {self._path}")


def _measured(properties: list[tuple[str, Any]]) -> list[tuple[str, float, str]]:
    return [value for name, value in properties if name == "measured"]


def _variant(case: Case) -> str:
    """The part of a test's name in brackets, or the name."""
    name = case["test"].rpartition("::")[2]
    return str(
        name.partition("[")[2].removesuffix("]") or name.removeprefix("test_").replace("_", " ")
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--report", metavar="FILE", type=Path, help="where to write the report (JSON); adds to one"
    )


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("report")
    if path and (path.is_dir() or not path.parent.is_dir()):
        raise pytest.UsageError(f"--report {path}: no file can be written there")
    config.pluginmanager.register(Matrix(path))
