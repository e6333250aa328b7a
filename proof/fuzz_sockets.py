"""The clients of `bin/fuzz sockets`: what each sends and when, how it ends, and what it must read.

docs/protocol.md defines the expected replies.

A batch runs in one process, with hundreds of clients in greenlets. Time is measured by the client:
if a pause was long enough that it may have ended a line, or that a deadline may have passed, both
outcomes are accepted.
"""

import socket as sockets
import ssl
import struct
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any, NamedTuple

import gevent
from gevent import socket
from gevent.pool import Pool

from gserver.protocol import TLS_BEGINNING
from lab import wire
from lab.admin import status
from lab.certificates import make_certificates
from lab.rows import Variant
from lab.running import LIMIT
from lab.site import Site

BATCH = 1000
AT_ONCE = 150
MAX_LINE, MAX_CLIENTS, LARGE_BYTES = 64, 120, 9_000_000
LINE_SECONDS, IDLE_SECONDS, WRITE_SECONDS, HANDSHAKE_SECONDS, SILENCE_SECONDS = (
    1.5,
    4.0,
    1.0,
    4.0,
    0.1,
)
OPTIONS = (
    *(
        "--max-line-bytes",
        f"{MAX_LINE}",
        "--max-clients",
        f"{MAX_CLIENTS}",
        "--max-clients-per-address",
        "50",
    ),
    *(
        "--line-timeout",
        f"{LINE_SECONDS}",
        "--idle-timeout",
        f"{IDLE_SECONDS}",
        "--write-timeout",
        f"{WRITE_SECONDS}",
    ),
    *("--tls-handshake-timeout", f"{HANDSHAKE_SECONDS}", "--commands", "fuzzed"),
)
VARIANTS: dict[str, tuple[Variant, list[str]]] = {
    "plain": (Variant(2), []),
    "tls": (Variant(2, True), []),
}
COMMANDS = f"""
from gserver.commands import command
from lab.commands import census, napping, replying

nap = napping("NAP", 0.02)
large = replying("LARGE", {LARGE_BYTES})

@command("WHYNOT", may_block=False)
def whynot(request):
    return "because"

@command("BOOM")
def boom(request):
    raise ValueError("as it should be\\n\\x1b[2J")

@command("ECHO")
def echo(request, *words):
    return " ".join(["ECHO", *words])

@command("PAIR", may_block=False)
def pair(request, first, second=""):
    return f"PAIR {{first}} {{second}}".rstrip()
"""
REPLIES = dict.fromkeys((b"WHO", b"CENSUS"), b"") | {
    b"WHERE": b"here",
    b"WHY": b"42",
    b"NAP": b"rested",
}
REPLIES |= dict.fromkeys(wire.WITH_WORDS, b"")
REPLIES |= {b"WHYNOT": b"because", b"BOOM": b"ERR internal", b"LARGE": b"x" * LARGE_BYTES}
TOO_SLOW, IDLE, TLS_ONLY = b"ERR too slow", b"ERR idle", b"ERR TLS only\n"
REJECTED = {
    "too_many_clients": b"ERR too many clients",
    "too_many_from_address": b"ERR too many clients from your address",
}
IP_BIND_ADDRESS_NO_PORT, TCP_ESTABLISHED = 24, 1
#: How a client ends: with an end of input, by waiting for the server's deadline, without reading
#: the rest, with a reset, or by not reading. Over TLS also: with a broken record, without a
#: handshake, or after half of one.
ENDINGS = {"end": 700, "stay": 20, "leave": 90, "reset": 90, "unread": 1}
#: Endings after which some replies may be missing, and their outcomes.
ROUGH = {
    "leave": "left",
    "reset": "reset by the client",
    "unread": "slow reader, reset",
    "broken": "broken record of TLS",
}
TLS_ENDINGS = ENDINGS | {"broken": 30, "no handshake": 30, "half a handshake": 10}


class Plan(NamedTuple):
    """The actions of one client."""

    pieces: list[bytes]
    #: Seconds after each piece; -1: until the reply to an unterminated command has arrived.
    pauses: list[float]
    ending: str
    reads_after: float
    source: str
    #: TLS only: whether the first bytes are sent with the end of the handshake.
    is_early: bool


def draw(random: Random, is_tls: bool) -> Plan:
    """Return the plan of one client."""
    endings = TLS_ENDINGS if is_tls else ENDINGS
    (ending,) = random.choices([*endings], [*endings.values()])
    sent = wire.draw(random, MAX_LINE)
    if random.random() < 0.02:
        sent = b"BOOM\n" + sent
    if ending == "unread":
        sent = b"LARGE\n"
    pieces = [piece for piece in wire.pieces(random, sent, random.choice((1, 1, 3, 8))) if piece]
    pauses = random.choices((0.0, 0.01, 0.06, 0.15, -1.0), (80, 10, 2, 2, 6), k=len(pieces))
    reads_after = random.choice((0.0, 0.0, 0.0, 0.05))
    return Plan(
        pieces,
        pauses,
        ending,
        reads_after,
        f"127.0.0.{random.choice((1, 1, 2, 3, 4))}",
        random.random() < 0.5,
    )


@contextmanager
def servers(names: list[str], **more: object) -> Iterator[dict[str, Site]]:
    """One server of each variant."""
    with ExitStack() as stack:
        sites = {}
        pems = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_certificates(pems)
        for name in names:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            (folder / "fuzzed.py").write_text(COMMANDS)
            variant, options = VARIANTS[name]
            sites[name] = stack.enter_context(
                Site(folder, pems, variant, *OPTIONS, *options, crowd=60, **more)
            )
        yield sites


def judge(sites: dict[str, Site], outcomes: Counter[str]) -> Iterator[tuple[str, str]]:
    """Yield the problems at the end, as the site's name and the reason.

    WHO must be exact, nothing may leak, each event must be a line of JSON, and stderr empty.
    """
    rejected = Counter[str]()
    for name, site in sites.items():
        try:
            rejected += Counter(status(site.server)["error_replies"])
            site.assert_as_before()
            died = [
                event
                for event in site.server.events()
                if event["event.action"] in ("worker.died", "worker.hung")
            ]
            assert not died, died
        except BaseException as error:  # noqa: BLE001 (pytest.fail raises no Exception)
            yield name, f"{type(error).__name__}: {error}"
    for reason, reply in REJECTED.items():
        if outcomes[reply.decode()] > rejected[reason]:
            yield "all", f"{reason}: {outcomes}, but {rejected}"


def run_batch(
    name: str, port: int, pems: str, seed: int, batch: int, count: int
) -> tuple[str, Counter[str]]:
    """Run `count` clients as drawn; return the first finding ("" for none) and all outcomes."""
    random, pool, outcomes, wrong = (
        Random(f"{seed}/{name}/{batch}"),
        Pool(AT_ONCE),
        Counter[str](),
        [],
    )
    context = ssl.create_default_context(cafile=f"{pems}/ca.pem") if name == "tls" else None
    plans = [(draw(random, context is not None), random.getrandbits(32)) for _ in range(count)]

    def run(number: int, plan: Plan, own: int) -> None:
        guest = Guest(plan, Random(own))
        try:
            with gevent.Timeout(3 * LIMIT, TimeoutError("the client does not end")):
                guest.run(port, context)
            outcomes[guest.outcome()] += 1
        except Exception as error:  # noqa: BLE001 (any exception is a finding)
            received = bytes(guest.received[:2000])
            wrong.append(
                f"client {number}: {type(error).__name__}: {error}\n"
                f"{plan}\nread {received!r}, {guest.end}"
            )

    for number, (plan, own) in enumerate(plans):
        pool.spawn(run, number, plan, own)
    pool.join()
    return (wrong[0] if wrong else ""), outcomes


class Guest:
    """One client."""

    def __init__(self, plan: Plan, random: Random) -> None:
        self._plan, self._random = plan, random
        self.received = bytearray()
        #: How the server's side has ended: `eof`, `ragged` (TLS without a closing alert), `alert`,
        #: `reset`; "": not yet.
        self.end = ""
        #: The possible inputs of the server, as each long pause may have ended a line.
        self._inputs = {b""}
        #: The time until everything was sent (if the client stays) or until the end: it tells which
        #: deadlines may have passed.
        self._began = self._took = 0.0
        self._tls: Any = None
        self._out, self._incoming = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._held = b""
        self._has_said_end = False

    def run(self, port: int, context: ssl.SSLContext | None) -> None:
        self._began, self._is_tls = monotonic(), context is not None
        try:
            self._live(port, context)
        finally:
            if self._plan.ending != "stay":
                self._took = monotonic() - self._began

    def _live(self, port: int, context: ssl.SSLContext | None) -> None:
        plan = self._plan
        with socket.socket() as self._sock:
            if plan.ending == "unread":
                self._sock.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
            self._sock.setsockopt(sockets.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            self._sock.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_NODELAY, 1)
            self._sock.bind((plan.source, 0))
            self._sock.connect(("127.0.0.1", port))
            reader = None
            with suppress(OSError):  # The server has closed: its earlier output is judged.
                if not context or self._run_handshake(context):
                    reader = (
                        gevent.spawn_later(plan.reads_after, self._read)
                        if plan.ending != "unread"
                        else None
                    )
                    self._talk()
            self._took = monotonic() - self._began
            if plan.ending in ("leave", "reset"):
                if reader:
                    reader.kill()
                if plan.ending == "reset":
                    self._sock.setsockopt(
                        sockets.SOL_SOCKET, sockets.SO_LINGER, struct.pack("ii", 1, 0)
                    )
                return
            with suppress(OSError):
                if plan.ending in ("end", "no handshake"):
                    self._sock.shutdown(sockets.SHUT_WR)
            while plan.ending == "unread" and self._is_open():
                gevent.sleep(0.1)
            if reader:
                reader.join()
            else:
                self._read()

    def _is_open(self) -> bool:
        """Whether the server has not closed, without reading."""
        return self._sock.getsockopt(sockets.IPPROTO_TCP, sockets.TCP_INFO, 1)[0] == TCP_ESTABLISHED

    def _talk(self) -> None:
        """Send the pieces, and note the possible inputs of the server."""
        plan, before = self._plan, monotonic()
        for number, (piece, pause) in enumerate(zip(plan.pieces, plan.pauses, strict=True)):
            began, is_last = monotonic(), number == len(plan.pieces) - 1
            self._send(piece, is_broken=is_last and plan.ending == "broken")
            took = monotonic() - before
            possible = {sent + piece for sent in self._inputs}
            if took > 0.8 * SILENCE_SECONDS:
                possible |= {
                    sent + b"\n" + piece
                    for sent in self._inputs
                    if wire.is_ended_by_silence(sent, REPLIES, wire.WITH_WORDS)
                }
            self._inputs, before = possible, began
            if pause < 0:
                self._hush()
            elif pause:
                gevent.sleep(pause)
        self._sock.sendall(self._held)

    def _hush(self) -> None:
        """Pause until the reply to an unterminated command has arrived, if it is known."""
        (sent, *others) = self._inputs
        if (
            others
            or not sent.rpartition(b"\n")[2].strip(wire.BLANKS)
            or not wire.is_ended_by_silence(sent, REPLIES, wire.WITH_WORDS)
        ):
            gevent.sleep(1.5 * SILENCE_SECONDS)
            return
        expected = _read(sent)
        while (
            self.received.count(b"\n") < len(expected.replies)
            and not self.end
            and not expected.is_closed
        ):
            gevent.sleep(0.01)
        self._inputs = {sent + b"\n"}

    def _send(self, data: bytes, *, is_broken: bool) -> None:
        if self._tls:
            self._tls.write(data)
            data = self._out.read()
            if is_broken:
                at = self._random.randrange(len(data))
                data = (
                    data[:at] + bytes((data[at] ^ self._random.randrange(1, 256),)) + data[at + 1 :]
                )
            data, self._held = self._held + data, b""
            for chunk in wire.pieces(self._random, data, 3):
                self._sock.sendall(chunk)
                gevent.sleep(0)
        else:
            self._sock.sendall(data)

    def _run_handshake(self, context: ssl.SSLContext) -> bool:
        """Start TLS, or send invalid bytes; return whether there is more to send."""
        plan = self._plan
        if plan.ending == "no handshake":
            self._sock.sendall(b"".join(plan.pieces))
            return False
        self._tls = context.wrap_bio(self._incoming, self._out, server_hostname="127.0.0.1")
        is_done = False
        while not is_done:
            with suppress(ssl.SSLWantReadError):
                self._tls.do_handshake()
                is_done = True
            data = self._out.read()
            if plan.ending == "half a handshake":
                self._tls = None
                self._sock.sendall(data[: self._random.randrange(1, len(data))])
                return False
            if is_done and plan.is_early:
                self._held = data
                return True
            for chunk in wire.pieces(self._random, data, 3):
                self._sock.sendall(chunk)
            if not is_done:
                data = self._sock.recv(65536)
                if not data:
                    raise ConnectionError("closed")
                self._incoming.write(data)
        return True

    def _read(self) -> None:
        """Read until the server has ended."""
        try:
            while data := self._sock.recv(65536):
                self._take(data)
            self.end = "ragged" if self._tls and not self._has_said_end else "eof"
        except ssl.SSLError:
            self.end = "alert"
        except OSError:
            self.end = "reset"

    def _take(self, data: bytes) -> None:
        if not self._tls:
            self.received += data
            return
        self._incoming.write(data)
        with suppress(ssl.SSLWantReadError):
            while not self._has_said_end:
                try:
                    part = self._tls.read(65536)
                except ssl.SSLZeroReturnError:
                    part = b""
                self.received += part
                self._has_said_end = not part

    def outcome(self) -> str:
        """Return the outcome as docs/protocol.md names it; raise for a forbidden one."""
        ending, (*lines, rest) = self._plan.ending, bytes(self.received).split(b"\n")
        if lines and lines[0] in REJECTED.values():
            assert len(lines) == 1, "the client was rejected, and answered"
            assert not rest, "the client was rejected, and answered"
            return lines[0].decode()
        is_silent = (
            self._is_tls
            and not self.received
            and not self._has_said_end
            and self._took > HANDSHAKE_SECONDS / 2
        )
        if (
            is_silent
            and ending not in ("leave", "reset")
            and (ending, self.end) != ("unread", "reset")
        ):
            return "a slow handshake of TLS, cut off"
        if ending in ("no handshake", "half a handshake"):
            return self._outcome_without_tls()
        # On a slow machine the client may have been too slow unintentionally.
        late = [TOO_SLOW] * (self._took > LINE_SECONDS / 2 or ending == "broken") + [IDLE] * (
            self._took > IDLE_SECONDS / 2
        )
        if (
            lines[-1:]
            and lines[-1] in late
            and any(_begin(expected.replies, lines[:-1]) for expected in self._expected())
        ):
            return lines[-1].decode()
        assert ending != "unread" or self.end == "reset", (
            "the client did not read, and was not reset"
        )
        if ending in ROUGH:
            assert any(_begin(expected.replies, lines) for expected in self._expected()), (
                "the replies do not start as expected"
            )
            return ROUGH[ending]
        for expected in self._expected():
            if _begin(expected.replies, lines) and len(lines) == len(expected.replies) and not rest:
                # The server does not wait for a client that still sends a second after the close.
                assert self.end == "eof" or (expected.is_closed and self._took > 0.8), (
                    "the end is not clean"
                )
                last = (
                    expected.replies[-1].decode() if expected.is_closed and expected.replies else ""
                )
                return (
                    last
                    if last.startswith("ERR")
                    else "HTTP, closed"
                    if expected.is_closed
                    else "answered"
                )
        raise AssertionError(f"expected one of {self._expected()}")

    def _outcome_without_tls(self) -> str:
        sent = b"".join(self._plan.pieces) if self._plan.ending == "no handshake" else b"\x16"
        if not sent.startswith(b"\x16"):
            assert (bytes(self.received), self.end) == (TLS_ONLY if sent else b"", "eof"), (
                "the client must be rejected with TLS only"
            )
            return "ERR TLS only" if sent else "no handshake of TLS"
        assert bytes(self.received[:1]) in (b"", b"\x15"), "half a handshake may get only an alert"
        return "no handshake of TLS"

    def _expected(self) -> list[wire.Expected]:
        """The expected outcome for each possible input of the server."""
        return [
            self._deadlined(sent) if self._plan.ending == "stay" else _read(sent)
            for sent in self._inputs
        ]

    def _deadlined(self, sent: bytes) -> wire.Expected:
        """The expected outcome for a client that stays: finally `idle` or `too slow`."""
        if wire.is_ended_by_silence(sent, REPLIES, wire.WITH_WORDS):
            sent += b"\n"
        expected = _read(sent)
        whole, newline, part = sent.rpartition(b"\n")
        before = _read(whole + newline)
        is_tls = expected.is_closed and part.startswith(
            TLS_BEGINNING
        )  # A first line: closed at once.
        if before.is_closed or is_tls or expected.replies[-1:] == [wire.TOO_LONG]:
            return expected
        return wire.Expected([*before.replies, TOO_SLOW if part else IDLE], True)


def _read(sent: bytes) -> wire.Expected:
    return wire.read(sent, REPLIES, MAX_LINE, wire.WITH_WORDS)


def _begin(replies: list[bytes], lines: list[bytes]) -> bool:
    """Whether these lines are the first of the replies."""
    if len(lines) > len(replies):
        return False
    for line, reply in zip(lines, replies, strict=False):
        if reply == b"WHO":
            if not (line.isdigit() and 1 <= int(line) <= MAX_CLIENTS):
                return False
        elif line != (REPLIES.get(reply) or reply):
            return False
    return True
