"""Memory, CPU time and descriptors of the server's processes, read from /proc by prometheus_client.

The names are those that Prometheus's clients use for their own process.
"""

import os
from collections.abc import Iterator
from typing import Any

from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as Family

from gserver.scoreboard import Scoreboard

SUPERVISOR, WORKER, AGENT = "supervisor", "worker", "agent"
#: For /status.json: its names, and those of Prometheus.
SHOWN = {
    "memory_bytes": "process_resident_memory_bytes",
    "cpu_seconds": "process_cpu_seconds_total",
    "open_files": "process_open_fds",
    "started_at": "process_start_time_seconds",
}


def running(scoreboard: Scoreboard) -> list[tuple[str, int]]:
    """Return role and process id of each process. Call this in the agent."""
    workers = [(WORKER, pid) for pid in scoreboard.by_slot("pid") if pid]
    return [(SUPERVISOR, os.getppid()), *workers, (AGENT, os.getpid())]


def families(scoreboard: Scoreboard) -> Iterator[Family]:
    """Yield the metrics of all processes, with their roles and ids as labels."""
    merged: dict[str, Family] = {}
    for role, pid in running(scoreboard):
        for family in _collect(pid):
            kind = CounterMetricFamily if family.type == "counter" else GaugeMetricFamily
            if family.name not in merged:
                merged[family.name] = kind(
                    family.name, family.documentation, labels=["role", "pid"]
                )
            value = family.samples[0].value
            merged[family.name].add_metric([role, str(pid)], value)  # type: ignore[attr-defined]
    yield from merged.values()


def described(scoreboard: Scoreboard) -> list[dict[str, Any]]:
    """Return what /status.json says of each process. A figure that cannot be read is None."""
    found = []
    for role, pid in running(scoreboard):
        values = {each.name: each.value for family in _collect(pid) for each in family.samples}
        figures = {name: values.get(source) for name, source in SHOWN.items()}
        found.append({"role": role, "pid": pid, **figures})
    return found


def _collect(pid: int) -> list[Family]:
    return list(ProcessCollector(pid=lambda: pid, registry=None).collect())
