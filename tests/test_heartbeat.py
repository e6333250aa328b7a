"""The sender of heartbeats and its link, without a Redis."""

import gevent

from gserver.cluster.heartbeat import HeartbeatSender
from gserver.cluster.redis_link import RedisLink
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


def test_an_error_is_explained_without_the_passwords_in_it() -> None:
    url = "redis+sentinel://me:se%20cret@a,b/main?sentinel_password=pass%2Fword"
    link = RedisLink(Config(redis_url=url))
    error = OSError("sent AUTH se cret, se%20cret, pass/word and pass%2Fword as me")
    assert link.explain(error) == "sent AUTH ***, ***, *** and *** as me"


def test_the_next_agent_continues_with_all_that_this_one_has_published() -> None:
    scoreboard = Scoreboard.create(1)
    config = Config(redis_url="redis://127.0.0.1:1", server_id="here")
    sender = HeartbeatSender(config, scoreboard)
    known = {"remote_clients": 11, "servers": 3, "last_clock": 13, "lost_at": 12, "hold_until": 14}
    for name, value in known.items():
        assert getattr(sender._membership, name) == 0
        setattr(sender._membership, name, value)
    sender._acked_sequence = 15
    sender._publish()
    successor = HeartbeatSender(config, scoreboard)
    assert {name: getattr(successor._membership, name) for name in known} == known
    assert successor._acked_sequence == 15
    assert successor._is_member
