"""Bad clients: too many, too slow, not reading, dead or disconnected, in every phase."""

import socket
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress

from lab.admin import status
from lab.netns import Network
from lab.rows import ALL, PLAIN, Notes, row
from lab.running import LIMIT, PATIENCE, Client, until
from lab.site import Site

Start = Callable[..., Site]

#: Bytes sent before the client leaves, plain or over TLS; and bytes sent without a TLS handshake.
PHASES = (
    b"",
    b"WH",
    b"WHY\n",
    b"NOPE\nWH",
    b"WHERE\n" * 5000,
    b"x" * 2000,
    b"GET / HTTP/1.1\n",
    b"\n",
    b"WHY\nNOPE\n" * 500,
)
BARE_PHASES = b"", b"\x16", b"\x16\x03\x01\x02\x00\x01", b"WHO\n"
#: Seconds from the loss of a client's machine, by the keepalive settings of listener.py.
DEAD_SECONDS = 120


def reset(sock: socket.socket) -> None:
    """Close with a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def counted(site: Site, name: str) -> int:
    """The number of error replies of this kind."""
    return int(status(site.server)["error_replies"][name])


@row("Resets")
def test_clients_that_reset_in_every_phase(start: Start, notes: Notes) -> None:
    site, number = start("--log-level", "debug"), 0

    def seen_clients() -> int:
        """The number of connections that were counted, as clients or as rejected handshakes."""
        events = site.server.events("client.accepted") + site.server.events("client.tls_failed")
        return sum(event["client.address"] == "127.0.0.2" for event in events)

    with site.neighbours():
        for _ in range(20):
            for said in PHASES:
                for is_half_closed in (False, True):
                    client = site.client("127.0.0.2")
                    client.send(said)
                    if is_half_closed:
                        socket.socket.shutdown(client.sock, socket.SHUT_WR)
                    reset(client.sock)
                    number += 1
            for said in BARE_PHASES:
                bare = site.server.client()
                bare.send(said)
                reset(bare.sock)
                number += 1
        until(lambda: seen_clients() == 40 * len(PHASES), "the server has counted all of them")
    notes.happened(f"{number} connections were reset")


@row("Half-closes", quick=None)
def test_hundreds_of_clients_end_at_once(start: Start, notes: Notes) -> None:
    site = start(crowd=400)
    with site.neighbours(), ExitStack() as stack:
        crowd = [stack.enter_context(site.client()) for _ in range(400)]
        for number, client in enumerate(crowd):
            client.send((b"", b"WHY\nWHERE", b"WHY\n", b"W")[number % 4])
        for client in crowd:
            socket.socket.shutdown(client.sock, socket.SHUT_WR)
        replies = [client.rest() for client in crowd]
        notes.happened(f"{len(crowd)} clients ended, and read everything up to a clean close")
        assert replies == [b"", b"42\nhere\n", b"42\n", b"ERR unknown command\n"] * 100


@row("Over the limit", quick=ALL[1])
def test_a_client_over_the_limit_gets_the_reason_and_a_clean_close(
    start: Start, notes: Notes
) -> None:
    site = start("--max-clients", "40")
    until(lambda: sum(site.clients()) == 0, "the earlier clients have left")
    with ExitStack() as stack:
        inside: list[Client] = []

        def fill() -> None:
            for count in range(len(inside) + 1, 41):
                inside.append(stack.enter_context(site.client()))
                assert inside[-1].who() == count

        fill()
        for turn in range(50):
            with site.client() as late:
                if turn % 2:
                    late.send(b"WHO\n")
                assert late.rest() == b"ERR too many clients\n"
                assert {client.ask(b"WHY") for client in inside} == {b"42"}
        assert inside[-1].who() == 40
        for client in inside[:10]:
            client.sock.close()
        del inside[:10]
        until(lambda: inside[0].who() == 30, "ten clients have left")
        fill()
        with site.client() as late:
            assert late.rest() == b"ERR too many clients\n"
        notes.happened(f"{counted(site, 'too_many_clients')} were rejected")
        assert counted(site, "too_many_clients") >= 50
    site.assert_as_before()


@row("One address takes all places", quick=None)
def test_one_address_does_not_take_all_places(start: Start, notes: Notes) -> None:
    site = start("--max-clients-per-address", "20")
    before = counted(site, "too_many_from_address")
    with site.neighbours(), ExitStack() as stack:
        greedy = [stack.enter_context(site.client("127.0.0.2")) for _ in range(20)]
        assert {client.ask(b"WHY") for client in greedy} == {b"42"}
        for _ in range(50):
            with site.client("127.0.0.2") as late:
                assert late.rest() == b"ERR too many clients from your address\n"
        assert {client.ask(b"WHY") for client in greedy} == {b"42"}
        number = counted(site, "too_many_from_address") - before
        notes.happened(f"{number} were rejected")
        assert number == 50


@row("Slowloris", quick=None)
def test_a_client_that_drips_bytes_is_closed_at_the_line_timeout(
    start: Start, notes: Notes
) -> None:
    site = start("--line-timeout", "2")
    with site.neighbours(), ExitStack() as stack:
        crowd = [stack.enter_context(site.client()) for _ in range(50)]
        began = time.monotonic()
        while counted(site, "too_slow") < 50:
            for client in crowd:
                with suppress(OSError):
                    client.send(b"x")
            time.sleep(0.1)
            assert time.monotonic() - began < 2 + LIMIT
        notes.measured("cut off after", time.monotonic() - began, "s")
        notes.happened("50 clients were closed")


@row("Slow reader", quick=None)
def test_a_client_that_does_not_read_uses_no_memory_and_is_reset(
    start: Start, notes: Notes
) -> None:
    site = start("--write-timeout", "1")
    with site.neighbours(), ExitStack() as stack:
        before, sent, began = site.resident_of_workers(), 0, time.monotonic()
        deaf = [stack.enter_context(site.client()) for _ in range(2)]
        for client in deaf:
            client.sock.settimeout(0.02)
        while counted(site, "slow_reader") < 2:
            assert time.monotonic() - began < LIMIT
            for client in deaf:
                with suppress(OSError):
                    sent += client.sock.send(b"N\n" * 20_000)
        grown = site.resident_of_workers() - before
        notes.happened(f"2 clients were reset, after {sent} bytes")
        notes.measured("memory grows by", grown / 1e6, "MB")
        assert sent < 100_000_000
        assert grown < 4_000_000 * site.variant.workers * PATIENCE


@row("Dead peer", *PLAIN, quick=None)
def test_a_client_on_a_vanished_machine_counts_for_two_minutes_at_most(
    start: Start, notes: Notes
) -> None:
    with Network(2) as network:
        here, there = network.hosts
        with here.inside():
            site = start("--host", "0.0.0.0")
            with site.neighbours(), there.inside():
                dead = [Client(site.server.port, here.address) for _ in range(10)]
                for number, client in enumerate(dead):
                    client.send(
                        (b"WHY\n", b"NOPE\n")[number % 2]
                    )  # One is idle, one has a greenlet.
                    assert client.line()
                with here.inside():
                    until(lambda: sum(site.clients()) >= 10, "the clients are counted")
                with network.cut((here, there), (there, here)) as cut:
                    for client in dead:
                        client.sock.close()  # The server does not learn of it.
                    with here.inside(), site.client() as one:
                        until(lambda: one.who() < 10, "they are uncounted", DEAD_SECONDS + LIMIT)
                    notes.happened("the machine of 10 clients vanished")
                    notes.measured("counted for", time.monotonic() - cut.after, "s")
                    assert time.monotonic() - cut.after > DEAD_SECONDS / 2
