"""Handshakes in progress: their limit, their timeout, and that they delay no client."""

import select
import signal
import ssl
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from gserver.addresses import TCP
from gserver.boot import RESERVED_FILES
from gserver.serve.admission import MAX_ADMISSIONS
from lab.admin import status
from lab.endpoints import Endpoints
from lab.running import LIMIT, Client, Running, argv, limited, stopped, until
from lab.tls_client import certified, trust


def test_too_many_handshakes_evict_the_oldest(pems: Path) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(Running(*certified(pems), "--tls-handshake-timeout", "0"))
        silent = [stack.enter_context(server.client()) for _ in range(MAX_ADMISSIONS + 10)]
        assert [client.rest() for client in silent[:10]] == [b""] * 10
        with server.client(context=trust(pems)) as good:
            assert good.who() == 1
        ended = select.poll()
        for client in silent[12:]:
            ended.register(client.sock, select.POLLIN)
        assert ended.poll(0) == []


def test_failed_handshakes_do_not_delay_other_clients(pems: Path) -> None:
    with Running(*certified(pems)) as server, ExitStack() as stack:
        bad = [stack.enter_context(server.client()) for _ in range(100)]
        for client in bad:
            client.send(b"\x16" + b"\xff" * 9)
        with server.client(context=trust(pems)) as good:
            assert good.who() == 1


@pytest.mark.outer
def test_a_hello_sent_while_the_worker_is_stalled_is_answered(pems: Path) -> None:
    hello, answer = ssl.MemoryBIO(), ssl.MemoryBIO()
    talk = trust(pems).wrap_bio(answer, hello, server_hostname="127.0.0.1")
    with pytest.raises(ssl.SSLWantReadError):
        talk.do_handshake()
    with Running(*certified(pems), "--tls-handshake-timeout", "1") as server:
        [worker] = server.workers()
        files = worker.num_fds()
        with server.client() as client:

            def done(step: Callable[[], Any]) -> Any:
                """Run a TLS step to its end: feed it received bytes, and send its output."""
                while True:
                    try:
                        result = step()
                    except ssl.SSLWantReadError:
                        assert answer.write(client.sock.recv(65536)), "the handshake was answered"
                    else:
                        client.send(hello.read())
                        return result

            until(lambda: worker.num_fds() > files, "the connection is accepted")
            with stopped(worker):
                client.send(hello.read())
                time.sleep(2.5)
            done(talk.do_handshake)
            done(lambda: talk.write(b"WHY\n"))
            assert done(talk.read) == b"42\n"


@pytest.mark.outer
def test_silent_peers_do_not_block_clients_when_descriptors_are_scarce(pems: Path) -> None:
    with ExitStack() as stack:
        more = [*certified(pems), "--tls-handshake-timeout", "0"]
        server = stack.enter_context(Running(*more, command=limited(512)))
        for _ in range(560):
            stack.enter_context(server.client())
        with server.client(context=trust(pems)) as good:
            assert good.who() == 1


@pytest.mark.outer
@pytest.mark.parametrize("established", [10, 15])
def test_handshakes_take_no_descriptors_from_clients(pems: Path, established: int) -> None:
    with ExitStack() as stack:
        more = [*certified(pems), "--tls-handshake-timeout", "0"]
        # Room for 16 clients.
        server = stack.enter_context(Running(*more, command=limited(RESERVED_FILES + 16)))
        for _ in range(established):
            # With TLS 1.3 the client completes its handshake before the server does.
            assert stack.enter_context(server.client(context=trust(pems))).ask(b"WHY") == b"42"
        for _ in range(20):
            stack.enter_context(server.client())
        with server.client(context=trust(pems)) as good:
            assert good.who() == established + 1


def test_an_evicted_plain_text_client_is_not_a_failed_handshake(pems: Path) -> None:
    with ExitStack() as stack:
        options = [*certified(pems), "--tls-handshake-timeout", "0", "--admin-port", "0"]
        # Room for four handshakes.
        server = stack.enter_context(Running(*options, command=limited(RESERVED_FILES + 16)))
        plain = stack.enter_context(server.client())
        plain.send(b"WHO\n")
        assert plain.line().startswith(b"ERR ")
        for _ in range(4):
            stack.enter_context(server.client())
        assert plain.rest() == b""
        errors = status(server)["error_replies"]
        assert (errors["plain_text"], errors["tls_failed"]) == (1, 0)


def test_an_address_with_too_many_clients_does_not_end_the_handshakes_of_others(pems: Path) -> None:
    options = [*certified(pems), "--tls-handshake-timeout", "0", "--max-clients-per-address", "2"]
    # Room for four handshakes.
    with (
        Running(*options, command=limited(RESERVED_FILES + 16)) as server,
        ExitStack() as stack,
        server.client("127.0.0.2") as victim,
    ):
        crowd = [stack.enter_context(server.client("127.0.0.1")) for _ in range(20)]
        assert [client.rest() for client in crowd[2:-1]] == [b""] * 17
        with trust(pems).wrap_socket(victim.sock, server_hostname="127.0.0.1") as sock:
            sock.sendall(b"WHY\n")
            assert sock.recv(100) == b"42\n"


def test_plain_clients_of_such_an_address_do_not_end_them_either(pems: Path) -> None:
    binds = argv("--bind tls://127.0.0.1:0 --bind tcp://127.0.0.1:0")
    options = [*certified(pems), *binds, *argv("--tls-handshake-timeout 0")]
    limit = argv("--max-clients-per-address 15")
    # Room for 16 clients, beside the second listener.
    with (
        Running(*options, *limit, command=limited(RESERVED_FILES + 17)) as server,
        ExitStack() as stack,
    ):
        endpoints = Endpoints(server, pems)
        plain = endpoints.port(TCP)
        crowd = [stack.enter_context(Client(plain)) for _ in range(15)]
        until(lambda: crowd[0].who() == 15, "they are counted")
        victim = stack.enter_context(server.client("127.0.0.2"))
        time.sleep(0.2)
        for _ in range(10):
            with Client(plain) as surplus:
                assert surplus.line() == b"ERR too many clients from your address\n"
        with trust(pems).wrap_socket(victim.sock, server_hostname="127.0.0.1") as sock:
            sock.sendall(b"WHY\n")
            assert sock.recv(100) == b"42\n"


@pytest.mark.outer
def test_a_drain_answers_tls_clients_and_does_not_wait_for_silent_peers(pems: Path) -> None:
    with (
        Running(
            *certified(pems), "--drain-timeout", "60", "--tls-handshake-timeout", "0"
        ) as server,
        server.client(context=trust(pems)) as one,
        server.client(context=trust(pems)) as other,
        server.client() as silent,
    ):
        assert one.ask(b"WHY") == b"42"
        other.send(b"WHO\nWH")
        assert other.line() == b"2\n"
        with stopped(*server.workers()):
            server.send_signal(signal.SIGTERM)
            server.wait_for("server.draining")
            other.send(b"Y\n")
        assert one.rest() == b""
        assert other.rest() == b"42\n"
        assert silent.rest() == b""
        assert server.exit_code(LIMIT) == 0
