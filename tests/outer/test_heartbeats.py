"""The cost of a heartbeat for Redis does not grow with the number of servers.

docs/cluster.md has the figures.
"""

import socket
from typing import Any, cast

import redis

from bench.heartbeats import KEYS, SIZES, heartbeat, run, running_redis
from gserver.cluster.redis_link import HEARTBEAT_SCRIPT
from lab.running import program

#: The commands that one heartbeat may call in Redis. With the script's arguments, the time of each
#: is constant or logarithmic in the number of servers.
CHEAP = {
    "evalsha",
    "time",
    "hlen",
    "zcard",
    "hget",
    "hmget",
    "hset",
    "zadd",
    "zrange",
    "zrangebyscore",
    "zscore",
}


def test_the_script_does_the_same_work_with_3000_servers_as_with_3() -> None:
    program("redis-server")
    calls = {}
    with running_redis() as (client, _, path), socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        for size in SIZES:
            client.delete(*KEYS)
            run(sock, [heartbeat(member, 1, 1) for member in range(size)])
            client.config_resetstat()
            run(sock, [heartbeat(number % size, 2 + number // size, 1) for number in range(3000)])
            stats = client.info("commandstats")
            calls[size] = {
                name.removeprefix("cmdstat_"): stat["calls"] for name, stat in stats.items()
            }
            del calls[size]["config|resetstat"]
    assert calls[3] == calls[300] == calls[3000]
    assert set(calls[3]) == CHEAP


def test_a_heartbeat_and_its_reply_are_as_long_with_3000_servers_as_with_3() -> None:
    program("redis-server")
    assert len({len(heartbeat(member, 10**15 + member, 50)) for member in range(3000)}) == 1
    replies = []
    with running_redis() as (client, _, path), socket.socket(socket.AF_UNIX) as sock:
        assert client.script_load(HEARTBEAT_SCRIPT)
        sock.connect(path)
        for size in SIZES:
            client.delete(*KEYS)
            run(sock, [heartbeat(member, 1, 1) for member in range(size)])
            assert client.hlen(KEYS[0]) == size
            replies.append(_reply(client, size))
    assert [reply[0] for reply in replies] == list(SIZES)
    assert len({len(reply) for reply in replies}) == 1


def _reply(client: redis.Redis, size: int) -> list[object]:
    """Return the reply to the next heartbeat of the last server."""
    words = heartbeat(size - 1, 2, 1).split(b"\r\n")[2::2]
    reply = cast(Any, client).execute_command(*words)
    assert isinstance(reply, list)
    return reply
