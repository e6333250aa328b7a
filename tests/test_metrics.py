"""What Prometheus is told, made from a scoreboard."""

import re
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from gserver.agent.prometheus import ScoreboardCollector
from gserver.config import Config
from gserver.scoreboard import SERVICE_BOUNDS_NS, Scoreboard
from gserver.serve.replies import Replies
from tests.running import ROOT

CONFIG = Config(server_id="here", redis_url="redis://x")


def told(scoreboard: Scoreboard, config: Config = CONFIG) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(ScoreboardCollector(config, scoreboard))
    lines = [
        line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")
    ]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_bursts_are_counted_by_their_time_up_to_each_bound() -> None:
    scoreboard = Scoreboard.create(2)
    replies = Replies(CONFIG, scoreboard, 1, ())
    for bursts, nanoseconds in ((1, 5_000), (1, 5_001), (4, 4 * 60_000), (1, 10**12)):
        replies.count_reads(bursts, nanoseconds)
    now = told(scoreboard)
    counts = [
        now[f'gserver_service_seconds_bucket{{le="{bound / 1e9:g}"}}']
        for bound in SERVICE_BOUNDS_NS
    ]
    assert counts[:6] == [1, 2, 2, 2, 6, 6]
    assert counts == sorted(counts)
    assert counts[-1] == 6
    assert (
        now['gserver_service_seconds_bucket{le="+Inf"}']
        == now["gserver_service_seconds_count"]
        == 7
    )
    assert now["gserver_service_seconds_sum"] == pytest.approx(1000.00025, rel=1e-6)


def test_what_is_not_known_is_not_told() -> None:
    scoreboard = Scoreboard.create(2)
    assert "gserver_cluster_servers" not in told(scoreboard)
    assert "gserver_tls_certificate_expiry_timestamp_seconds" not in told(scoreboard)
    assert not [
        name
        for name in told(scoreboard, replace(CONFIG, redis_url=""))
        if "cluster" in name.partition("{")[0]
    ]
    scoreboard.put("view", 1)
    scoreboard.put("servers", 3)
    assert told(scoreboard)["gserver_cluster_servers"] == 3
    assert told(scoreboard)["gserver_cluster_view_age_seconds"] > 0


def test_workers_are_told_beside_how_many_there_should_be() -> None:
    scoreboard = Scoreboard.create(4)
    scoreboard.put("workers", 2)
    now = told(scoreboard, replace(CONFIG, workers=3))
    assert (now["gserver_workers"], now["gserver_workers_wanted"]) == (2, 3)


def test_every_metric_is_in_the_operators_table_and_the_other_way_round() -> None:
    scoreboard = Scoreboard.create(2)
    scoreboard.put("view", 1)
    scoreboard.cells[scoreboard.cell("tls_expires_at", 1)] = 1
    Replies(CONFIG, scoreboard, 0, ())
    registry = CollectorRegistry()
    registry.register(ScoreboardCollector(CONFIG, scoreboard))
    names = {
        metric.name + {"counter": "_total", "info": "_info"}.get(metric.type, "")
        for metric in ScoreboardCollector(CONFIG, scoreboard).collect()
    }
    page = (ROOT / "docs/operations.md").read_text()
    assert set(re.findall(r"`(gserver_\w+)(?:\{\w+\})?`", page)) == names
