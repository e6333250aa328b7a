"""From samples to figures, and from figures to tables.

Goals are in `bench/goals.py`, and `bench/page.py` writes both into the pages in docs/.
"""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bench import admin, tls
from bench.measure import Sample
from bench.peers import PEERS
from bench.scenarios import ORDERS
from gserver.cluster.heartbeat import JITTER, MIN_PAUSE_SECONDS

#: Allowed for two round trips to Redis in Δ: see `delta_ms`.
ROUND_TRIPS_SECONDS = 0.025

#: By scenario: `machine` and `samples`.
Results = dict[str, dict[str, Any]]


class Figure(NamedTuple):
    """A median over rounds, with its quartiles."""

    value: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        low, high = number(self.low), number(self.high)
        return number(self.value) + (f" ({low}-{high})" if low != high else "")

    @property
    def notch(self) -> float:
        """The possible error of the median, at 95 % confidence.

        These are the notches of a box plot (McGill, Tukey, Larsen, 1978).
        """
        return float(1.57 * (self.high - self.low) / self.rounds**0.5)


def number(value: float) -> str:
    """A number with three digits, or all digits of a large one."""
    if value == int(value):
        return f"{value:,.0f}"
    for digits, least in enumerate((100, 10, 1)):
        if abs(value) >= least:
            return f"{value:,.{digits}f}"
    return f"{value:,.3f}"


def samples_of(results: Results, name: str, **where: Any) -> list[Sample]:
    """The samples of a scenario that have these values."""
    samples: list[Sample] = results.get(name, {}).get("samples", [])
    return [
        sample
        for sample in samples
        if all(sample.get(key, value) == value for key, value in where.items())
    ]


def pick(results: Results, name: str, measure: str, **where: Any) -> list[float]:
    """The values of a measure in these samples."""
    return [sample[measure] for sample in samples_of(results, name, **where) if measure in sample]


def summary(values: list[float]) -> Figure | None:
    """The median of values, and the quartiles."""
    if not values:
        return None
    low, median, high = (
        statistics.quantiles(values, n=4, method="inclusive") if values[1:] else values * 3
    )
    return Figure(median, low, high, len(values))


def figure(results: Results, name: str, measure: str, **where: Any) -> Figure | None:
    """The median of a measure."""
    return summary(pick(results, name, measure, **where))


def ratio(
    results: Results, name: str, measure: str, over: dict[str, Any], **where: Any
) -> Figure | None:
    """The median of a measure, divided by that of samples that differ in `over`.

    The quartiles are those of the rounds' own ratios, centred on this ratio.
    """
    above, below = (pick(results, name, measure, **(where | more)) for more in ({}, over))
    rounds = summary([one / other for one, other in zip(above, below, strict=False)])
    if not rounds:
        return None
    value = statistics.median(above) / statistics.median(below)
    return Figure(
        value, value * rounds.low / rounds.value, value * rounds.high / rounds.value, rounds.rounds
    )


def delta_ms(interval: float) -> float:
    """Δ for a `--heartbeat-interval`: how old another server's count in WHO may be.

    A change is reported after `MIN_PAUSE_SECONDS` at most. The other server reads it with its next
    heartbeat.
    """
    return 1000 * (JITTER[1] * interval + MIN_PAUSE_SECONDS + ROUND_TRIPS_SECONDS)


@dataclass(frozen=True)
class Column:
    """A column of a table: a measure, a ratio or a percentile.

    `over` names the samples that the measure is divided by. `percent` takes that percentile of all
    samples. `minus` names the samples whose median is subtracted. `scenario` and `where`
    default to those of the table. `has_spread` adds the quartiles.
    """

    measure: str
    over: tuple[str, Any] | None = None
    percent: int | None = None
    minus: tuple[str, Any] | None = None
    scenario: str = ""
    where: dict[str, Any] = field(default_factory=dict)
    has_spread: bool = True

    def cell(self, results: Results, name: str, where: dict[str, Any]) -> str:
        """The text of a cell."""
        name, where = self.scenario or name, {**where, **self.where}
        if self.percent is not None:
            values = sorted(pick(results, name, self.measure, **where))
            return (
                number(values[min(len(values) - 1, len(values) * self.percent // 100)])
                if values
                else "-"
            )
        if self.over:
            found = ratio(results, name, self.measure, dict([self.over]), **where)
            return f"{found.value:.2f}" if found else "-"
        found = figure(results, name, self.measure, **where)
        if not found:
            return "-"
        if self.minus:
            least = figure(results, name, self.measure, **(where | dict([self.minus])))
            return number(found.value - least.value) if least else "-"
        return str(found) if self.has_spread else number(found.value)


class DeltaColumn(Column):
    """A column of the limit Δ, which is not measured."""

    def cell(self, results: Results, name: str, where: dict[str, Any]) -> str:  # noqa: ARG002
        """The text of a cell."""
        return f"{delta_ms(where['interval']):,.0f}"


@dataclass(frozen=True)
class Table:
    """A table of a scenario: a row for each combination of the values of `keys`.

    `only` limits the rows to these values. The values of `across` are side by side. `is_turned`
    exchanges rows and columns.
    """

    scenario: str
    keys: dict[str, str]
    columns: dict[str, Column]
    across: str = ""
    is_turned: bool = False
    only: tuple[Any, ...] = ()

    @property
    def scenarios(self) -> list[str]:
        """All scenarios that the figures come from."""
        others = [column.scenario for column in self.columns.values() if column.scenario]
        return list(dict.fromkeys([self.scenario, *others]))

    def write(self, results: Results) -> str:
        """Write the table in Markdown."""
        names = [*self.keys, *([self.across] if self.across else [])]
        samples = [
            sample
            for sample in results[self.scenario]["samples"]
            if all(name in sample for name in names)
        ]
        seen = sorted(
            dict.fromkeys(tuple(sample[name] for name in self.keys) for sample in samples),
            key=_order,
        )
        sides = (
            list(dict.fromkeys(sample[self.across] for sample in samples))
            if self.across
            else [None]
        )
        head = [*self.keys.values()]
        head += [
            column if side is None else f"{_title(side)} {column}".strip()
            for side in sides
            for column in self.columns
        ]
        rows = []
        for values in seen:
            if self.only and values[0] not in self.only:
                continue
            where = dict(zip(self.keys, values, strict=True))
            cells = [
                column.cell(
                    results, self.scenario, where if side is None else {**where, self.across: side}
                )
                for side in sides
                for column in self.columns.values()
            ]
            rows.append([*map(_title, values), *cells])
        if self.is_turned:
            head, *rows = map(list, zip(head, *rows, strict=True))
        return table(head, rows)


def _order(values: tuple[Any, ...]) -> list[float]:
    """Sort by numbers, then by the order of commands; servers keep their order."""
    numbers = [value for value in values if not isinstance(value, str)]
    return [*numbers, *(ORDERS.index(value) for value in values if value in ORDERS)]


def _title(value: Any) -> str:
    if isinstance(value, str):
        return PEERS[value].title if value in PEERS else value
    return f"{value:,g}"


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """Write a table in Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


CPU, CPU_MEDIAN = Column("cpu_us"), Column("cpu_us", has_spread=False)
ONE: dict[str, Any] = {"depth": 1, "order": ORDERS[0]}
IDLE_CLIENTS = 10_000
#: Rows of tables whose plots show all values.
SOME_CONNECTIONS = 64, 1000, 10_000
SOME_DEPTHS = 1, 8, 32, 128, 1024
SOME_INTERVALS = 0.1, 0.5, 2.0

HEARTBEATS, HEARTBEAT_CPU = "heartbeats", "CPU a heartbeat, us"
#: The cost of a cluster's heartbeats for Redis: titles, and names in the results.
HEARTBEAT_ROWS = {
    "time of the script in Redis, µs": "script_us",
    "heartbeats per second": "heartbeats a second",
    "CPU of Redis, % of a core": "CPU of Redis, % of a core",
    "CPU per heartbeat, µs": HEARTBEAT_CPU,
    "bytes sent per heartbeat": "sent a heartbeat, bytes",
    "bytes received per heartbeat": "received a heartbeat, bytes",
    "delay p99, ms": "delay p99, ms",
    "replies later than 0.5 s": "later than 0.5 s",
    "memory of Redis, MB": "memory of Redis, MB",
}


def heartbeat_table(titles: Iterable[str] = HEARTBEAT_ROWS, *, is_turned: bool = True) -> Table:
    """The table of heartbeats with these rows; columns if not `is_turned`."""
    columns = {title: Column(HEARTBEAT_ROWS[title]) for title in titles}
    return Table(HEARTBEATS, {"servers": "servers"}, columns, is_turned=is_turned)


#: The tables of docs/performance.md, by the names of their marks.
TABLES = {
    "servers": Table(
        "speed",
        {"server": "server"},
        {
            "1 in flight, µs": Column("cpu_us", where=ONE, has_spread=False),
            **{
                f"32 {order}, µs": Column(
                    "cpu_us", where={"depth": 32, "order": order}, has_spread=False
                )
                for order in ORDERS
            },
            "p50, µs": Column("p50_us", where=ONE, has_spread=False),
            "p99, µs": Column("p99_us", where=ONE, has_spread=False),
            "connection, µs": Column("cpu_us", scenario="connect", has_spread=False),
            "idle client, bytes": Column(
                "client_bytes", scenario="idle", where={"clients": IDLE_CLIENTS}, has_spread=False
            ),
        },
    ),
    "spellings": Table(
        "spellings", {"shape": "ratio to uvloop"}, {"in flight": Column("cpu_in_uvloops")}, "depth"
    ),
    "depth": Table("depth", {"depth": "in flight"}, {"": CPU_MEDIAN}, "server", only=SOME_DEPTHS),
    "connections": Table(
        "connections", {"clients": "connections"}, {"": CPU_MEDIAN}, "server", only=SOME_CONNECTIONS
    ),
    "conversations": Table(
        "conversations",
        {"clients": "clients with half a line"},
        {
            "bytes for each": Column("conversation_bytes"),
            "bytes when they have left": Column("left_bytes"),
            "p99 of another client, µs": Column("asking_p99_us"),
        },
    ),
    "workers": Table(
        "workers",
        {"clients": "clients", "workers": "workers"},
        {
            "CPU per command, µs": CPU,
            "ratio to one": Column("cpu_us", ("workers", 1)),
            "share of the busiest, %": Column("busiest_percent", has_spread=False),
        },
    ),
    "tls": Table(
        "tls",
        {"service": "service"},
        {
            "CPU per command, µs": Column("command_us"),
            "ratio": Column("command_us", ("service", tls.PLAIN)),
            "per connection, µs": Column("connection_us"),
            "its ratio": Column("connection_us", ("service", tls.PLAIN)),
            "more per idle client, bytes": Column("client_bytes", minus=("service", tls.PLAIN)),
        },
    ),
    "admin": Table(
        "admin",
        {"admin_port": "admin port"},
        {
            "CPU per command, µs": CPU,
            "ratio": Column("cpu_us", ("admin_port", admin.OFF)),
            "CPU of the agent, % of a core": Column("agent_percent"),
        },
    ),
    "hold": Table(
        "hold",
        {"clients": "clients"},
        {
            "lowest WHO": Column("lowest"),
            "highest WHO": Column("highest"),
            "seconds to connect all": Column("taken_s"),
        },
    ),
    "handover": Table(
        "handover",
        {"clients": "idle clients"},
        {
            "handover, s": Column("handover_s"),
            "p99 of replies, ms": Column("p99_ms"),
            "longest reply, ms": Column("longest_ms"),
            "most by which WHO was too high": Column("over", percent=100),
            "lost, wrong or missing": Column("failed", percent=100),
        },
    ),
    "start": Table("start", {"workers": "workers"}, {"first reply, s": Column("start_s")}),
    "propagation": Table(
        "propagation",
        {"interval": "`--heartbeat-interval`, s"},
        {
            "median, ms": Column("delay_ms", percent=50),
            "longest, ms": Column("delay_ms", percent=100),
            "limit Δ, ms": DeltaColumn("delay_ms"),
        },
        only=SOME_INTERVALS,
    ),
    "heartbeats": heartbeat_table(),
}
