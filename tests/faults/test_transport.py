"""Faults of TLS: plain text clients, invalid records, silent peers, and bad certificate files."""

import shutil
import signal
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from lab.admin import status
from lab.certificates import make_certificates
from lab.rows import PLAIN, Notes, Variant, row
from lab.running import LIMIT, PATIENCE, Client, until
from lab.site import Site
from lab.tls13 import APPLICATION_DATA, HANDSHAKE, RecordClient
from lab.tls_client import certified, trust

Start = Callable[..., Site]

BY_TLS = Variant(1, True), Variant(3, True)
CCS, ALERT, HEARTBEAT = 20, 21, 24
#: Content and type (RFC 8446, B.1) of records that are encrypted correctly but invalid.
WRONG = {
    "a second ClientHello": (b"\x01\0\0\x04abcd", HANDSHAKE),
    "a ticket": (b"\x04\0\0\x01a", HANDSHAKE),
    "a bad KeyUpdate": (b"\x18\0\0\x01\x02", HANDSHAKE),
    "a message that would be 16 MB": (b"\x18\xff\xff\xff" + b"x" * 9000, HANDSHAKE),
    "ChangeCipherSpec": (b"\x01", CCS),
    "Heartbleed": (b"\x01\x40\0", HEARTBEAT),
    "no such kind": (b"x", 99),
    "no kind": (b"", 0),
    "too long": (b"x" * 16_400, APPLICATION_DATA),
    "a fatal alert": (b"\x02\x28", ALERT),
    "no alert": (b"\x03", ALERT),
}


@pytest.fixture
def connect(tmp_path: Path, pems: Path) -> Iterator[Callable[[Site], RecordClient]]:
    """Connect a client that makes its own records, and has a reply."""
    with ExitStack() as stack:

        def connected(site: Site) -> RecordClient:
            folder = tmp_path / str(time.monotonic_ns())
            folder.mkdir()
            client = stack.enter_context(RecordClient(site.server.port, trust(pems), folder))
            client.send(client.record(b"WHY\n"))
            assert client.line() == b"42\n"
            return client

        yield connected


def failed(site: Site) -> tuple[int, int]:
    """The numbers of plain text clients and of failed handshakes."""
    rejected = status(site.server)["error_replies"]
    return rejected["plain_text"], rejected["tls_failed"]


def ends(client: Client) -> bool:
    """Whether only the end follows, clean or not, after at most a `too slow` reply."""
    with suppress(OSError):
        return client.line() in (b"", b"ERR too slow\n")
    return True


@row("Plain text to a TLS port", *BY_TLS)
def test_a_plain_text_client_of_a_tls_port_gets_an_error_or_is_closed(
    start: Start, notes: Notes
) -> None:
    site = start()
    plain = (
        b"WHO\n",
        b"W",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0",
        b"\x15\x03\x01\0\x02\x01\0",
        b"\x80\x2e\x01\x03\x01",
    )
    broken = (
        b"\x16",
        b"\x16\x03\x01\xff\xff" + b"x" * 70_000,
        b"\x16\x03\x01\0\0" * 500,
        b"\x16\x03\x01\0\x04\x01\0\0\0",
    )
    with site.neighbours():
        for said in plain:
            with site.server.client() as client:
                client.send(said)
                assert client.rest() == b"ERR TLS only\n"
        for said in broken:
            with site.server.client() as client, suppress(OSError):
                client.send(said)
                client.end()
        until(lambda: failed(site) == (len(plain), len(broken)), "all clients are counted once")
        notes.happened(f"{len(plain)} plain text clients, {len(broken)} failed handshakes")


@row("TLS to a plain port", *PLAIN)
def test_a_tls_client_of_a_plain_port_is_closed(start: Start, notes: Notes, pems: Path) -> None:
    site = start()
    with site.neighbours():
        for _ in range(20):
            with site.server.client() as client:
                client.sock.settimeout(2 * PATIENCE)
                with pytest.raises(ssl.SSLError) as error:
                    trust(pems).wrap_socket(client.sock, server_hostname="127.0.0.1")
    notes.happened(str(error.value))


@row("Invalid TLS records", *BY_TLS)
def test_records_that_break_the_rules_end_their_client(
    start: Start, notes: Notes, connect: Callable[[Site], RecordClient]
) -> None:
    site = start("--line-timeout", "1")
    with site.neighbours():
        for name, (content, kind) in WRONG.items():
            client = connect(site)
            with suppress(ConnectionError):
                client.send(client.record(content, kind))
            assert ends(client), name
        for sent in (
            b"\x17\x03\x03\xff\xff",
            b"\x17\x03\x03\0\x20" + b"x" * 32,
            b"\x17\x03\x03\0\0",
            b"WHO\n" * 99,
        ):
            client = connect(site)
            client.send(sent)
            assert ends(client), sent
        client = connect(site)
        with suppress(ConnectionError):
            client.send(b"".join(client.record(b"") for _ in range(1000)))
        assert ends(client)
        notes.happened(f"{len(WRONG) + 5} clients were closed")


@row("Endless KeyUpdates", *BY_TLS, quick=None)
def test_endless_key_updates_do_not_delay_other_clients(
    start: Start, notes: Notes, connect: Callable[[Site], RecordClient]
) -> None:
    site = start()
    with site.neighbours() as neighbours:
        client = connect(site)
        before, memory = neighbours.rounds, site.resident_of_workers()
        flood = b"".join(client.key_update(wants_one=True) for _ in range(60_000))
        with suppress(ConnectionError):
            client.send(flood)
        last = b""
        with suppress(OSError):
            client.send(client.record(b"WHY\n"))
            last = client.line()
        assert last in (b"", b"42\n", b"ERR too slow\n"), last
        client.sock.close()
        neighbours.are_served()
        notes.happened(
            f"{len(flood)} bytes of KeyUpdates; neighbours were served"
            f" {neighbours.rounds - before} times meanwhile"
        )
        assert site.resident_of_workers() - memory < 4_000_000 * site.variant.workers * PATIENCE


@row("Stalled TLS handshake", *BY_TLS)
def test_a_stalled_handshake_is_closed_at_the_timeout(start: Start, notes: Notes) -> None:
    site = start("--tls-handshake-timeout", "2", "--max-clients", "100", crowd=30)
    with site.neighbours(), ExitStack() as stack:
        crowd = [stack.enter_context(site.server.client()) for _ in range(300)]
        for number, client in enumerate(crowd):
            client.send((b"", b"\x16", b"\x16\x03\x01\x02\0\x01")[number % 3])
        began = time.monotonic()
        with site.client() as good:
            assert good.who() < 10
            assert [client.rest() for client in crowd] == [b""] * len(crowd)
            notes.measured("closed after", time.monotonic() - began, "s")
            assert 0.5 < time.monotonic() - began < 2 + LIMIT
            assert good.who() < 10
        until(lambda: failed(site)[1] >= len(crowd), "all clients are counted")
        notes.happened(f"{len(crowd)} clients were closed")


@row("Bad certificates at a reload", *BY_TLS, quick=None)
def test_bad_certificates_at_a_reload_change_nothing(
    start: Start, notes: Notes, tmp_path: Path, pems: Path
) -> None:
    for name in ("server.pem", "server.key"):
        shutil.copy(pems / name, tmp_path)
    (tmp_path / "other").mkdir()
    make_certificates(tmp_path / "other")
    site = start(*certified(tmp_path))
    workers = site.server.workers()
    bad = b"", b"\0" * 5000, b"x" * 2_000_000, (tmp_path / "other/server.pem").read_bytes()
    with site.neighbours():
        for number, text in enumerate(bad):
            (tmp_path / "server.pem").write_bytes(text)
            site.server.send_signal(signal.SIGHUP)
            notes.happened(site.server.wait_for("server.reload_failed", number + 1)["message"])
        (tmp_path / "server.pem").unlink()
        site.server.send_signal(signal.SIGHUP)
        site.server.wait_for("server.reload_failed", len(bad) + 1)
        assert site.server.workers() == workers
