"""How many servers one Redis carries: the generated part of docs/cluster.md."""

import statistics
from collections.abc import Iterator, Sequence

from bench.measure import Sample
from bench.page import put, source
from bench.report import (
    HEARTBEAT_CPU,
    HEARTBEATS,
    Results,
    figure,
    heartbeat_table,
    number,
    samples_of,
    table,
)
from gserver.cluster.heartbeat import JITTER, MIN_PAUSE_SECONDS
from gserver.config import Config
from lab.running import ROOT

PAGE = ROOT / "docs/cluster.md"
BEGIN, END = "<!-- heartbeats -->", "<!-- /heartbeats -->"
#: The part of one core that Redis may use for heartbeats.
CORE_SHARE = 0.5
#: The mean time between two heartbeats of a server with the default interval: with a constant
#: count, and with a count that changes all the time.
SECONDS_BETWEEN = {
    "quiet": Config().heartbeat_interval_seconds * statistics.mean(JITTER),
    "busy": MIN_PAUSE_SECONDS,
}
COLUMNS = (
    "heartbeats per second",
    "CPU of Redis, % of a core",
    "CPU per heartbeat, µs",
    "delay p99, ms",
)


def section(results: Results) -> str:
    """The cost of a heartbeat to Redis, and how many servers one Redis carries."""
    samples = samples_of(results, HEARTBEATS)
    most = max((sample.get("servers", 0) for sample in samples), default=0)
    cpu = figure(results, HEARTBEATS, HEARTBEAT_CPU, servers=most)
    if cpu is None:
        return f"Not measured yet: `bin/bench {HEARTBEATS}`."
    rows = [
        [name, number(1 / seconds), f"{_rounded_down(CORE_SHARE * 1e6 / cpu.value * seconds):,}"]
        for name, seconds in SECONDS_BETWEEN.items()
    ]
    share = f"servers at {100 * CORE_SHARE:g} % of a core"
    where = f"{source(results, [HEARTBEATS])}, {results[HEARTBEATS]['machine']['redis-server']}"
    return "\n\n".join(
        [
            f"Measured with `bin/bench {HEARTBEATS}` ({where}):",
            heartbeat_table(COLUMNS, is_turned=False).write(results),
            *_script(samples),
            *_lists(samples),
            f"From its CPU time at {most:,} servers, one Redis carries:",
            table(["cluster", "heartbeats per second each", share], rows),
        ]
    )


def _script(samples: Sequence[Sample]) -> Iterator[str]:
    """Explain why the CPU of a heartbeat differs between rows."""
    times = [sample["script_us"] for sample in samples if "script_us" in sample]
    if times:
        yield (
            f"The script itself takes {min(times):.0f} to {max(times):.0f} µs, whatever the number "
            "of servers. The CPU per heartbeat also\n"
            "includes background work of Redis, which dominates with few servers, and wake-ups, "
            "each of which probably serves several\nheartbeats when Redis is busy."
        )


def _lists(samples: Sequence[Sample]) -> Iterator[str]:
    """Tell what the lists of servers cost."""
    for sample in samples:
        if "list_us" in sample:
            yield (
                "With several Redis, replies list the other servers. With "
                f"{sample['listed']:,} servers, the most that are listed, a heartbeat takes\n"
                f"{number(sample['list_us'])} µs of CPU, and its reply has "
                f"{number(sample['list_bytes'] / 1000)} kB."
            )


def _rounded_down(value: float) -> int:
    """A number with two digits: more would be false precision."""
    zeros = max(0, len(str(int(value))) - 2)
    return int(value) // int(10**zeros) * int(10**zeros)


def render(results: Results) -> None:
    """Put the section between its marks in the page."""
    PAGE.write_text(put(PAGE.read_text(), f"{BEGIN}\n\n{section(results)}\n\n{END}"))
