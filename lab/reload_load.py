"""Clients of every kind, for reloads: `python -m lab.reload_load PORT SERVER_ID KIND=NUMBER ...`.

Each kind keeps its connections busy in its own way. Every reply is compared with the expected one,
so a reply that is missing, doubled or out of order is found. The server needs the commands of
`MODULE`.
"""

import heapq
import random
import selectors
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from math import inf

from lab import child

#: The module of commands.
MODULE = """
from lab.commands import napping, replying

nap = napping("NAP", 0.3)
large = replying("LARGE", 1_000_000)
"""
#: Any number, as the reply to WHO.
NUMBER = b"(number)"
LARGE = b"x" * 1_000_000


class Flow:
    """One client: what it sends next, and the replies that it waits for."""

    #: How much it reads at once, and the pause between two batches.
    read_bytes, pause_seconds = 262_144, 0.0

    def __init__(self, port: int, server_id: bytes) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.sock.setblocking(False)
        self.server_id = server_id
        self.expected: deque[bytes] = deque()
        self.received = b""
        self.sent_at = 0.0
        self._batches = self.batches()

    def batches(self) -> Iterator[tuple[bytes, list[bytes]]]:
        """Yield bytes to send, and the replies to them."""
        raise NotImplementedError

    def send_next(self, now: float) -> None:
        data, replies = next(self._batches)
        self.expected.extend(replies)
        self.sent_at = now
        self.sock.sendall(data)

    def take(self, data: bytes) -> list[bytes]:
        """Take what has arrived; return the lines."""
        *lines, self.received = (self.received + data).split(b"\n")
        return lines


class Pipelined(Flow):
    """Sends batches of commands without a pause."""

    def batches(self) -> Iterator[tuple[bytes, list[bytes]]]:
        replies = {
            b"WHO": NUMBER,
            b"WHY": b"42",
            b"WHERE": self.server_id,
            b"WHAT": b"ERR unknown command",
        }
        while True:
            batch = random.choices(list(replies), k=random.randint(1, 40))
            yield b"\n".join(batch) + b"\n", [replies[line] for line in batch]


class Partial(Flow):
    """Is always in the middle of a line."""

    pause_seconds = 0.5

    def batches(self) -> Iterator[tuple[bytes, list[bytes]]]:
        yield b"WHE", []
        while True:
            yield b"RE\nWHE", [self.server_id]


class Busy(Flow):
    """Is nearly always in a handler that blocks."""

    def batches(self) -> Iterator[tuple[bytes, list[bytes]]]:
        while True:
            yield b"WHY\nNAP\nWHERE\nNAP\n", [b"42", b"rested", self.server_id, b"rested"]


class Slow(Flow):
    """Asks for large replies, and reads them slowly."""

    read_bytes, pause_seconds = 20_000, 0.01

    def batches(self) -> Iterator[tuple[bytes, list[bytes]]]:
        while True:
            yield b"WHY\nLARGE\nWHERE\n", [b"42", LARGE, self.server_id]


class Idle(Flow):
    """Asks now and then."""

    pause_seconds = 20.0

    def batches(self) -> Iterator[tuple[bytes, list[bytes]]]:
        while True:
            yield b"WHY\n", [b"42"]


class Watcher(Flow):
    """Asks WHO all the time."""

    pause_seconds = 0.001

    def batches(self) -> Iterator[tuple[bytes, list[bytes]]]:
        while True:
            yield b"WHO\n", [NUMBER]


KINDS = {kind.__name__.lower(): kind for kind in (Pipelined, Partial, Busy, Slow, Idle, Watcher)}


class Load:
    """All clients, and what has been found."""

    def __init__(self, port: int, server_id: bytes, numbers: dict[str, int]) -> None:
        self._selector = selectors.DefaultSelector()
        self.flows: dict[int, Flow] = {}
        #: When which client sends its next batch, or reads on.
        self._due: list[tuple[float, int]] = []
        for name, number in numbers.items():
            for _ in range(number):
                flow = KINDS[name](port, server_id)
                self.flows[flow.sock.fileno()] = flow
                self._selector.register(flow.sock, selectors.EVENT_READ, flow)
                self._put_off(flow, random.random() * flow.pause_seconds)
        self.clients = len(self.flows)
        self.lost = self.wrong = self.replies = 0
        self.least, self.most = self.clients, 0
        #: Time from a command to its reply in milliseconds, of idle clients and of the watcher.
        self.latencies: list[float] = []
        self._selector.register(sys.stdin, selectors.EVENT_READ, None)

    def run(self) -> None:
        """Run until stdin ends, and until every reply to what was sent has arrived, or 20 s."""
        end_at = inf
        while end_at == inf or (self._is_waiting() and time.monotonic() < end_at):
            for key, _ in self._selector.select(0.001):
                if key.data is None:
                    self._selector.unregister(sys.stdin)
                    end_at = time.monotonic() + 20
                else:
                    self._read(key.data)
            now = time.monotonic()
            while self._due and self._due[0][0] <= now:
                flow = self.flows.get(heapq.heappop(self._due)[1])
                if flow and flow.expected:
                    self._selector.register(flow.sock, selectors.EVENT_READ, flow)
                elif flow and end_at == inf:
                    self._send(flow, now)
        self.missing = sum(len(flow.expected) for flow in self.flows.values())

    def _put_off(self, flow: Flow, seconds: float) -> None:
        heapq.heappush(self._due, (time.monotonic() + seconds, flow.sock.fileno()))

    def _is_waiting(self) -> bool:
        return any(flow.expected for flow in self.flows.values())

    def _send(self, flow: Flow, now: float) -> None:
        try:
            flow.send_next(now)
        except OSError:
            self._lose(flow)
            return
        if not flow.expected:
            self._put_off(flow, flow.pause_seconds)

    def _read(self, flow: Flow) -> None:
        try:
            data = flow.sock.recv(flow.read_bytes)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lose(flow)
            return
        now = time.monotonic()
        for line in flow.take(data):
            self._compare(flow, line, now)
        if not flow.expected:
            self._put_off(flow, flow.pause_seconds)
        elif isinstance(flow, Slow):
            self._selector.unregister(flow.sock)
            self._put_off(flow, flow.pause_seconds)

    def _compare(self, flow: Flow, line: bytes, now: float) -> None:
        self.replies += 1
        wanted = flow.expected.popleft() if flow.expected else None
        if wanted is NUMBER and line.isdigit():
            self.least, self.most = min(self.least, int(line)), max(self.most, int(line))
        elif line != wanted:
            self.wrong += 1
        if isinstance(flow, Idle | Watcher):
            self.latencies.append((now - flow.sent_at) * 1000)

    def _lose(self, flow: Flow) -> None:
        self.lost += 1
        with suppress(KeyError):  # A slow reader that pauses.
            self._selector.unregister(flow.sock)
        del self.flows[flow.sock.fileno()]
        flow.sock.close()

    def figures(self) -> dict[str, float]:
        latencies = sorted(self.latencies)
        return {
            "clients": self.clients,
            "lost": self.lost,
            "wrong": self.wrong,
            "missing": self.missing,
            "replies": self.replies,
            "who_least": self.least,
            "who_most": self.most,
            "asked": len(latencies),
            "p50_ms": latencies[len(latencies) // 2] if latencies else 0.0,
            "p99_ms": latencies[len(latencies) * 99 // 100] if latencies else 0.0,
            "longest_ms": latencies[-1] if latencies else 0.0,
        }


def main() -> None:
    port, server_id, *words = sys.argv[1:]
    numbers = {kind: int(number) for kind, _, number in (word.partition("=") for word in words)}
    load = Load(int(port), server_id.encode(), numbers)
    child.begun()
    load.run()
    child.report(load.figures())


if __name__ == "__main__":
    main()
