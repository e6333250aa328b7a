"""Good clients of every kind, each in a thread. They check each reply and record errors."""

import random
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from itertools import groupby
from math import inf
from typing import Protocol

from lab.running import LIMIT, Client, until

HTTP = b"GET / HTTP/1.1\r\nHost: here\r\n\r\nWHO\n"
COMMANDS = b"WHO", b"WHERE", b"WHY"


class Target(Protocol):
    """A server under load."""

    @property
    def name(self) -> str:
        """The reply to WHERE."""

    @property
    def is_tls(self) -> bool:
        """Whether its port speaks TLS."""

    @property
    def excuse(self) -> str:
        """Excused errors: "" none, "lost" a lost connection, "away" any, also a refusal."""

    def client(self) -> Client:
        """A new client, over TLS if the server has it."""

    def plain_client(self) -> Client:
        """A new client without TLS."""


class Caller:
    """A repeated client of one kind."""

    def __init__(self, kind: str, member: Target, load: "Load", seed: str) -> None:
        self.kind, self.member, self.rounds, self.is_parked = kind, member, 0, False
        self._load, self._random = load, random.Random(seed)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        load = self._load
        while not load.is_over.is_set():
            self.is_parked = not load.may_call.is_set()
            load.may_call.wait()
            self.is_parked = False
            try:
                getattr(self, f"_{self.kind}")()
                self.rounds += 1
            except (OSError, EOFError, ValueError) as error:
                is_refused = isinstance(error, ConnectionRefusedError)
                is_excused = self.member.excuse == "away" or (self.member.excuse and not is_refused)
                self._note("excused" if is_excused else "lost", error)
            except AssertionError as error:
                self._note("wrong", error)
            self._rest()

    def _note(self, what: str, error: Exception | None = None) -> None:
        with self._load.lock:
            self._load.replies[what] += 1
            if error and what != "excused":
                self._load.failures.append(f"{self.member.name}, {self.kind}: {what}: {error!r}")

    def _right(self) -> None:
        with self._load.lock:
            self._load.replies["right"] += 1
            self._load.kinds[self.kind] += 1

    def _rest(self) -> None:
        self._load.is_over.wait(self._load.pause * self._random.uniform(0.3, 1.7))

    def _draw(self, count: int = 0) -> list[bytes]:
        return self._random.choices(COMMANDS, k=count or self._random.randint(1, 4))

    def _ask(self, client: Client, asked: list[bytes]) -> None:
        floor, began = self._floor(), time.perf_counter()
        client.send(b"".join(command + b"\n" for command in asked))
        replies = [self._line(client) for _ in asked]
        self._load.seconds.append(time.perf_counter() - began)
        floor = min(floor, self._floor())
        for command, reply in zip(asked, replies, strict=True):
            self._check(command, reply, floor)

    def _floor(self) -> int:
        return 1 if self.member.excuse else max(1, self._load.staying[self.member.name])

    def _line(self, client: Client) -> bytes:
        line = client.line()
        if not line.endswith(b"\n") or (self.member.excuse and line.startswith(b"ERR too many")):
            raise EOFError(f"closed with {line!r}")
        return line[:-1]

    def _check(self, command: bytes, reply: bytes, floor: int) -> None:
        text = reply.decode("ascii", "replace")
        right = {b"WHY": text == "42", b"WHERE": text == self.member.name}
        right[b"WHO"] = text.isdigit() and floor <= int(text) <= self._load.ceiling
        assert right[command], (
            f"{command!r} was answered {reply!r}, {floor} to {self._load.ceiling} are allowed"
        )
        self._right()

    def _expect(self, reply: bytes, *replies: bytes) -> None:
        """Check that the reply is one of these, unless the server was unavailable."""
        if self.member.excuse and reply not in replies:
            raise EOFError(f"{reply!r}")
        assert reply in replies, f"answered {reply[:200]!r}, not {replies!r}"
        self._right()

    # The kinds.

    def _stays(self) -> None:
        with self.member.client() as client:
            self._ask(client, [b"WHERE"])
            self._load.staying.update([self.member.name])
            try:
                while self._load.may_call.is_set() and not self._load.is_over.is_set():
                    self._ask(client, self._draw())
                    self.rounds += 1
                    self._rest()
            finally:
                self._load.staying.subtract([self.member.name])

    def _comes_and_goes(self) -> None:
        with self.member.client() as client:
            for _ in range(self._random.randint(1, 3)):
                self._ask(client, self._draw())

    def _pipelines(self) -> None:
        with self.member.client() as client:
            self._ask(client, self._draw(300))

    def _is_slow(self) -> None:
        """Send byte by byte; a pause ends the last line, which has no newline."""
        with self.member.client() as client:
            asked = self._draw(2)
            for byte in b"\n".join(asked):
                client.send(bytes([byte]))
                self._load.is_over.wait(0.01)
            for command in asked:
                self._check(command, self._line(client), 1)

    def _half_closes(self) -> None:
        with self.member.client() as client:
            asked = self._draw(20)
            client.send(b"\n".join(asked))
            lines = client.end().split(b"\n")
            if len(lines) != len(asked) + 1:
                raise EOFError(f"{len(lines) - 1} replies to {len(asked)} lines")
            for command, reply in zip(asked, lines, strict=False):
                self._check(command, reply, 1)

    def _resets(self) -> None:
        with self.member.client() as client:
            self._ask(client, self._draw())
            client.send(b"WHO\nWHERE\nWH" * self._random.randint(1, 20))
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _sends_bad_lines(self) -> None:
        with self.member.client() as client:
            client.send(b"NO\n\n\xff\xfe\nwHy\r\n" + b"x" * 5000)
            replies = client.rest()
        self._expect(replies, b"ERR unknown command\nERR not ASCII\n42\nERR line too long\n")

    def _speaks_http(self) -> None:
        with self.member.client() as client:
            client.send(HTTP)
            self._expect(client.rest(), b"")

    def _mistakes_the_port(self) -> None:
        """Send plain text to a TLS port, or a TLS record to a plain one."""
        with self.member.plain_client() as client:
            client.send(b"WHO\n" if self.member.is_tls else b"\x16\x03\x01\x00\x05hello\n")
            self._expect(client.line(), b"ERR TLS only\n" if self.member.is_tls else b"")


KINDS = (
    "stays", "comes_and_goes", "pipelines", "is_slow", "half_closes",
    "resets", "sends_bad_lines", "speaks_http", "mistakes_the_port",
)  # fmt: skip


class Load:
    """Callers of these kinds at all servers, and their results; `may_call` lets them start.

    `ceiling` is the largest allowed reply to WHO. `pause` is a caller's mean time between requests.
    """

    def __init__(
        self,
        members: Sequence[Target],
        seed: int,
        kinds: Sequence[str] = KINDS,
        ceiling: float = inf,
        pause: float = 0.15,
    ) -> None:
        self.ceiling, self.pause = ceiling, pause
        self.seconds: deque[float] = deque(maxlen=100_000)  #: from a request to its last reply
        self.kinds: Counter[str] = Counter()  #: correct replies
        self.replies = Counter(right=0, wrong=0, excused=0, lost=0)
        self.staying: Counter[str] = (
            Counter()
        )  #: clients of each server that have a reply and are not leaving
        self.failures: list[str] = []
        self.lock, self.may_call, self.is_over = (
            threading.Lock(),
            threading.Event(),
            threading.Event(),
        )
        self._callers = [
            Caller(kind, member, self, f"{seed} {member.name} {number}")
            for member in members
            for number, kind in enumerate(kinds)
        ]

    @property
    def rounds(self) -> int:
        """How often every caller has been served so far."""
        return sum(caller.rounds for caller in self._callers)

    @property
    def lost(self) -> int:
        """The number of lost connections so far, excused or not."""
        return self.replies["lost"] + self.replies["excused"]

    def p99(self) -> float:
        """Seconds within which 99 of 100 requests were answered."""
        seconds = sorted(self.seconds)
        return seconds[len(seconds) * 99 // 100]

    def park(self) -> None:
        """Wait until no caller is connected."""
        self.may_call.clear()
        until(
            lambda: all(caller.is_parked for caller in self._callers),
            "all clients pause",
            2 * LIMIT,
        )

    def are_served(self) -> None:
        """Wait until each caller has been served once more, from its start."""
        before = [(caller, caller.rounds) for caller in self._callers]

        def late() -> list[str]:
            return [
                f"{caller.member.name} {caller.kind}"
                for caller, rounds in before
                if caller.rounds < rounds + 2
            ]

        until(lambda: not late(), lambda: f"all callers are served again: not {late()}", 2 * LIMIT)

    def problems(self) -> list[str]:
        """The errors since the last call, each kind once."""
        with self.lock:
            found, self.failures[:] = sorted(self.failures), []
        return [f"{text} ({len(list(same))} times)" for text, same in groupby(found)]

    def stop(self) -> None:
        """Stop all callers; `join` waits for them."""
        self.is_over.set()
        self.may_call.set()

    def join(self) -> None:
        """Wait until all callers have ended."""
        for caller in self._callers:
            caller.thread.join(LIMIT)
        late = [caller.kind for caller in self._callers if caller.thread.is_alive()]
        assert not late, f"no reply: {late}"
