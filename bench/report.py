"""From samples to figures, and from figures to tables, goals and the page in docs/."""

import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from bench import admin, tls
from bench.measure import Sample
from bench.peers import PEERS, ROOT
from bench.scenarios import LONG, ORDERS, SHAPES

PAGE = ROOT / "docs/performance.md"
#: A figure that moved by less is taken for the same, however narrow its spread.
LEAST_MOVE = 0.03

#: Of each scenario by name: `machine` and `samples`.
Results = dict[str, dict[str, Any]]


class Figure(NamedTuple):
    """A median over rounds, with the quartiles about it."""

    value: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        spread = f" ({number(self.low)} .. {number(self.high)})" if self.low < self.high else ""
        return number(self.value) + spread

    @property
    def notch(self) -> float:
        """How far off the median may be, at 95 %.

        These are the notches of a box plot (McGill, Tukey, Larsen, 1978).
        """
        return float(1.57 * (self.high - self.low) / self.rounds**0.5)


def number(value: float) -> str:
    """Three digits of a number, all of a large one."""
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
    """What such samples say."""
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


@dataclass(frozen=True)
class Column:
    """A column of a table: a measure, a ratio or a percentile.

    `over` names the samples that the measure is divided by. `percent` takes that percentile of all
    samples.
    """

    measure: str
    over: tuple[str, Any] | None = None
    percent: int | None = None

    def cell(self, results: Results, name: str, where: dict[str, Any]) -> str:
        """What stands there."""
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
        return str(figure(results, name, self.measure, **where) or "-")


@dataclass(frozen=True)
class Table:
    """A table of a scenario: a row for each combination of the values of `keys`.

    The values of `across` stand side by side. `is_turned` exchanges rows and columns.
    """

    scenario: str
    keys: dict[str, str]
    columns: dict[str, Column]
    across: str = ""
    is_turned: bool = False

    def write(self, results: Results) -> str:
        """Write it in Markdown."""
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
            column if side is None else _title(side) for side in sides for column in self.columns
        ]
        rows = []
        for values in seen:
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
    """By numbers, then by the order of commands; servers stay as they are."""
    numbers = [value for value in values if not isinstance(value, str)]
    return [*numbers, *(ORDERS.index(value) for value in values if value in ORDERS)]


def _title(value: Any) -> str:
    if isinstance(value, str):
        return PEERS[value].title if value in PEERS else value
    return f"{value:,g}"


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """Write a table in Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


CPU, OF_UVLOOP = Column("cpu_us"), Column("cpu_us", ("server", "uvloop"))
HEARTBEAT_MEASURES = (
    "heartbeats a second",
    "CPU of Redis, % of a core",
    "CPU a heartbeat, us",
    "sent a heartbeat, bytes",
    "received a heartbeat, bytes",
    "delay p50, ms",
    "delay p99, ms",
    "later than 0.5 s",
    "memory of Redis, MB",
)
IN_UVLOOPS = Column("cpu_in_uvloops")
TABLES = {
    "spellings": Table(
        "spellings",
        {"depth": "in flight", "shape": "commands"},
        {
            "CPU a command, µs": CPU,
            "uvloop's, µs": Column("uvloop_cpu_us"),
            "in uvloop's": IN_UVLOOPS,
        },
    ),
    "speed": Table(
        "speed",
        {"depth": "in flight", "order": "order", "server": "server"},
        {
            "CPU a command, µs": CPU,
            "in uvloop's": OF_UVLOOP,
            "latency p50, µs": Column("p50_us"),
            "p99, µs": Column("p99_us"),
        },
    ),
    "connect": Table(
        "connect", {"server": "server"}, {"CPU a connection, µs": CPU, "in uvloop's": OF_UVLOOP}
    ),
    "idle": Table(
        "idle",
        {"clients": "clients", "server": "server"},
        {
            "memory a client, bytes": Column("client_bytes"),
            "CPU, % of a core": Column("cpu_percent"),
        },
    ),
    "connections": Table(
        "connections", {"clients": "connections; CPU a command, µs"}, {"": CPU}, "server"
    ),
    "memory": Table(
        "connections", {"clients": "connections; memory, MB"}, {"": Column("memory_mb")}, "server"
    ),
    "depth": Table("depth", {"depth": "in flight; CPU a command, µs"}, {"": CPU}, "server"),
    "workers": Table(
        "workers",
        {"clients": "clients", "workers": "workers"},
        {
            "CPU a command, µs": CPU,
            "in one worker's": Column("cpu_us", ("workers", 1)),
            "clients of the idlest, %": Column("idlest_percent"),
            "of the busiest, %": Column("busiest_percent"),
        },
    ),
    "tls": Table(
        "tls",
        {"service": "service"},
        {
            "CPU a command, µs": Column("command_us"),
            "in that without TLS": Column("command_us", ("service", tls.PLAIN)),
            "CPU a connection, µs": Column("connection_us"),
            "in one's without TLS": Column("connection_us", ("service", tls.PLAIN)),
            "memory an idle client, bytes": Column("client_bytes"),
        },
    ),
    "admin": Table(
        "admin",
        {"admin_port": "admin port"},
        {
            "CPU a command, µs": CPU,
            "in that without": Column("cpu_us", ("admin_port", admin.OFF)),
            "CPU of the agent, % of a core": Column("agent_percent"),
        },
        is_turned=True,
    ),
    "hold": Table(
        "hold",
        {"clients": "clients"},
        {
            "lowest WHO": Column("lowest"),
            "highest WHO": Column("highest"),
            "until all were there, s": Column("taken_s"),
            "memory a client, bytes": Column("client_bytes"),
        },
    ),
    "start": Table("start", {"workers": "workers"}, {"to the first answer, s": Column("start_s")}),
    "propagation": Table(
        "propagation",
        {"interval": "`--heartbeat-interval`, s"},
        {"median, ms": Column("delay_ms", percent=50), "most, ms": Column("delay_ms", percent=100)},
    ),
    "heartbeats": Table(
        "heartbeats",
        {"servers": "servers"},
        {
            "script inside Redis, µs a heartbeat": Column("script_us"),
            **{name: Column(name) for name in HEARTBEAT_MEASURES},
        },
        is_turned=True,
    ),
}


@dataclass(frozen=True)
class Goal:
    """A figure with a `limit` that it must not exceed, or must reach; `further` is a wish."""

    what: str
    limit: float
    unit: str
    measured: Callable[[Results], Figure | None]
    further: float | None = None
    is_least: bool = False

    def row(self, results: Results) -> list[str]:
        """Its line of the table."""
        sign = "≥" if self.is_least else "≤"
        wanted, further = (
            "" if limit is None else f"{sign} {limit:,g} {self.unit}".strip()
            for limit in (self.limit, self.further)
        )
        if not (found := self.measured(results)):
            return [self.what, wanted, further, "-", "not measured"]
        is_met = found.value >= self.limit if self.is_least else found.value <= self.limit
        return [self.what, wanted, further, str(found), "yes" if is_met else "**no**"]


def _in(
    other: str, name: str = "speed", measure: str = "cpu_us", **where: Any
) -> Callable[[Results], Figure | None]:
    """What gserver takes in parts of what another server does."""
    return lambda results: ratio(
        results, name, measure, {"server": other}, server="gserver", **where
    )


def _of(name: str, measure: str, **where: Any) -> Callable[[Results], Figure | None]:
    return lambda results: figure(results, name, measure, **where)


def _with(clients: int) -> Callable[[Results], Figure | None]:
    """CPU a command with so many connections, in parts of that with 64."""
    where = {"server": "gserver", "clients": clients}
    return lambda results: ratio(results, "connections", "cpu_us", {"clients": 64}, **where)


def _two_workers(results: Results) -> Figure | None:
    return ratio(results, "workers", "cpu_us", {"workers": 1}, workers=2, clients=64)


def _long(shape: str) -> Callable[[Results], Figure | None]:
    """CPU a command in a burst of more than 4,096 bytes, in parts of that in one of 32 commands."""
    return lambda results: ratio(
        results, "spellings", "cpu_us", {"depth": 32}, shape=shape, depth=LONG
    )


ONE: dict[str, Any] = {"depth": 1, "order": ORDERS[0]}
IDLE = {"server": "gserver", "clients": 10000}
#: Of the goals of spellings, by commands in flight and whether they are shuffled.
SPELLING_LIMITS = {(1, False): 1.0, (1, True): 1.0, (32, False): 1.2, (32, True): 0.9}
GOALS = (
    Goal("CPU a command, 1 in flight, in uvloop's", 1.15, "", _in("uvloop", **ONE), 1.0),
    Goal("CPU a command, 1 in flight, in gevent's", 0.65, "", _in("gevent", **ONE)),
    *(
        Goal(
            f"CPU a command, 32 in flight, {order}, in {title}'s",
            limit,
            "",
            _in(server, depth=32, order=order),
            further,
        )
        for order in ORDERS
        for server, title, limit, further in (
            ("uvloop", "uvloop", 0.9, 0.5),
            ("go", "Go", 1.4, None),
        )
    ),
    *(
        Goal(
            f"CPU a command, {depth} in flight, {shape}, in uvloop's (any spelling)",
            limit,
            "",
            _of("spellings", "cpu_in_uvloops", shape=shape, depth=depth),
        )
        for depth in (1, 32)
        for shape in SHAPES
        for limit in (SPELLING_LIMITS[depth, "shuffled" in shape],)
    ),
    *(
        Goal(f"CPU a command, {LONG:,} in flight, {shape}, in that with 32", 1.05, "", _long(shape))
        for shape, sent in SHAPES.items()
        if LONG in sent.depths
    ),
    Goal("CPU a connection, in uvloop's", 1.5, "", _in("uvloop", "connect"), 1.0),
    Goal("latency p99, 1 in flight, in uvloop's", 1.3, "", _in("uvloop", measure="p99_us", **ONE)),
    Goal(
        "memory a client of 10,000 idle ones",
        2048,
        "bytes",
        _of("idle", "client_bytes", **IDLE),
        500,
    ),
    Goal("the same, in Go's", 1.0, "", _in("go", "idle", "client_bytes", clients=10000)),
    Goal("CPU with 10,000 idle clients, of a core", 1.0, "%", _of("idle", "cpu_percent", **IDLE)),
    Goal("CPU a command with 1,000 connections, in that with 64", 1.3, "", _with(1000)),
    Goal("CPU a command with 10,000 connections, in that with 64", 1.3, "", _with(10000)),
    Goal("CPU a command of two workers, in that of one", 1.1, "", _two_workers),
    *(
        Goal(
            f"share of {clients:,} clients that the busier of two workers has",
            60,
            "%",
            _of("workers", "busiest_percent", workers=2, clients=clients),
        )
        for clients in (64, 1000)
    ),
    Goal(
        "clients held at once, by what each is told",
        50000,
        "",
        _of("hold", "lowest"),
        is_least=True,
    ),
    Goal("start to the first answer", 0.5, "s", _of("start", "start_s", workers=1)),
)


def goal_figures(results: Results) -> dict[str, Figure]:
    """What the goals measure, as far as there are samples for it."""
    return {goal.what: found for goal in GOALS if (found := goal.measured(results))}


def comparison(was: dict[str, Figure], now: dict[str, Figure]) -> str:
    """A table of two sets of figures; it says which moved by more than the spread explains."""
    rows = []
    for what, new in now.items():
        old = was.get(what)
        move = new.value - old.value if old else 0.0
        is_real = old and abs(move) > LEAST_MOVE * old.value and abs(move) > old.notch + new.notch
        said = (
            f"{move / old.value:+.0%}" if old and is_real else "within the spread" if old else "new"
        )
        rows.append([what, str(old or "-"), str(new), said])
    return table(["", "was", "is", "moved"], rows)


def tables(results: Results, scenarios: Iterable[str]) -> dict[str, str]:
    """The tables of these scenarios, that of the goals, and what the samples were made on."""
    machines: dict[str, list[str]] = {}
    for name, result in results.items():
        machines.setdefault(", ".join(result["machine"].values()), []).append(name)
    return {
        **{
            name: item.write(results)
            for name, item in TABLES.items()
            if item.scenario in scenarios and item.scenario in results
        },
        "goals": table(
            ["", "goal", "further aim", "measured", "met"], [goal.row(results) for goal in GOALS]
        ),
        "machine": table(
            ["measured on", "what"], [[text, ", ".join(names)] for text, names in machines.items()]
        ),
    }


def render(results: Results) -> None:
    """Put the tables between their marks in the page."""
    page = PAGE.read_text()
    for name, text in tables(results, results).items():
        start, end = f"<!-- table: {name} -->", "<!-- end -->"
        page = re.sub(
            f"{start}.*?{end}", f"{start}\n\n{text}\n\n{end}".replace("\\", r"\\"), page, flags=re.S
        )
    PAGE.write_text(page)
