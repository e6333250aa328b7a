"""Faults of monitoring: the admin port, StatsD, the logs. None may affect clients."""

import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil

from lab.admin import dial, get, status
from lab.redises import Redis, free_port
from lab.rows import Notes, Variant, row
from lab.running import GSERVER, LIMIT, PATIENCE, Event, Running, argv, program, unavailable, until
from lab.site import Site
from lab.statsd import LINE

Start = Callable[..., Site]
ONE, THREE = Variant(1), Variant(3)
FLOOD = 30_000
NO_END = 15.0

STATUS = b"GET /status.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
HALF = {
    "silent": b"",
    "half a request": STATUS[:-2],
    "no body": b"POST / HTTP/1.1\r\nContent-Length: 99\r\n\r\nx",
}


@contextmanager
def over_and_over(act: Callable[[], object], threads: int) -> Iterator[list[int]]:
    """Call `act` repeatedly in some threads during the body; yield the counts of each thread."""
    counts, is_over = [0] * threads, threading.Event()

    def run(number: int) -> None:
        while not is_over.is_set():
            with suppress(OSError):
                act()
                counts[number] += 1

    running = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    try:
        yield counts
    finally:
        is_over.set()
        for thread in running:
            thread.join(LIMIT)


def ask(site: Site, request: bytes) -> bytes:
    """Send a request to the admin port, and return the complete response."""
    with dial(site.server) as sock:
        sock.sendall(request)
        return b"".join(iter(partial(sock.recv, 65536), b""))


def assert_healthy(site: Site) -> None:
    """The admin port answers at once."""
    for path in ("/livez", "/readyz", "/metrics", "/status.json"):
        began = time.monotonic()
        assert get(site.server, path)[0] == 200
        assert time.monotonic() - began < 2 * PATIENCE


@row("Admin port: slowloris", ONE, THREE, values=HALF, quick=None)
def test_300_unfinished_admin_requests(start: Start, notes: Notes, kind: bytes) -> None:
    site = start()
    agents = site.server.agents()
    with site.neighbours(), ExitStack() as stack:
        crowd = [stack.enter_context(dial(site.server)) for _ in range(300)]
        for sock in crowd:
            sock.sendall(kind)
        assert_healthy(site)
        for sock in crowd:
            with suppress(ConnectionError):
                assert sock.recv(65536)[9:12] in (b"", b"405")
        notes.happened(f"{len(crowd)} connections were closed or refused")
    assert site.server.agents() == agents


@row("Admin port: flood", ONE, THREE, quick=None)
def test_a_flood_of_invalid_requests_at_the_admin_port(start: Start, notes: Notes) -> None:
    site = start()
    agents = site.server.agents()
    rubbish = (
        b"\0" * 20_000,
        b"GET /" + b"x" * 50_000,
        b"GET /livez HTTP/1.1\r\nX: \x1b[2J\xff\r\n\r\n",
        STATUS,
    )
    with site.neighbours(), ExitStack() as stack:
        floods = [
            stack.enter_context(over_and_over(partial(ask, site, each), 4)) for each in rubbish
        ]
        time.sleep(1.0)
        assert_healthy(site)
    answered = ", ".join(f"{sum(counts):,}" for counts in floods)
    notes.happened(f"responses to the four kinds of invalid requests: {answered}")
    assert sum(floods[-1]) > 20
    assert site.server.agents() == agents


@row("Admin port while Redis hangs", ONE, THREE)
def test_a_flood_of_status_requests_while_redis_hangs(
    start: Start, notes: Notes, tmp_path: Path
) -> None:
    with Redis(tmp_path) as redis:
        site = start("--redis-url", redis.url)
        agents = site.server.agents()
        with site.neighbours():
            redis.freeze()
            with over_and_over(partial(ask, site, STATUS), 80) as counts:
                site.server.wait_for("cluster.lost")
                assert_healthy(site)
            redis.thaw()
            site.server.wait_for("cluster.regained")
        notes.happened(f"{sum(counts)} responses while Redis was frozen")
        assert sum(counts) > 80
        assert site.server.agents() == agents
        site.close()


# StatsD.


@row(
    "StatsD daemon absent",
    ONE,
    THREE,
    values={"refused": "127.0.0.1", "no such name": "host.invalid"},
)
def test_the_statsd_daemon_is_absent(start: Start, notes: Notes, kind: str) -> None:
    site = start("--statsd-host", kind, "--statsd-port", str(free_port()))
    agents, before = site.server.agents(), unreachable()
    with site.neighbours():
        if kind == "127.0.0.1":
            until(lambda: unreachable() >= before + 2, "ICMP reports that the port is closed")
            notes.happened("two datagrams were undeliverable")
        else:
            notes.happened(site.server.wait_for("statsd.unresolved")["message"])
    assert site.server.agents() == agents
    assert site.server.stop() == 0


def unreachable() -> int:
    """The number of ICMP `destination unreachable` messages that this machine has sent."""
    names, values = [
        line.split()
        for line in Path("/proc/net/snmp").read_text().splitlines()
        if line[:6] == "IcmpMs"
    ]
    return sum(int(value) for name, value in zip(names, values, strict=True) if name == "OutType3")


@row("Silent name servers", ONE, THREE)
def test_silent_name_servers_delay_neither_clients_nor_the_stop(
    start: Start, notes: Notes, tmp_path: Path
) -> None:
    if os.geteuid() != 0:
        unavailable("a test name server needs root")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent, Redis(tmp_path) as redis:
        silent.bind((f"127.{os.getpid() >> 8 & 255}.{os.getpid() & 255}.53", 53))
        (tmp_path / "resolv.conf").write_text(
            f"nameserver {silent.getsockname()[0]}\noptions timeout:30\n"
        )
        mount = f'mount --bind {tmp_path}/resolv.conf /etc/resolv.conf && exec "$@"'
        command = [
            *argv(f"{program('unshare')} -m sh -c"),
            mount,
            "sh",
            *GSERVER,
            "serve",
            "--port",
            "0",
        ]
        site = start("--statsd-host", "statsd.example", "--redis-url", redis.url, command=command)
        silent.settimeout(LIMIT)
        asked = silent.recv(512)
        # A question begins at byte 12 with the length of its first label (RFC 1035, 4.1.2).
        name = asked[13 : 13 + asked[12]].decode()
        notes.happened(f"a query for {name}... got no answer")
        nameless = "--admin-host", "127.0.0.2", "--admin-port", "0"  # No /etc/hosts has it.
        with Running(*nameless, "--workers", str(site.variant.workers), command=command) as other:
            other.wait_for("agent.ready")
        with site.neighbours():
            until(
                lambda: redis.members() == {"here": status(site.server)["clients"]["now"]},
                "heartbeats continue",
            )
        began = time.monotonic()
        assert site.server.stop() == 0
        notes.measured("stop takes", time.monotonic() - began, "s")
        assert time.monotonic() - began < NO_END * PATIENCE
        assert redis.members() == {}, "the server has left the cluster"


@row("StatsD names", ONE, THREE, quick=None)
def test_input_from_clients_creates_no_metric(start: Start, notes: Notes) -> None:
    evil = b"x:1|c\n", b"clients_accepted:9|c|#a\n", b"\x1b[2J\n", b"\0\xff|@:\n", b"WHO:7|c\nWHY\n"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as daemon:
        daemon.bind(("127.0.0.1", 0))
        daemon.settimeout(LIMIT)
        options = "--statsd-host", "127.0.0.1", "--statsd-port", str(daemon.getsockname()[1])
        site = start(*options, "--statsd-prefix", "a:b|c@d#e\nf/\u0416")
        with site.neighbours(), site.client() as client:
            client.send(b"".join(evil))
            replies = {client.line() for _ in evil}
            notes.happened(f"{len(evil)} hostile lines got error replies")
            assert all(reply.startswith(b"ERR ") for reply in replies)
            got = b""
            while b"error_replies.not_ascii:1" not in got:
                got += daemon.recv(65536) + b"\n"
        assert [line for line in got.splitlines() if not LINE.fullmatch(line)] == []
        assert {line[:10] for line in got.splitlines()} == {b"a_b_c_d_e_"}


# Logs.


def read_by(reader: str) -> list[str]:
    """The command of a server whose stdout is redirected as `reader` says in bash."""
    script = f'exec "$@" {reader}'
    return ["bash", "-c", script, "bash", *GSERVER, "serve", "--port", "0"]


def reader_of(site: Site) -> psutil.Process:
    children = psutil.Process(site.server.pid).children()
    (reader,) = [child for child in children if child.name() in ("cat", "tail")]
    return reader


def flood(site: Site, count: int) -> None:
    """Cause a number of log events: each client that connects and disconnects causes two."""
    for _ in range(count // 2):
        with site.client() as client:
            client.ask(b"WHY")


def drop_events(site: Site, after: int) -> list[Event]:
    """The `log.dropped` events after the first `after` lines."""
    return [
        event for event in site.server.events()[after:] if event["event.action"] == "log.dropped"
    ]


def sum_of(events: list[Event]) -> int:
    return sum(event["gserver.suppressed"] for event in events)


PIPE = read_by("> >(exec cat)")


@row("stdout reader stalled", quick=None)
def test_the_reader_of_stdout_stalls_under_load(start: Start, notes: Notes) -> None:
    site = start("--log-level", "debug", command=PIPE)
    reader = reader_of(site)
    with site.neighbours() as neighbours:
        reader.suspend()
        flood(site, FLOOD * site.variant.workers)
        neighbours.are_served()
        before = len(site.server.lines)
        reader.resume()
        missed = until(lambda: drop_events(site, before), "the dropped lines are logged")
        notes.happened(f"{sum_of(missed)} lines were dropped, and this was logged")
    assert site.server.stop() == 0


@row("stdout reader gone", quick=None)
def test_the_reader_of_stdout_exits(start: Start, notes: Notes) -> None:
    site = start("--log-level", "debug", command=PIPE)
    with site.neighbours():
        reader = reader_of(site)
        reader.kill()
        until(lambda: not psutil.pid_exists(reader.pid), "the reader has ended")
        before = len(site.server.lines)
        flood(site, 1000)
    notes.happened("the reader was killed")
    assert len(site.server.lines) == before
    assert site.server.stop() == 0


@row("Disk full", ONE, THREE, Variant(1, True))
def test_a_full_disk_does_not_corrupt_the_count_of_dropped_lines(
    start: Start, notes: Notes, tmp_path: Path
) -> None:
    command = read_by(">> log")
    command[2] = f"touch log; tail --pid=$$ -n +1 -f log & {command[2]}"
    site = start("--log-level", "debug", command=command)
    server, log = site.server, tmp_path / "log"
    with site.neighbours():
        size = log.stat().st_size + 1000
        limit_files(site, size)
        until(lambda: log.stat().st_size >= size, "the file is full")
        size = log.stat().st_size  # It may have grown before the limit was set.
        flood(site, 1000)
        assert log.stat().st_size == size
        before = len(server.lines)
        limit_files(site, resource.RLIM_INFINITY)
        until(lambda: len(server.lines) > before + 1, "logging continues")
        torn = [line for line in server.lines if not line.endswith("}\n")]
        assert len(torn) < 2
        for line in torn:
            server.lines.remove(line)
    notes.happened(f"the file was full at {size} bytes")

    def every_line_is_accounted_for() -> bool:
        counts, there = (
            status(server)["clients"],
            server.events("client.accepted") + server.events("client.closed"),
        )
        return bool(
            len(there) + sum_of(drop_events(site, 0)) == counts["accepted"] + counts["closed"]
        )

    until(every_line_is_accounted_for, "each line was written or counted as dropped")
    assert sum_of(drop_events(site, 0)) > 900


def limit_files(site: Site, size: int) -> None:
    """Limit the size of the files that the server writes."""
    for process in site.server.processes():
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@row("stderr closed", ONE, THREE, values={"closed": "2>&-", "full": "2>/dev/full"}, quick=None)
def test_a_closed_stderr_does_not_matter(start: Start, notes: Notes, kind: str) -> None:
    site = start(command=read_by(kind))
    with site.neighbours():
        for process in site.server.processes():
            link = os.readlink(f"/proc/{process.pid}/fd/2")
            notes.happened(f"stderr is {link}")
            assert link == kind.removeprefix("2>").replace("&-", "/dev/null")
    assert site.server.stop() == 0
