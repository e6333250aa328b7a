"""How many servers one Redis carries: the generated part of docs/cluster.md."""

import statistics

from bench.peers import ROOT
from bench.report import Column, Results, Table, figure, number, samples_of, table
from gserver.cluster.heartbeat import JITTER, MIN_PAUSE_SECONDS
from gserver.config import Config

PAGE = ROOT / "docs/cluster.md"
BEGIN, END = "<!-- heartbeats -->", "<!-- /heartbeats -->"
SCENARIO = "heartbeats"
CPU = "CPU a heartbeat, us"
#: The part of one core that Redis may use for heartbeats.
CORE_SHARE = 0.5
#: The mean time between two heartbeats of a server with the default interval: while its count does
#: not change, and while it changes all the time.
SECONDS_BETWEEN = {
    "quiet": Config().heartbeat_interval_seconds * statistics.mean(JITTER),
    "busy": MIN_PAUSE_SECONDS,
}
COLUMNS = {
    "heartbeats a second": Column("heartbeats a second"),
    "CPU of Redis, % of a core": Column("CPU of Redis, % of a core"),
    "CPU, µs a heartbeat": Column(CPU),
    "reply p99, ms": Column("delay p99, ms"),
}


def section(results: Results) -> str:
    """What a heartbeat costs Redis, and how many servers it carries."""
    samples = samples_of(results, SCENARIO)
    most = max((sample["servers"] for sample in samples), default=0)
    cpu = figure(results, SCENARIO, CPU, servers=most)
    if cpu is None:
        return f"Not measured yet: `bin/bench {SCENARIO}`."
    rows = [
        [name, number(1 / seconds), f"{_rounded_down(CORE_SHARE * 1e6 / cpu.value * seconds):,}"]
        for name, seconds in SECONDS_BETWEEN.items()
    ]
    share = f"servers at {100 * CORE_SHARE:g} % of a core"
    machine = results[SCENARIO]["machine"]
    where = ", ".join(machine[key] for key in ("processor", "redis-server", "date"))
    return "\n\n".join(
        [
            f"Measured with `bin/bench {SCENARIO}` ({where}):",
            Table(SCENARIO, {"servers": "servers"}, COLUMNS).write(results),
            f"From its CPU time at {most:,} servers, one Redis carries:",
            table(["cluster", "heartbeats a second each", share], rows),
        ]
    )


def _rounded_down(value: float) -> int:
    """Two digits of a number: more would claim too much."""
    zeros = max(0, len(str(int(value))) - 2)
    return int(value) // int(10**zeros) * int(10**zeros)


def render(results: Results) -> None:
    """Put the section between its marks in the page."""
    page = PAGE.read_text()
    head, _, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    assert end, f"{PAGE.name} has no {END}"
    PAGE.write_text(f"{head}{BEGIN}\n\n{section(results)}\n\n{END}{tail}")
