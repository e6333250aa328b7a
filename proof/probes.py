"""Sends requests at a steady pace, whatever the replies: `python -m proof.probes HOST PORT`.

It ends with its stdin. Half of the requests open a connection each, half use permanent ones. A
request times out after one second, and is retried once on a new connection. The report has the due
time of each request and its number of tries (0: both failed).
"""

import re
import sys
import time

import gevent
from gevent import socket, spawn
from gevent.lock import RLock
from gevent.os import tp_read

from lab.child import begun, report

PERIOD_SECONDS = 0.01
LIMIT_SECONDS = 1.0
STAYING = 30
REPLIES = {b"WHO": rb"[0-9]+\n", b"WHERE": rb"[0-9a-f-]{36}\n", b"WHY": rb"42\n"}


class Line:
    """A connection, replaced after a failure. One user at a time."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._sock: socket.socket | None = None
        self._lock = RLock()

    def ask(self, command: bytes) -> None:
        """Send a request; any failure ends the connection."""
        with self._lock:
            try:
                self._sock = self._sock or socket.create_connection(self._address)
                _ask(self._sock, command)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """End the connection."""
        if self._sock:
            self._sock.close()
        self._sock = None


class Probes:
    """All requests so far."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self.results: list[tuple[float, int]] = []
        self._lines = [Line(address) for _ in range(STAYING)]
        self._is_over = False

    def request(self, due: float, number: int) -> None:
        """One request, with its tries."""
        command = [*REPLIES][number // 2 % 3]
        line = self._lines[number // 2 % STAYING] if number % 2 else Line(self._address)
        tries = next((tries for tries in (1, 2) if _is_answered(line, command)), 0)
        if not number % 2:
            line.close()
        self.results.append((due, tries))

    def run(self) -> None:
        """Send requests until `stop`, and wait for the last one."""
        due, number, under_way = time.monotonic(), 0, set()
        while not self._is_over:
            greenlet = spawn(self.request, due, number)
            under_way.add(greenlet)
            greenlet.link(under_way.discard)
            due, number = due + PERIOD_SECONDS, number + 1
            gevent.sleep(max(0.0, due - time.monotonic()))
        gevent.joinall([*under_way])

    def stop(self) -> None:
        """Stop sending."""
        self._is_over = True


def _is_answered(line: Line, command: bytes) -> bool:
    try:
        with gevent.Timeout(LIMIT_SECONDS):
            line.ask(command)
    except (OSError, EOFError, AssertionError, gevent.Timeout):
        return False
    return True


def _ask(line: socket.socket, command: bytes) -> None:
    line.sendall(command + b"\n")
    reply = b""
    while not reply.endswith(b"\n"):
        data = line.recv(100)
        if not data:
            raise EOFError
        reply += data
    if not re.fullmatch(REPLIES[command], reply):
        raise AssertionError(f"{command!r} was answered {reply!r}")


def main() -> None:
    """Run until the end of stdin."""
    probes = Probes((sys.argv[1], int(sys.argv[2])))
    running = spawn(probes.run)
    begun()
    tp_read(0, 1)
    probes.stop()
    running.join()
    report(probes.results)


if __name__ == "__main__":
    main()
