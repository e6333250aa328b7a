"""The sender of heartbeats, without a Redis."""

import gevent

from gserver.cluster.heartbeat import HeartbeatSender
from gserver.config import Config
from gserver.scoreboard import Scoreboard
from lab.running import LIMIT


def test_the_id_counts_as_checked_when_redis_is_away() -> None:
    scoreboard = Scoreboard.create(1)
    sender = HeartbeatSender(Config(redis_url="redis://127.0.0.1:1", server_id="here"), scoreboard)
    running = gevent.spawn(sender.run)
    assert sender.id_is_known.wait(LIMIT), "otherwise the start waits for its limit"
    assert not sender.has_duplicate_id
    assert scoreboard.totals()["heartbeat_errors.connection"] > 0
    sender.should_stop.set()
    running.join(LIMIT)
    assert running.ready()
