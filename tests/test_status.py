"""The status document and the readiness of a server, computed from a scoreboard."""

import json
import time
from dataclasses import replace

import pytest

from gserver.agent.status import state, status
from gserver.config import Config
from gserver.protocol import ERROR_REPLIES
from gserver.redis_errors import HEARTBEAT_ERRORS
from gserver.scoreboard import Scoreboard

CONFIG = Config(server_id="here", workers=2)


@pytest.mark.parametrize(
    ("workers", "stopping", "expected"),
    [(0, 0, "starting"), (1, 0, "ready"), (2, 1, "draining"), (0, 1, "draining")],
)
def test_a_server_is_ready_from_its_first_worker_to_its_stop_signal(
    workers: int, stopping: int, expected: str
) -> None:
    scoreboard = Scoreboard.create(2)
    scoreboard.put("workers", workers)
    scoreboard.put("stopping", stopping)
    assert state(scoreboard) == expected


def test_workers_are_listed_only_while_they_run() -> None:
    scoreboard = Scoreboard.create(3)
    for name, value in (
        ("pid", 17),
        ("started_at", time.monotonic_ns() - 5_000_000_000),
        ("clients", 4),
        ("clients_peak", 9),
    ):
        scoreboard.cells[scoreboard.cell(name, 1)] = value
    document = status(CONFIG, scoreboard)
    [worker] = document["workers"]["each"]
    assert (worker["slot"], worker["pid"], worker["clients"]) == (1, 17, 4)
    assert 5 <= worker["age_seconds"] < 60
    assert (document["clients"]["now"], document["clients"]["peak"]) == (4, 9)
    scoreboard.clear_dead_worker(1)
    assert status(CONFIG, scoreboard)["workers"]["each"] == []
    assert status(CONFIG, scoreboard)["clients"]["peak"] == 9


def test_every_error_reply_is_listed_and_the_document_is_json() -> None:
    document = status(CONFIG, Scoreboard.create(2))
    assert document["error_replies"] == {reply.name: 0 for reply in ERROR_REPLIES}
    assert json.loads(json.dumps(document)) == document
    assert document["cluster"] is None


def test_counters_of_the_server_are_under_server() -> None:
    scoreboard = Scoreboard.create(2)
    for name in ("worker_restarts", "agent_starts", "reloads", "reload_failures"):
        scoreboard.add(name, 2)
        assert status(CONFIG, scoreboard)["server"][name] == 2
    assert status(CONFIG, scoreboard)["server"]["tls_expires_at"] is None


UNKNOWN = ("servers", "clients", "age_seconds", "silent_seconds")


def test_cluster_figures_are_null_until_known() -> None:
    config = replace(CONFIG, redis_url="redis://x", cluster_name="east")
    scoreboard = Scoreboard.create(2)
    unknown = status(config, scoreboard)["cluster"]
    assert unknown["name"] == "east"
    assert [unknown[name] for name in UNKNOWN] == [None] * 4
    for name, value in (
        ("cluster_servers", 3),
        ("remote_clients", 7),
        ("cluster_updated_at", time.monotonic_ns() - 1_000_000_000),
        ("cluster_doubtful_at", time.monotonic_ns() // 1_000_000 - 5000),
        ("hold_until.0", 1),
        ("heartbeats", 5),
    ):
        scoreboard.put(name, value)
    scoreboard.add("heartbeat_errors.tls", 2)
    scoreboard.put("engine_updated_at.0", time.monotonic_ns())
    cluster = status(config, scoreboard)["cluster"]
    assert (cluster["servers"], cluster["clients"], cluster["heartbeats"]) == (3, 7, 5)
    assert cluster["is_held"] is True
    assert cluster["heartbeat_errors"] == {**dict.fromkeys(HEARTBEAT_ERRORS, 0), "tls": 2}
    assert 5 <= cluster["age_seconds"] < 60
    assert 1 <= cluster["silent_seconds"] < cluster["age_seconds"] - 3
    assert cluster["members"] is None
    server = {"id": "a", "clients": 1, "silent_seconds": 0.1, "is_late": False, "is_this": True}
    members = {"servers": [server], "error_kind": None}
    assert status(config, scoreboard, members)["cluster"]["members"] == members


@pytest.mark.parametrize(
    ("holding", "answering", "is_held"),
    [("", "01", False), ("0", "01", False), ("01", "01", True), ("0", "0", True), ("", "0", False)],
)
def test_the_count_is_held_unless_a_redis_answers_that_holds_nothing(
    holding: str, answering: str, is_held: bool
) -> None:
    config = replace(CONFIG, redis_url="redis://x redis://y")
    scoreboard = Scoreboard.create(2)
    scoreboard.put("cluster_updated_at", time.monotonic_ns())
    for number in "01":
        silent_ns = 0 if number in answering else 60_000_000_000
        scoreboard.put(f"engine_updated_at.{number}", time.monotonic_ns() - silent_ns)
        scoreboard.put(f"hold_until.{number}", int(number in holding))
    cluster = status(config, scoreboard)["cluster"]
    assert cluster["is_held"] is is_held
    assert [engine["is_away"] for engine in cluster["engines"]] == [
        number not in answering for number in "01"
    ]
