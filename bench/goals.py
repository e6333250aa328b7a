"""The goals for gserver's figures, and the changes since a baseline."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.report import IDLE_CLIENTS, ONE, Figure, Results, figure, number, ratio, table
from bench.scenarios import LONG, ORDERS, SHAPES

#: A smaller change of a figure is ignored, however narrow its spread.
LEAST_MOVE = 0.03


@dataclass(frozen=True)
class Goal:
    """A figure with a `limit` that it must not exceed, or must reach; `aim` is a stricter target.

    Goals of one `group` have the same limit, and share a row of the table.
    """

    what: str
    limit: float
    unit: str
    measured: Callable[[Results], Figure | None]
    aim: float | None = None
    is_least: bool = False
    group: str = ""

    @property
    def wanted(self) -> str:
        """The limit, and the aim if there is one, as text."""
        sign = "≥" if self.is_least else "≤"
        aim = "" if self.aim is None else f", aim {self.aim:,g}"
        return f"{sign} {self.limit:,g} {self.unit}".strip() + aim

    def is_met(self, found: Figure) -> bool:
        """Whether a figure is within the limit."""
        return found.value >= self.limit if self.is_least else found.value <= self.limit


def _row(title: str, goals: list[Goal], results: Results) -> list[str]:
    """The row of a goal, or of a group of goals."""
    found = [(goal, figure) for goal in goals if (figure := goal.measured(results))]
    if not found:
        return [title, goals[0].wanted, "-", "not measured"]
    met = sum(goal.is_met(figure) for goal, figure in found)
    if len(goals) == 1:
        ((goal, only),) = found
        return [title, goal.wanted, _shown(goal, only), "yes" if met else "**no**"]
    values = [figure.value for _, figure in found]
    text = f"{met} of {len(found)}"
    return [
        title,
        goals[0].wanted,
        f"{number(min(values))} to {number(max(values))}",
        text if met == len(found) else f"**{text}**",
    ]


def _shown(goal: Goal, found: Figure) -> str:
    """The figure, with a fourth digit if three would hide that it misses its limit."""
    text = str(found)
    if not goal.is_met(found) and number(found.value) == number(goal.limit):
        return text.replace(number(found.value), f"{found.value:.4f}", 1)
    return text


def goal_table(results: Results) -> str:
    """The table of all goals."""
    groups: dict[str, list[Goal]] = {}
    for goal in GOALS:
        groups.setdefault(goal.group or goal.what, []).append(goal)
    head = ["figure", "goal", "measured", "met"]
    return table(head, [_row(title, goals, results) for title, goals in groups.items()])


def _in(
    other: str, name: str = "speed", measure: str = "cpu_us", **where: Any
) -> Callable[[Results], Figure | None]:
    """The ratio of gserver's figure to that of another server."""
    return lambda results: ratio(
        results, name, measure, {"server": other}, server="gserver", **where
    )


def _of(name: str, measure: str, **where: Any) -> Callable[[Results], Figure | None]:
    return lambda results: figure(results, name, measure, **where)


def _with(clients: int) -> Callable[[Results], Figure | None]:
    """The ratio of CPU per command with so many connections to that with 64."""
    where = {"server": "gserver", "clients": clients}
    return lambda results: ratio(results, "connections", "cpu_us", {"clients": 64}, **where)


def _two_workers(results: Results) -> Figure | None:
    return ratio(results, "workers", "cpu_us", {"workers": 1}, workers=2, clients=64)


def _long(shape: str) -> Callable[[Results], Figure | None]:
    """The ratio of CPU per command with `LONG` in flight to that with 32."""
    return lambda results: ratio(
        results, "spellings", "cpu_us", {"depth": 32}, shape=shape, depth=LONG
    )


IDLE = {"server": "gserver", "clients": IDLE_CLIENTS}
#: Limits of the scenario `spellings`, by commands in flight and whether they are shuffled.
SPELLING_LIMITS = {(1, False): 1.0, (1, True): 1.0, (32, False): 1.2, (32, True): 0.9}


def _spelling_group(depth: int, limit: float) -> str:
    """The shared row of goals of the scenario `spellings`."""
    is_shuffled = depth > 1 and limit == SPELLING_LIMITS[depth, True]
    order = ", shuffled" if is_shuffled else ""
    return f"any spelling, {depth} in flight{order}: ratio to uvloop"


GOALS = (
    Goal("1 in flight: ratio to uvloop", 1.15, "", _in("uvloop", **ONE), 1.0),
    Goal("1 in flight: ratio to gevent", 0.65, "", _in("gevent", **ONE)),
    *(
        Goal(
            f"32 in flight, {order}: ratio to {title}",
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
            f"spelling {shape}, {depth} in flight: ratio to uvloop",
            limit,
            "",
            _of("spellings", "cpu_in_uvloops", shape=shape, depth=depth),
            group=_spelling_group(depth, limit),
        )
        for depth in (1, 32)
        for shape in SHAPES
        for limit in (SPELLING_LIMITS[depth, "shuffled" in shape],)
    ),
    *(
        Goal(
            f"spelling {shape}, {LONG:,} in flight: ratio to 32",
            1.05,
            "",
            _long(shape),
            group=f"any spelling, {LONG:,} in flight: ratio to 32",
        )
        for shape, sent in SHAPES.items()
        if LONG in sent.depths
    ),
    Goal("CPU per connection: ratio to uvloop", 1.5, "", _in("uvloop", "connect"), 1.0),
    Goal("latency p99: ratio to uvloop", 1.3, "", _in("uvloop", measure="p99_us", **ONE)),
    Goal("memory per idle client", 2048, "bytes", _of("idle", "client_bytes", **IDLE), 500),
    Goal("memory per conversation", 20_480, "bytes", _of("conversations", "conversation_bytes")),
    Goal(
        "latency p99 beside 5,000 conversations", 2000, "µs", _of("conversations", "asking_p99_us")
    ),
    Goal(
        "memory per idle client: ratio to Go",
        1.0,
        "",
        _in("go", "idle", "client_bytes", clients=IDLE_CLIENTS),
    ),
    Goal("CPU of 10,000 idle clients", 1.0, "% of a core", _of("idle", "cpu_percent", **IDLE)),
    *(
        Goal(
            f"{clients:,} connections: ratio to 64",
            1.3,
            "",
            _with(clients),
            group="1,000 and 10,000 connections: ratio to 64",
        )
        for clients in (1000, 10_000)
    ),
    Goal("two workers, 64 clients: ratio to one worker", 1.1, "", _two_workers),
    *(
        Goal(
            f"{clients:,} clients: share of the busier of two workers",
            60,
            "%",
            _of("workers", "busiest_percent", workers=2, clients=clients),
            group="share of clients of the busier of two workers",
        )
        for clients in (64, 1000)
    ),
    Goal("clients at once", 50000, "", _of("hold", "lowest"), is_least=True),
    Goal("start to first reply", 0.5, "s", _of("start", "start_s", workers=1)),
    Goal("handover of 10,000 clients", 2, "s", _of("handover", "handover_s", clients=10000)),
    Goal("p99 of replies meanwhile", 50, "ms", _of("handover", "p99_ms", clients=10000)),
)


def goal_figures(results: Results) -> dict[str, Figure]:
    """The figures of all goals with samples."""
    return {goal.what: found for goal in GOALS if (found := goal.measured(results))}


def comparison(was: dict[str, Figure], now: dict[str, Figure]) -> str:
    """A table of two sets of figures. It marks changes beyond the spread."""
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
