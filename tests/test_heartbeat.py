"""The sender of heartbeats and its link, without a Redis."""

from collections import Counter

import gevent
import pytest

from gserver.cluster.engines import Engines
from gserver.cluster.heartbeat import attempt_seconds, backoff_seconds
from gserver.cluster.redis_link import RedisLink
from gserver.config import Config
from gserver.scoreboard import Scoreboard
from lab.running import LIMIT


def test_the_id_counts_as_checked_when_redis_is_away() -> None:
    scoreboard = Scoreboard.create(1)
    config = Config(redis_url="redis://127.0.0.1:1 redis://127.0.0.1:2", server_id="here")
    engines = Engines(config, scoreboard)
    running = gevent.spawn(engines.run)
    assert engines.id_is_known.wait(LIMIT), "otherwise the start waits for its limit"
    assert not engines.has_duplicate_id
    assert scoreboard.totals()["heartbeat_errors.connection"] > 0
    engines.stop()
    running.join(LIMIT)
    assert running.ready()


def attempts(url: str, servers: int, ttl: float) -> list[float]:
    """When the servers try to connect while Redis is away for 20 s, and they lost it at once."""
    config = Config(redis_url=url, member_ttl_seconds=ttl)
    found = []
    for _ in range(servers):
        moment = 0.0
        for failures in range(1, 1000):
            moment += backoff_seconds(config, failures, servers)
            if moment > 20:
                break
            found.append(moment)
    return found


@pytest.mark.parametrize(
    ("url", "servers", "ttl", "most"),
    [
        ("redis://a", 3000, 5, 3600),
        ("rediss://a", 1000, 5, 1000),
        ("rediss://a", 2000, 10, 1100),
        ("rediss://a", 3, 5, 18),
    ],
)
def test_the_servers_of_a_cluster_do_not_connect_all_at_once(
    url: str, servers: int, ttl: float, most: int
) -> None:
    moments = attempts(url, servers, ttl)
    in_seconds = Counter(int(moment) for moment in moments if moment < 20)
    assert max(in_seconds.values()) <= most
    assert min(in_seconds.values()) >= most / 9


@pytest.mark.parametrize("servers", [1, 3, 100, 100_000])
@pytest.mark.parametrize(("interval", "ttl"), [(0.5, 5), (1, 5), (2, 10), (0.2, 2), (10, 3600)])
@pytest.mark.parametrize("url", ["redis://a", "rediss://a"])
def test_each_server_tries_again_before_its_lease_has_ended(
    servers: int, interval: float, ttl: float, url: str
) -> None:
    config = Config(redis_url=url, heartbeat_interval_seconds=interval, member_ttl_seconds=ttl)
    limit = max(interval, ttl - 2 * interval - attempt_seconds(config))
    pauses = [backoff_seconds(config, number, servers) for number in [1, 2, 5, 100, 10_000] * 20]
    assert min(pauses) >= 0.04
    assert max(pauses) <= min(limit, max(interval, ttl / 3)) + 1e-9


def test_the_first_retry_without_tls_is_not_late() -> None:
    config = Config(redis_url="redis://a")
    assert max(backoff_seconds(config, 1, 100_000) for _ in range(100)) <= 0.05 + 0.5


def test_an_error_is_explained_without_the_passwords_in_it() -> None:
    url = "redis+sentinel://me:se%20cret@a,b/main?sentinel_password=pass%2Fword"
    link = RedisLink(Config(redis_url=url))
    error = OSError("sent AUTH se cret, se%20cret, pass/word and pass%2Fword as me")
    assert link.explain(error) == "sent AUTH ***, ***, *** and *** as me"


def test_the_next_agent_continues_with_all_that_this_one_has_published() -> None:
    scoreboard = Scoreboard.create(1)
    config = Config(redis_url="redis://a redis://b redis://c", server_id="here")
    sender = Engines(config, scoreboard).senders[2]
    known = {"remote_clients": 11, "servers": 3, "last_clock": 13, "lost_at": 12, "hold_until": 14}
    known["data_known_from"] = 16
    for name, value in known.items():
        assert getattr(sender.membership, name) == 0
        setattr(sender.membership, name, value)
    sender._acked_sequence = 15
    sender._keep()
    successor = Engines(config, scoreboard).senders[2]
    assert {name: getattr(successor.membership, name) for name in known} == known
    assert successor._acked_sequence == 15
    assert successor.is_member
