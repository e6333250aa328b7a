"""The targets of `bin/fuzz core`: the pure modules of gserver.

A target draws inputs and judges the results of the code. A wrong result raises AssertionError, and
exceptions of the code are passed on: both are findings.
"""

import contextlib
import json
import logging
import re
import socket
import ssl
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cache, partial
from io import StringIO
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, ClassVar

from rich.console import Console

from gserver import config, logs, protocol, redis_url
from gserver.certificates import Certificates
from gserver.cli import admin_client, top
from gserver.commands import BUILT_IN
from gserver.config import Config
from gserver.scoreboard import Scoreboard
from gserver.serve import fastpath, proxy_header, tls
from gserver.serve.replies import Replies
from lab import proxy_header as lab_header
from lab import wire
from lab.certificates import make_certificates

LIMITS = (1, 3, 5, 24, 64, 1024)
#: Tables of commands: in the last two, some commands are prefixes of others.
TABLES = tuple(
    tuple(names.encode().split())
    for names in (
        "WHO WHERE WHY",
        "WHO WHERE WHY WHYNOT NAP ECHO PAIR",
        "WHO W WHOWHY WHERE 42 ECHO",
    )
)
SECRET = "s3cr3t"
#: Control characters that a terminal obeys.
OBEYED = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


class Target:
    """A fuzz target: a new one for each batch, so that a batch can be repeated."""

    def __init__(self, random: Random) -> None:
        self.random = random

    def draw(self) -> Any:
        """Return an input whose `repr` is complete."""
        raise NotImplementedError

    def check(self, given: Any) -> None:
        """Judge the result for an input."""
        raise NotImplementedError

    def close(self) -> None:
        """Release its resources."""


class ParserTarget(Target):
    """The parser against docs/protocol.md: input whole, byte by byte, split, and with pauses."""

    code: ModuleType = protocol

    def __init__(self, random: Random) -> None:
        super().__init__(random)
        # Not the bare names: a parser that echoes its input would pass.
        self._grammars = {
            (table, limit): self.code.Grammar(
                {name: (name,) for name in table}, limit, self._with_words(table)
            )
            for table in TABLES
            for limit in LIMITS
        }

    def _with_words(self, table: Collection[bytes]) -> dict[bytes, Any]:
        return {name: partial(self._bind, name) for name in wire.WITH_WORDS if name in table}

    def _bind(self, name: bytes, words: Sequence[str]) -> Any:
        reply = wire.say(name, words)
        if reply is None:
            return self.code.usage_error(wire.WITH_WORDS[name].usage.decode())
        return (reply,)

    def draw(self) -> tuple[tuple[bytes, ...], int, list[list[bytes | None]]]:
        random = self.random
        table, limit = random.choices(TABLES, (3, 1, 1))[0], random.choice(LIMITS)
        sent = wire.draw(random, limit)
        cuts: list[list[bytes | None]] = [
            [sent],
            [*wire.pieces(random, sent, 6)],
            [*wire.pieces(random, sent, 20)],
        ]
        if random.random() < 0.1:
            cuts.append([sent[at : at + 1] for at in range(len(sent))])
        silent: list[bytes | None] = []
        for piece in cuts[1]:
            silent += [piece, wire.SILENCE] if random.random() < 0.5 else [piece]
        return table, limit, [*cuts, silent]

    def check(self, given: tuple[tuple[bytes, ...], int, list[list[bytes | None]]]) -> None:
        table, limit, cuts = given
        for cut in cuts:
            parser, replies = self.code.Parser(self._grammars[table, limit]), []
            for piece in cut:
                replies += parser.silence() if piece is wire.SILENCE else parser.feed(piece)
            if any(isinstance(reply, self.code.ErrorReply) and reply.closes for reply in replies):
                assert not parser.feed(b"WHO\n"), (
                    f"{cut}: the parser continues after a closing reply"
                )
                assert not parser.silence(), f"{cut}: the parser continues after a closing reply"
            replies += parser.end()
            sent = wire.merge_pieces(cut, table, wire.WITH_WORDS)
            expected = wire.read(sent, table, limit, wire.WITH_WORDS)
            given_replies = [
                r.reply[:-1] if isinstance(r, self.code.ErrorReply) else r[0] for r in replies
            ]
            closes = [isinstance(r, self.code.ErrorReply) and r.closes for r in replies]
            assert [reply for reply in given_replies if reply] == expected.replies, (
                f"{cut} gave {given_replies}, not {expected}"
            )
            assert (any(closes), any(closes[:-1])) == (expected.is_closed, False), (
                f"{cut} gave {replies}, not {expected}"
            )


class FastPathTarget(Target):
    """A read of an idle client: answered as docs/protocol.md says and counted, or not taken."""

    code: ModuleType = fastpath

    def __init__(self, random: Random) -> None:
        super().__init__(random)
        self._id = random.choice(("here", "WHO", "WHY", "xWHERE", "42", "!" * 128))
        limit = random.choice((5, 6, 24, 1024))
        scoreboard = Scoreboard.create(1)
        config = Config(server_id=self._id, max_line_bytes=limit)
        self._limit, self._clients = limit, scoreboard.cell("clients", 0)
        self._replies = Replies(config, scoreboard, 0, BUILT_IN)
        self._fastpath = self.code.FastPath(self._replies)
        self._cells = {name.encode(): cell for name, cell in self._replies.command_cells.items()}
        self._earlier = [b"WHO\n"]

    def draw(self) -> bytes:
        random = self.random
        if random.random() < 0.3:
            return random.choice(self._earlier)
        lines = random.choices(
            wire.PLAIN[:3] if random.random() < 0.6 else wire.PLAIN, k=random.randrange(1, 40)
        )
        sent = b"".join(lines)
        sent = sent if random.random() < 0.7 else wire.draw(random, 24)
        self._earlier = [*self._earlier[-80:], sent]
        return sent

    def check(self, given: bytes) -> None:
        cells = self._replies.cells
        cells[self._clients] = clients = self.random.randrange(1, 3000)
        before = {name: cells[cell] for name, cell in self._cells.items()}
        has_spoken = self.random.random() < 0.8
        replies = self._fastpath.answer(given, has_spoken)
        counted = {name: cells[cell] - before[name] for name, cell in self._cells.items()}
        expected = wire.read(given, self._cells, self._limit)
        if replies is None:
            assert not any(counted.values()), f"{counted} were counted without a reply"
            return
        is_for_it = has_spoken or (expected.replies and not expected.is_closed)
        assert is_for_it, f"it replied {replies!r} to input that is not for the fast path"
        assert given.endswith(b"\n"), f"it replied {replies!r} to an unfinished line"
        values = {b"WHO": b"%d" % clients, b"WHERE": self._id.encode(), b"WHY": b"42"}
        if not expected.is_closed:  # Only a first line may close for HTTP or TLS bytes.
            assert replies == b"".join(
                values.get(name, name) + b"\n" for name in expected.replies
            ), f"it replied {replies!r}"
            assert counted == {name: expected.replies.count(name) for name in self._cells}, (
                f"it counted {counted}"
            )


class ProxyTarget(Target):
    """The PROXY header against a second reading of its specification: whole, and in two pieces."""

    code: ModuleType = proxy_header

    def draw(self) -> tuple[bytes, int]:
        data = lab_header.draw(self.random)
        return data, self.random.randrange(len(data) + 1)

    def check(self, given: tuple[bytes, int]) -> None:
        data, at = given
        said, found = lab_header.judge(data), self._parse(data)
        if said:
            assert found == tuple(said), found
        else:
            assert found == "refused" or lab_header.may_go_on(data), "it waits for ever"
        beginning = self._parse(data[:at])
        assert said is None or at >= said.size or beginning is None, "it is not whole yet"
        assert not isinstance(beginning, tuple) or beginning == found

    def _parse(self, data: bytes) -> Any:
        """Return the header as a tuple; None if it is not whole."""
        try:
            header = self.code.parse(data)
        except self.code.ProxyHeaderError:
            return "refused"
        return header and tuple(header)


class UrlTarget(Target):
    """Redis URLs: a bad one gives a reason, and neither reason nor log contains the secret."""

    code: ModuleType = redis_url
    PARTS = (
        "redis rediss unix redis+sentinel http :// : / // @ ? & = # , [ ] ::1 127.0.0.1 h 6379 0"
        " 65535 65536 db 1 99999 %40 %2F %00 % é \x1b username password sentinel_password mymaster"
        " [fe80::1%25eth0] ² %ff + ; %0A"
    ).split(" ")
    GOOD = (
        *(
            f"redis://u:{SECRET}@h:1/2",
            f"rediss://:{SECRET}@[::1]",
            f"unix:///tmp/r.sock?db=3&password={SECRET}",
        ),
        f"redis+sentinel://u:{SECRET}@a:1,[::1]:2,c/m/4?sentinel_password={SECRET}",
    )

    def draw(self) -> str:
        random = self.random
        if random.random() < 0.3:
            return "".join(random.choices((*self.PARTS, SECRET), k=random.randrange(14)))
        text = random.choice(self.GOOD)
        for _ in range(random.randrange(4)):
            at = random.randrange(len(text) + 1)
            if not _is_inside(text, at):
                text = (
                    text[:at]
                    + random.choice(("", *self.PARTS))
                    + text[at + random.choice((0, 0, 1, 1, 2, 4)) :]
                )
        return text

    def check(self, given: str) -> None:
        try:
            url = self.code.RedisUrl.parse(given)
        except ValueError as reason:
            is_good = SECRET not in str(reason) and str(reason).isprintable()
            assert is_good, f"the reason is {reason}"
            return
        shown = str(url)
        assert shown.isprintable(), f"it is shown as {shown!r}"
        assert bool(url.hosts) != bool(url.path), repr(url)
        assert all(host and 0 < port < 65536 for host, port in url.hosts), repr(url)
        if SECRET not in "".join((url.service, url.path, *(host for host, _ in url.hosts))):
            assert SECRET not in shown, f"it is shown as {shown}"
        if (
            re.fullmatch(r"[\w.:,/\[\]+=?-]*", shown) and "/" not in url.service
        ):  # Percent-encoding is not restored.
            again = self.code.RedisUrl.parse(shown)
            bare = replace(
                url, username="", password="", sentinel_username="", sentinel_password=""
            )
            assert again == bare, f"it is shown as {shown}, which is {again}"


def _is_inside(text: str, at: int) -> bool:
    found = text.find(SECRET)
    while found >= 0:
        if found <= at < found + len(SECRET) + 1:
            return True
        found = text.find(SECRET, found + 1)
    return False


class OptionTarget(Target):
    """The texts of options: a value within its limits, or a ValueError of one printable line."""

    code: ModuleType = config
    PARTS = (
        *("\n", " ", "x" * 130),
        *"auto off 1 0 - 256 65535 é ² \x1b[2J a : | @ # . %".split(" "),
        *"tcp:// tls:// unix: / ?mode=0660 [::1] :1".split(),
    )
    RIGHT: ClassVar[dict[str, Callable[[Any], bool]]] = {
        "parse_workers": lambda value: 0 <= value <= 256,
        "parse_server_id": lambda value: re.fullmatch(r"[!-~]{1,128}", value) is not None,
        "parse_statsd_prefix": lambda value: (
            re.fullmatch(r"[A-Za-z0-9_.-]{0,128}", value) is not None
        ),
        "parse_admin_port": lambda value: -1 <= value <= 65535,
        "parse_cluster_name": lambda value: (
            re.fullmatch(r"[A-Za-z0-9_.:-]{1,64}", value) is not None
        ),
        "parse_bind": lambda value: config.parse_bind(value) == value,
        "is_loopback": lambda value: isinstance(value, bool),
    }

    def draw(self) -> tuple[str, str]:
        return self.random.choice([*self.RIGHT]), "".join(
            self.random.choices(self.PARTS, k=self.random.randrange(6))
        )

    def check(self, given: tuple[str, str]) -> None:
        name, text = given
        try:
            value = getattr(self.code, name)(text)
        except ValueError as reason:
            assert logs.printable(str(reason)) == str(reason), f"the reason is {str(reason)!r}"
        else:
            assert self.RIGHT[name](value), f"{text!r} became {value!r}"


class StatusTarget(Target):
    """The status from another admin port: rejected, or shown without terminal control codes."""

    code: ModuleType = admin_client
    ODD = (
        *'null|true|-1|0|1e308|-1e18|9223372036854775808|NaN|""'.split("|"),
        '"\\u001b[2J"',
        '"é\\n[red]"',
        "[]",
        "{}",
        "[[]]",
        '{"a": 1}',
        '"' + "x" * 200 + '"',
    )
    MEMBER = '{"id": "a", "clients": 1, "silent_seconds": 0.5, "is_late": false}'
    MEMBERS = (
        f'{{"servers": [{MEMBER}], "omitted_servers": 0, "age_seconds": 0.1, "error_kind": null}}'
    )
    CLUSTER = (
        f'{{"name": "c", "servers": 1, "clients": 1, "age_seconds": 0.1, "silent_seconds": 0.1,'
        f' "members": {MEMBERS}}}'
    )
    WORKER = '{"pid": 1, "age_seconds": 1, "clients": 1, "silent_seconds": 0.1}'
    GOOD = f"""{{
        "server": {{"id": "a", "state": "ready", "uptime_seconds": 3.5, "tls_expires_at": null}},
        "clients": {{"now": 1, "peak": 2}}, "commands": {{"WHO": 1}},
        "error_replies": {{"idle": 0}}, "workers": {{"each": [{WORKER}]}}, "cluster": {CLUSTER}}}"""

    def draw(self) -> str:
        random = self.random
        document = json.loads(self.GOOD)
        for _ in range(random.randrange(4)):
            where: Any = document
            while isinstance(where, dict | list) and where:
                key = random.choice([*where]) if isinstance(where, dict) else 0
                if random.random() < 0.35 or not isinstance(where[key], dict | list):
                    if isinstance(where, dict) and random.random() < 0.2:
                        where[random.choice(("\x1b]0;x\x07", "é" * 60, "new"))] = where.pop(key)
                    else:
                        where[key] = json.loads(random.choice(self.ODD))
                    break
                where = where[key]
        text = json.dumps(document)
        return (
            text
            if random.random() < 0.9
            else text[: random.randrange(len(text))]
            + random.choice(("[" * 2000, "}", "\0", "1e999"))
        )

    def check(self, given: str) -> None:
        try:
            status = self.code._printable(json.loads(given))
        except (ValueError, RecursionError):
            return
        if not self.code._fits(status, self.code.SHAPE):
            return
        good = json.loads(self.GOOD)
        for before, now in ((good, status), (status, status), (status, good)):
            watched = self.code.Target("127.0.0.1:1", now=now, before=before)
            Console(file=(shown := StringIO()), width=100).print(top.render([watched]))
            assert not OBEYED.search(shown.getvalue() + top.line(watched)), "a terminal obeys it"


class LogTarget(Target):
    """An event is one line of JSON or text without terminal control codes, whatever it holds."""

    code: ModuleType = logs
    ODD = (
        "\n",
        "\r\n",
        "\u2028",
        "x" * 5000,
        "\U0001f600" * 900,
        *'\x1b[2J \0 " \\ é \ud800 {} %s a'.split(" "),
    )

    def __init__(self, random: Random) -> None:
        super().__init__(random)
        ecs: Any = self.code.EcsFormatter  # The package has no types.
        self._json = ecs(
            "%(levelname)s %(message)s",
            timestamp="@timestamp",
            rename_fields={"levelname": "log.level"},
        )
        self._text = self.code.TextFormatter()

    def _odd(self) -> str:
        return "".join(self.random.choices(self.ODD, k=self.random.randrange(6)))

    def draw(self) -> tuple[str, dict[str, Any]]:
        values: list[Callable[[], Any]] = [
            self._odd,
            lambda: self.random.choice(
                (None, 1, 2.5, float("inf"), float("nan"), b"\xff", [1], {"a": 2}, 10**30)
            ),
        ]
        names = [
            "client.address",
            "error.message",
            "gserver.reason",
            logs.STACK,
            "x" * self.random.randrange(1, 2000),
        ]
        fields = self.random.sample(names, self.random.randrange(5))
        odd = {name: self.random.choice(values[: 1 + (name != logs.STACK)])() for name in fields}
        return self._odd(), {"event.action": "x", **odd}

    def check(self, given: tuple[str, dict[str, Any]]) -> None:
        message, fields = given
        record = logging.LogRecord("gserver", 20, "x.py", 1, "%s", (message,), None)
        record.fields = fields
        line = self._json.format(record).encode("ascii", "backslashreplace") + b"\n"
        assert len(line) <= 4096, f"{len(line)} bytes: {line!r}"
        assert line.count(b"\n") == 1, f"{line!r}"
        assert b"\x1b" not in line, f"{line!r}"
        event = json.loads(line, parse_constant=lambda _: 1 / 0)  # NaN is not JSON.
        assert event["event.action"] == "x", event
        assert "message" in event, event
        shown = self._text.format(record)
        assert not OBEYED.search(shown), f"a terminal obeys {shown!r}"


@cache
def _contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    with TemporaryDirectory() as folder:
        make_certificates(Path(folder))
        chain, key = ((Path(folder) / f"server.{kind}").read_text() for kind in ("pem", "key"))
        return tls.make_context(Certificates(chain, key)), ssl.create_default_context(
            cafile=f"{folder}/ca.pem"
        )


class TlsTarget(Target):
    """A TLS connection: records may come in any pieces, and a broken record is an error.

    A partial record is reported as such.
    """

    code: ModuleType = tls

    def __init__(self, random: Random) -> None:
        super().__init__(random)
        self._server: Any = None

    def _connect(self) -> None:
        """Start a new connection."""
        ours, self._sock = socket.socketpair()
        ours.setblocking(False)
        context, trust = _contexts()
        trust.maximum_version = self.random.choice((ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3))
        self._server = self.code.TlsSocket(ours, context)
        self._out, received = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._client = trust.wrap_bio(received, self._out, server_hostname="127.0.0.1")
        is_done = is_met = False
        for _ in range(10):
            with contextlib.suppress(ssl.SSLWantReadError):
                self._client.do_handshake()
                is_done = True
            for piece in filter(None, wire.pieces(self.random, self._out.read(), 4)):
                self._sock.sendall(piece)
                is_met = self._server.handshake(ours.recv(65536))
                ours.sendall(self._server.outgoing())
            with contextlib.suppress(BlockingIOError):
                received.write(self._sock.recv(65536, socket.MSG_DONTWAIT))
            if is_done and is_met:
                return
        raise AssertionError("the handshake does not end")

    def _received(self) -> tuple[bytes, bool]:
        """The output of one read, and whether it ends with a partial record."""
        try:
            data = self._server.recv(4096)
        except BlockingIOError:
            data = b""
        return data, self._server.has_partial_record

    def draw(self) -> tuple[list[bytes], float, float]:
        sizes = self.random.choices(
            (1, 4, 40, 1000, 16384), (5, 5, 5, 2, 1), k=self.random.randrange(1, 5)
        )
        return (
            [self.random.randbytes(size) for size in sizes],
            self.random.random(),
            self.random.random(),
        )

    def check(self, given: tuple[list[bytes], float, float]) -> None:
        if self._server is None:
            self._connect()
        said, fault, place = given
        ends, raw = [0], b""
        for data in said:
            self._client.write(data)
            raw += self._out.read()
            ends.append(len(raw))
        at = int(place * len(raw)) if fault < 0.02 else len(raw)
        is_broken = at < len(raw)
        raw = raw[:at] + (bytes((raw[at] ^ 0x41,)) + raw[at + 1 :] if is_broken else b"")
        output, sent = b"", 0
        try:
            for piece in filter(None, wire.pieces(self.random, raw, 8)):
                self._sock.sendall(piece)
                sent += len(piece)
                for _ in range(0, len(piece), 4096):
                    data, is_part = self._received()
                    output += data
                whole = max(i for i, end in enumerate(ends) if end <= sent)
                if not is_broken:
                    assert output == b"".join(said[:whole]), (
                        f"after {sent} bytes it had {len(output)}"
                    )
                    assert is_part == self._server.has_partial_record == (ends[whole] < sent), (
                        "a partial record is not reported"
                    )
            assert b"".join(said).startswith(output), "the output has other bytes"
            assert not is_broken or output != b"".join(said), "a broken record was accepted"
        except ssl.SSLError:
            assert is_broken, "an error without a broken record"
        if is_broken:
            self.close()

    def close(self) -> None:
        if self._server:
            self._sock.close()
            self._server.close()
            self._server = None


TARGETS: dict[str, tuple[Callable[[Random], Target], int]] = {
    # Each with its share of 1000 inputs: the protocol has most.
    "parser": (ParserTarget, 600),
    "fastpath": (FastPathTarget, 160),
    "proxy": (ProxyTarget, 100),
    "url": (UrlTarget, 60),
    "option": (OptionTarget, 49),
    "log": (LogTarget, 15),
    "tls": (TlsTarget, 15),
    "status": (StatusTarget, 1),
}


def run_batch(
    name: str, seed: int, batch: int, count: int, make: Callable[[Random], Target] | None = None
) -> str:
    """Try `count` inputs; return the first finding, or an empty string."""
    target = (make or TARGETS[name][0])(Random(f"{seed}/{name}/{batch}"))
    with contextlib.closing(target):
        for number in range(count):
            given = target.draw()
            try:
                target.check(given)
            except Exception as error:  # noqa: BLE001 (any exception of the code is a finding)
                return f"input {number}: {type(error).__name__}: {error}\n{given!r}"
    return ""
