"""TLS on the port: OpenSSL's client, Python's, plain text clients and silent peers."""

import _socket
import contextlib
import fcntl
import re
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from gserver.certificates import Certificates
from gserver.errors import UsageError
from gserver.serve import tls
from lab.admin import get, status
from lab.certificates import make_certificates
from lab.netns import Network
from lab.running import LIMIT, PATIENCE, Client, Running, argv, gserver, program, stopped, until
from lab.tls13 import HANDSHAKE, KEY_UPDATE, RecordClient
from lab.tls_client import certified, run_handshake, trust
from lab.wire_cases import CASES, Case

#: Timeouts of the servers below, in seconds.
HANDSHAKE_TIMEOUT = 1.0
MAX_CLIENTS = 1200
LARGE = "from lab.commands import replying\nlarge = replying('LARGE', 3_000_000)\n"

LATE = """
import os
import time
from pathlib import Path
from gserver.commands import command

while Path("wait").exists() and not Path(f"go-{os.getpid()}").exists():
    time.sleep(0.01)

@command("LATE")
def late(request):
    return 1
"""


@pytest.fixture(scope="module")
def server(pems: Path) -> Iterator[Running]:
    """One server for the tests that do not change it."""
    more = argv(f"--server-id here --admin-port 0 --max-clients {MAX_CLIENTS} --commands large")
    more += ["--tls-handshake-timeout", str(HANDSHAKE_TIMEOUT)]
    (pems / "large.py").write_text(LARGE)
    with Running(*certified(pems), *more, cwd=pems) as running:
        yield running


def error_replies(server: Running) -> Callable[[str], int]:
    """Return a function that counts the error replies with a reason from now on."""
    before = status(server)

    def count(reason: str) -> int:
        now = status(server)
        return int(now["error_replies"][reason] - before["error_replies"][reason])

    return count


def waiting(client: Client) -> int:
    """The number of sent bytes that the server's kernel has not acknowledged."""
    return int.from_bytes(fcntl.ioctl(client.sock, termios.TIOCOUTQ, b"\0" * 4), sys.byteorder)


def s_client(server: Running, *more: str) -> list[str]:
    """The command line of OpenSSL's client."""
    return [program("openssl"), "s_client", "-connect", f"127.0.0.1:{server.port}", *more]


@pytest.mark.outer
@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_openssl_is_answered(server: Running, pems: Path, version: str) -> None:
    command = s_client(
        server, version, "-quiet", "-CAfile", str(pems / "ca.pem"), "-verify_return_error"
    )
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with process as client:
        assert client.stdin
        assert client.stdout
        client.stdin.write(b"WHO\nWHERE\nWHY")  # The input stays open: a pause ends the last line.
        client.stdin.flush()
        assert [client.stdout.readline() for _ in range(3)] == [b"1\n", b"here\n", b"42\n"]
        client.terminate()


@pytest.mark.outer
def test_older_versions_are_refused(server: Running) -> None:
    count = error_replies(server)
    command = s_client(server, "-tls1_1", "-cipher", "DEFAULT@SECLEVEL=0")
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 1
    assert b"alert protocol version" in done.stderr
    assert count("tls_failed") == 1


@pytest.mark.outer
def test_renegotiation_is_refused(server: Running) -> None:
    # A line that begins with R makes s_client renegotiate.
    command = s_client(server, "-tls1_2")
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    with process as client:
        assert client.stdin
        assert client.stdout
        client.stdin.write(b"R\n")
        client.stdin.flush()
        assert any(b"no renegotiation" in line for line in client.stdout)
        client.terminate()


def test_keys_may_be_updated(server: Running, pems: Path, tmp_path: Path) -> None:
    with RecordClient(server.port, trust(pems), tmp_path) as client:
        client.send(client.record(b"WHY\n") + client.key_update() + client.record(b"WHERE\n"))
        assert (client.line(), client.line()) == (b"42\n", b"here\n")
        client.send(client.key_update(wants_one=True) + client.record(b"WHO\n"))
        assert client.line() == b"1\n"
        client.send(client.record(b"WHY\n"))
        assert client.line() == b"42\n"


def test_endless_key_updates_are_processed_in_turn_with_other_clients(
    server: Running, pems: Path, tmp_path: Path
) -> None:
    with (
        RecordClient(server.port, trust(pems), tmp_path) as greedy,
        server.client(context=trust(pems)) as good,
    ):
        greedy.send(greedy.record(b"WHY\n"))
        assert (good.ask(b"WHY"), greedy.line()) == (b"42", b"42\n")
        flood = b"".join(greedy.key_update() for _ in range(10_000)) + greedy.record(b"WHY\n")
        sending = threading.Thread(target=greedy.send, args=[flood])
        with stopped(*server.workers()):
            sending.start()
            # The kernel's buffers are full before the other client sends.
            until(
                lambda: waiting(greedy) > 100_000 or not sending.is_alive(),
                "the updates have been sent",
            )
            good.send(b"WHERE\n")
        first, _, _ = select.select([good.sock, greedy.sock], [], [], LIMIT)
        assert first == [good.sock]
        assert good.line() == b"here\n"
        assert greedy.line() == b"42\n"
        sending.join()


def test_a_partial_record_is_not_a_pause(server: Running, pems: Path, tmp_path: Path) -> None:
    with RecordClient(server.port, trust(pems), tmp_path) as client:
        # WHO, which a pause would end, is followed by a partial record: it may belong to another
        # line.
        whole, (first, *others) = client.record(b"WHO"), client.record(b"LE\n")
        client.send(whole + bytes([first]))
        for byte in others:
            client.send(bytes([byte]))
        assert client.line() == b"ERR unknown command\n"


def test_an_invalid_record_header_closes_at_once(
    server: Running, pems: Path, tmp_path: Path
) -> None:
    with RecordClient(server.port, trust(pems), tmp_path) as client:
        client.send(b"\x17\x03\x03\xff\xff" + b"x" * 10)
        with pytest.raises(ssl.SSLError, match="RECORD_OVERFLOW"):
            client.line()


def test_a_client_that_does_not_read_tls_output_is_closed(pems: Path, tmp_path: Path) -> None:
    pem = [(pems / name).read_text() for name in ("server.pem", "server.key")]
    context = tls.make_context(Certificates(*pem))

    def receive() -> None:
        """Act as the server until the client ends."""
        sock = _socket.socket(fileno=listener.accept()[0].detach())
        with contextlib.closing(sock):
            sock.setblocking(False)
            connection = tls.TlsSocket(sock, context)
            while select.select([sock], [], [], LIMIT)[0]:
                is_over = connection.handshake(sock.recv(4096))
                sock.send(connection.outgoing())
                if is_over:
                    break
            while select.select([sock], [], [], LIMIT)[0]:
                with contextlib.suppress(BlockingIOError):
                    if not connection.recv(4096):
                        return

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor() as pool:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        receiving = pool.submit(receive)
        with RecordClient(listener.getsockname()[1], trust(pems), tmp_path) as client:
            flood = b"".join(client.key_update(wants_one=True) for _ in range(20_000))
            with contextlib.suppress(ConnectionError):  # The server closes first.
                client.send(flood)
            with pytest.raises(ConnectionAbortedError, match="does not read what TLS sends"):
                receiving.result()


def test_a_client_that_breaks_tls_gets_an_alert(server: Running) -> None:
    with server.client() as client:
        client.send(b"\x16\x03\x01\x00\x05hello")
        assert client.rest().startswith(b"\x15\x03")


@contextmanager
def answered(
    pems: Path, folder: Path, options: str = "--drain-timeout 60"
) -> Iterator[tuple[Running, RecordClient]]:
    """A server with these options and a long drain timeout, and a client that has a reply."""
    with (
        Running(*certified(pems), *argv(options)) as server,
        RecordClient(server.port, trust(pems), folder) as client,
    ):
        client.send(client.record(b"WHY\n"))
        assert client.line() == b"42\n"
        yield server, client


def test_a_drain_answers_all_that_has_arrived_in_large_records(pems: Path, tmp_path: Path) -> None:
    with answered(pems, tmp_path) as (server, client):
        with stopped(*server.workers()):
            client.send(b"".join(client.record(b"WHY\n" * 4096) for _ in range(4)))
            server.send_signal(signal.SIGTERM)
            server.wait_for("server.draining")
        assert [client.line() for _ in range(4 * 4096)] == [b"42\n"] * (4 * 4096)
        assert client.line() == b""


@pytest.mark.outer
def test_a_drain_answers_a_record_longer_than_a_read_that_came_during_a_long_command(
    pems: Path, tmp_path: Path
) -> None:
    (tmp_path / "nap.py").write_text('from lab.commands import napping\nnap = napping("NAP", 2)\n')
    options = (*certified(pems), *argv("--drain-timeout 60 --commands nap"))
    with (
        Running(*options, cwd=tmp_path) as server,
        RecordClient(server.port, trust(pems), tmp_path) as client,
    ):
        client.send(client.record(b"NAP\n"))
        time.sleep(0.5)  # The command runs.
        client.send(client.record(b"WHY\n" * 4096))
        server.send_signal(signal.SIGTERM)
        assert client.line() == b"rested\n"
        assert [client.line() for _ in range(4096)] == [b"42\n"] * 4096
        assert client.line() == b""


def test_a_drain_waits_briefly_for_a_partial_record(pems: Path, tmp_path: Path) -> None:
    with answered(pems, tmp_path) as (server, client):
        record = client.record(b"WHY\n" * 1000)
        client.send(record[:1500])
        time.sleep(0.2)  # The server has read it.
        with stopped(*server.workers()):
            server.send_signal(signal.SIGTERM)
            server.wait_for("server.draining")
            client.send(record[1500:])
        assert [client.line() for _ in range(1000)] == [b"42\n"] * 1000
        assert client.line() == b""


@pytest.mark.outer
def test_a_partial_record_is_not_idle_but_must_end_in_time(pems: Path, tmp_path: Path) -> None:
    options = f"--idle-timeout {PATIENCE} --line-timeout {3 * PATIENCE}"
    with answered(pems, tmp_path, options) as (_, client):
        record = client.record(b"WHY\n" * 500)
        for at in range(0, len(record), 300):
            client.send(record[at : at + 300])
            time.sleep(0.3 * PATIENCE)  # Twice the idle timeout in all.
        assert [client.line() for _ in range(500)] == [b"42\n"] * 500
        for byte in client.record(b"WHY\n")[:-1]:
            client.send(bytes([byte]))
            if select.select([client.sock], [], [], 0.3)[0]:
                break
        assert client.line() == b"ERR too slow\n"
        assert client.line() == b""


@pytest.mark.outer
def test_a_partial_record_that_arrives_during_a_stall_is_not_idle(
    pems: Path, tmp_path: Path
) -> None:
    with answered(pems, tmp_path, "--idle-timeout 1 --line-timeout 30") as (server, client):
        record = client.record(b"WHY\n")
        with stopped(*server.workers()):
            time.sleep(0.5)
            client.send(record[:-1])
            time.sleep(0.9)
        client.send(record[-1:])
        assert client.line() == b"42\n"


@pytest.mark.outer
@pytest.mark.parametrize("whole", [b"", b"WHY\n", b"NOPE\nWHY\n", b"WHY\nWHE"])
@pytest.mark.parametrize("is_early", [True, False], ids=["with the handshake", "later"])
def test_a_partial_record_has_the_line_timeout_wherever_it_arrives(
    pems: Path, whole: bytes, is_early: bool
) -> None:
    received, sent = ssl.MemoryBIO(), ssl.MemoryBIO()
    inner = trust(pems).wrap_bio(received, sent, server_hostname="127.0.0.1")
    limits = ("--line-timeout", "0.5")
    with Running(*certified(pems), *limits) as server, server.client() as client:
        run_handshake(client, inner, received, sent)

        def line() -> bytes:
            reply = b""
            while not reply.endswith(b"\n"):
                with contextlib.suppress(ssl.SSLWantReadError):
                    reply += inner.read(1)
                    continue
                received.write(client.sock.recv(65536))
            return reply

        if not is_early:
            inner.write(b"WHO\n")
            client.send(sent.read())
            assert line() == b"1\n"
        for said in (whole, b"WHY\n"):
            if said:
                inner.write(said)
        client.send(sent.read()[:-1])
        expected = [b"ERR unknown command\n"] * (b"NOPE" in whole) + [b"42\n"] * (b"WHY" in whole)
        assert [line() for _ in (*expected, 1)] == [*expected, b"ERR too slow\n"]


@pytest.mark.outer
@pytest.mark.parametrize("is_said", [True, False], ids=["a line", "a key update"])
def test_time_of_an_earlier_line_or_record_does_not_count_for_the_next(
    pems: Path, tmp_path: Path, is_said: bool
) -> None:
    with answered(pems, tmp_path, f"--line-timeout {PATIENCE}") as (_, client):
        earlier = client.record(b"WHO") if is_said else client.key_update()
        client.send(earlier[:-1])
        time.sleep(0.2)  # So that the server reads the part alone.
        client.send(earlier[-1:])
        if is_said:
            assert client.line() == b"1\n"
        time.sleep(1.5 * PATIENCE)
        record = client.record(b"WHY\n")
        client.send(record[:-1])
        time.sleep(0.2)
        client.send(record[-1:])
        assert client.line() == b"42\n"


def test_half_a_tls_message_closes_the_connection(
    server: Running, pems: Path, tmp_path: Path
) -> None:
    count = error_replies(server)
    with RecordClient(server.port, trust(pems), tmp_path) as client:
        # The reply is due after a pause, but cannot be encrypted until the rest of the message
        # arrives.
        client.send(client.record(b"WHO") + client.record(KEY_UPDATE, HANDSHAKE))
        with contextlib.suppress(ConnectionResetError):
            assert client.line() == b""
    assert count("slow_reader") == 0


@pytest.mark.outer
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_gets_the_same_replies_over_tls(server: Running, pems: Path, case: Case) -> None:
    with server.client(context=trust(pems)) as client:
        client.send(case.sent)
        assert client.end() == case.replies


def test_batches_and_replies_may_span_many_records(server: Running, pems: Path) -> None:
    with server.client(context=trust(pems)) as client:
        client.send(b"WHY\n" * 20_000 + b"LARGE\n" + b"WHERE\n" * 3)
        assert [client.line() for _ in range(20_000)] == [b"42\n"] * 20_000
        assert client.line() == b"x" * 3_000_000 + b"\n"
        assert [client.line() for _ in range(3)] == [b"here\n"] * 3


def test_a_client_that_reads_late_gets_every_reply_once(pems: Path) -> None:
    server_id = "x" * 20  # The replies to one read fit in one record, and are sent at once.
    with (
        Running(*certified(pems), "--server-id", server_id) as server,
        server.client(context=trust(pems)) as client,
    ):
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        for _ in range(3000):
            client.send(b"WHERE\n" * 100)
        time.sleep(0.5)  # By now the kernel takes no more, in the middle of a record.
        lines = {client.line() for _ in range(300_000)}
        assert lines == {server_id.encode() + b"\n"}
        assert client.ask(b"WHY") == b"42"


def test_a_plain_text_client_that_disconnects_is_counted_once(server: Running) -> None:
    count = error_replies(server)
    for _ in range(20):
        client = server.client()
        client.send(b"WHO\n")
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.sock.close()
    until(lambda: count("plain_text") + count("tls_failed") >= 20, "all clients are counted")
    assert count("plain_text") + count("tls_failed") == 20


def test_a_client_that_connects_and_leaves_is_not_an_error(server: Running, pems: Path) -> None:
    count = error_replies(server)
    with server.client():
        pass
    with server.client(context=trust(pems)) as client:
        assert client.who() == 1
    assert (count("tls_failed"), count("plain_text")) == (0, 0)


def test_rejected_clients_get_the_reason_over_tls(pems: Path) -> None:
    with (
        Running(*certified(pems), "--max-clients", "1") as server,
        server.client(context=trust(pems)) as first,
        server.client(),
    ):
        assert first.who() == 1
        with server.client(context=trust(pems)) as second:
            assert second.rest() == b"ERR too many clients\n"
        assert first.who() == 1


@pytest.fixture(scope="module")
def mutual(pems: Path) -> Iterator[Running]:
    """A server that requires client certificates."""
    (pems / "names.py").write_text(
        "from gserver.commands import command\n"
        "def name(request): return f'{request.tls_name} {request.address}'\n"
        "name_1 = command('NAME')(name)\nname_2 = command('QUICK', may_block=False)(name)\n"
    )
    options = argv(f"--tls-client-ca {pems}/ca.pem --admin-port 0 --commands names")
    with Running(*certified(pems), *options, cwd=pems) as running:
        yield running


def test_clients_need_a_certificate_if_a_client_ca_is_set(mutual: Running, pems: Path) -> None:
    count = error_replies(mutual)
    # With TLS 1.3 a client learns of it only after its own handshake.
    for bad in (trust(pems), trust(pems, "other-ca")):
        with pytest.raises(ssl.SSLError, match="ALERT"), mutual.client(context=bad) as client:
            client.ask(b"WHO")
    until(lambda: count("tls_failed") == 2, "both clients are counted")
    with mutual.client(context=trust(pems, "server")) as client:
        assert client.who() == 1


def test_a_handler_knows_the_name_in_the_certificate_of_its_client(
    mutual: Running, pems: Path
) -> None:
    with mutual.client(context=trust(pems, "server")) as client:
        assert client.ask(b"NAME") == b"server 127.0.0.1"
        assert client.ask(b"QUICK") == b"server 127.0.0.1"


def serial(server: Running) -> str:
    """The serial number of the server's certificate."""
    pem = ssl.get_server_certificate(("127.0.0.1", server.port), timeout=LIMIT)
    command = [program("openssl"), "x509", "-noout", "-serial"]
    return subprocess.run(command, input=pem, capture_output=True, text=True, check=True).stdout


@pytest.mark.outer
def test_a_reload_takes_new_certificates_and_keeps_the_old_if_they_are_bad(
    pems: Path, tmp_path: Path
) -> None:
    for folder in (tmp_path / "new", tmp_path / "live"):
        folder.mkdir()
        make_certificates(folder)
    live = tmp_path / "live"
    with Running(*certified(live), "--admin-port", "0") as server:
        old = serial(server)
        for name in ("server.pem", "server.key"):
            (live / name).write_bytes((tmp_path / "new" / name).read_bytes())
        server.send_signal(signal.SIGHUP)
        server.wait_for("server.reloaded")
        new = serial(server)
        assert new != old
        (live / "server.key").write_bytes((pems / "server.key").read_bytes())
        server.send_signal(signal.SIGHUP)
        assert "--tls-key is not the key" in server.wait_for("server.reload_failed")["message"]
        (live / "server.key").unlink()
        server.send_signal(signal.SIGHUP)
        assert "--tls-key" in server.wait_for("server.reload_failed", 2)["message"]
        # A file that is being written: TLS stays on.
        for name in ("server.pem", "server.key"):
            (live / name).write_bytes(b"")
        server.send_signal(signal.SIGHUP)
        assert "is empty" in server.wait_for("server.reload_failed", 3)["message"]
        assert serial(server) == new
        # The replacement of a dead worker has the last good files.
        (worker,) = server.workers()
        worker.kill()
        server.wait_for("worker.ready", 3)
        assert serial(server) == new
        for name in ("server.pem", "server.key"):
            (live / name).write_bytes((pems / name).read_bytes())
        server.send_signal(signal.SIGHUP)
        server.wait_for("server.reloaded", 2)
        assert serial(server) not in (old, new)
        counted = status(server)["server"]
        assert (counted["reloads"], counted["reload_failures"]) == (2, 3)
        assert server.stop() == 0


@pytest.mark.outer
@pytest.mark.parametrize("is_first_ready", [False, True])
def test_a_reload_continues_even_if_the_next_one_finds_bad_files(
    tmp_path: Path, *, is_first_ready: bool
) -> None:
    make_certificates(tmp_path)
    (tmp_path / "late.py").write_text(LATE)
    more = ["--workers", "3", "--commands", "late", "--admin-port", "0"]
    with Running(*certified(tmp_path), *more, cwd=tmp_path) as server:
        server.wait_for("worker.ready", 3)
        server.wait_for("agent.ready")
        before, old = server.workers(), serial(server)
        make_certificates(tmp_path)
        (tmp_path / "wait").touch()
        server.send_signal(signal.SIGHUP)
        until(lambda: len(server.workers()) == 4, "a new worker starts")
        (new,) = set(server.workers()) - set(before)
        if is_first_ready:
            (tmp_path / f"go-{new.pid}").touch()
            server.wait_for("worker.ready", 4)
            (next_one,) = until(
                lambda: set(server.workers()) - {new, *before}, "the second new worker starts"
            )
            next_one.kill()
            server.wait_for("worker.died")
        (tmp_path / "server.key").write_bytes(b"")
        server.send_signal(signal.SIGHUP)
        assert (
            "the previous reload continues: " in server.wait_for("server.reload_failed")["message"]
        )
        (tmp_path / "wait").unlink()
        server.wait_for("server.reloaded")
        assert not set(before) & set(server.workers())
        assert new in server.workers()
        assert [each["name"] for each in status(server)["reasons"]][-1:] == ["reload_failed"]
        assert old not in [serial(server) for _ in range(20)]
        counted = status(server)["server"]
        assert (counted["reloads"], counted["reload_failures"], counted["worker_restarts"]) == (
            1,
            1,
            int(is_first_ready),
        )


@pytest.mark.outer
def test_a_reload_whose_workers_fail_lets_the_previous_one_continue(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    (tmp_path / "late.py").write_text(LATE)
    with Running(
        *certified(tmp_path), "--workers", "2", "--commands", "late", cwd=tmp_path
    ) as server:
        server.wait_for("worker.ready", 2)
        before, old = server.workers(), serial(server)
        make_certificates(tmp_path)
        (tmp_path / "wait").touch()
        server.send_signal(signal.SIGHUP)
        (new,) = until(lambda: set(server.workers()) - set(before), "a new worker starts")
        (tmp_path / f"go-{new.pid}").touch()
        (next_one,) = until(
            lambda: set(server.workers()) - {new, *before}, "the second new worker starts"
        )
        (tmp_path / "late.py").write_text("raise RuntimeError('out of luck')")
        make_certificates(tmp_path)
        server.send_signal(signal.SIGHUP)
        server.wait_for("server.reloading", 2)
        next_one.kill()  # It is replaced by the newest generation.
        message = server.wait_for("server.reload_failed")["message"]
        assert re.search("the previous reload continues: .*out of luck", message)
        (tmp_path / "late.py").write_text(LATE)
        (tmp_path / "wait").unlink()
        server.wait_for("server.reloaded")
        assert new in server.workers()
        assert not set(before) & set(server.workers())
        shown = {serial(server) for _ in range(20)}
        assert len(shown) == 1
        assert old not in shown


def test_a_certificate_with_an_invalid_date_is_still_served(pems: Path) -> None:
    """OpenSSL accepts any digits."""
    chain = (pems / "server.pem").read_text()
    [*_, last] = re.findall(
        rb"\d{12}Z|\d{14}Z", der := ssl.PEM_cert_to_DER_cert(chain[chain.index("-----BEGIN C") :])
    )
    broken = ssl.DER_cert_to_PEM_cert(der.replace(last, last[:-11] + b"99" + last[-9:]))
    assert tls.expires_at(Certificates(chain)) > time.time()
    assert tls.expires_at(Certificates(broken)) == 0


@pytest.mark.parametrize(
    ("last", "moment"),
    [
        (b"\x17\x0d500101000000Z", datetime(1950, 1, 1, tzinfo=UTC)),
        (b"\x17\x0d991231235959Z", datetime(1999, 12, 31, 23, 59, 59, tzinfo=UTC)),
        (b"\x17\x0d491231000000Z", datetime(2049, 12, 31, tzinfo=UTC)),
        (b"\x18\x0f20510203040506Z", datetime(2051, 2, 3, 4, 5, 6, tzinfo=UTC)),
    ],
)
def test_the_expiry_is_read_in_both_time_formats(last: bytes, moment: datetime) -> None:
    validity = b"\x17\x0d490101000000Z" + last
    der = b"\x30\x22\x30" + bytes([len(validity)]) + validity
    chain = ssl.DER_cert_to_PEM_cert(der)
    assert tls.expires_at(Certificates(chain)) == moment.timestamp()


@pytest.mark.outer
@pytest.mark.parametrize("days", [1, 20_000])
def test_the_certificate_expiry_is_a_metric(tmp_path: Path, days: int) -> None:
    command = argv(f"{program('openssl')} req -x509 -days {days} -nodes -newkey ec -subj /CN=x")
    command += argv("-pkeyopt ec_paramgen_curve:prime256v1 -keyout server.key -out server.pem")
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    dates = [program("openssl"), "x509", "-noout", "-enddate", "-in", "server.pem"]
    output = subprocess.run(
        dates, cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout.strip()
    moment = datetime.strptime(output + "+0000", "notAfter=%b %d %H:%M:%S %Y GMT%z").timestamp()
    with Running(*certified(tmp_path), "--admin-port", "0", "--workers", "2") as server:
        assert status(server)["server"]["tls_expires_at"] == moment
        output = gserver("status", "--admin", f"127.0.0.1:{server.admin_port()}").stdout
        assert re.search(r"certificate valid for (23 h|19,?999 d)", output), output
        metric = re.search(
            r"^gserver_tls_expires_timestamp_seconds (\S+)$",
            get(server, "/metrics")[2].decode(),
            re.M,
        )
        assert metric
        assert float(metric[1]) == moment


@pytest.mark.outer
def test_an_expired_certificate_is_shown_and_warned_about(tmp_path: Path, pems: Path) -> None:
    # This `openssl req` has no option for dates, so `ca` sets the expiry.
    (tmp_path / "index.txt").touch()
    lines = argv("[ca] default_ca=x [x] database=index.txt serial=serial new_certs_dir=. policy=p")
    (tmp_path / "ca.conf").write_text(
        "\n".join([*lines, "default_md=sha256", "[p]", "CN=supplied", ""])
    )
    request = argv("req -new -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -subj /CN=x")
    request += ["-keyout", "server.key", "-out", "server.csr"]
    sign = argv(f"ca -batch -config ca.conf -cert {pems / 'ca.pem'} -keyfile {pems / 'ca.key'}")
    sign += ["-create_serial", "-startdate", "20200101000000Z", "-enddate", "20200202000000Z"]
    for arguments in (request, [*sign, "-in", "server.csr", "-out", "server.pem"]):
        subprocess.run(
            [program("openssl"), *arguments], cwd=tmp_path, check=True, capture_output=True
        )
    with Running(*certified(tmp_path), "--admin-port", "0") as server:
        assert (
            "certificate expired"
            in gserver("status", "--admin", f"127.0.0.1:{server.admin_port()}").stdout
        )
        assert "2020-02-02" in server.wait_for("tls.expired")["message"]
        anyone = trust(pems)
        anyone.check_hostname = False
        with (
            pytest.raises(ssl.SSLCertVerificationError, match="expired"),
            server.client(context=anyone),
        ):
            pass


@pytest.mark.outer
def test_bad_files_fail_the_start_with_one_line(pems: Path) -> None:
    good = {
        part: (pems / name).read_text()
        for part, name in (("chain", "server.pem"), ("key", "server.key"))
    }
    damaged = good["chain"][:200] + "!" + good["chain"][201:]
    encrypt = argv(f"{program('openssl')} pkey -aes128 -passout pass:x -in {pems / 'server.key'}")
    encrypted = subprocess.run(encrypt, check=True, capture_output=True, text=True).stdout
    other = (pems / "ca.key").read_text()
    for parts, words in (
        ({"chain": ""}, "--tls-cert must contain a certificate"),
        ({"chain": damaged}, "--tls-cert must contain a certificate"),
        ({"chain": good["key"]}, "--tls-cert must contain a certificate"),
        ({"key": good["chain"]}, "--tls-cert must contain a certificate"),
        ({"key": other}, "--tls-key is not the key"),
        ({"key": encrypted}, "--tls-key is encrypted"),
        ({"client_ca": "nothing"}, "--tls-client-ca contains no certificate"),
        ({"client_ca": good["key"]}, "--tls-client-ca contains no certificate"),
    ):
        with pytest.raises(UsageError, match=words):
            tls.make_context(Certificates(**{**good, **parts}))
    tls.make_context(Certificates(**good, client_ca=good["chain"]))


@pytest.mark.outer
@pytest.mark.parametrize(
    ("given", "output"),
    [
        ("", "replied ERR TLS only"),
        (
            "--tls",
            "has a certificate that is not trusted: self-signed certificate in certificate chain",
        ),
        ("--tls-ca other-ca.pem", "has a certificate that is not trusted: self-signed"),
        ("--tls-ca ca.pem", "failed the TLS handshake: TLSV13_ALERT_CERTIFICATE_REQUIRED"),
        (
            "--tls-ca ca.pem --tls-cert other-ca.pem --tls-key other-ca.key",
            "failed the TLS handshake: TLSV1_ALERT_",
        ),
        (
            "--tls-ca ca.pem --tls-cert server.pem --tls-key server.key --tls-name x",
            "Hostname mismatch",
        ),
        ("--tls-ca none.pem", "--tls-ca none.pem cannot be read: No such file or directory"),
        ("--tls-ca server.key", "server.key cannot be used: it must contain a certificate in PEM"),
        (
            "--tls-cert server.pem",
            "server.pem cannot be used: it must contain a certificate in PEM and, here or in",
        ),
        ("--tls-cert server.pem --tls-key ca.key", "server.pem cannot be used: "),
        (
            "--tls-cert server.pem --tls-key none.pem",
            "server.pem or --tls-key none.pem cannot be read: No such file",
        ),
        ("--tls-key server.key", "--tls-key needs --tls-cert"),
    ],
)
def test_ask_reports_why_it_has_no_reply_over_tls(
    mutual: Running, pems: Path, given: str, output: str
) -> None:
    words = [str(pems / word) if "." in word else word for word in given.split()]
    done = gserver("ask", "--server", f"127.0.0.1:{mutual.port}", *words)
    assert done.stdout == ""
    assert done.returncode == (1 if "no server answered" in done.stderr else 2)
    assert output in done.stderr.replace(f"{pems}/", "")
    assert done.stderr.count("\n") == 1


def test_ask_is_answered_over_tls(mutual: Running, pems: Path) -> None:
    words = ["--tls-ca", str(pems / "ca.pem"), *certified(pems)]
    assert (
        gserver("ask", "WHY", "WHO", "--server", f"127.0.0.1:{mutual.port}", *words).stdout
        == "42\n1\n"
    )
    named = gserver(
        "ask", "WHY", "--server", f"localhost:{mutual.port}", *words, "--tls-name", "127.0.0.1"
    )
    assert named.stdout == "42\n"


def test_ask_keeps_its_timeout_when_the_handshake_is_not_answered(
    mutual: Running, pems: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        servers = argv(
            f"--server 127.0.0.1:{mute.getsockname()[1]} --server 127.0.0.1:{mutual.port}"
        )
        done = gserver(
            "ask",
            *servers,
            "--timeout",
            str(PATIENCE),
            "--tls-ca",
            str(pems / "ca.pem"),
            *certified(pems),
        )
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_all_descriptors_are_released(server: Running, pems: Path) -> None:
    def files() -> int:
        return sum(worker.num_fds() for worker in server.workers())

    with server.client(context=trust(pems)) as client:
        client.who()
        before = files()
        for _ in range(20):
            with server.client(context=trust(pems)) as other:
                other.who()
            with server.client() as plain:
                plain.send(b"WHO\n")
                plain.rest()
            with server.client() as broken:
                broken.send(b"\x16\x03\x01\x02\x00")
                broken.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        until(lambda: files() == before, "all descriptors are closed")
        assert client.who() == 1


@pytest.mark.outer
def test_a_client_ca_file_may_contain_non_ascii_comments(tmp_path: Path, pems: Path) -> None:
    (tmp_path / "ca.pem").write_text(
        "# Label: F\u0151tan\u00fas\u00edtv\u00e1ny\n" + (pems / "ca.pem").read_text()
    )
    with Running(*certified(pems), "--tls-client-ca", str(tmp_path / "ca.pem")) as server:
        with server.client(context=trust(pems, "server")) as client:
            assert client.ask(b"WHY") == b"42"
        assert not server.events("worker.died")


@pytest.mark.outer
def test_a_weak_certificate_is_distinguished_from_an_invalid_one(tmp_path: Path) -> None:
    command = argv(f"{program('openssl')} req -x509 -nodes -newkey rsa:1024 -subj /CN=weak")
    command += ["-keyout", "weak.key", "-out", "weak.pem"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    done = gserver("--port", "0", *certified(tmp_path, "weak"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("gserver: --tls-cert is too weak for OpenSSL")


@pytest.mark.outer
@pytest.mark.parametrize(
    "version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"]
)
def test_a_certificate_chain_may_exceed_the_socket_buffer(
    tmp_path: Path, pems: Path, version: ssl.TLSVersion
) -> None:
    (tmp_path / "server.key").write_bytes((pems / "server.key").read_bytes())
    (tmp_path / "server.pem").write_bytes(
        (pems / "server.pem").read_bytes() + 20 * (pems / "ca.pem").read_bytes()
    )
    context = trust(pems)
    context.maximum_version = version
    with Network(1) as network, network.hosts[0].inside():
        subprocess.run(["ip", "link", "set", "lo", "up", "mtu", "1500"], check=True)
        Path("/proc/sys/net/ipv4/tcp_wmem").write_text("4096 4096 4096")
        with Running(*certified(tmp_path), "--admin-port", "0") as server:
            count = error_replies(server)
            for _ in range(3):
                with socket.socket() as sock:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                    sock.settimeout(LIMIT)
                    sock.connect(("127.0.0.1", server.port))
                    with context.wrap_socket(sock, server_hostname="127.0.0.1") as client:
                        client.sendall(b"WHY\n")
                        assert client.recv(100) == b"42\n"
            assert count("tls_failed") == 0
