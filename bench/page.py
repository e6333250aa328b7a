"""Writes tables and figures between their marks in docs/performance.md.

`bench/capacity.py` does this for docs/cluster.md.
"""

from collections import Counter
from collections.abc import Iterable

from bench import tls
from bench.goals import IDLE, goal_table
from bench.measure import CLIENTS
from bench.report import IDLE_CLIENTS, ONE, TABLES, Figure, Results, figure, number, ratio
from bench.scenarios import ORDERS
from lab.running import ROOT

PAGE = ROOT / "docs/performance.md"
#: The keys that identify the run of a figure.
SOURCE_KEYS = "commit", "date", "processor"
#: The scenarios of the summary.
SUMMARISED = {"speed", "depth", "connect", "connections", "idle", "tls", "start"}


def tables(results: Results, scenarios: Iterable[str]) -> dict[str, str]:
    """The tables of these scenarios, the tables of all, and the source of the samples."""
    usual = usual_source(results)
    found = {
        name: _with_source(item.write(results), source(results, item.scenarios), usual)
        for name, item in TABLES.items()
        if item.scenario in scenarios and all(each in results for each in item.scenarios)
    }
    goals = f"{goal_table(results)}\n\n*{source(results, results)}*"
    if results.keys() >= SUMMARISED:
        found["summary"] = summary(results)
    return {**found, "goals": goals, "software": software(results)}


def idle_client_bytes(results: Results) -> str:
    """The memory of one of 10,000 idle clients, as shown on all pages."""
    return number(_found(figure(results, "idle", "client_bytes", **IDLE)).value)


def summary(results: Results) -> str:
    """The main figures, as a list."""
    gserver = {"server": "gserver"}

    def in_uvloops(name: str, **where: object) -> float:
        return _found(
            ratio(results, name, "cpu_us", {"server": "uvloop"}, **gserver, **where)
        ).value

    def cost(name: str, *others: float, **where: object) -> str:
        """The CPU; `others` are ratios to uvloop in other tables for the same case."""
        own = _found(figure(results, name, "cpu_us", **gserver, **where)).value
        found = [f"{value:.2f}" for value in sorted([in_uvloops(name, **where), *others])]
        shown, tables = (
            (f"{found[0]} to {found[-1]}", ", depending on the table") if others else (found[0], "")
        )
        return f"{number(own)} µs of CPU, {shown} times that of bare uvloop{tables}"

    def of_haproxy(measure: str) -> str:
        haproxy = {"service": next(iter(tls.PROXIES))}
        found = _found(ratio(results, "tls", measure, haproxy, service=tls.OWN)).value
        return f"{found:.2f} times that of HAProxy in front of gserver"

    idle = _found(figure(results, "idle", "cpu_percent", **IDLE)).value
    memory = _found(figure(results, "connections", "memory_mb", **gserver, clients=CLIENTS)).value
    start = _found(figure(results, "start", "start_s", workers=1)).value
    one = cost("speed", in_uvloops("depth", depth=1), in_uvloops("connections", clients=64), **ONE)
    in_turn = cost("speed", depth=32, order=ORDERS[0])
    shuffled = cost("speed", in_uvloops("depth", depth=32), depth=32, order=ORDERS[1])
    return "\n".join(
        [
            f"- A command costs {one}.",
            f"- With 32 commands in flight, in turn, it costs {in_turn}.",
            f"- With 32 in flight, shuffled, it costs {shuffled}.",
            f"- A connection costs {cost('connect')}.",
            f"- An idle client takes {idle_client_bytes(results)} bytes, measured with"
            f" {IDLE_CLIENTS:,} on one worker. Together they use {number(idle)} % of a core.",
            f"- Supervisor, worker and agent take {number(memory)} MB with {CLIENTS} clients.",
            f"- A command over TLS costs {of_haproxy('command_us')}.",
            f"- A TLS connection costs {of_haproxy('connection_us')}.",
            f"- The first reply comes {number(start)} s after the start.",
        ]
    )


def _found(value: Figure | None) -> Figure:
    assert value, "the summary needs full results: run bin/bench"
    return value


def source(results: Results, names: Iterable[str]) -> str:
    """Name the commits, the dates and the machines of some scenarios."""
    machines = [results[name]["machine"] for name in names]
    return ", ".join(
        " and ".join(dict.fromkeys(machine[key] for machine in machines)) for key in SOURCE_KEYS
    )


def usual_source(results: Results) -> str:
    """The source of most scenarios."""
    found = Counter(source(results, [name]) for name in results)
    return max(found, key=lambda text: found[text], default="")


def _with_source(table: str, source: str, usual: str) -> str:
    """A table, with its source below it if that is not the usual one."""
    return table if source == usual else f"{table}\n\n*{source}*"


def software(results: Results) -> str:
    """Name the usual source, and the versions that figures depend on.

    A version that differs between scenarios is named with its scenarios.
    """
    parts = []
    keys = dict.fromkeys(key for result in results.values() for key in result["machine"])
    for key in (key for key in keys if key not in SOURCE_KEYS):
        found: dict[str, list[str]] = {}
        for name, result in results.items():
            found.setdefault(result["machine"].get(key, f"{key} unknown"), []).append(name)
        usual = max(found, key=lambda value: len(found[value]))
        others = [f"{text} for {' and '.join(names)}" for text, names in found.items()]
        parts.append(usual if not others[1:] else " or ".join(others))
    return (
        f"Measured with {usual_source(results)}, unless a table says otherwise.\n"
        f"Versions: {', '.join(parts)}."
    )


def render(results: Results) -> None:
    """Put the tables between their marks in the page."""
    page = PAGE.read_text()
    for name, text in tables(results, results).items():
        page = put(page, f"<!-- table: {name} -->\n\n{text}\n\n<!-- end -->")
    PAGE.write_text(page)


def put(page: str, block: str) -> str:
    """Return a page with a new text of a block, whose first and last lines are its marks."""
    start, *_, end = block.splitlines()
    head, found, rest = page.partition(start)
    assert found, f"the page has no {start}"
    _, found, tail = rest.partition(end)
    assert found, f"the page has no {end} after {start}"
    return f"{head}{block}{tail}"
