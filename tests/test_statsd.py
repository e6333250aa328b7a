"""StatsD: what a flush sends. The daemon is a socket of the test."""

import socket
from collections.abc import Iterator

import pytest

from gserver.agent import statsd
from gserver.config import Config
from gserver.scoreboard import Scoreboard
from lab.running import LIMIT


def test_a_counter_that_grows_during_a_flush_is_sent_by_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scoreboard = Scoreboard.create(1)
    changes = statsd.changes

    def grow(before: statsd.Totals, now: statsd.Totals) -> Iterator[statsd.Sample]:
        yield from changes(before, now)
        scoreboard.add("reloads", 1)

    monkeypatch.setattr(statsd, "changes", grow)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as daemon:
        daemon.bind(("127.0.0.1", 0))
        daemon.settimeout(LIMIT)
        client = statsd.StatsdClient(
            Config(statsd_host="127.0.0.1", statsd_port=daemon.getsockname()[1]), scoreboard
        )
        client.flush()
        assert b"reloads" not in daemon.recv(1000)
        client.flush()
        assert b"gserver.reloads:1|c" in daemon.recv(1000)
        assert client._client
        client._client.close()
