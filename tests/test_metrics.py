"""The catalogue of metrics, and its consistency with every format, document and file."""

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from gserver.agent.prometheus import ScoreboardCollector
from gserver.agent.statsd import COUNTERS, GAUGES, TIMINGS
from gserver.agent.status import status
from gserver.commands import BUILT_IN, where, who, why
from gserver.config import Config
from gserver.metrics import DURATION_BOUNDS_NS, METRICS, Kind, Metric, in_seconds, percentile
from gserver.scoreboard import BUCKETS_OFFSET, TIME_OFFSET, Scoreboard
from gserver.serve.replies import Replies
from lab.documents import prometheus_type as documented_type
from lab.documents import rows, statsd_metrics
from lab.running import ROOT

CONFIG = Config(server_id="here", redis_url="redis://x")
BY_NAME = {metric.name: metric for metric in METRICS}
#: The metric with the version, which is not in the catalogue.
INFO = "gserver_info"


def filled() -> Scoreboard:
    """A scoreboard for which every figure of the catalogue is known."""
    scoreboard = Scoreboard.create(2)
    scoreboard.put("cluster_updated_at", 1)
    scoreboard.put("engine_updated_at.1", time.monotonic_ns() - 7_000_000_000)
    for name in ("tls_expires_at", "pid"):
        scoreboard.cells[scoreboard.cell(name, 1)] = 1
    scoreboard.command_cell("WHO", 0)
    return scoreboard


def samples(scoreboard: Scoreboard, config: Config = CONFIG) -> dict[str, float]:
    """The samples of /metrics by name and labels."""
    registry = CollectorRegistry()
    registry.register(ScoreboardCollector(config, scoreboard))
    lines = [
        line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")
    ]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def sample_names(metric: Metric) -> set[str]:
    """The names that a metric's samples have in /metrics; empty if it has none."""
    name = metric.prometheus
    if not name:
        return set()
    if metric.buckets:
        return {f"{name}_bucket", f"{name}_sum", f"{name}_count"}
    return {name if metric.kind is Kind.GAUGE else f"{name}_total"}


# The catalogue.


def test_every_figure_has_its_own_name_in_every_format() -> None:
    assert len(BY_NAME) == len(METRICS)
    for format_name in ("statsd", "prometheus", "json"):
        names = [name for metric in METRICS if (name := getattr(metric, format_name))]
        assert len(set(names)) == len(names), format_name


def noun(name: str) -> str:
    """A name without the parts that only one format adds."""
    name = name.replace(".", "_").removeprefix("gserver_").removeprefix("server_")
    name = name.removeprefix("cluster_").removesuffix("_now")
    return re.sub(r"_(ns|ms|timestamp_seconds|seconds|time|at)$", "", name)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_figure_has_the_same_noun_in_every_format(name: str) -> None:
    metric = BY_NAME[name]
    names = [shown for shown in (metric.statsd, metric.prometheus, metric.json) if shown]
    assert {noun(shown) for shown in names} <= {noun(name)}


def test_a_unit_is_part_of_the_name() -> None:
    for metric in METRICS:
        if metric.kind is Kind.STATE:
            continue
        suffix = {"ns": ("_ns", "_at", "heartbeat"), "ms": ("_ms",), "s": ("_at",)}
        if metric.unit:
            assert metric.name.endswith(suffix[metric.unit]), metric.name
        if metric.prometheus and metric.unit:
            assert metric.prometheus.endswith("_seconds")


def test_a_timing_names_the_counter_of_the_timed_events() -> None:
    timings = [metric for metric in METRICS if metric.kind is Kind.TIMING]
    assert timings
    for metric in timings:
        assert BY_NAME[metric.count].kind is Kind.COUNTER
        assert not metric.buckets or BY_NAME[metric.count].label == metric.label


def test_moments_and_states_are_shown_only_for_each_worker() -> None:
    for metric in METRICS:
        if metric.kind in (Kind.MOMENT, Kind.STATE):
            assert (metric.statsd, metric.prometheus, metric.json) == ("", "", "")


# Prometheus.


def test_each_histogram_bucket_counts_values_up_to_its_bound() -> None:
    scoreboard = Scoreboard.create(2)
    for number, runs in ((0, 1), (1, 1), (4, 4), (len(DURATION_BOUNDS_NS), 1)):
        first = scoreboard.command_cell("NAP", number % 2)
        scoreboard.cells[first + BUCKETS_OFFSET + number] = runs
    scoreboard.cells[scoreboard.command_cell("NAP", 1) + TIME_OFFSET] = 1_000_000_250_001
    now = samples(scoreboard)
    counts = [
        now[f'gserver_command_seconds_bucket{{command="NAP",le="{bound / 1e9:g}"}}']
        for bound in DURATION_BOUNDS_NS
    ]
    assert counts[:6] == [1, 2, 2, 2, 6, 6]
    assert counts == sorted(counts)
    assert counts[-1] == 6
    assert now['gserver_command_seconds_bucket{command="NAP",le="+Inf"}'] == 7
    assert now['gserver_command_seconds_count{command="NAP"}'] == 7
    seconds = now['gserver_command_seconds_sum{command="NAP"}']
    assert seconds == pytest.approx(1000.00025, rel=1e-6)


def test_quick_commands_take_as_long_as_the_reads_with_which_they_came() -> None:
    scoreboard = Scoreboard.create(2)
    replies = Replies(CONFIG, scoreboard, 1, BUILT_IN)
    ask = partial(replies.reply_to, sock=None)
    for commands, reads, nanoseconds in (
        ((who,), 1, 5_000),
        ((why, who, who), 2, 2 * 5_001),
        ((), 4, 4 * 60_000),
        ((where,), 1, 10**12),
    ):
        for command in commands:
            ask(command)
        replies.count_reads(reads, nanoseconds)
    seconds = status(CONFIG, scoreboard)["command_seconds"]
    assert status(CONFIG, scoreboard)["reads"] == 8
    assert seconds["WHO"]["buckets"] == [1, 2, *[0] * (len(DURATION_BOUNDS_NS) - 1)]
    assert seconds["WHY"]["buckets"] == [0, 1, *[0] * (len(DURATION_BOUNDS_NS) - 1)]
    assert seconds["WHERE"]["buckets"] == [*[0] * len(DURATION_BOUNDS_NS), 1]
    assert seconds["WHO"]["seconds"] == pytest.approx(15_002e-9, abs=1e-6)


def test_percentiles_are_read_from_the_buckets() -> None:
    none = [0] * (len(DURATION_BOUNDS_NS) + 1)
    assert percentile(none, 50) is None
    # Bounds of 5, 10, 20 us: half of ten are below 5 us.
    assert percentile([5, 0, 5, *none[3:]], 50) == pytest.approx(5e-6)
    assert percentile([5, 0, 5, *none[3:]], 75) == pytest.approx(15e-6)
    assert percentile([5, 0, 5, *none[3:]], 100) == pytest.approx(20e-6)
    assert percentile([10, *none[1:]], 50) == pytest.approx(2.5e-6)
    assert percentile([*none[:-1], 1], 99) == DURATION_BOUNDS_NS[-1] / 1e9


def test_unknown_figures_have_no_sample() -> None:
    scoreboard = Scoreboard.create(2)
    assert "gserver_cluster_servers" not in samples(scoreboard)
    assert "gserver_tls_expires_timestamp_seconds" not in samples(scoreboard)
    alone = samples(filled(), replace(CONFIG, redis_url=""))
    assert not [name for name in alone if "cluster" in name.partition("{")[0]]
    scoreboard.put("cluster_updated_at", 1)
    scoreboard.put("cluster_servers", 3)
    assert samples(scoreboard)["gserver_cluster_servers"] == 3
    assert samples(scoreboard)["gserver_cluster_age_seconds"] > 0


def test_the_silence_of_each_redis_is_in_seconds() -> None:
    scoreboard, config = filled(), replace(CONFIG, redis_url="redis://a redis://b")
    scoreboard.put("server_started_at", time.monotonic_ns() - 70_000_000_000)
    found = samples(scoreboard, config)
    name = "gserver_cluster_engine_silent_seconds"
    silences = [each for each in found if each.startswith(name)]
    assert silences == [f'{name}{{engine="{number}"}}' for number in (0, 1)]
    assert 7 <= found[silences[1]] < 60
    assert found[silences[0]] >= 70, "one that has never answered is silent since the start"


def test_workers_are_shown_with_the_configured_number() -> None:
    scoreboard = Scoreboard.create(4)
    scoreboard.put("workers", 2)
    now = samples(scoreboard, replace(CONFIG, workers=3))
    assert (now["gserver_workers"], now["gserver_workers_wanted"]) == (2, 3)


def test_a_figure_is_converted_by_its_unit() -> None:
    assert in_seconds(BY_NAME["cluster_age_ms"], 1500) == 1.5
    assert in_seconds(BY_NAME["heartbeat_ns"], 25e8) == 2.5
    assert in_seconds(BY_NAME["clients"], 7) == 7


def test_times_are_in_seconds() -> None:
    scoreboard = filled()
    scoreboard.put("heartbeat_ns", 1_500_000_000)
    assert samples(scoreboard)["gserver_cluster_heartbeat_seconds_total"] == 1.5
    cluster = status(CONFIG, scoreboard)["cluster"]
    assert cluster["heartbeat_seconds"] == 1.5


def test_prometheus_gets_every_metric_of_the_catalogue() -> None:
    now = {name.partition("{")[0] for name in samples(filled())}
    # prometheus_client names those of the processes.
    assert "process_resident_memory_bytes" in now
    now = {name for name in now if not name.startswith("process_")}
    assert now == {INFO}.union(*(sample_names(metric) for metric in METRICS))


# StatsD.


def test_statsd_gets_every_metric_of_the_catalogue() -> None:
    names = {*GAUGES, *COUNTERS, *TIMINGS}
    for metric in METRICS:
        if metric.statsd and metric.label != "command":
            for name in metric.names:
                assert name.replace(metric.name, metric.statsd, 1) in names
                names.remove(name.replace(metric.name, metric.statsd, 1))
    assert names == set()


# JSON.

#: Figures of /status.json that are not in the catalogue.
OTHER_PATHS = {
    *("verdict", "reasons", "events", "last_second", "server.now", "processes"),
    *(f"last_minute.{name}" for name in ("mistakes", "failures", "rejected")),
    *(f"server.{name}" for name in ("id", "version", "endpoints", "state")),
    *(
        "latency_bounds_seconds",
        "workers.each",
        "cluster.name",
        "cluster.is_held",
        "cluster.members",
        "cluster.engines",
    ),
}


def paths(value: Any, path: str = "") -> Iterator[str]:
    """The path of each value in a document; an object that a family has counts as one."""
    families = {metric.json for metric in METRICS if metric.label}
    for name, item in value.items():
        if isinstance(item, dict) and f"{path}{name}" not in families:
            yield from paths(item, f"{path}{name}.")
        else:
            yield f"{path}{name}"


def test_the_status_has_exactly_the_figures_of_the_catalogue() -> None:
    document = status(CONFIG, filled())
    assert set(paths(document)) == OTHER_PATHS | {metric.json for metric in METRICS if metric.json}
    [worker] = document["workers"]["each"]
    named = {metric.worker_json for metric in METRICS if metric.worker_json}
    assert set(worker) == {"slot", *named}


def test_the_page_reads_only_figures_of_the_status() -> None:
    document = status(CONFIG, filled())
    script = (ROOT / "gserver/agent/page.html").read_text().partition("<script>")[2]
    script = script.replace("clients.json", "")  # A path.
    of_groups = set(re.findall(r"\b(server|clients|workers|cluster)\.(\w+)", script))
    assert len(of_groups) > 20
    for group, name in of_groups:
        assert name in document[group], f"{group}.{name}"
    # `now` is the document, and `w` one of its workers.
    of_all = set(re.findall(r"\bnow\.(\w+)", script)) | set(
        re.findall(r"per\(s => .*?s\.(\w+)", script)
    )
    assert {"commands", "error_replies", "command_seconds"} <= of_all <= document.keys()
    of_worker = set(re.findall(r"\bw\.(\w+)", script))
    assert {"pid", "reads"} <= of_worker <= document["workers"]["each"][0].keys()


# Documents and files.


def metric_table() -> dict[str, str]:
    """The types of the Prometheus metrics in the table of the operator's manual, by name."""
    return {name.partition("{")[0]: documented_type(name) for name in rows("Metrics")}


def prometheus_type(metric: Metric) -> str:
    if metric.buckets:
        return "histogram"
    return "gauge" if metric.kind is Kind.GAUGE else "counter"


def test_the_manual_lists_every_prometheus_metric_with_its_type() -> None:
    expected = {INFO: "info"}
    for metric in METRICS:
        if metric.prometheus:
            kind = prometheus_type(metric)
            expected[metric.prometheus + ("_total" if kind == "counter" else "")] = kind
    assert metric_table() == expected


def test_the_manual_lists_every_statsd_metric_with_its_kind() -> None:
    expected = dict.fromkeys(GAUGES, "gauge") | dict.fromkeys(COUNTERS, "counter")
    expected |= dict.fromkeys(TIMINGS, "timing, ms")
    expected["cluster.age_ms"] = "gauge, ms"
    expected |= {"commands.NAME": "counter", "command_time.NAME": "timing, ms"}
    assert statsd_metrics() == expected


#: Names of recording rules, and a label of Prometheus that the links of alerts need.
OTHER_NAMES = re.compile(r"\w+:gserver_\w+:\w+|gserver_runbook")
FILES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(path for path in (ROOT / "deploy").rglob("*") if path.is_file()),
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_documents_and_deploy_files_name_only_metrics_of_the_catalogue(path: Path) -> None:
    known = {INFO}.union(*(sample_names(metric) for metric in METRICS))
    known |= {metric.prometheus for metric in METRICS if metric.buckets}
    named = set(re.findall(r"\bgserver_[a-z_]+", OTHER_NAMES.sub("", path.read_text())))
    assert named - known == set()


def test_documents_name_only_existing_cluster_figures() -> None:
    known = {*GAUGES, *COUNTERS, *TIMINGS, *OTHER_PATHS, *rows("Logs")}
    known |= {metric.json for metric in METRICS}
    for path in FILES:
        if path.suffix == ".md":
            named = set(re.findall(r"`(cluster\.[a-z_]+)`", path.read_text()))
            assert named - known == set(), path.name
