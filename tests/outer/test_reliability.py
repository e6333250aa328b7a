"""docs/reliability.md matches the reports, and its sums are right."""

import json
import math
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lab.admin import status
from lab.child import Child
from lab.history import Fact, Kind
from lab.rows import Notes
from lab.running import LIMIT, ROOT, Running, environment, until
from lab.seed import draw
from proof import outages, page, timeline
from proof.availability import (
    BUDGET_SECONDS,
    COMMON,
    RATES,
    RATES_OF_TWO,
    Cost,
    Rate,
    availability,
    budget_parts,
    cost,
    costs,
    failover_verdict,
    in_window,
    missed,
    needed,
    sums_table,
    together,
    total,
    who_verdict,
)
from proof.outages import FAULTS, FAULTS_OF_TWO, Outage, outage, wrong

TEXT = "".join(path.read_text() for path in page.PAGES)
SEED = draw()


def test_the_page_matches_the_reports() -> None:
    for mark, text in page.sections().items():
        assert page.block(mark, text) in TEXT, f"{mark}: run bin/availability --write"


def test_every_mark_of_the_page_has_an_end_and_every_section_a_mark() -> None:
    marks = re.findall(r"<!-- ([\w ]+) -->", TEXT)
    assert marks == re.findall(r"<!-- /([\w ]+) -->", TEXT)
    assert set(page.SECTIONS) <= set(marks)


def test_the_plots_exist_and_name_every_line() -> None:
    for name in timeline.SCENARIOS:
        assert f"(plots/who-{name}.svg)" in TEXT
        drawn = (ROOT / f"docs/plots/who-{name}.svg").read_text()
        lines, shades = {"A", "B", "C", "true count"}, {"fault", "recovery"}
        assert lines | shades <= set(re.findall(r">([\w ]+)</text>", drawn))


def test_every_fault_has_a_rate_with_its_reason() -> None:
    rates = {**RATES, **RATES_OF_TWO}
    faults = {fault.name: fault for fault in (*FAULTS, *FAULTS_OF_TWO)}
    assert [*faults] == [*rates]
    assert all(rate.why for rate in rates.values())
    assert all(each.why for each in COMMON)
    assert {name for name, fault in faults.items() if fault.lasts} == {
        name for name, rate in rates.items() if rate.lasts_seconds
    }


def test_two_redis_are_gone_at_once_for_the_product_of_their_shares() -> None:
    rate, year = RATES_OF_TWO["both Redis gone"], 365 * 86400
    share = RATES["Redis gone"].per_year * RATES["Redis gone"].lasts_seconds / year
    assert rate.per_year * rate.lasts_seconds == pytest.approx(share**2 * year)


def test_the_sums_match_a_calculation_by_hand() -> None:
    assert round(BUDGET_SECONDS) == 1296
    # Once a month, 10 s for a third of all requests. The second of three trials takes 12 s for half
    # of them, and the third affects none.
    rate = Rate(365 / 30, "")
    trials = [Outage(10, 1 / 3, 0.1), Outage(12, 1 / 2, 0), Outage(0, 0)]
    assert cost(rate, trials) == pytest.approx(Cost(10 / 3, 6, 1))
    # A fault of a minute with a recovery of 10 s affects all requests for that time.
    assert cost(rate, trials, 60).median == pytest.approx(70)
    assert in_window(12, 100) == pytest.approx(98.63, abs=0.01)
    assert availability(1296) == "99.95 %"
    assert availability(5) == "99.9998 %"


def test_the_probability_of_a_missed_budget_matches_a_calculation_by_hand() -> None:
    # One cause: more than two events, with a mean of one.
    assert missed([(1.0, 10)], 29) == pytest.approx(1 - math.exp(-1) * (1 + 1 + 1 / 2))
    # Two causes: anything except no event, one or two short ones, or one long one.
    allowed = math.exp(-0.5) * math.exp(-0.2) * (1 + 0.5 + 0.5**2 / 2 + 0.2)
    assert missed([(0.5, 10), (0.2, 20)], 20) == pytest.approx(1 - allowed)


def test_no_fault_of_redis_or_an_agent_costs_a_reply() -> None:
    report = json.loads(outages.FILE.read_text())
    quiet = {
        name: trials
        for name, trials in report["replies"].items()
        if re.search("Redis|failover|agent", name)
    }
    assert len(quiet) == 8
    assert not any(figure for trials in quiet.values() for trial in trials for figure in trial)


def test_the_sum_of_the_page_is_the_sum_of_its_rows() -> None:
    report = {
        "replies": {"server killed": [[2, 0.5, 0]]},
        "who": {
            "Redis gone": [[1, 1, 0]],
            "planned failover": [[10, 1, 0]],
            "server cut off from Redis": [[6, 1, 0]],
        },
        "who_of_two": {"both Redis gone": [[1, 1, 0]], "agent killed": [[2, 0.5, 0]]},
    }
    table = sums_table(report)
    common = sum(each.per_year * each.seconds * each.share for each in COMMON) * 30 / 365
    assert f"| common causes, costs assumed too | {common:.0f} |" in table
    lost = 18 * 30 / 365
    assert (
        f"| single faults and planned work, worst | {lost:.2f} "
        f"| {100 * lost / 1296:.1f} % | 99.9999 % |" in table
    )
    # A cut-off server would fail a third of the requests.
    needing_redis = lost + common + (12 * 1801 + 24 * 10 + 12 * 306 / 3) * 30 / 365
    assert f"| the same, if replies needed Redis | {needing_redis:,.0f} |" in table
    both = RATES_OF_TWO["both Redis gone"].per_year
    of_two = (both * 901 + 12 * 1) * 30 / 365
    assert f"| the same with two Redis | {of_two:.2f} |" in table


def test_a_who_that_misses_the_objective_is_reported() -> None:
    report = {"who": {"Redis gone": [[1, 1, 0]], "worker killed": [[2, 0.5, 0]]}}
    text = who_verdict(report, "who")
    assert f"fall in {12 * 1802 * 30 / 365:,.0f} s" in text
    assert "**This misses 99.95 %.**" in text
    # 1,295 s of the budget are left: 21.6 minutes, rounded down.
    assert "must not exceed 21 minutes" in text
    met = who_verdict({"who_of_two": {"worker killed": [[2, 0.5, 0]]}}, "who_of_two")
    assert "**This meets 99.95 %**" in met
    assert "does not exceed 21 minutes in 30 days" in met


def test_three_servers_of_90_percent_are_not_enough() -> None:
    assert together(3, 0.9) == pytest.approx(0.999)
    assert together(4, 0.9) == pytest.approx(0.9999)
    assert together(3, 0.9, enough=2) == pytest.approx(0.9**3 + 3 * 0.9**2 * 0.1)
    assert needed(3) == pytest.approx(0.92063, abs=1e-5)
    assert together(3, needed(3)) == pytest.approx(0.9995)
    assert together(3, needed(3, enough=2), enough=2) == pytest.approx(0.9995)


def test_servers_need_what_the_other_causes_leave_of_the_budget() -> None:
    # An eighth of the budget is left: half of the share that may be down.
    assert needed(3, spent_seconds=1296 * 7 / 8) == pytest.approx(1 - (1 - needed(3)) / 2, abs=1e-6)
    report = json.loads(outages.FILE.read_text())
    spent = total(each for *_, each in costs(report, "replies").values()).median
    spent += sum(each.cost for each in COMMON)
    assert f"up for at least {100 * needed(3, spent_seconds=spent):.1f} % of the time" in TEXT
    assert f"it takes {100 * needed(3, 2, spent):.1f} %" in TEXT


def test_the_cost_of_broken_connections_grows_with_the_pause_between_requests() -> None:
    # 300 requests in 30 s fail: ten of each connection that stays.
    report = {
        "replies": {"rolling restart": [[365 / 30 * 3 / 12, 1, 0]]},
        "who": {"Redis gone": [[1, 1, 0]]},
        "who_of_two": {"agent killed": [[0, 0, 0]]},
    }
    table = sums_table(report)
    assert "on each kept connection every 0.6 s" in table
    assert "these rows are about 10.0 T s." in table
    common = sum(each.cost for each in COMMON)
    assert f"From T = {math.ceil((1296 - common) / 10)} s on" in table


def test_the_time_of_a_failover_is_that_of_all_its_trials() -> None:
    report = {
        "who": {
            "Redis primary killed": [[2, 1, 0], [2.5, 1, 0]],
            "Redis primary hung": [[2.1, 1, 0], [4, 1, 0], [2.2, 1, 0]],
        }
    }
    assert "wrong for 4.00 s at most." in failover_verdict(report)


def test_the_page_names_the_commits_of_its_figures_and_the_figures_without_one() -> None:
    machines = {name: {"machine": {"gserver": f"gserver {name}"}} for name in page.MEASURED}
    machines["outages"] = {**machines["timelines"], "machine_of_two": {"gserver": "gserver two"}}
    machines["faults"] = {"machine": {}}
    fuzz = {"core": {"gserver": "gserver x"}, "sockets": {}}
    text = page.commits({**machines, "fuzz": fuzz})
    assert "(timelines, costs of faults: timelines; soak: soak; WHO with two Redis: two)" in text
    assert "No commit is recorded for: fault matrix, fuzzing." in text
    complete = page.commits(
        {**machines, "faults": machines["soak"], "fuzz": {"core": {"gserver": "x"}}}
    )
    assert "soak, fault matrix: soak; WHO with two Redis: two; fuzzing: x" in complete
    assert "No commit" not in complete


def test_an_outage_lasts_from_the_fault_to_the_last_failed_probe() -> None:
    probes = [(at / 100, 1) for at in range(1000)]
    assert outage(probes, 2) == Outage(0, 0)
    for number, tries in ((210, 2), (240, 0), (299, 2)):
        probes[number] = (number / 100, tries)
    assert outage(probes, 2) == pytest.approx(Outage(1, 0.03, 0.01))


def test_a_probe_with_any_other_reply_has_failed() -> None:
    with Running("--max-clients", "1", "--admin-port", "0") as server, server.client() as only:
        assert only.who() == 1
        probes = Child("proof.probes", "127.0.0.1", server.port)
        until(
            lambda: status(server)["error_replies"]["too_many_clients"] > 20,
            "some requests were rejected",
        )
        text = probes.result()
    assert {tries for _, tries in text} == {0}


def test_who_is_wrong_until_the_last_wrong_reply_of_any_server() -> None:
    right, late = (
        [(at / 10, 7) for at in range(100)],
        [(at / 10, 6 if at <= 40 else 7) for at in range(100)],
    )
    assert wrong(right, 0, 7) == Outage(0, 0)
    assert wrong(right + late, 0, 7) == pytest.approx(Outage(4, 0.5))


def case(fault: str, outcome: str = "survived", **more: Any) -> dict[str, Any]:
    return {
        "fault": fault,
        "test": "tests/faults/test_wire.py::test_it",
        "seconds": 1.0,
        "outcome": outcome,
        **more,
    }


COLLECT = """
import pytest

class Names:
    def pytest_collection_finish(self, session):
        marks = (item.get_closest_marker("fault") for item in session.items)
        self.faults = sorted({mark.args[0] for mark in marks})

names = Names()
options = ["--collect-only", "-q", "-m", "fault", "-p", "no:cacheprovider"]
pytest.main([*options, "tests"], plugins=[names])
print("faults:", *names.faults, sep="\\n")
"""


def test_the_report_has_exactly_the_faults_of_the_matrix() -> None:
    words = [sys.executable, "-c", COLLECT]
    text = subprocess.check_output(
        words, cwd=ROOT, env=environment(), text=True, timeout=4 * LIMIT
    ).split("faults:\n")
    cases = json.loads((ROOT / "proof/results/faults.json").read_text())["cases"]
    assert text[-1].splitlines() == sorted({case["fault"] for case in cases}), (
        "bin/faults --report proof/results/faults.json"
    )


def test_a_fault_is_one_row_with_the_cases_passed_and_the_range_of_each_figure() -> None:
    cases = [
        case(
            "Flood",
            happened=["9 connected", "all left"],
            measured={"p99": [0.5, "ms"], "replies": [7, ""]},
        ),
        case("Flood", happened=["8 connected"], measured={"p99": [2, "ms"]}),
        case("Frost", "SKIPPED", happened=[], measured={}, why="needs root"),
        case("Flood", "FAILED", happened=[], measured={}),
        case(page.CONTROL, happened=[], measured={}),
    ]
    report = {
        "machine": {"date": "2026", "gserver": "x", "system": "Linux", "python": "3", "seed": 5},
        "seconds": 120,
        "cases": cases,
    }
    head, title, table = page.faults(report).split("\n\n")
    assert head == "2 faults in 4 cases: 2 passed, in 2 minutes (x; 2026; seed 5; Linux, Python 3)."
    assert title == "## What clients send"
    assert table.splitlines() == [
        "| fault | cases passed | p99, ms | replies |",
        "| --- | --- | --- | --- |",
        "| Flood | 2 of 3; FAILED | 0.500 to 2 | 7 |",
        "| Frost | 0 of 1; SKIPPED: needs root |  |  |",
        f"| {page.CONTROL} | 1 of 1 |  |  |",
    ]


def test_a_single_figure_is_in_one_column_with_those_of_other_faults() -> None:
    cases = [
        case("Flood", measured={"p99": [0.5, "ms"]}),
        case("Frost", measured={"right replies": [7, ""]}),
    ]
    assert page._table({each["fault"]: [each] for each in cases}).splitlines() == [
        "| fault | cases passed | measured |",
        "| --- | --- | --- |",
        "| Flood | 1 of 1 | p99 0.500 ms |",
        "| Frost | 1 of 1 | 7 correct replies |",
    ]
    assert "measured" not in page._table({"Frost": [case("Frost")]})


def test_every_fault_of_the_report_is_in_exactly_one_table() -> None:
    report = json.loads((ROOT / "proof/results/faults.json").read_text())
    rows = [line for line in page.faults(report).splitlines() if line.startswith("| ")]
    heads = [line for line in rows if line.startswith(("| fault |", "| --- |"))]
    assert len(rows) - len(heads) == len({case["fault"] for case in report["cases"]})
    assert len(heads) == 2 * len(page.GROUPS)


def test_the_bar_of_the_error_budget_has_every_part_of_the_sum() -> None:
    report = json.loads(outages.FILE.read_text())
    parts = budget_parts(report)
    single = total(each for *_, each in costs(report, "replies").values()).median
    assert sum(seconds for _, seconds in parts) == pytest.approx(
        single + sum(each.cost for each in COMMON)
    )
    drawn = (ROOT / "docs/plots/budget.svg").read_text()
    for name, seconds in parts:
        shown = f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.2f}"
        assert f">{name}: {shown} s</text>" in drawn, "bin/availability --write does it"


def test_a_soak_is_summarised_in_one_line() -> None:
    faults = {"a": {"seconds": [1, 2]}, "b": {"seconds": [3]}}
    report = {"seconds": 3600, "is_interrupted": False, "faults": faults, "censuses": [1] * 30}
    text = page.soak({**report, "replies": {"right": 12345, "wrong": 0, "lost": 2}})
    assert text.startswith(
        "1.00 hours, 3 faults of 2 kinds. 12,345 replies were right, none wrong; "
        "2 replies were lost unless"
    )


def test_the_true_count_changes_in_the_middle_of_its_possible_time() -> None:
    facts = [
        *(
            Fact(at, kind, "A", 1)
            for at, kind in ((1, Kind.CONNECTING), (3, Kind.COUNTED), (6, Kind.CLOSING))
        ),
        *(Fact(at, kind, "B", 2) for at, kind in ((4, Kind.CONNECTING), (5, Kind.COUNTED))),
        *(Fact(at, kind, "A", 1) for at, kind in ((7, Kind.COUNTED), (8, Kind.CLOSED))),
    ]
    assert timeline.truth(facts, 1) == [(1, 1), (3.5, 2), (6, 1)]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("timeline", "This needs root: it makes network namespaces."),
        ("availability --measure", "This needs root: it makes network namespaces."),
        ("availability --only worker", "Error: --only needs --measure, and excludes --write"),
        (
            "availability --measure --only zzz",
            "Error: Invalid value for --only: no such fault; the faults are: ",
        ),
    ],
)
def test_a_command_that_cannot_run_reports_it_in_one_line(words: str, line: str) -> None:
    module, *options = words.split()
    code = (
        f"import os; from proof import {module}; os.geteuid() or os.seteuid(65534); {module}.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *options],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=4 * LIMIT,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith(line)


@pytest.mark.long
@pytest.mark.fault("Primary killed while clients come and go")
def test_a_short_timeline_of_a_failover_keeps_the_promise(tmp_path: Path, notes: Notes) -> None:
    report = timeline.record(tmp_path, SEED, partial(timeline.failover, seconds=0.5))
    killed, elected, over = (at for at, _ in report["events"])
    notes.happened(
        f"another was primary after {elected - killed:.1f} s, "
        f"and all reached it after {over - killed:.1f} s"
    )
    assert report["broken"] == 0, f"seed {SEED}: {report['first broken']}"
    assert report["answers"] > 100
    assert report["said"]["A"][0][1] < max(count for _, count in report["truth"])
