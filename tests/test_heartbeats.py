"""The cost of a heartbeat for Redis does not grow with the number of servers.

docs/distributed.md has the figures.
"""

import socket
from typing import Any, cast

import redis

from bench.heartbeats import KEYS, SIZES, heartbeat, run, running_redis, script_times
from gserver.cluster.redis_link import HEARTBEAT_SCRIPT
from tests.running import program


def test_the_script_takes_as_long_with_3000_servers_as_with_3() -> None:
    program("redis-server")
    # The quickest round of each size: other load makes a round slower, never quicker.
    times = {size: min(rounds) for size, rounds in script_times(rounds=5, heartbeats=3000).items()}
    assert max(times.values()) <= 1.5 * min(times.values()), times


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
