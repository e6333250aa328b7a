"""What beats cost Redis does not grow with the number of servers. docs/distributed.md has the
figures.
"""

import socket
from typing import Any, cast

import redis

from bench.beats import KEYS, SIZES, beat, run, running_redis, script_times
from gserver.cluster.redis_link import SCRIPT
from tests.running import program


def test_the_script_takes_as_long_with_3000_servers_as_with_3() -> None:
    program("redis-server")
    # The quickest round of each size: what else the machine does makes a round slower, and none
    # quicker.
    times = {size: min(rounds) for size, rounds in script_times(rounds=5, beats=3000).items()}
    assert max(times.values()) <= 1.5 * min(times.values()), times


def test_a_beat_and_its_answer_are_as_long_with_3000_servers_as_with_3() -> None:
    program("redis-server")
    assert len({len(beat(member, 10**15 + member, 50)) for member in range(3000)}) == 1
    answers = []
    with running_redis() as (client, _, path), socket.socket(socket.AF_UNIX) as sock:
        assert client.script_load(SCRIPT)
        sock.connect(path)
        for size in SIZES:
            client.delete(*KEYS)
            run(sock, [beat(member, 1, 1) for member in range(size)])
            assert client.hlen(KEYS[0]) == size
            answers.append(_answer(client, size))
    assert [answer[0] for answer in answers] == list(SIZES)
    assert len({len(answer) for answer in answers}) == 1


def _answer(client: redis.Redis, size: int) -> list[object]:
    """What the last server is told when it beats again."""
    words = beat(size - 1, 2, 1).split(b"\r\n")[2::2]
    answer = cast(Any, client).execute_command(*words)
    assert isinstance(answer, list)
    return answer
