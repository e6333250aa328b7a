"""docs/cluster.md shows the measured figures of heartbeats."""

import json

import pytest

from bench import capacity
from bench.report import HEARTBEAT_CPU
from lab.running import ROOT


def test_the_cluster_page_matches_the_results() -> None:
    results = json.loads((ROOT / "bench/results.json").read_text())
    section = f"{capacity.BEGIN}\n\n{capacity.section(results)}\n\n{capacity.END}"
    assert section in capacity.PAGE.read_text(), "bin/bench --render"


def test_the_number_of_servers_follows_from_the_cpu_of_a_heartbeat_in_the_largest_cluster() -> None:
    machine = dict.fromkeys(("commit", "processor", "redis-server", "date"), "x")
    samples = [{"servers": size, HEARTBEAT_CPU: cpu} for size, cpu in ((3, 500), (3000, 40))]
    section = capacity.section({"heartbeats": {"machine": machine, "samples": samples}})
    assert pytest.approx(0.425) == capacity.SECONDS_BETWEEN["quiet"]
    # Half a second of CPU is 12,500 heartbeats of 40 us: 5,312 or 1,250 servers.
    assert "servers at 50 % of a core" in section
    assert "| quiet | 2.35 | 5,300 |" in section
    assert "| busy | 10 | 1,200 |" in section


def test_the_script_time_is_shown_as_one_range_for_all_sizes() -> None:
    machine = dict.fromkeys(("commit", "processor", "redis-server", "date"), "x")
    samples: list[dict[str, float]] = [{"servers": 3, HEARTBEAT_CPU: 500}]
    samples += [{"servers": 3, "script_us": time} for time in (20.1, 31.9)]
    section = capacity.section({"heartbeats": {"machine": machine, "samples": samples}})
    assert "The script itself takes 20 to 32 µs" in section


def test_the_cost_of_lists_is_shown() -> None:
    machine = dict.fromkeys(("commit", "processor", "redis-server", "date"), "x")
    samples: list[dict[str, float]] = [{"servers": 3, HEARTBEAT_CPU: 500}]
    samples += [{"listed": 100, "list_us": 312.4, "list_bytes": 8765.0}]
    section = capacity.section({"heartbeats": {"machine": machine, "samples": samples}})
    assert "With 100 servers" in section
    assert "312 µs of CPU, and its reply has 8.77 kB" in section


def test_without_results_there_are_no_figures() -> None:
    assert capacity.section({}) == "Not measured yet: `bin/bench heartbeats`."
