"""The cost of heartbeats: the script's time in Redis, and the total load of one Redis.

A scenario of `bin/bench`, with 3, 300 and 3,000 servers. It starts its own Redis on a unix socket,
and ends it. The script and its arguments are gserver's; only the servers are simulated, each with
its own connection.
"""

import heapq
import random
import selectors
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import redis

from gserver.cluster.heartbeat import JITTER
from gserver.cluster.membership import Heartbeat, Reply
from gserver.cluster.redis_link import HEARTBEAT_SCRIPT, RedisLink, sha1_of
from gserver.config import Config
from lab.redises import Redis

SIZES = (3, 300, 3000)
ROUNDS = 9
HEARTBEATS = 6000
SECONDS = 20.0
TTL_MS, INTERVAL_MS = 5000, 500
KEYS = RedisLink(Config(redis_url="redis://localhost")).keys


@contextmanager
def running_redis() -> Iterator[tuple[redis.Redis, psutil.Process, str]]:
    """Start a Redis that knows the script; yield a client, its process and its socket's path."""
    with tempfile.TemporaryDirectory() as folder, Redis(Path(folder)) as server:
        path = f"{server.folder}/redis.sock"
        with redis.Redis(unix_socket_path=path) as client:
            client.script_load(HEARTBEAT_SCRIPT)
            yield client, psutil.Process(server.process.pid), path


def command(*words: str) -> bytes:
    """Return the words as a command in RESP."""
    return f"*{len(words)}\r\n".encode() + b"".join(
        f"${len(word)}\r\n{word}\r\n".encode() for word in words
    )


def heartbeat(member: int, sequence: int, clients: int, max_listed: int = 0) -> bytes:
    """Return one server's heartbeat, as `gserver.cluster.heartbeat` sends it."""
    own = Heartbeat(
        f"{member:08x}-0000-4000-8000-000000000000",
        f"{member:016x}",
        sequence,
        clients,
        TTL_MS,
        INTERVAL_MS,
        told_clock=10**14,  # It knows the clock: its first heartbeat needs no repetition.
        max_listed=max_listed,
    )
    script = "EVALSHA", sha1_of(HEARTBEAT_SCRIPT), str(len(KEYS)), *KEYS
    return command(*script, *map(str, own))


def script_times(rounds: int = ROUNDS, heartbeats: int = HEARTBEATS) -> dict[int, list[float]]:
    """Return the script's time inside Redis in microseconds, by number of servers: one per round.

    The sizes take turns, so a slow phase of the machine affects all of them.
    """
    times: dict[int, list[float]] = {size: [] for size in SIZES}
    with running_redis() as (client, _, path), socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        for size in SIZES * rounds:
            client.delete(*KEYS)
            run(sock, [heartbeat(member, 1, member % 7) for member in range(size)])
            client.config_resetstat()
            run(
                sock,
                [
                    heartbeat(number % size, 2 + number // size, random.randrange(100))
                    for number in range(heartbeats)
                ],
            )
            stats = client.info("commandstats")["cmdstat_evalsha"]
            assert stats["calls"] == heartbeats
            assert client.hlen(KEYS[0]) == size
            times[size].append(stats["usec_per_call"])
    return times


def run(sock: socket.socket, commands: list[bytes]) -> None:
    """Send commands in batches, and read a reply to each."""
    sock.settimeout(10)
    head = f"*{len(Reply._fields)}\r\n".encode()
    for start in range(0, len(commands), 100):
        batch = commands[start : start + 100]
        sock.sendall(b"".join(batch))
        received = b""
        while received.count(head) < len(batch) or not received.endswith(b"\r\n"):
            received += sock.recv(1 << 20)
            assert b"-ERR" not in received, received[:300]


def under_heartbeats(size: int, seconds: float, max_listed: int = 0) -> dict[str, float]:
    """Measure one Redis under the heartbeats of `size` servers, each at its own pace.

    If there are at most `max_listed`, each reply lists the others.
    """
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
        heartbeats = late = sent_bytes = received_bytes = 0
        cpu, measured_from = None, start + 2  # All servers have joined by then.
        while (now := time.monotonic()) < measured_from + seconds:
            if cpu is None and now >= measured_from:
                cpu, heartbeats, late, delays = sum(process.cpu_times()[:2]), 0, 0, []
                sent_bytes = received_bytes = 0
            while due and due[0][0] <= now:
                _, member = heapq.heappop(due)
                data = heartbeat(member, int(now * 1e6), random.randrange(100), max_listed)
                socks[member].sendall(data)
                sent_at[member] = now
                sent_bytes += len(data)
            for key, _ in selector.select(
                min(0.01, max(0.0, due[0][0] - time.monotonic())) if due else 0.01
            ):
                received_bytes += len(socks[key.data].recv(1 << 16))
                delay = time.monotonic() - sent_at[key.data]
                delays.append(delay)
                heartbeats += 1
                late += delay > 0.5
                heapq.heappush(due, (sent_at[key.data] + 0.5 * random.uniform(*JITTER), key.data))
        used = sum(process.cpu_times()[:2]) - (cpu or 0.0)
        assert client.hlen(KEYS[0]) == size
        return {
            "heartbeats a second": heartbeats / seconds,
            "CPU of Redis, % of a core": 100 * used / seconds,
            "CPU a heartbeat, us": 1e6 * used / heartbeats,
            "sent a heartbeat, bytes": sent_bytes / heartbeats,
            "received a heartbeat, bytes": received_bytes / heartbeats,
            "delay p50, ms": 1e3 * statistics.median(delays),
            "delay p99, ms": 1e3 * sorted(delays)[len(delays) * 99 // 100],
            "later than 0.5 s": late,
            "memory of Redis, MB": process.memory_info().rss / 1e6,
        }
