"""StatsD: the figures of a real daemon, and the datagrams that are sent."""

import contextlib
import os
import re
import socket
import time
from pathlib import Path

import psutil
import pytest

from gserver.agent.statsd import COUNTERS, MAX_DATAGRAM_BYTES, RETRY_SECONDS, changes
from gserver.protocol import ERROR_REPLIES
from gserver.scoreboard import Scoreboard
from lab.redises import free_port
from lab.running import GSERVER, LIMIT, PATIENCE, Running, argv, program, unavailable, until
from lab.statsd import LINE, Daemon, becomes, received, statsd_daemon, to

COMMANDS = "from lab.commands import fail, napping\nnap = napping('NAP_1', 0)\n"

# The figures that are sent, from the totals of a scoreboard.


def zero() -> dict[str, int]:
    return Scoreboard.create(2).totals()


def test_gauges_are_always_sent_and_counters_only_when_they_have_changed() -> None:
    before = {
        **zero(),
        "clients": 9,
        "clients_accepted": 5,
        "commands.WHO": 3,
        "command_ns.WHO": 10,
        "command_buckets.WHO.0": 3,
    }
    now = {**before, "clients": 7, "workers": 2}
    assert list(changes(before, now)) == [("gauge", "clients", 7), ("gauge", "workers", 2)]


@pytest.mark.parametrize(("name", "total"), COUNTERS.items(), ids=COUNTERS)
def test_a_counter_is_sent_as_its_increase(name: str, total: str) -> None:
    before = {**zero(), total: 4}
    sent = [metric for metric in changes(before, {**before, total: 7}) if metric[0] == "incr"]
    assert sent == [("incr", name, 3)]


def test_the_first_flush_sends_everything() -> None:
    sent = list(
        changes(
            {},
            {
                **zero(),
                "clients_accepted": 4,
                "commands.WHO": 2,
                "command_ns.WHO": 6_000_000,
                "command_buckets.WHO.8": 2,
            },
        )
    )
    assert [metric for metric in sent if metric[0] != "gauge"] == [
        ("incr", "clients_accepted", 4),
        ("incr", "commands.who", 2),
        ("timing", "command_time.who", 3.0),
    ]


def test_every_error_reply_has_a_counter() -> None:
    counters = {name for name in COUNTERS if name.startswith("error_replies.")}
    assert counters == {f"error_replies.{reply.name}" for reply in ERROR_REPLIES}


def test_a_command_is_counted_under_its_name_in_lower_case() -> None:
    before = {**zero(), "commands.WHO": 10}
    now = {
        **zero(),
        "commands.WHO": 12,
        "commands.MY-NAP_2": 5,
    }  # The second command is new since the last flush.
    sent = [metric for metric in changes(before, now) if metric[0] != "gauge"]
    assert sorted(sent) == [("incr", "commands.my-nap_2", 5), ("incr", "commands.who", 2)]


def test_the_time_of_a_command_is_the_mean_since_the_last_flush_in_milliseconds() -> None:
    before = {
        **zero(),
        "commands.MY-NAP_2": 7,
        "command_ns.MY-NAP_2": 10**12,
        "command_buckets.MY-NAP_2.3": 100,
    }
    # None of the four runs had a reply: it is their time that counts.
    now = before | {"command_ns.MY-NAP_2": 10**12 + 10_000_000, "command_buckets.MY-NAP_2.3": 104}
    assert list(changes(before, now))[2:] == [("timing", "command_time.my-nap_2", 2.5)]


# A real daemon.


def test_all_is_counted_even_if_the_server_stops_after_the_last_command(
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
            becomes(lambda: received(daemon, "gauges", "all."), {"clients": 3, "workers": 2})
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
            client.end()  # Otherwise the stop would take long enough for a flush.
        assert server.stop() == 0
    expected = {
        "clients_accepted": 8,
        "clients_closed": 8,
        "agent_starts": 1,
        "commands.who": 1,
        "commands.where": 3,
        "commands.why": 103,
        "commands.nap_1": 3,
        "error_replies.unknown_command": 3,
        "error_replies.not_ascii": 3,
        "error_replies.internal": 3,
        "error_replies.line_too_long": 2,
        "error_replies.too_slow": 1,
        "error_replies.too_many_clients": 1,
        "error_replies.http": 1,
    }
    becomes(lambda: received(daemon, "counters", "all."), expected)
    assert received(daemon, "gauges", "all.") == {"clients": 0, "workers": 0}
    times = received(daemon, "timers", "all.")["command_time.why"]
    assert times
    assert all(0 < milliseconds < 1000 * LIMIT for milliseconds in times)
    assert received(daemon, "counters")["statsd.bad_lines_seen"] == 0


def test_sums_are_exact_over_all_workers_and_the_death_of_one(daemon: Daemon) -> None:
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
            lambda: received(daemon, "gauges", "death."), {"clients": len(survivors), "workers": 2}
        )
        for client in survivors:
            assert client.ask(b"WHY") == b"42"
        for _ in range(clients):
            with server.client() as client:
                assert client.ask(b"WHY") == b"42"
        assert server.stop() == 0
    expected = {
        "clients_accepted": 2 * clients,
        "clients_closed": 2 * clients - lost,
        "clients_lost": lost,
        "worker_restarts": 1,
        "agent_starts": 1,
        "commands.why": 2 * clients + len(survivors),
    }
    becomes(lambda: received(daemon, "counters", "death."), expected)


def test_a_daemon_that_starts_later_gets_metrics_from_then_on(tmp_path: Path) -> None:
    port = free_port()
    with (
        Running("--statsd-host", "127.0.0.1", "--statsd-port", str(port)) as server,
        server.client() as client,
    ):
        server.wait_for("agent.ready")
        agent = server.agents()[0]
        for _ in range(100):
            assert client.ask(b"WHY") == b"42"
        with statsd_daemon(tmp_path, port) as late:
            becomes(lambda: received(late, "gauges", "gserver."), {"clients": 1, "workers": 1})
            counted = received(late, "counters", "gserver.").get("commands.why", 0)
            assert client.ask(b"WHY") == b"42"
            until(
                lambda: (
                    received(late, "counters", "gserver.").get("commands.why", 0) == counted + 1
                ),
                "one more flush",
            )
        assert server.agents() == [agent]
        assert [
            event["event.action"] for event in server.events() if event["log.level"] != "info"
        ] == []


# A daemon whose name does not resolve.


def test_an_unresolvable_daemon_does_not_affect_clients_and_is_logged_once() -> None:
    # The wait below exceeds the hang timeout, so a blocked agent would be replaced.
    options = ["--statsd-host", "host.invalid", "--hang-timeout", "3"]
    with Running(*options) as server, server.client() as client:
        first = server.wait_for("statsd.unresolved")
        (agent,) = server.agents()
        began, spent = time.monotonic(), sum(agent.cpu_times()[:2])
        while time.monotonic() - began < 1.5 * RETRY_SECONDS:
            asked = time.monotonic()
            assert client.ask(b"WHY") == b"42"
            assert time.monotonic() - asked < PATIENCE
            time.sleep(0.05)
        spent = sum(agent.cpu_times()[:2]) - spent
        assert spent < 0.1 * (time.monotonic() - began)
        assert server.agents() == [agent]
        assert server.events("statsd.unresolved") == [first]
    assert first["log.level"] == "warning"
    assert first["server.address"] == "host.invalid"
    assert first["error.type"] == "gaierror"
    assert "StatsD host of host.invalid:8125 does not resolve" in first["message"]


def test_a_daemon_whose_name_resolves_later_gets_all_metrics_and_this_is_logged(
    tmp_path: Path,
) -> None:
    if os.geteuid() != 0:
        unavailable("a private hosts file needs root")
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n")
    mount = f'mount --bind {hosts} /etc/hosts && exec "$@"'
    command = [program("unshare"), "-m", "sh", "-c", mount, "sh", *GSERVER, "serve", "--port", "0"]
    with (
        statsd_daemon(tmp_path) as daemon,
        Running(
            "--statsd-host", "later.invalid", "--statsd-port", str(daemon[0]), command=command
        ) as server,
        server.client() as client,
    ):
        server.wait_for("statsd.unresolved")
        assert client.ask(b"WHY") == b"42"
        with hosts.open("a") as file:
            file.write("127.0.0.1 later.invalid\n")
        resolved = server.wait_for("statsd.resolved")
        becomes(lambda: received(daemon, "counters", "gserver.").get("commands.why"), 1)
        assert len(server.events("statsd.unresolved")) == 1
    assert resolved["log.level"] == "info"
    assert resolved["server.address"] == "later.invalid"
    assert re.search(r"later\.invalid resolves again after \d+ s", resolved["message"])


# The datagrams.

NAMES = [f"C{number}".ljust(32, "X") for number in range(60)]


def sent_with(prefix: str, folder: Path) -> list[bytes]:
    """The datagrams of a server with many commands, each sent once."""
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
        options = argv(
            f"--statsd-host 127.0.0.1 --statsd-port {sock.getsockname()[1]} --commands many"
        )
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
    assert f"{shown}clients_accepted:1|c".encode() in lines


def test_a_long_prefix_keeps_the_datagrams_small(tmp_path: Path) -> None:
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
            assert sock.recv(65536).startswith(b"gserver.clients:0|g\ngserver.workers:")
