"""A client's states under load: other clients must not change its replies."""

import select
import socket
import ssl
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from lab.running import LIMIT, PATIENCE, Running, extended, until
from lab.tls13 import RecordClient
from lab.tls_client import certified, trust

MODULE = """
import os
import time
from gserver.commands import command
from lab.commands import nap

@command("WAIT", may_block=False)
def wait(request):
    time.sleep(0.3)
    return "waited"

@command("LARGE")
def large(request):
    return os.urandom(200_000).hex()
"""


@pytest.mark.outer
def test_deadlines_hold_with_more_busy_clients_than_fit_in_one_turn() -> None:
    with Running("--line-timeout", "1") as server, ExitStack() as stack:
        crowd = [stack.enter_context(server.client()) for _ in range(300)]
        slow = stack.enter_context(server.client())
        unterminated = stack.enter_context(server.client())
        slow.send(b"WH")
        for client in crowd:
            client.sock.setblocking(False)
            client.sock.send(b"\n" * 60_000)
        began = time.monotonic()
        unterminated.send(b"WHY")
        assert unterminated.line() == b"42\n"
        assert slow.line() == b"ERR too slow\n"
        assert time.monotonic() - began < 4 * PATIENCE  # Regression: 9 s, as long as the load.


@pytest.mark.outer
def test_a_line_that_ends_in_time_is_not_too_slow_if_tls_records_are_split(
    pems: Path, tmp_path: Path
) -> None:
    options = ("--line-timeout", "1", "--unterminated-after", "0")
    with (
        Running(*certified(pems), *options) as server,
        RecordClient(server.port, trust(pems), tmp_path) as client,
    ):
        record = client.record(b"WHY\n")
        client.send(record[:10])
        for _ in range(8):
            time.sleep(0.2)
            following = client.record(b"WHY\n")
            client.send(record[10:] + following[:10])
            assert client.line() == b"42\n"
            record = following


@pytest.mark.outer
def test_a_partial_tls_record_starts_the_line_timeout(pems: Path, tmp_path: Path) -> None:
    options = ("--line-timeout", "4", "--unterminated-after", "0")
    with (
        Running(*certified(pems), *options) as server,
        RecordClient(server.port, trust(pems), tmp_path) as client,
    ):
        record = client.record(b"W")
        began = time.monotonic()
        client.send(record[:10])
        time.sleep(3.5)
        client.send(record[10:])
        assert client.line() == b"ERR too slow\n"
        assert time.monotonic() - began < 7  # 4 s from the first byte of the record, not 7.5.


@pytest.mark.outer
def test_a_handler_that_blocks_with_may_block_false_fails_in_order(tmp_path: Path) -> None:
    with extended(tmp_path, MODULE) as server, server.client() as client:
        client.send(b"NAP\nWAIT\nWHY\n")
        until(lambda: server.events("command.failed"), "the handler has failed")
        client.send(b"why\n")
        expected = [b"rested\n", b"ERR internal\n", b"42\n", b"42\n"]
        assert [client.line() for _ in range(4)] == expected


@pytest.mark.outer
def test_large_replies_are_not_remembered(tmp_path: Path) -> None:
    with extended(tmp_path, MODULE) as server, server.client() as client:
        [worker] = server.workers()
        for _ in range(10):
            client.ask(b"LARGE")
        before = worker.memory_info().rss
        for _ in range(100):
            assert len(client.ask(b"LARGE")) == 400_000
        assert worker.memory_info().rss - before < 20_000_000  # Regression: 40 MB.


@pytest.mark.outer
def test_a_large_certificate_chain_does_not_make_a_worker_spin(pems: Path, tmp_path: Path) -> None:
    """The kernel does not accept all of it at once; then the client reads it and stays silent."""
    chain = tmp_path / "chain.pem"
    chain.write_text((pems / "server.pem").read_text() * 150)
    options = ["--tls-cert", str(chain), "--tls-key", str(pems / "server.key")]
    with Running(*options, "--tls-handshake-timeout", "0") as server, socket.socket() as sock:
        [worker] = server.workers()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1460)
        sock.settimeout(LIMIT)
        sock.connect(("127.0.0.1", server.port))
        received, sent = ssl.MemoryBIO(), ssl.MemoryBIO()
        with pytest.raises(ssl.SSLWantReadError):
            trust(pems).wrap_bio(received, sent, server_hostname="127.0.0.1").do_handshake()
        sock.sendall(sent.read())
        time.sleep(0.5)
        total = 0
        while select.select([sock], [], [], 0.5)[0]:
            total += len(sock.recv(65536))
        assert total > 40_000
        used = sum(worker.cpu_times()[:2])
        time.sleep(2)
        assert sum(worker.cpu_times()[:2]) - used < 0.5  # A spinning loop uses 2 s.
