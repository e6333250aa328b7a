"""docs/design.md matches the reports."""

import json
import re

from lab.running import ROOT
from proof import outages
from proof.availability import (
    BUDGET_SECONDS,
    COMMON,
    PLANNED,
    WINDOW_SECONDS,
    costs,
    needed,
    sums_table,
    total,
)

PAGE = (ROOT / "docs/design.md").read_text()
MAX_WORDS = 2000


def test_the_budget_matches_the_reliability_page() -> None:
    report = json.loads(outages.FILE.read_text())
    seconds = {fault: cost.median for fault, (*_, cost) in costs(report, "replies").items()}
    planned = sum(seconds[fault] for fault in PLANNED)
    single = sum(seconds.values()) - planned
    common = sum(cause.cost for cause in COMMON)
    each = ", ".join(f"{fault} {seconds[fault]:.2f}" for fault in PLANNED)
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", PAGE, re.M))
    assert rows["single faults: worker, server, machine"] == f"{single:.2f}"
    assert rows[f"planned: {each}"] == f"{planned:.2f}"
    assert rows["common causes: release, site, DNS, balancer, overload"] == f"{common:.0f}"
    sum_seconds = single + planned + common
    assert rows["**sum**"] == f"**{sum_seconds:.0f} of {BUDGET_SECONDS:,.0f}**"
    assert f"Common causes are {common / sum_seconds:.1%}".replace("%", " %") in PAGE


def test_the_other_figures_follow_from_the_reports() -> None:
    report = json.loads(outages.FILE.read_text())
    months = re.search(r"miss 99.95 % in about (one month in \d+),", sums_table(report))
    assert months
    assert f"{months[1]} misses 99.95 %" in PAGE
    one, two = (
        100 * (1 - total(cost for *_, cost in costs(report, sort).values()).worst / WINDOW_SECONDS)
        for sort in ("who", "who_of_two")
    )
    assert f"{two:.2f} % of answers are exact with two Redis, and {one:.2f} % with one" in PAGE
    retried = total(cost for *_, cost in costs(report, "replies").values()).retried
    assert retried == 0, "every request succeeded when it was repeated"
    spent = total(cost for *_, cost in costs(report, "replies").values()).median
    spent += sum(cause.cost for cause in COMMON)
    assert f"each needs {100 * needed(3, spent_seconds=spent):.1f} %" in PAGE
    assert f"needs two, {100 * needed(3, 2, spent):.1f} %" in PAGE
    assert f"{BUDGET_SECONDS - spent:.0f} s" in PAGE
    common = sum(cause.cost for cause in COMMON)
    assert f"{1e6 * common / WINDOW_SECONDS:.0f} requests in a million" in PAGE
    assert f"{WINDOW_SECONDS * 1e-6:.1f} s a month" in PAGE


def test_a_reviewer_can_read_the_page_in_twenty_minutes() -> None:
    words = [word for word in PAGE.split() if re.search(r"\w", word)]
    assert len(words) <= MAX_WORDS
