"""Unavailability in 30 days: the frequency of each fault, times its length, times its share.

The frequency is assumed, with a reason. Length and share are measured if possible
(proof/outages.py). Faults that hit all servers at once are assumed too, and counted separately.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any, NamedTuple

import click

from bench.report import table
from proof import outages
from proof.outages import Outage
from proof.probes import PERIOD_SECONDS, STAYING
from proof.world import need_root, write

DAYS = 30
WINDOW_SECONDS = DAYS * 86400
OBJECTIVE = 0.9995
BUDGET_SECONDS = WINDOW_SECONDS * (1 - OBJECTIVE)
SITE = "the site or the provider fails"
FAILOVERS = "Redis primary killed", "Redis primary hung"


class Rate(NamedTuple):
    """How often a fault happens to a service of three servers, and why.

    `lasts_seconds` is for a fault that does not end by itself. `share` is the part of all requests
    that would fail during the fault if replies needed Redis.
    """

    per_year: float
    why: str
    lasts_seconds: float = 0.0
    share: float = 1.0


#: The measured faults.
RATES = {
    "worker killed": Rate(12, "out of memory, a bug in a library: monthly"),
    "worker hung": Rate(6, "a custom command that never ends"),
    "agent killed": Rate(12, "as for workers"),
    "agent hung": Rate(6, "as for workers"),
    "server killed": Rate(18, "kernel, memory, a person: every two months each"),
    "host frozen": Rate(12, "a VM is moved or paused: four times a year each"),
    "host gone": Rate(18, "power, hardware, a switch: every two months each"),
    "rolling reload": Rate(26, "certificates, custom commands: every two weeks"),
    "rolling upgrade": Rate(104, "two releases a week"),
    "rolling restart": Rate(12, "other options, a new kernel: once a month"),
    "Redis primary killed": Rate(6, "every two months"),
    "Redis primary hung": Rate(6, "a slow disk, a slow command: every two months"),
    "planned failover": Rate(24, "upgrades: twice a month"),
    "Redis wiped": Rate(2, "a mistake: twice a year"),
    "Redis gone": Rate(12, "its own objective: half an hour a month", 1800),
    "server cut off from Redis": Rate(
        12, "a firewall rule, a cable: five minutes a month", 300, share=1 / 3
    ),
}
#: Each of two Redis, which fail independently, is gone for half an hour a month.
GONE_SECONDS, YEAR_SECONDS = 1800, 365 * 86400
#: The faults of a cluster with two Redis. Others have the rates above.
RATES_OF_TWO = {
    "one Redis killed": Rate(12, "each every two months"),
    "one Redis hung": Rate(12, "each every two months: a slow disk, a slow command"),
    "one Redis restarted": Rate(48, "upgrades: each twice a month"),
    "one Redis wiped": Rate(4, "a mistake: each twice a year"),
    "one Redis gone": Rate(24, "each for half an hour a month"),
    # Two that begin at random, of the same length, overlap for half of it.
    "both Redis gone": Rate(
        2 * 12 * 12 * GONE_SECONDS / YEAR_SECONDS,
        "by chance at once, each for half an hour a month",
        GONE_SECONDS / 2,
    ),
    "server cut off from both": Rate(
        12, "a firewall rule, a cable: five minutes a month", 300, share=1 / 3
    ),
}
#: The planned ones.
PLANNED = "rolling reload", "rolling upgrade", "rolling restart"


class Common(NamedTuple):
    """A fault that redundancy does not help against, or that checks miss. It is not measured."""

    what: str
    per_year: float
    seconds: float
    share: float
    why: str

    @property
    def cost(self) -> float:
        """Seconds in 30 days."""
        return in_window(self.per_year, self.seconds * self.share)


COMMON = (
    Common(
        "a server fails clients but passes health checks", 6, 300, 1 / 3, "until a person notices"
    ),
    Common("the balancer fails over", 6, 10, 1, "a pair, with VRRP or similar"),
    Common("overload", 2.4, 600, 1 / 2, "more load than two servers carry"),
    Common(
        "a bad release or configuration reaches all",
        2.4,
        1200,
        1,
        "not staged, or the error shows late",
    ),
    Common(SITE, 1.2, 1800, 1, "one site"),
    Common("a DNS mistake", 0.6, 3600, 1, "the length of its TTL"),
)


class Cost(NamedTuple):
    """Seconds in 30 days: by the median trial, by the worst, and by the worst with one retry."""

    median: float
    worst: float
    retried: float


def in_window(per_year: float, seconds: float) -> float:
    """Seconds in 30 days of a fault that takes `seconds` each time."""
    return per_year * DAYS / 365 * seconds


def cost(rate: Rate, trials: Sequence[Outage], lasts_seconds: float = 0.0) -> Cost:
    """The cost of a fault. One with `lasts_seconds` hits all requests until it is over."""
    each = [
        lasts_seconds + trial.seconds * (1 if lasts_seconds else trial.share) for trial in trials
    ]
    retried = [trial.seconds * trial.retried for trial in trials]
    return Cost(
        *(in_window(rate.per_year, seconds) for seconds in (median(each), max(each), max(retried)))
    )


def costs(report: dict[str, Any], sort: str) -> dict[str, tuple[Rate, list[Outage], Cost]]:
    """The measurements and the cost of each fault; replies do not depend on Redis."""
    found = {name: [Outage(*figures) for figures in each] for name, each in report[sort].items()}
    rates = {name: rate for name, rate in {**RATES, **RATES_OF_TWO}.items() if name in found}
    if sort == "replies":
        rates = {name: rate._replace(lasts_seconds=0.0) for name, rate in rates.items()}
    return {
        name: (rate, found[name], cost(rate, found[name], rate.lasts_seconds))
        for name, rate in rates.items()
    }


def total(costs: Iterable[Cost]) -> Cost:
    """The sum."""
    return Cost(*map(sum, zip(*costs, strict=True)))


def availability(lost_seconds: float) -> str:
    """A percentage. Frequencies are assumed, so a loss of 0.01 % or more has two decimals."""
    if lost_seconds == 0:
        return "no loss measured"
    lost = 100 * lost_seconds / WINDOW_SECONDS
    percent = f"{100 - lost:.2f} %" if lost >= 0.01 else f"{100 - lost:.4f} %"
    return percent.replace("100.0000", "over 99.9999")


def _cells(rate: Rate, trials: Sequence[Outage]) -> list[str]:
    """Length and share: the median, and the worst in brackets."""
    seconds, shares = [each.seconds for each in trials], [each.share for each in trials]
    if rate.lasts_seconds:
        return [f"{_seconds(rate.lasts_seconds)} + {_both(_seconds, seconds)}", "all"]
    return [_both(_seconds, seconds), _both(_percent, shares) if any(shares) else "none"]


def _both(write: Callable[[float], str], values: Sequence[float]) -> str:
    middle, worst = write(median(values)), write(max(values))
    return middle if middle == worst else f"{middle} ({worst})"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _of_budget(lost_seconds: float) -> str:
    percent = 100 * lost_seconds / BUDGET_SECONDS
    return f"{percent:.0f} %" if percent >= 1 or percent == 0 else f"{percent:.1f} %"


def _seconds(value: float) -> str:
    return f"{value:,.2f}" if 0 < value < 10 else f"{value:,.0f}"


def replies_table(report: dict[str, Any]) -> str:
    """The cost of faults for replies, and the sum. Faults without cost are only in `who_table`."""
    found = _costly(report)
    rows = [
        [name, f"{rate.per_year:.3g}", rate.why, *_cells(rate, trials), *map(_seconds, each)]
        for name, (rate, trials, each) in found.items()
    ]
    sums = [f"**{_seconds(each)}**" for each in total(each for *_, each in found.values())]
    head = [
        "fault",
        "a year",
        "assumed because",
        "lasts, s",
        "requests hit",
        "s in 30 days",
        "worst",
        "with a retry",
    ]
    return table(head, [*rows, ["**sum**", "", "", "", "", *sums]])


def _costly(report: dict[str, Any]) -> dict[str, tuple[Rate, list[Outage], Cost]]:
    """The faults that cost replies."""
    return {
        name: found
        for name, found in costs(report, "replies").items()
        if found[2].worst or name in PLANNED
    }


def who_page(report: dict[str, Any]) -> str:
    """The time in which WHO is not exact, with one Redis that has replicas."""
    return f"{who_table(report, 'who')}\n\n{failover_verdict(report)}"


def who_of_two_page(report: dict[str, Any]) -> str:
    """The same, with two Redis that are independent."""
    return who_table(report, "who_of_two")


def who_table(report: dict[str, Any], sort: str) -> str:
    """The verdict, and the costs of the faults with their sum."""
    found = costs(report, sort)
    shown_before = _costly(report)
    rows = [
        [
            name,
            f"{rate.per_year:.3g}",
            "as above" if name in shown_before else rate.why,
            *_cells(rate, trials),
            *map(_seconds, each[:2]),
        ]
        for name, (rate, trials, each) in found.items()
    ]
    sums = [f"**{_seconds(each)}**" for each in total(each for *_, each in found.values())[:2]]
    head = [
        "fault",
        "a year",
        "assumed because",
        "wrong for, s",
        "replies wrong",
        "s in 30 days",
        "worst",
    ]
    shown = table(head, [*rows, ["**sum**", "", "", "", "", *sums]])
    return f"{who_verdict(report, sort)}\n\n{shown}"


def failover_verdict(report: dict[str, Any]) -> str:
    """Return how long WHO was wrong when the primary was killed or hung."""
    seconds = [Outage(*figures).seconds for name in FAILOVERS for figures in report["who"][name]]
    return (
        "With `down-after-milliseconds 500`, a failover from a dead or hung primary made WHO wrong "
        f"for {_seconds(max(seconds))} s at most."
    )


def who_verdict(report: dict[str, Any], sort: str) -> str:
    """Return the share of exact replies to WHO, and whether it meets the objective."""
    found = costs(report, sort)
    lost = total(each for *_, each in found.values()).worst
    lasting = sum(each.worst for rate, _, each in found.values() if rate.lasts_seconds)
    left = BUDGET_SECONDS - (lost - lasting)
    verdict = (
        f"With these rates, {availability(lost)} of the replies to WHO are exact. "
        f"The others fall in {_seconds(lost)} s of 30 days: "
        f"{_seconds(lasting)} s in which one server or all have no contact with any Redis, "
        f"and {_seconds(lost - lasting)} s for the other faults of the table. "
        "Without contact, all replies to WHO are taken as wrong."
    )
    if lost <= BUDGET_SECONDS:
        return (
            f"{verdict} **This meets 99.95 %**, as long as loss of contact with all Redis does not "
            f"exceed {math.floor(left / 60)} minutes in 30 days."
        )
    return (
        f"{verdict} **This misses 99.95 %.** "
        "More servers do not help. To meet 99.95 %, loss of contact with Redis must not exceed "
        f"{math.floor(left / 60)} minutes in 30 days."
    )


def common_table() -> str:
    """The common causes, and the sum."""
    rows = [
        [
            each.what,
            f"{each.per_year:g}",
            each.why,
            _seconds(each.seconds),
            _percent(each.share),
            _seconds(each.cost),
        ]
        for each in COMMON
    ]
    rows.append(["**sum**", "", "", "", "", f"**{_seconds(sum(each.cost for each in COMMON))}**"])
    return table(
        ["cause", "a year", "assumed because", "lasts, s", "requests hit", "s in 30 days"], rows
    )


def sums_table(report: dict[str, Any]) -> str:
    """The sums beside the budget."""
    by_median, by_worst, retried = total(each for *_, each in costs(report, "replies").values())
    common = sum(each.cost for each in COMMON)
    of_two = costs(report, "who_of_two")
    stale = {name: each.worst for name, (*_, each) in costs(report, "who").items()}
    redis = sum(
        each * RATES[name].share
        for name, each in stale.items()
        if "Redis" in name or "failover" in name
    )
    lines = {
        "single faults and planned work, median": by_median,
        "single faults and planned work, worst": by_worst,
        "single faults and planned work, worst, with a retry": retried,
        "common causes, costs assumed too": common,
        "**single faults and planned work, worst, and common causes**": by_worst + common,
        "the same, if replies needed Redis": by_worst + common + redis,
        "WHO not exact, worst (a separate objective)": sum(stale.values()),
        "the same with two Redis": total(each for *_, each in of_two.values()).worst,
    }
    rows = [
        [what, _seconds(lost), _of_budget(lost), availability(lost)] for what, lost in lines.items()
    ]
    title = "assumed frequencies, measured costs"
    head = [title, "s in 30 days", f"of the {BUDGET_SECONDS:,.0f} s of 99.95 %", "availability"]
    shown = table(head, rows)
    return f"{shown}\n\n{_spread(by_worst, common)}\n\n{_asked_seldom(by_median, common)}"


def budget_parts(report: dict[str, Any]) -> list[tuple[str, float]]:
    """Return each part of the sum of single faults and common causes, the largest first."""
    found = costs(report, "replies")
    planned = total(found[name][2] for name in PLANNED).median
    single = total(each for *_, each in found.values()).median - planned
    parts = [(each.what, each.cost) for each in COMMON]
    parts += [("planned reloads, upgrades and restarts", planned), ("single faults", single)]
    return sorted(parts, key=lambda part: -part[1])


def _spread(single: float, common: float) -> str:
    """The variation of 30 days and of a year."""
    left = BUDGET_SECONDS - single
    months, years = (
        missed(
            [(each.per_year * days / 365, each.seconds * each.share) for each in COMMON],
            left * days / DAYS,
        )
        for days in (DAYS, 365)
    )
    site = next(each.seconds for each in COMMON if each.what == SITE)
    return (
        "These are means over many years. "
        f"**Expect to miss 99.95 % in about one month in {1 / months:.0f}, "
        f"and in one whole year in {1 / years:.0f}.** "
        f"One outage of the site ({site:,.0f} s) is enough for a month. "
        f"If common causes were {math.ceil(10 * left / common) / 10} times as frequent, "
        "the mean would miss it too."
    )


def _asked_seldom(by_median: float, common: float) -> str:
    """How the cost of single faults and planned work depends on the pace of the clients.

    A broken connection costs a request, however seldom it is used.
    """
    lost_requests = by_median / (PERIOD_SECONDS * STAYING)
    longest = (BUDGET_SECONDS - common) / lost_requests
    return (
        "The first two rows are for a probe that asks on each kept connection every "
        f"{2 * STAYING * PERIOD_SECONDS:g} s. For clients that ask every T s on connections they "
        "keep, and do not notice a close, these rows are "
        f"about {lost_requests:.1f} T s. "
        f"From T = {math.ceil(longest)} s on, the mean misses 99.95 %."
    )


def missed(causes: Sequence[tuple[float, float]], budget_seconds: float) -> float:
    """Return the probability that the causes take more seconds of a window than the budget.

    A cause is its mean number in the window and its length in seconds. Causes are independent: the
    sum is compound Poisson, and Panjer's recursion (ASTIN Bulletin 12, 1981) gives the probability
    of each whole number of seconds.
    """
    whole = [(often, round(seconds)) for often, seconds in causes]
    chances = [math.exp(-sum(often for often, _ in whole))]
    for lost in range(1, int(budget_seconds) + 1):
        each = (
            often * seconds * chances[lost - seconds] for often, seconds in whole if seconds <= lost
        )
        chances.append(sum(each) / lost)
    return 1 - sum(chances)


def needed(servers: int, enough: int = 1, spent_seconds: float = 0) -> float:
    """How available each server must be if servers fail independently, and so many are enough.

    Other causes have spent some seconds of the budget. By bisection.
    """
    objective = 1 - (BUDGET_SECONDS - spent_seconds) / WINDOW_SECONDS
    low, high = 0.0, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        if together(servers, middle, enough) < objective:
            low = middle
        else:
            high = middle
    return high


def together(servers: int, each: float, enough: int = 1) -> float:
    """How often so many of the servers are available at once, at best."""
    return sum(
        math.comb(servers, up) * each**up * (1 - each) ** (servers - up)
        for up in range(enough, servers + 1)
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--measure",
    is_flag=True,
    help="First measure how long each fault lasts: needs root, 7 minutes per round.",
)
@click.option("--rounds", default=5, show_default=True, help="How often each fault is measured.")
@click.option(
    "--engines",
    type=click.Choice(["1", "2"]),
    help="Measure only with so many Redis; the other figures stay.",
)
@click.option(
    "--only", default="", help="Measure only faults whose names contain this, without the sums."
)
@click.option(
    "--write",
    "is_kept",
    is_flag=True,
    help="Write the measurements to proof/results/outages.json, and docs/reliability.md.",
)
def main(measure: bool, rounds: int, engines: str | None, only: str, is_kept: bool) -> None:
    """Add up the cost of faults against 99.95 %, from proof/results/outages.json or measured."""
    if only and (not measure or is_kept):
        raise click.UsageError("--only needs --measure, and excludes --write")
    if not any(only in name for name in (*RATES, *RATES_OF_TWO)):
        known = ", ".join((*RATES, *RATES_OF_TWO))
        raise click.BadParameter(f"no such fault; the faults are: {known}", param_hint="--only")
    if measure:
        need_root()
    from proof import page

    report = json.loads(outages.FILE.read_text())
    if measure:
        for number in (1, 2) if engines is None else (int(engines),):
            report |= outages.measure(number, rounds, lambda text: click.echo(text, err=True), only)
        if only:
            return
    if is_kept:
        from proof import budget_plot

        write(report, outages.FILE)
        page.render()
        budget_plot.draw(report)
    parts = replies_table, lambda _: common_table(), who_page, who_of_two_page, sums_table
    for part in parts:
        click.echo(part(report) + "\n")


if __name__ == "__main__":
    main(prog_name="bin/availability")
