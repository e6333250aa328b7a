"""StatsD: what a real daemon has counted in the end, and what goes over the wire."""

import contextlib
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from gserver.agent.statsd import COUNTERS, MAX_DATAGRAM_BYTES, RETRY_SECONDS, changes
from gserver.scoreboard import Scoreboard
from tests.running import LIMIT, PATIENCE, ROOT, Running, program, until

STATSD = ROOT / ".tools/node_modules/statsd/stats.js"
COMMANDS = """
from gserver.commands import command

@command("NAP_1")
def nap(service):
    return "rested"

@command("FAIL")
def fail(service):
    raise LookupError
"""

#: A daemon's UDP port, and the TCP port of its management interface.
Daemon = tuple[int, int]


def free_port(kind: socket.SocketKind) -> int:
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def statsd_daemon(folder: Path, port: int = 0) -> Iterator[Daemon]:
    """The real StatsD daemon. It never flushes, so what it has received adds up."""
    node = program("node")
    if not STATSD.exists():
        reason = f"{STATSD} is missing: bin/test installs it"
        if "CI" in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)
    port, management = port or free_port(socket.SOCK_DGRAM), free_port(socket.SOCK_STREAM)
    address = "127.0.0.1"
    config = {"address": address, "port": port, "mgmt_address": address, "mgmt_port": management}
    file = folder / f"{port}.js"
    file.write_text(json.dumps({**config, "backends": [], "flushInterval": 10**8, "title": False}))
    process = subprocess.Popen([node, STATSD, file], stdout=subprocess.DEVNULL)
    try:
        until(lambda: has_started((port, management)), "a StatsD daemon that counts")
        yield port, management
    finally:
        process.kill()
        process.wait()


def has_started(daemon: Daemon) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.sendto(b"probe:1|c", ("127.0.0.1", daemon[0]))
    try:
        return "probe" in received(daemon, "counters")
    except ConnectionRefusedError:
        return False


def received(daemon: Daemon, kind: str, prefix: str = "") -> dict[str, Any]:
    """What the daemon has: its `counters`, `gauges` or `timers` with that prefix, which is left
    out.
    """
    with socket.create_connection(("127.0.0.1", daemon[1]), LIMIT) as management:
        management.sendall(kind.encode() + b"\n")
        answer = b""
        while not answer.endswith(b"END\n\n"):
            answer += management.recv(65536)
    # It writes JavaScript, with quotes only where a name needs them.
    found = re.findall(r"'?([\w.-]+)'?: (\[[^\]]*\]|[-+.\de]+)", answer.decode())
    return {
        name.removeprefix(prefix): json.loads(value)
        for name, value in found
        if name.startswith(prefix)
    }


def becomes(read: Callable[[], Any], expected: Any) -> None:
    """Datagrams take their time: wait for what is expected, and show the difference when it does
    not come.
    """
    deadline = time.monotonic() + LIMIT
    while read() != expected and time.monotonic() < deadline:
        time.sleep(0.02)
    assert read() == expected


def to(daemon: Daemon, prefix: str) -> list[str]:
    return [
        "--statsd-host",
        "127.0.0.1",
        "--statsd-port",
        str(daemon[0]),
        "--statsd-prefix",
        prefix,
    ]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for the file; each test has a prefix of its own."""
    with statsd_daemon(tmp_path_factory.mktemp("statsd")) as running:
        yield running


# What is sent of the scoreboard.


def zero() -> dict[str, int]:
    return Scoreboard.create(2).totals()


def test_gauges_are_sent_as_they_are_and_counters_that_stand_still_are_not() -> None:
    before = {
        **zero(),
        "clients": 9,
        "accepted": 5,
        "commands.WHO": 3,
        "bursts": 2,
        "service_ns": 10,
    }
    now = {**before, "clients": 7, "workers": 2}
    assert list(changes(before, now)) == [("gauge", "connections", 7), ("gauge", "workers", 2)]


@pytest.mark.parametrize(("name", "total"), COUNTERS.items(), ids=COUNTERS)
def test_a_counter_is_sent_as_its_increase(name: str, total: str) -> None:
    before = {**zero(), total: 4}
    sent = [metric for metric in changes(before, {**before, total: 7}) if metric[0] == "incr"]
    assert sent == [("incr", name, 3)]


def test_a_first_flush_tells_all_there_is() -> None:
    sent = list(
        changes(
            {}, {**zero(), "accepted": 4, "commands.WHO": 2, "bursts": 1, "service_ns": 3_000_000}
        )
    )
    assert [metric for metric in sent if metric[0] != "gauge"] == [
        ("incr", "accepted", 4),
        ("incr", "commands.who", 2),
        ("timing", "service_time", 3.0),
    ]


def test_every_refusal_has_a_counter_by_what_became_of_the_client() -> None:
    assert {name for name in COUNTERS if name.startswith(("errors.", "rejected."))} == {
        "errors.unknown_command",
        "errors.cluster_unavailable",
        "errors.not_ascii",
        "errors.internal",
        "rejected.line_too_long",
        "rejected.too_slow",
        "rejected.idle",
        "rejected.too_many_clients",
        "rejected.too_many_from_address",
        "rejected.plain_text",
        "rejected.tls_failed",
        "rejected.http",
        "rejected.tls",
        "rejected.slow_reader",
    }


def test_a_command_is_counted_under_its_name_in_small_letters() -> None:
    before = {**zero(), "commands.WHO": 10}
    now = {
        **zero(),
        "commands.WHO": 12,
        "commands.MY-NAP_2": 5,
    }  # the second is new since the last flush
    sent = [metric for metric in changes(before, now) if metric[0] != "gauge"]
    assert sorted(sent) == [("incr", "commands.my-nap_2", 5), ("incr", "commands.who", 2)]


def test_service_time_is_the_mean_since_the_last_flush_in_milliseconds() -> None:
    before = {**zero(), "bursts": 100, "service_ns": 10**12}
    now = {**zero(), "bursts": 104, "service_ns": 10**12 + 10_000_000}
    assert list(changes(before, now))[2:] == [("timing", "service_time", 2.5)]


# A real daemon.


def test_all_that_happened_is_counted_although_the_end_follows_the_last_command(
    daemon: Daemon, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(COMMANDS)
    options = ["--workers", "2", "--max-clients", "3", "--line-timeout", "0.2", "--commands", "own"]
    with Running(*options, *to(daemon, "all"), cwd=tmp_path) as server:
        server.wait_for("worker.ready", 2)
        with server.client() as one, server.client() as two, server.client() as three:
            for client in (one, two, three):
                client.send(b"WHERE\nWHY\nNAP_1\nFAIL\nnope\nn\xf6pe\n")
                replies = [client.line() for _ in range(6)]
                assert replies[1:3] == [b"42\n", b"rested\n"]
                assert replies[3:] == [
                    b"ERR internal\n",
                    b"ERR unknown command\n",
                    b"ERR not ASCII\n",
                ]
            assert three.who() == 3
            becomes(lambda: received(daemon, "gauges", "all."), {"connections": 3, "workers": 2})
            with server.client() as late:
                assert late.line() == b"ERR too many clients\n"
            for client in (one, two, three):
                client.end()
        for sent, reply in (
            (b"x" * 2000, b"ERR line too long\n"),
            (b"y" * 2000, b"ERR line too long\n"),
            (b"GET / HTTP/1.1\r\n", b""),
            (b"WH", b"ERR too slow\n"),
        ):
            with server.client() as client:
                client.send(sent)
                assert client.line() == reply
        with server.client() as client:
            client.send(b"WHY\n" * 100)
            assert [client.line() for _ in range(100)] == [b"42\n"] * 100
            client.end()  # so that the stop takes no time in which a flush might fall anyway
        assert server.stop() == 0
    expected = {
        "accepted": 8,
        "closed": 8,
        "agent_starts": 1,
        "commands.who": 1,
        "commands.where": 3,
        "commands.why": 103,
        "commands.nap_1": 3,
        "errors.unknown_command": 3,
        "errors.not_ascii": 3,
        "errors.internal": 3,
        "rejected.line_too_long": 2,
        "rejected.too_slow": 1,
        "rejected.too_many_clients": 1,
        "rejected.http": 1,
    }
    becomes(lambda: received(daemon, "counters", "all."), expected)
    assert received(daemon, "gauges", "all.") == {"connections": 0, "workers": 0}
    times = received(daemon, "timers", "all.")["service_time"]
    assert times
    assert all(0 < milliseconds < 1000 * LIMIT for milliseconds in times)
    assert received(daemon, "counters")["statsd.bad_lines_seen"] == 0


def test_sums_are_exact_over_the_workers_and_the_death_of_one(daemon: Daemon) -> None:
    clients = 20
    with (
        Running("--workers", "2", "--log-level", "debug", *to(daemon, "death")) as server,
        contextlib.ExitStack() as stack,
    ):
        server.wait_for("worker.ready", 2)
        connected = [stack.enter_context(server.client()) for _ in range(clients)]
        for client in connected:
            assert client.ask(b"WHY") == b"42"
        server.wait_for("client.accepted", clients)
        serving = {
            event["client.port"]: event["process.pid"] for event in server.events("client.accepted")
        }
        killed = psutil.Process(serving[connected[0].sock.getsockname()[1]])
        survivors = [
            client for client in connected if serving[client.sock.getsockname()[1]] != killed.pid
        ]
        lost = clients - len(survivors)
        killed.kill()
        assert server.wait_for("worker.died")["gserver.lost"] == lost
        server.wait_for("worker.ready", 3)
        becomes(
            lambda: received(daemon, "gauges", "death."),
            {"connections": len(survivors), "workers": 2},
        )
        for client in survivors:
            assert client.ask(b"WHY") == b"42"
        for _ in range(clients):
            with server.client() as client:
                assert client.ask(b"WHY") == b"42"
        assert server.stop() == 0
    expected = {
        "accepted": 2 * clients,
        "closed": 2 * clients - lost,
        "lost": lost,
        "restarts": 1,
        "agent_starts": 1,
        "commands.why": 2 * clients + len(survivors),
    }
    becomes(lambda: received(daemon, "counters", "death."), expected)


def test_a_daemon_that_comes_later_is_told_from_then_on(tmp_path: Path) -> None:
    port = free_port(socket.SOCK_DGRAM)
    with (
        Running("--statsd-host", "127.0.0.1", "--statsd-port", str(port)) as server,
        server.client() as client,
    ):
        server.wait_for("agent.ready")
        agent = server.agents()[0]
        for _ in range(100):
            assert client.ask(b"WHY") == b"42"
        with statsd_daemon(tmp_path, port) as late:
            becomes(lambda: received(late, "gauges", "gserver."), {"connections": 1, "workers": 1})
            counted = received(late, "counters", "gserver.").get("commands.why", 0)
            assert client.ask(b"WHY") == b"42"
            until(
                lambda: (
                    received(late, "counters", "gserver.").get("commands.why", 0) == counted + 1
                ),
                "one more",
            )
        assert server.agents() == [agent]
        assert [
            event["event.action"] for event in server.events() if event["log.level"] != "info"
        ] == []


def test_a_daemon_that_cannot_be_found_costs_no_client_anything() -> None:
    # Shorter than the wait to come, so that an agent that stood still would be replaced.
    options = ["--statsd-host", "host.invalid", "--hang-timeout", "3"]
    with Running(*options) as server, server.client() as client:
        first = server.wait_for("statsd.unresolved")
        (agent,) = server.agents()
        began, spent = time.monotonic(), sum(agent.cpu_times()[:2])
        while len(server.events("statsd.unresolved")) < 2:
            asked = time.monotonic()
            assert client.ask(b"WHY") == b"42"
            assert time.monotonic() - asked < PATIENCE
            assert asked - began < RETRY_SECONDS + 3 * LIMIT, "never tried again"
            time.sleep(0.05)
        spent = sum(agent.cpu_times()[:2]) - spent
        assert spent < 0.1 * (time.monotonic() - began)
        assert server.agents() == [agent]
        second = server.events("statsd.unresolved")[1]
    assert first["log.level"] == "warning"
    assert first["server.address"] == "host.invalid"
    assert first["error.type"] == "gaierror"
    assert "StatsD at host.invalid:8125 cannot be found" in first["message"]
    moments = [datetime.fromisoformat(event["@timestamp"]) for event in (first, second)]
    assert (moments[1] - moments[0]).total_seconds() >= RETRY_SECONDS - 0.1


# What goes over the wire.

LINE = re.compile(rb"[A-Za-z0-9_.-]+:-?[0-9.]+\|(c|g|ms)")


NAMES = [f"C{number}".ljust(32, "X") for number in range(60)]


def sent_with(prefix: str, folder: Path) -> list[bytes]:
    """The datagrams that a plain UDP socket gets of a server with many commands, each asked once."""
    (folder / "many.py").write_text(
        "from gserver.commands import command\n"
        + "".join(
            f"c{number} = command({name!r})(lambda service: 1)\n"
            for number, name in enumerate(NAMES)
        )
    )
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.setblocking(False)
        options = [
            "--statsd-host",
            "127.0.0.1",
            "--statsd-port",
            str(sock.getsockname()[1]),
            "--commands",
            "many",
        ]
        with Running(*options, env={"STATSD_PREFIX": prefix}, cwd=folder) as server:
            with server.client() as client:
                client.send("".join(f"{name}\n" for name in NAMES).encode())
                assert [client.line() for _ in NAMES] == [b"1\n"] * len(NAMES)
            server.wait_for("agent.ready")
            assert server.stop() == 0
        arrived = []
        with contextlib.suppress(BlockingIOError):
            while True:
                arrived.append(sock.recv(65536))
    return arrived


@pytest.mark.parametrize(
    ("prefix", "shown"),
    [("a:b|c@d#e\nf g/\u0416", "a_b_c_d_e_f_g__."), (".inner.dots.", "inner.dots."), ("...", "")],
    ids=["hostile", "dots", "only dots"],
)
def test_every_datagram_is_small_and_every_line_is_a_metric(
    tmp_path: Path, prefix: str, shown: str
) -> None:
    arrived = sent_with(prefix, tmp_path)
    assert [len(datagram) for datagram in arrived if len(datagram) > MAX_DATAGRAM_BYTES] == []
    lines = [line for datagram in arrived for line in datagram.split(b"\n")]
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    counted = [line.decode() for line in lines if b"commands." in line]
    assert sorted(counted) == sorted(f"{shown}commands.{name.lower()}:1|c" for name in NAMES)
    assert f"{shown}accepted:1|c".encode() in lines


def test_a_prefix_of_any_length_leaves_the_datagrams_small(tmp_path: Path) -> None:
    arrived = sent_with("x" * 1000, tmp_path)
    assert arrived
    assert [len(datagram) for datagram in arrived if len(datagram) > MAX_DATAGRAM_BYTES] == []


def test_a_daemon_is_reached_over_ipv6() -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        try:
            sock.bind(("::1", 0))
        except OSError as error:
            pytest.skip(f"this machine has no ::1: {error}")
        sock.settimeout(LIMIT)
        options = ["--statsd-host", "::1", "--statsd-port", str(sock.getsockname()[1])]
        with Running(*options):
            assert sock.recv(65536).startswith(b"gserver.connections:0|g\ngserver.workers:")
