"""Bad input: any bytes, in any amount, split in any way."""

import random
import socket
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise

from lab.admin import status
from lab.rows import PLAIN, Notes, row
from lab.running import LIMIT, PATIENCE
from lab.site import SEED, Site
from lab.wire import replies
from lab.wire_cases import LIMIT_BYTES, NOT_ASCII, REPLIES, TOO_LONG, UNKNOWN

Start = Callable[..., Site]

#: No WHO: its reply depends on the neighbours.
ODD = [
    *(
        b"WHY",
        b"why\r",
        b" \t Why \v",
        b"WHERE",
        b"where\r",
        b"",
        b"\r",
        b" \t\f",
        b"WH",
        b"WHYWHY",
    ),
    *(b"WHY WHY", b"\0", b"WHY\0", b"\x1b[2J\x1b]0;x\a", b"\xff\xfe", b"\xc3\x28", b"WHY\x80"),
    *(b"{}", b"%s%n", b"../..", b"x" * LIMIT_BYTES),
]
HTTP = (
    b"GET / HTTP/1.1",
    b"POST / HTTP/1.1",
    b" \r\nOPTIONS * HTTP/1.0",
    b"PRI * HTTP/2.0",
    b"get /x y http/3",
)


def reply(line: bytes) -> bytes:
    """The reply to a line that is not the first."""
    return replies(b"WHY\n" + line, REPLIES, LIMIT_BYTES).removeprefix(REPLIES[b"WHY"])


@row("Odd lines")
def test_odd_lines_get_one_reply_each_and_are_never_echoed(start: Start, notes: Notes) -> None:
    site = start("--log-level", "debug")
    with site.neighbours(), site.client() as client:
        for line in ODD:
            client.send(line + b"\n")
            if reply(line):
                assert client.line() == reply(line), line
        counts = status(site.server)["error_replies"]
        notes.happened(f"{counts}")
        assert counts["not_ascii"] == sum(reply(line) == NOT_ASCII for line in ODD)
        assert client.ask(b"WHY") == b"42"
        logged = "".join(site.server.lines)  # `neighbours` checks each line.
        assert "2J" not in logged
        assert "\x1b" not in logged


@row("Input in pieces")
def test_input_in_pieces_of_any_size_and_its_end(start: Start, notes: Notes) -> None:
    draw = random.Random(SEED)
    site = start("--unterminated-after", "0")
    with site.neighbours():
        for size in (1, 2, 3, 7, 100, 5000, 100_000):
            lines = draw.choices(ODD[:-1], k=300)
            sent = b"\n".join([*lines, b"WHERE"])
            cuts = [
                0,
                *sorted({draw.randrange(len(sent)) for _ in range(len(sent) // size)}),
                len(sent),
            ]
            with site.client() as client:
                for begin, end in pairwise(cuts):
                    client.send(sent[begin:end])
                got = client.end()
            assert got == b"".join(map(reply, lines)) + b"here\n", (
                f"GSERVER_FAULT_SEED={SEED}, pieces of {size}"
            )
            notes.happened(f"{len(cuts) - 1} pieces")


@row("Endless line")
def test_an_endless_line_is_closed_and_uses_no_memory(start: Start, notes: Notes) -> None:
    site = start()
    with site.neighbours():
        for size, expected in {
            LIMIT_BYTES - 1: UNKNOWN,
            LIMIT_BYTES: UNKNOWN,
            LIMIT_BYTES + 1: TOO_LONG,
        }.items():
            for ending in (b"\n", b"\r\n"):
                with site.client() as client:
                    client.send(b"x" * size + ending + b"WHY\n")
                    assert client.end() == expected + b"42\n" * (expected == UNKNOWN)
        before = site.resident_of_workers()
        with site.client() as client:
            sent, received = 0, b""
            with suppress(OSError):
                while sent < 10_000_000:
                    client.send(b"x" * 65536)
                    sent += 65536
                client.send(b"\nWHY\n")
            grown = site.resident_of_workers() - before
            with suppress(ConnectionError):  # Bytes that arrive too late make the kernel reset.
                received = client.rest()
            assert received in (b"", TOO_LONG)
        notes.happened(f"{sent} bytes of a line were sent")
        notes.measured("memory grows by", grown / 1e6, "MB")
        assert grown < 3_000_000 * site.variant.workers * PATIENCE
        assert status(site.server)["error_replies"]["line_too_long"] == 3


@row("Browser")
def test_an_http_request_gets_no_reply_and_no_later_line_is_run(start: Start, notes: Notes) -> None:
    site = start()
    with site.neighbours():
        for request in HTTP:
            for ending in (b"\n", b"\r\n"):
                with site.client() as client:
                    client.send(request + ending + b"Host: x" + ending * 2 + b"WHO\nWHY\nWHERE\n")
                    assert client.rest() == b""
        closed = status(site.server)["error_replies"]["http"]
        notes.happened(f"{closed} clients were closed")
        assert closed == 2 * len(HTTP)


@row("A million commands at once", quick=None)
def test_a_million_commands_from_one_client_do_not_delay_others(start: Start, notes: Notes) -> None:
    site = start()
    with site.neighbours() as neighbours, site.client() as client:
        usual = neighbours.rounds
        with site.client() as other:
            other.sock.settimeout(4 * LIMIT)
            got = b"".join(pump(other.sock, b"WHY\n" * 1_000_000))
        assert got == b"42\n" * 1_000_000
        assert client.who() > 0
        answered = neighbours.rounds - usual
        notes.happened(
            f"a million commands were answered; neighbours were served {answered} times meanwhile"
        )
        notes.measured("p99", neighbours.p99() * 1000, "ms")
        assert neighbours.rounds > usual + 10


def pump(sock: socket.socket, data: bytes) -> list[bytes]:
    """Send all data and the end of input; return everything received meanwhile."""
    rest, is_sent = memoryview(data), False
    got: list[bytes] = []
    sock.settimeout(0.01)
    while True:
        with suppress(TimeoutError):
            if rest:
                rest = rest[sock.send(rest[:16384]) :]
            elif not is_sent:
                socket.socket.shutdown(sock, socket.SHUT_WR)
                is_sent = True
        with suppress(TimeoutError):
            piece = sock.recv(65536)
            if not piece:
                return got
            got.append(piece)


@row("Urgent data", *PLAIN)
def test_urgent_bytes_are_not_part_of_a_line_and_use_no_cpu(start: Start, notes: Notes) -> None:
    site = start()
    with site.neighbours():
        for _ in range(50):
            with site.client() as client:
                client.sock.send(b"!", socket.MSG_OOB)
                client.send(b"WH")
                client.sock.send(b"!", socket.MSG_OOB)
                client.send(b"Y\nWHERE\n")
                assert [client.line(), client.line()] == [b"42\n", b"here\n"]
                client.sock.send(b"!", socket.MSG_OOB)
                assert client.end() == b""
        notes.happened("150 urgent bytes were sent")
        with site.client() as client:
            client.sock.send(b"!", socket.MSG_OOB)
            assert client.ask(b"WHY") == b"42"
