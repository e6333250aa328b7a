"""Connections from a balancer: the PROXY header gives them the address of their client."""

import json
import signal
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from gserver.serve.admission import MAX_ADMISSIONS, MAX_PROBES
from lab.admin import get, metrics
from lab.proxy_header import binary, line
from lab.running import LIMIT, PATIENCE, Client, Running, argv, extended, stopped, until
from lab.tls_client import certified, trust

BALANCER = "127.0.0.2"
OPTIONS = argv(f"--proxy-from {BALANCER},fd00::/8 --admin-port 0")
#: Probes of the balancer itself.
LOCAL = binary(0x20, 0x00, b"")
WHENCE = """
import time

from gserver.commands import command


@command("WHENCE")
def whence(request):
    return f"{request.address} {request.port}"


@command("NAP")
def nap(request):
    time.sleep(1)
    return "done"
"""


def header(host: str = "192.0.2.7", port: int = 50000, version: int = 2) -> bytes:
    if version == 1:
        return line("TCP4", host, "10.0.0.1", port, 4242)
    addresses = bytes(map(int, host.split("."))) + bytes([10, 0, 0, 1])
    return binary(0x21, 0x11, addresses + port.to_bytes(2) + (4242).to_bytes(2))


@contextmanager
def through(
    server: Running, sent: bytes, context: ssl.SSLContext | None = None
) -> Iterator[Client]:
    """A connection of the balancer, which begins with these bytes."""
    with server.client(source=BALANCER) as client:
        client.send(sent)
        if context:
            client.sock = context.wrap_socket(client.sock, server_hostname="127.0.0.1")
        yield client


def await_listed(server: Running, expected: list[tuple[str, int]]) -> None:
    """The list is of a moment ago."""
    until(lambda: listed(server) == expected, f"listed: {expected}")


def listed(server: Running) -> list[tuple[str, int]]:
    """The addresses and ports of the clients on the list."""
    document = json.loads(get(server, "/clients.json")[2])
    return sorted((client["address"], client["port"]) for client in document["clients"])


def test_the_client_s_address_is_that_of_the_header(tmp_path: Path) -> None:
    with extended(tmp_path, WHENCE, *OPTIONS, *argv("--log-level debug")) as server:
        for version in (1, 2):
            with through(server, header(version=version) + b"WHENCE\n") as client:
                assert client.line() == b"192.0.2.7 50000\n"
                assert client.who() == 1
                await_listed(server, [("192.0.2.7", 50000)])
            await_listed(server, [])
        accepted = server.events("client.accepted")
        assert {event["client.address"] for event in accepted} == {"192.0.2.7"}
        assert {event["client.port"] for event in accepted} == {50000}
        v6 = line("TCP6", "2001:db8::7", "::1", 50001, 4242)
        with through(server, v6 + b"WHENCE\n") as client:
            assert client.line() == b"2001:db8::7 50001\n"


@pytest.mark.parametrize("sent", [b"PROXY UNKNOWN\r\n", binary(0x21, 0x00, b"")])
def test_without_an_address_the_client_has_that_of_the_balancer(sent: bytes) -> None:
    with Running(*OPTIONS) as server, through(server, sent + b"WHO\n") as client:
        assert client.line() == b"1\n"
        assert [host for host, _ in listed(server)] == [BALANCER]


def test_limits_count_the_clients_addresses() -> None:
    with Running(*OPTIONS, "--max-clients-per-address", "2") as server, ExitStack() as stack:
        for host, reply in [
            ("192.0.2.7", b"1\n"),
            ("192.0.2.7", b"2\n"),
            ("192.0.2.7", b"ERR too many clients from your address\n"),
            ("192.0.2.8", b"3\n"),
        ]:
            client = stack.enter_context(through(server, header(host) + b"WHO\n"))
            assert client.line() == reply
        rejected = server.wait_for("client.rejected")
        assert rejected["client.address"] == "192.0.2.7"
        # A balancer may have more connections than its clients.
        for number in range(3):
            client = stack.enter_context(through(server, header(f"192.0.2.{number + 20}")))
            assert client.who() == 4 + number


def test_a_header_may_arrive_in_any_pieces() -> None:
    with Running(*OPTIONS) as server:
        for version in (1, 2):
            sent = header(version=version) + b"WHY\n"
            with through(server, b"") as client:
                for at in range(len(sent)):
                    client.send(sent[at : at + 1])
                    time.sleep(0.001)
                assert client.line() == b"42\n"
        with through(server, header() + b"WHO\nWHY\nWHO\n") as client:
            assert [client.line() for _ in range(3)] == [b"1\n", b"42\n", b"1\n"]
        with through(server, header() + b"WH") as client:
            client.send(b"Y\n")
            assert client.line() == b"42\n"


def test_a_second_header_is_a_command_of_the_client() -> None:
    with Running(*OPTIONS) as server:
        with through(server, 2 * header(version=1) + b"WHO\n") as client:
            assert client.line() == b"ERR unknown command\n"
            assert client.line() == b"1\n"
            await_listed(server, [("192.0.2.7", 50000)])
        with through(server, 2 * header() + b"\nWHO\n") as client:
            replies = client.end().splitlines()
            assert replies[-1] == b"1"
            assert all(reply.startswith(b"ERR ") for reply in replies[:-1])


def test_a_header_from_elsewhere_is_a_command() -> None:
    with Running(*OPTIONS) as server, server.client() as client:
        client.send(header(version=1) + b"WHO\n")
        assert client.line() == b"ERR unknown command\n"
        assert client.line() == b"1\n"
        assert [host for host, _ in listed(server)] == ["127.0.0.1"]


@pytest.mark.parametrize(
    "sent", [b"WHO\n", b"PROXY TCP4 x y 1 2\r\n", b"\x16\x03\x01", b"PROXY " + b"x" * 200]
)
def test_a_balancer_that_sends_no_header_is_closed_and_the_log_says_why(sent: bytes) -> None:
    with Running(*OPTIONS) as server:
        with through(server, sent) as client:
            assert client.rest() == b""
        event = server.wait_for("client.proxy_failed")
        assert event["client.address"] == BALANCER
        assert "a balancer in --proxy-from must send one" in event["message"]
        assert metrics(server)['gserver_error_replies_total{reason="proxy_failed"}'] == 1
        assert server.who() == 1


def test_a_balancer_that_ends_within_the_header_has_failed_and_one_that_only_connects_has_not() -> (
    None
):
    with Running(*OPTIONS) as server:
        for sent in (b"", b"PROX", header()[:20]):
            with through(server, sent) as client:
                assert client.end() == b""
        until(
            lambda: metrics(server)['gserver_error_replies_total{reason="proxy_failed"}'] == 2,
            "two have failed",
        )


def test_a_header_has_its_own_time() -> None:
    times = argv("--proxy-header-timeout 0.5 --line-timeout 60 --idle-timeout 60")
    with Running(*OPTIONS, *times) as server:
        began = time.monotonic()
        with through(server, header()[:20]) as slow, through(server, b"") as silent:
            assert slow.rest() == b""
            assert silent.rest() == b""
            assert 0.4 < time.monotonic() - began < 30
        assert "it took too long" in server.wait_for("client.proxy_failed")["message"]


def test_probes_of_the_balancer_are_answered_and_are_no_clients() -> None:
    limits = argv("--max-clients 1 --max-clients-per-address 1")
    with Running(*OPTIONS, *limits) as server, ExitStack() as stack:
        probes = [stack.enter_context(through(server, LOCAL + b"WHO\n")) for _ in range(3)]
        assert {probe.line() for probe in probes} == {b"0\n"}
        client = stack.enter_context(through(server, header()))
        assert client.who() == 1
        assert [probe.who() for probe in probes] == [1, 1, 1]
        await_listed(server, [("192.0.2.7", 50000)])
        for probe in probes[:2]:
            assert probe.end() == b""
        assert client.who() == 1
        figures = metrics(server)
        assert figures["gserver_clients"] == 1
        assert figures["gserver_clients_accepted_total"] == 1
        assert figures["gserver_clients_closed_total"] == 0


def test_the_header_comes_before_tls(pems: Path) -> None:
    with Running(*OPTIONS, *certified(pems)) as server:
        for version in (1, 2):
            with through(server, header(version=version), trust(pems)) as client:
                assert client.who() == 1
                await_listed(server, [("192.0.2.7", 50000)])
            await_listed(server, [])
        with through(server, LOCAL, trust(pems)) as probe:
            assert probe.ask(b"WHO") == b"0"
            await_listed(server, [])
        with server.client(context=trust(pems)) as direct:
            assert direct.who() == 1
        with through(server, header() + b"WHO\n") as plain:
            assert plain.rest() == b"ERR TLS only\n"


@pytest.mark.outer
def test_addresses_and_their_limit_stay_over_a_reload_and_probes_end(tmp_path: Path) -> None:
    options = [*OPTIONS, *argv("--max-clients-per-address 1 --workers 2")]
    with extended(tmp_path, WHENCE, *options) as server, ExitStack() as stack:
        kept = stack.enter_context(through(server, header() + b"WHENCE\n"))
        assert kept.line() == b"192.0.2.7 50000\n"
        probe = stack.enter_context(through(server, LOCAL + b"WHY\n"))
        assert probe.line() == b"42\n"
        begun = stack.enter_context(through(server, header("192.0.2.8")[:9]))
        with server.expecting("server.reloaded"):
            server.send_signal(signal.SIGHUP)
            begun.send(header("192.0.2.8")[9:] + b"WHENCE\n")
            assert begun.line() == b"192.0.2.8 50000\n"
        assert probe.rest() == b""
        assert kept.ask(b"WHENCE") == b"192.0.2.7 50000"
        assert kept.who() == 2
        await_listed(server, [("192.0.2.7", 50000), ("192.0.2.8", 50000)])
        with through(server, header() + b"WHO\n") as another:
            assert another.line() == b"ERR too many clients from your address\n"


@pytest.mark.outer
def test_in_a_drain_a_header_may_still_end_and_silent_balancers_do_not_delay_it(pems: Path) -> None:
    for more in ([], [*certified(pems), *argv("--tls-handshake-timeout 0")]):
        options = [*OPTIONS, *more, *argv("--proxy-header-timeout 0 --drain-timeout 60")]
        with Running(*options) as server, ExitStack() as stack:
            probe = stack.enter_context(through(server, LOCAL))
            begun = stack.enter_context(through(server, header()[:9]))
            stack.enter_context(through(server, header()[:9]))
            if not more:  # The headers before it have been read.
                assert probe.ask(b"WHO") == b"0"
            began = time.monotonic()
            with stopped(*server.workers()):
                server.send_signal(signal.SIGTERM)
                server.wait_for("server.draining")
                begun.send(header()[9:] + (b"" if more else b"WHO\n"))
            assert begun.rest() == (b"" if more else b"1\n")
            assert probe.rest() == b""
            assert server.exit_code() == 0
            assert time.monotonic() - began < 10 * PATIENCE


@pytest.mark.outer
def test_probes_delay_no_reload_and_one_may_come_during_it(tmp_path: Path) -> None:
    patient = argv("--proxy-header-timeout 0 --drain-timeout 300")
    with extended(tmp_path, WHENCE, *OPTIONS, *patient) as server, ExitStack() as stack:
        busy = stack.enter_context(through(server, LOCAL + b"NAP\n"))
        begun = stack.enter_context(through(server, LOCAL[:5]))
        client = stack.enter_context(through(server, b"PROXY UNKNOWN\r\nWHO\n"))
        assert client.line() == b"1\n"
        began = time.monotonic()
        with server.expecting("server.reloaded"):
            server.send_signal(signal.SIGHUP)
            begun.send(LOCAL[5:] + b"WHY\n")
            assert begun.line() == b"42\n"
            assert busy.line() == b"done\n"
            assert begun.rest() == busy.rest() == b""
        assert time.monotonic() - began < 30
        assert client.ask(b"WHENCE").startswith(BALANCER.encode())
        assert client.who() == 1
        assert not server.events("worker.cut_off")


def reset(client: Client) -> None:
    """Close with a reset, as health checks do."""
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.sock.close()


def test_health_checks_that_end_with_a_reset_are_no_failure() -> None:
    with Running(*OPTIONS) as server:
        for sent in (LOCAL, b"", header(), LOCAL + b"WHO\n") * 20:
            with through(server, sent) as client:
                reset(client)
        until(lambda: server.who() == 1, "all have gone")
        assert metrics(server)['gserver_error_replies_total{reason="proxy_failed"}'] == 0
        assert not server.events("client.proxy_failed")


def test_more_local_connections_than_a_balancer_needs_are_clients(pems: Path) -> None:
    with Running(*OPTIONS) as server, ExitStack() as stack:
        probes = []
        for number in range(MAX_PROBES + 1):
            probes.append(stack.enter_context(through(server, LOCAL + b"WHO\n")))
            assert probes[-1].line() == (b"1\n" if number == MAX_PROBES else b"0\n")
        probes[0].sock.close()
        until(lambda: server.who() == 2, "the last one is still a client")
    # A probe that never begins with TLS is forgotten.
    with Running(*OPTIONS, *certified(pems)) as server:
        for _ in range(MAX_PROBES + 4):
            with through(server, LOCAL) as probe:
                assert probe.end() == b""
        with through(server, LOCAL, trust(pems)) as probe:
            assert probe.who() == 0


def test_a_listener_for_both_families_knows_the_balancer() -> None:
    with Running(*OPTIONS, "--host", "::") as server, through(server, header()) as client:
        assert client.who() == 1
        await_listed(server, [("192.0.2.7", 50000)])


def test_an_address_of_ipv6_that_looks_like_a_mapped_one_is_limited_as_any_other() -> None:
    odd = line("TCP6", "::ffff:0:1:2", "::1", 50001, 4242)
    with Running(*OPTIONS, "--max-clients-per-address", "1") as server, ExitStack() as stack:
        first, second = (stack.enter_context(through(server, odd + b"WHO\n")) for _ in range(2))
        assert first.line() == b"1\n"
        assert second.line() == b"ERR too many clients from your address\n"
        await_listed(server, [("::ffff:0:1:2", 50001)])


def test_an_operator_closes_by_the_address_of_the_header() -> None:
    with Running(*OPTIONS) as server, ExitStack() as stack:
        client = stack.enter_context(through(server, header()))
        probe = stack.enter_context(through(server, LOCAL))
        assert client.who() == 1
        for who in (BALANCER, "192.0.2.7"):
            assert client.who() == 1
            get(server, f"/kick?client={who}", "POST", "127.0.0.1", LIMIT, **{"X-Gserver": "1"})
        assert client.rest() == b"ERR closed by the operator\n"
        assert probe.ask(b"WHY") == b"42"


def test_too_many_headers_evict_the_oldest() -> None:
    with Running(*OPTIONS, "--proxy-header-timeout", "0") as server, ExitStack() as stack:
        # The first ones are silent: unread bytes would make their end a reset.
        silent = [
            stack.enter_context(through(server, b"P" if number >= 10 else b""))
            for number in range(MAX_ADMISSIONS + 10)
        ]
        assert [client.rest() for client in silent[:10]] == [b""] * 10
        with through(server, header()) as good:
            assert good.who() == 1
            assert server.who() == 2
        silent[-1].send(header(version=1)[1:])
        assert silent[-1].who() >= 1


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("10.0.0.1/8", "'10.0.0.1/8' is not a network: its end must be zeros"),
        ("balancer", "'balancer' is not a network: use one such as 10.0.0.0/8"),
        ("10.0.0.0/8,", "'' is not a network: use one such as 10.0.0.0/8"),
        ("::ffff:10.0.0.0/104", "write them so, without ::ffff:"),
    ],
)
def test_a_wrong_network_is_a_clear_error(text: str, error: str) -> None:
    done: Any = Running("--proxy-from", text, wait=False)
    with done:
        assert done.exit_code() == 2
        assert error in done.stderr
