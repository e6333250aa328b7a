"""What there is to tell of a server, made from a scoreboard."""

import json
import time
from dataclasses import replace

import pytest

from gserver.agent.status import state, status
from gserver.config import Config
from gserver.protocol import ERROR_REPLIES
from gserver.scoreboard import Scoreboard

CONFIG = Config(server_id="here", workers=2)


@pytest.mark.parametrize(
    ("workers", "stopping", "draining", "expected"),
    [
        (0, 0, 0, "starting"),
        (1, 0, 0, "ready"),
        (2, 1, 0, "draining"),
        (2, 1, 1, "draining"),
        (0, 0, 1, "draining"),
    ],
)
def test_a_server_is_ready_from_its_first_worker_to_the_signal_that_ends_it(
    workers: int, stopping: int, draining: int, expected: str
) -> None:
    scoreboard = Scoreboard.create(2)
    for name, value in (("workers", workers), ("stopping", stopping), ("draining", draining)):
        scoreboard.put(name, value)
    assert state(scoreboard) == expected


def test_only_workers_that_are_there_are_told_of() -> None:
    scoreboard = Scoreboard.create(3)
    for name, value in (
        ("pid", 17),
        ("begun", time.monotonic_ns() - 5_000_000_000),
        ("clients", 4),
        ("peak", 9),
    ):
        scoreboard.cells[scoreboard.cell(name, 1)] = value
    told = status(CONFIG, scoreboard)
    [worker] = told["workers"]["each"]
    assert (worker["slot"], worker["pid"], worker["clients"]) == (1, 17, 4)
    assert 5 <= worker["age_seconds"] < 6
    assert (told["clients"]["now"], told["clients"]["peak"]) == (4, 9)
    scoreboard.settle(1)
    assert status(CONFIG, scoreboard)["workers"]["each"] == []
    assert status(CONFIG, scoreboard)["clients"]["peak"] == 9


def test_each_refusal_is_an_error_or_a_rejection_and_all_of_it_is_json() -> None:
    told = status(CONFIG, Scoreboard.create(2))
    assert {*told["errors"], *told["rejected"]} == {refusal.name for refusal in ERROR_REPLIES}
    assert json.loads(json.dumps(told)) == told
    assert told["cluster"] is None


def test_a_cluster_is_told_of_when_it_is_known() -> None:
    config, scoreboard = (
        replace(CONFIG, redis_url="redis://x", cluster_name="east"),
        Scoreboard.create(2),
    )
    assert (
        status(config, scoreboard)["cluster"]["name"],
        status(config, scoreboard)["cluster"]["servers"],
    ) == ("east", None)
    for name, value in (
        ("servers", 3),
        ("remote", 7),
        ("view", time.monotonic_ns()),
        ("hold_until", 1),
        ("beats", 5),
    ):
        scoreboard.put(name, value)
    scoreboard.add("beat_errors.tls", 2)
    told = status(config, scoreboard)["cluster"]
    assert (told["servers"], told["clients"], told["is_held"], told["beats"]) == (3, 7, True, 5)
    assert told["beat_errors"] == {"tls": 2}
    assert 0 <= told["view_age_seconds"] < 1
    assert told["roster"] is None
    roster = {"servers": [{"id": "a"}]}
    assert status(config, scoreboard, roster)["cluster"]["roster"] == roster
