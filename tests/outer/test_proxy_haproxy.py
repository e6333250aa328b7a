"""A real HAProxy sends PROXY headers of each kind, and checks the service port."""

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from gserver.addresses import TCP, TLS, UNIX
from lab.admin import get, listed, metrics
from lab.endpoints import three_endpoints
from lab.haproxy import ADDRESS, TRUSTED
from lab.redises import free_port
from lab.running import LIMIT, Client, Running, argv, is_refused, program, until
from lab.tls_client import certified, trust

CONFIG = """
defaults
    mode tcp
    timeout connect 2s
    timeout client 1m
    timeout server 1m
listen gserver
    bind 127.0.0.1:PORT
    option tcp-check
    CHECK
    server one 127.0.0.1:SERVER source ADDRESS check inter 100ms check-send-proxy OPTIONS
"""
#: another endpoint, with TLS that passes through.
SECRET = """
listen secret
    bind 127.0.0.1:PORT
    option tcp-check
    CHECK
    server one 127.0.0.1:SERVER source ADDRESS check inter 100ms check-send-proxy send-proxy-v2 \
        check-ssl verify none
"""
CHECK = r"""
    tcp-check send WHO\n
    tcp-check expect rstring ^[0-9]+
"""
SOURCE = "127.0.0.20"


@contextmanager
def haproxy(
    folder: Path, server: Running, options: str, check: str = CHECK, more: str = ""
) -> Iterator[int]:
    """HAProxy in front of the server, with these options; yield its port."""
    port = free_port()
    text = CONFIG.replace("PORT", str(port)).replace("SERVER", str(server.port)) + more
    text = text.replace("ADDRESS", ADDRESS).replace("CHECK", check).replace("OPTIONS", options)
    file = folder / "haproxy.cfg"
    file.write_text(text)
    with subprocess.Popen([program("haproxy"), "-db", "-f", str(file)]) as process:
        try:
            until(lambda: not is_refused(port), "HAProxy listens")
            yield port
        finally:
            process.kill()
            process.wait(LIMIT)


def replies(server: Running) -> float:
    return metrics(server)['gserver_commands_total{command="WHO"}']


@pytest.mark.parametrize(
    "options",
    ["send-proxy-v2", "send-proxy-v2 proxy-v2-options crc32c,unique-id", "send-proxy-v2-ssl-cn"],
)
def test_its_checks_are_answered_and_are_no_clients(tmp_path: Path, options: str) -> None:
    limit = argv("--max-clients-per-address 1 --admin-port 0")
    with Running(*TRUSTED, *limit) as server, haproxy(tmp_path, server, options) as port:
        until(lambda: replies(server) >= 3, "checks were answered")
        before = metrics(server)["gserver_clients_accepted_total"]
        checks = replies(server)
        until(lambda: replies(server) >= checks + 5, "more checks were answered")
        assert metrics(server)["gserver_clients_accepted_total"] == before
        with Client(port, source=SOURCE) as client, Client(port, source="127.0.0.21") as other:
            assert other.ask(b"WHY") == b"42"
            assert client.who() == 2
            document = json.loads(get(server, "/clients.json")[2])
            assert {each["address"] for each in document["clients"]} == {SOURCE, "127.0.0.21"}
        assert not server.events("client.proxy_failed")
        assert not server.events("client.rejected")


def test_version_1_has_the_addresses_but_its_checks_are_clients(tmp_path: Path) -> None:
    with Running(*TRUSTED, "--admin-port", "0") as server:
        with haproxy(tmp_path, server, "send-proxy") as port, Client(port, source=SOURCE) as client:
            assert client.who() >= 1

            def is_listed() -> bool:
                document = json.loads(get(server, "/clients.json")[2])
                return SOURCE in {each["address"] for each in document["clients"]}

            until(is_listed, "it is listed")
        until(lambda: metrics(server)["gserver_clients_accepted_total"] > 1, "a check was a client")


def test_by_a_balancer_with_and_without_tls_and_by_a_socket_file_there_is_one_who(
    tmp_path: Path, pems: Path
) -> None:
    """Limits see the true addresses, and checks are in no count. The same through reloads."""
    given = [*TRUSTED, *argv("--max-clients-per-address 2 --drain-timeout 2")]
    with three_endpoints(tmp_path, pems, *given) as (server, endpoints), ExitStack() as stack:
        front_of_tls = free_port()
        more = SECRET.replace("PORT", str(front_of_tls)).replace("SERVER", str(endpoints.port(TLS)))
        front = stack.enter_context(haproxy(tmp_path, server, "send-proxy-v2", more=more))
        until(lambda: not is_refused(front_of_tls), "HAProxy listens for TLS")

        def plain(source: str = SOURCE) -> Client:
            return stack.enter_context(Client(front, source=source))

        def secret(source: str = SOURCE) -> Client:
            return stack.enter_context(Client(front_of_tls, source=source, context=trust(pems)))

        kept = [plain(), *(stack.enter_context(endpoints.client(UNIX)) for _ in range(3))]
        for reloads in range(3):
            with_tls = secret()
            until(lambda: {each.who() for each in (*kept, with_tls)} == {5}, "all are counted")  # noqa: B023
            for surplus in (plain(), secret()):
                assert surplus.line() == b"ERR too many clients from your address\n"
            for other in (plain("127.0.0.21"), secret("127.0.0.22")):
                assert other.ask(b"WHY") == b"42"
                other.end()
            accepted = metrics(server)["gserver_clients_accepted_total"]
            checks = replies(server)
            until(lambda: replies(server) >= checks + 5, "checks were answered")  # noqa: B023
            assert metrics(server)["gserver_clients_accepted_total"] == accepted
            found = sorted((each["transport"], each["address"]) for each in listed(server))
            assert found == [(TCP, SOURCE), (TLS, SOURCE), *[(UNIX, "unix")] * 3]
            server.send_signal(signal.SIGHUP)
            server.wait_for("server.reloaded", reloads + 1)
            assert with_tls.rest() == b"", "it was closed at the drain timeout"
            assert {each.who() for each in kept} == {4}
        assert not server.events("client.proxy_failed")


def test_the_header_comes_before_tls_that_passes_through(tmp_path: Path, pems: Path) -> None:
    options = [*TRUSTED, *certified(pems), "--admin-port", "0"]
    with ExitStack() as stack:
        server = stack.enter_context(Running(*options))
        port = stack.enter_context(haproxy(tmp_path, server, "send-proxy-v2 check-ssl verify none"))
        until(lambda: replies(server) >= 3, "checks with TLS were answered")
        with Client(port, source=SOURCE, context=trust(pems)) as client:
            assert client.who() == 1
        assert not server.events("client.proxy_failed")
