"""What beats cost: the script inside Redis at 3, 300 and 3,000 servers, and one Redis under the
beats of 3,000.

A scenario of `bin/bench`. Starts a Redis of its own on a unix socket, and ends it. The script and
its arguments are gserver's; only the servers are simulated, each with a connection of its own.
"""

import heapq
import random
import selectors
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import redis

from gserver.cluster.heartbeat import JITTER
from gserver.cluster.membership import Reply
from gserver.cluster.redis_link import SCRIPT, RedisLink, sha_of
from gserver.config import Config

SIZES = (3, 300, 3000)
ROUNDS = 9
BEATS = 6000
SECONDS = 20.0
TTL_MS, INTERVAL_MS = "5000", "500"
KEYS = RedisLink(Config(redis_url="redis://localhost")).keys


@contextmanager
def running_redis(port: int = 0) -> Iterator[tuple[redis.Redis, psutil.Process, str]]:
    """A Redis that keeps nothing on disk, its process, and the path of its socket; on a port too if
    one is named.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/redis.sock"
        words = [
            "redis-server",
            "--port",
            str(port),
            "--unixsocket",
            path,
            "--save",
            "",
            "--dir",
            folder,
        ]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        try:
            client = redis.Redis(unix_socket_path=path)
            while not Path(path).exists() or not client.ping():
                time.sleep(0.01)
            client.script_load(SCRIPT)
            yield client, psutil.Process(process.pid), path
        finally:
            process.terminate()
            process.wait()


def command(*words: str) -> bytes:
    """The words as Redis wants them."""
    return f"*{len(words)}\r\n".encode() + b"".join(
        f"${len(word)}\r\n{word}\r\n".encode() for word in words
    )


def beat(member: int, stamp: int, count: int) -> bytes:
    """One server's beat, as `gserver.cluster.heartbeat` sends it."""
    own = (f"{member:08x}-0000-4000-8000-000000000000", f"{member:016x}", str(stamp), str(count))
    return command(
        "EVALSHA", sha_of(SCRIPT), str(len(KEYS)), *KEYS, *own, TTL_MS, INTERVAL_MS, "", "0", "0"
    )


def script_times(rounds: int = ROUNDS, beats: int = BEATS) -> dict[int, list[float]]:
    """Microseconds of the script inside Redis for each number of servers, round by round, each size
    in its turn.
    """
    times: dict[int, list[float]] = {size: [] for size in SIZES}
    with running_redis() as (client, _, path), socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        for size in SIZES * rounds:
            client.delete(*KEYS)
            run(sock, [beat(member, 1, member % 7) for member in range(size)])
            client.config_resetstat()
            run(
                sock,
                [
                    beat(number % size, 2 + number // size, random.randrange(100))
                    for number in range(beats)
                ],
            )
            stats = client.info("commandstats")["cmdstat_evalsha"]
            assert stats["calls"] == beats
            assert client.hlen(KEYS[0]) == size
            times[size].append(stats["usec_per_call"])
    return times


def run(sock: socket.socket, commands: list[bytes]) -> None:
    """Send commands, some at a time, and read an answer to each."""
    sock.settimeout(10)
    head = f"*{len(Reply._fields)}\r\n".encode()
    for start in range(0, len(commands), 100):
        batch = commands[start : start + 100]
        sock.sendall(b"".join(batch))
        received = b""
        while received.count(head) < len(batch) or not received.endswith(b"\r\n"):
            received += sock.recv(1 << 20)
            assert b"-ERR" not in received, received[:300]


def under_beats(size: int, seconds: float) -> dict[str, float]:
    """One Redis under the beats of so many servers, at their own pace, for a while."""
    with running_redis() as (client, process, path):
        selector = selectors.DefaultSelector()
        socks, sent_at = [], [0.0] * size
        delays: list[float] = []
        for member in range(size):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(path)
            selector.register(sock, selectors.EVENT_READ, member)
            socks.append(sock)
        start = time.monotonic()
        due = [(start + random.random() * 0.5, member) for member in range(size)]
        heapq.heapify(due)
        beats = late = sent_bytes = received_bytes = 0
        cpu, begun = None, start + 2  # all have joined by then
        while (now := time.monotonic()) < begun + seconds:
            if cpu is None and now >= begun:
                cpu, beats, late, delays = sum(process.cpu_times()[:2]), 0, 0, []
                sent_bytes = received_bytes = 0
            while due and due[0][0] <= now:
                _, member = heapq.heappop(due)
                data = beat(member, int(now * 1e6), random.randrange(100))
                socks[member].sendall(data)
                sent_at[member] = now
                sent_bytes += len(data)
            for key, _ in selector.select(
                min(0.01, max(0.0, due[0][0] - time.monotonic())) if due else 0.01
            ):
                received_bytes += len(socks[key.data].recv(4096))
                delay = time.monotonic() - sent_at[key.data]
                delays.append(delay)
                beats += 1
                late += delay > 0.5
                heapq.heappush(due, (sent_at[key.data] + 0.5 * random.uniform(*JITTER), key.data))
        used = sum(process.cpu_times()[:2]) - (cpu or 0.0)
        assert client.hlen(KEYS[0]) == size
        return {
            "beats a second": beats / seconds,
            "CPU of Redis, % of a core": 100 * used / seconds,
            "CPU a beat, us": 1e6 * used / beats,
            "sent a beat, bytes": sent_bytes / beats,
            "received a beat, bytes": received_bytes / beats,
            "delay p50, ms": 1e3 * statistics.median(delays),
            "delay p99, ms": 1e3 * sorted(delays)[len(delays) * 99 // 100],
            "later than 0.5 s": late,
            "memory of Redis, MB": process.memory_info().rss / 1e6,
        }
