"""The worker: each client is counted once and uncounted once, however it leaves."""

import random
import signal
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, chdir
from pathlib import Path
from statistics import median

import psutil
import pytest

from gserver.boot import Instructions
from gserver.certificates import Certificates
from gserver.config import Config
from gserver.scoreboard import Scoreboard
from gserver.supervise.child import WORKER, Child
from gserver.supervise.phases import Generation
from lab.running import LIMIT, PATIENCE, Client, Running, extended, limited, stopped, until
from lab.ways import WAYS, Way

REJECTED = b"ERR too many clients\n"

MODULE = """
import os, socket
import gevent
from gserver.commands import command
from lab.commands import count_greenlets, end_greenlet, fail, nap, pid

@command("HELD")
def held(request):
    greenlets, files = count_greenlets(), len(os.listdir("/proc/self/fd"))
    return f"{greenlets} greenlets, {files} files, {gevent.get_hub().loop.activecnt} watchers"

def is_tcp(fd):
    try:
        with socket.socket(fileno=os.dup(fd)) as sock:
            return sock.family == socket.AF_INET and sock.type == socket.SOCK_STREAM
    except OSError:
        return False

@command("OPTIONS")
def options(request):
    fds = [int(fd) for fd in os.listdir("/proc/self/fd") if is_tcp(int(fd))]
    socks = [socket.socket(fileno=os.dup(fd)) for fd in fds]
    tcp = [
        getattr(socket, f"TCP_{name}")
        for name in ("KEEPIDLE", "KEEPINTVL", "KEEPCNT", "USER_TIMEOUT", "NODELAY")
    ]
    found = {
        (
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
            *(sock.getsockopt(socket.IPPROTO_TCP, option) for option in tcp),
        )
        for sock in socks
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    }
    return str(sorted(found))
"""


def start(folder: Path, *options: str, command: list[str] | None = None) -> Running:
    """A server with the commands above."""
    return extended(folder, MODULE, *options, command=command)


NAMES = {way.name for way in WAYS}


def go(server: Running, way: Way, source: str) -> str:
    """Connect, leave in this way, and return the outcome."""
    with server.client(source) as client:
        try:
            received = way.go(client)
        except OSError:
            return "reset"
    if received == REJECTED:
        return "rejected"
    return way.name if received == way.replies else f"{way.name}: {received!r}"


def figures(daemon: socket.socket) -> Counter[str]:
    """The sums of all counters that were sent to a StatsD daemon."""
    daemon.setblocking(False)
    sums: Counter[str] = Counter()
    while True:
        try:
            data = daemon.recv(65536)
        except BlockingIOError:
            return sums
        for line in data.decode().splitlines():
            name, _, rest = line.partition(":")
            value, _, kind = rest.partition("|")
            if kind == "c":
                sums[name.removeprefix("gserver.")] += int(value)


@pytest.mark.outer
@pytest.mark.parametrize(("workers", "kills"), [(1, 0), (2, 0), (2, 1)])
def test_who_is_exact_after_10000_clients_that_left_in_every_way(
    tmp_path: Path, workers: int, kills: int
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")  # noqa: T201 (pytest shows it if the test fails)
    chance = random.Random(seed)
    ways = chance.choices(WAYS, [way.often for way in WAYS], k=10_000)
    sources = [f"127.0.0.{chance.randrange(2, 50)}" for _ in ways]
    at_once, askers = 30, 0

    def run(at: int) -> str:
        if kills and at == 5000:
            server.workers()[0].kill()
        return go(server, ways[at], sources[at])

    def is_alone() -> bool:
        nonlocal askers
        askers += 1
        with server.client() as asker:
            return asker.ask(b"WHO") == b"1"

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as daemon:
        daemon.bind(("127.0.0.1", 0))
        statsd = ("--statsd-host", "127.0.0.1", "--statsd-port", str(daemon.getsockname()[1]))
        options = ("--workers", str(workers), "--max-clients", "24", "--line-timeout", "1")
        with start(tmp_path, *options, *statsd) as server:
            server.wait_for("agent.ready")
            with ThreadPoolExecutor(at_once) as pool:
                became = Counter(pool.map(run, range(10_000)))
            server.wait_for("worker.ready", workers + kills)
            until(is_alone, "the asking client is alone")
            assert server.stop() == 0
        sums = figures(daemon)

    known = NAMES | {"rejected"}
    assert known <= set(became)
    lost = sum(became[what] for what in became if what not in known)
    assert lost <= at_once * kills, became
    assert sums["worker_restarts"] == kills
    # A worker may be killed between its two counts of a client.
    assert abs(sums["clients_accepted"] - sums["clients_closed"] - sums["clients_lost"]) <= kills
    seen = sums["clients_accepted"] + sums["error_replies.too_many_clients"]
    assert abs(seen - 10_000 - askers) <= kills
    if not kills:
        reasons = {
            "sends HTTP": "http",
            "sends a long line": "line_too_long",
            "is slow": "too_slow",
        }
        for way, name in reasons.items():
            assert sums[f"error_replies.{name}"] == became[way]


def test_clients_that_connect_at_once_spread_over_the_workers(tmp_path: Path) -> None:
    with start(tmp_path, "--workers", "2") as server:
        for count in (16, 64, 200):
            largest = []
            for _ in range(3):  # In one of them, this machine may have stopped a worker.
                with ExitStack() as stack:
                    clients = [stack.enter_context(server.client()) for _ in range(count)]
                    shares = Counter(client.ask(b"PID") for client in clients)
                    largest.append(max(shares.values()))
                until(lambda: server.who() == 1, "the clients have left")
            assert median(largest) <= 0.55 * count + 3


@pytest.mark.outer
def test_one_worker_accepts_all_clients_while_the_others_cannot(tmp_path: Path) -> None:
    with start(tmp_path, "--workers", "2") as server, ExitStack() as stack:
        worker, other = server.workers()
        with stopped(other):
            began = time.monotonic()
            clients = [stack.enter_context(server.client()) for _ in range(200)]
            assert {int(client.ask(b"PID")) for client in clients} == {worker.pid}
            assert time.monotonic() - began < 10 * PATIENCE


@pytest.mark.outer
@pytest.mark.parametrize("most", [10, 36])
def test_rejected_clients_take_no_room_from_admitted_clients(tmp_path: Path, most: int) -> None:
    """The descriptor limit of this worker allows 36 clients."""
    options = ("--max-clients", str(most))
    with start(tmp_path, *options, command=limited(100)) as server, ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for _ in range(most)]
        assert clients[-1].who() == most
        began = time.monotonic()
        crowd = [stack.enter_context(server.client()) for _ in range(300)]
        received = Counter(other.rest() for other in crowd)
        # No client waits while another lingers, which takes up to a second: 9 s in all.
        assert time.monotonic() - began < 6 * PATIENCE
        assert set(received) <= {b"", REJECTED}
        assert received[REJECTED] >= 32
        assert {client.who() for client in clients} == {most}
        assert not server.events("process.error")


def test_at_the_descriptor_limit_clients_are_rejected_with_the_reason(tmp_path: Path) -> None:
    with start(tmp_path, command=limited(100)) as server, ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for _ in range(36)]
        assert [client.who() for client in clients] == [36] * 36
        for _ in range(10):
            with server.client() as other:
                assert other.rest() == REJECTED
        clients[0].sock.close()
        until(lambda: clients[1].who() == 35, "one client has left")
        with server.client() as other:
            assert other.who() == 36


def test_a_worker_at_its_descriptor_limit_leaves_clients_to_the_others(tmp_path: Path) -> None:
    with start(tmp_path, "--workers", "2", command=limited(100)) as server, ExitStack() as stack:
        full, other = server.workers()
        with stopped(other):
            clients = [stack.enter_context(server.client()) for _ in range(60)]
            assert {int(client.ask(b"PID")) for client in clients[:36]} == {full.pid}
        assert {int(client.ask(b"PID")) for client in clients[36:]} == {other.pid}
        assert clients[0].who() == 60
        for client in clients[:30]:
            client.sock.close()
        until(lambda: clients[30].who() == 30, "the clients have left")
        with stopped(other), server.client() as client:
            assert int(client.ask(b"PID")) == full.pid
        assert not server.events("process.error")


@pytest.mark.outer
def test_a_worker_at_its_descriptor_limit_drains_like_any_other(tmp_path: Path) -> None:
    with start(tmp_path, command=limited(80)) as server, ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for _ in range(16)]
        assert [client.who() for client in clients] == [16] * 16
        for _ in range(100):  # More than even the reserve allows.
            stack.enter_context(server.client())
        server.send_signal(signal.SIGTERM)
        for client in clients:
            with client:
                assert client.rest() == b""
        assert server.exit_code() == 0
        assert not server.events("process.error")
        assert not server.events("worker.died")


@pytest.mark.outer
def test_2000_clients_leave_no_descriptors_or_greenlets_behind(tmp_path: Path) -> None:
    options = ("--max-clients", "24", "--line-timeout", "1")
    with start(tmp_path, *options) as server, server.client() as client:
        ways = 10 * [way for way in WAYS for _ in range(way.often)]
        with ThreadPoolExecutor(30) as pool:
            became = set(pool.map(lambda way: go(server, way, "127.0.0.2"), ways))
            before = held(client)
            became |= set(pool.map(lambda way: go(server, way, "127.0.0.3"), 2 * ways))
        assert became >= NAMES
        assert held(client) == before


def held(client: Client) -> bytes:
    """What the worker holds while this client is alone."""
    until(lambda: client.who() == 1, "the other clients have left")
    client.ask(b"HELD")  # The first call creates its greenlet, which the second call reuses.
    return client.ask(b"HELD")


def test_accepted_sockets_have_keepalive_and_no_delay(tmp_path: Path) -> None:
    with start(tmp_path) as server, server.client() as client:
        # Keepalive on: after 60 s, every 15 s, 4 times; unacknowledged data for 120 s; no delay.
        assert client.ask(b"OPTIONS") == b"[(1, 60, 15, 4, 120000, 1)]"


@pytest.mark.outer
def test_a_listener_that_was_shut_down_does_not_make_a_worker_spin(tmp_path: Path) -> None:
    module = """
import os
import socket
from gserver.commands import command

@command("SHUT")
def shut(request):
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            sock = socket.socket(fileno=os.dup(fd))
        except OSError:
            continue
        with sock:
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                sock.shutdown(socket.SHUT_RDWR)
    return "done"
"""
    with extended(tmp_path, module) as server, server.client() as client:
        [worker] = server.workers()
        # The supervisor would listen again within a second.
        with stopped(psutil.Process(server.pid)):
            assert client.ask(b"SHUT") == b"done"
            used = sum(worker.cpu_times()[:2])
            time.sleep(2)
            assert sum(worker.cpu_times()[:2]) - used < 0.5  # A loop that spins takes 2.
            assert client.ask(b"WHO") == b"1"
        server.wait_for("server.port_closed")
        assert server.who() == 2


@pytest.mark.outer
def test_a_drain_keeps_the_deadline_of_the_server(tmp_path: Path) -> None:
    """The supervisor may have waited before it tells a worker to drain."""
    (tmp_path / "naps.py").write_text(
        "from lab.commands import napping\nnap = napping('NAP', 60)\n"
    )
    scoreboard = Scoreboard.create(1)
    config = Config(drain_timeout_seconds=60, commands="naps")
    with socket.create_server(("127.0.0.1", 0)) as listener, chdir(tmp_path):
        fds = [listener.fileno()]
        instructions = Instructions(config, Certificates(), 0, 1, scoreboard.fd, fds)
        worker = Child.start(WORKER, Generation(0, Certificates()), instructions)
        with worker.control, Client(listener.getsockname()[1]) as client:
            until(worker.read_report, "the worker is ready")
            client.send(b"NAP\n")
            until(lambda: scoreboard.clients() == 1, "the client is counted")
            scoreboard.put("drain_started_at", time.monotonic_ns() - 50 * 10**9)
            began = time.monotonic()
            worker.terminate(began + LIMIT)
            until(worker.has_ended, "the worker has ended")
            assert time.monotonic() - began < 30  # 45 s from the signal on, which it does not have.


def test_a_reload_answers_all_clients_that_are_in_the_accept_queue() -> None:
    with Running("--workers", "2") as server, ExitStack() as stack:
        server.wait_for("worker.ready", 2)
        old = server.workers()
        with stopped(*old):
            server.send_signal(signal.SIGHUP)
            server.wait_for("worker.ready", 3)
            with stopped(*(each for each in server.workers() if each not in old)):
                clients = [stack.enter_context(server.client()) for _ in range(60)]
                for each in old:  # One of them has been told to hand its clients over.
                    each.resume()
        for client in clients:
            client.send(b"WHY\n")
        server.wait_for("server.reloaded")
        assert [client.line() for client in clients] == [b"42\n"] * 60
        assert clients[0].who() == 60
