"""One client, from accept to close, in plain blocking code: receive, feed the parser, answer, send.

Owns the client's deadlines, and the two ends of the count: `admit` and `release`.
"""

import math
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic, perf_counter_ns

from gevent import socket as gevent_socket

from gserver import logs
from gserver.board import Board
from gserver.config import Config
from gserver.protocol import IDLE, INTERNAL, REFUSALS, SLOW_READER, TOO_SLOW, Grammar, Parser, Refusal
from gserver.receiver import Receiver, raw_socket

#: At a drain, a client that has just connected, or whose line is still on its way, has so long to say it.
DRAIN_GRACE_SECONDS = 0.5
#: After the last word, how long to wait for the client's own end, so that no reset overtakes that word.
LINGER_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Verb:
    """A command as one worker knows it: how it is answered, and the cell that counts it."""

    name: str
    answer: Callable[[], bytes]
    cell: int
    may_block: bool


class Shared:
    """What the connections of one worker have in common."""

    def __init__(self, config: Config, board: Board, slot: int, verbs: dict[bytes, Verb]) -> None:
        self.config = config
        self.grammar = Grammar(verbs, config.max_line_bytes)
        self.cells = board.cells
        self.count_clients = board.clients
        self.clients = board.cell("clients", slot)
        self.accepted = board.cell("accepted", slot)
        self.closed = board.cell("closed", slot)
        self.bursts = board.cell("bursts", slot)
        self.service_ns = board.cell("service_ns", slot)
        self.refusals = {refusal: board.cell(f"refused.{refusal.name}", slot) for refusal in REFUSALS}
        self.connections: set[Connection] = set()
        self.is_draining = False
        self.drain_started_at = 0.0

    def admit(self) -> bool:
        """Count a client in, unless there are too many; who is counted in must be counted out by `release`."""
        self.cells[self.clients] += 1
        # Counted first and compared then, so that two workers never both give away the last place.
        if self.count_clients() <= self.config.max_clients:
            self.cells[self.accepted] += 1
            return True
        self.cells[self.clients] -= 1
        return False

    def release(self) -> None:
        """Count a client out."""
        self.cells[self.clients] -= 1
        self.cells[self.closed] += 1

    def refuse(self, refusal: Refusal) -> None:
        """Count a refusal."""
        self.cells[self.refusals[refusal]] += 1

    def close_idle(self, now: float) -> None:
        """Close who has been idle too long. One such sweep now and then costs less than a timer for each command."""
        for connection in self.connections:
            if connection.was_active or not connection.receiver.is_waiting:
                connection.was_active = False
                connection.idle_since = now
            elif now - connection.idle_since >= self.config.idle_timeout_seconds:
                connection.is_overstayed = True
                connection.receiver.interrupt()

    def drain(self) -> None:
        """Let every client go as soon as what it has sent is answered."""
        self.is_draining = True
        self.drain_started_at = monotonic()
        for connection in self.connections:
            connection.receiver.interrupt()


class Connection:
    """One client: `run` is its whole conversation, and then `close` its end."""

    __slots__ = (
        "_accepted_at",
        "_has_spoken",
        "_is_ended",
        "_line_deadline",
        "_parser",
        "_shared",
        "_sock",
        "idle_since",
        "is_overstayed",
        "receiver",
        "was_active",
    )

    def __init__(self, sock: gevent_socket.socket, shared: Shared) -> None:
        self._sock = sock
        self._shared = shared
        self._parser: Parser[Verb] = Parser(shared.grammar)
        self._accepted_at = self.idle_since = monotonic()
        self._line_deadline = math.inf
        self._has_spoken = self._is_ended = False
        self.receiver = Receiver(sock)
        self.was_active = self.is_overstayed = False

    def run(self) -> Refusal | None:
        """Serve the client to its end; return for what it was turned out, None when it left or was let go."""
        self._shared.connections.add(self)
        try:
            return self._converse()
        except OSError as error:
            self._is_ended = True  # It is gone, and cannot be told anything.
            if not isinstance(error, TimeoutError) or error.errno is not None:
                return None
            # No errno: the deadline of `sendall`. What the kernel holds for the client would stay for
            # minutes; closing with a reset drops it.
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._shared.refuse(SLOW_READER)
            return SLOW_READER
        finally:
            self._shared.connections.discard(self)
            self.receiver.close()

    def close(self) -> None:
        """Close the socket: at once when the client has ended, else so that it reads what it was told."""
        if self._is_ended:
            self._sock.close()
        else:
            close_cleanly(self._sock)

    def _converse(self) -> Refusal | None:
        shared, parser, receive = self._shared, self._parser, self.receiver.receive
        while True:
            data = receive(self._patience() if parser.partial or shared.is_draining else None)
            started = perf_counter_ns()
            if data:
                self._has_spoken = True
                if not parser.partial or b"\n" in data:
                    self._line_deadline = math.inf  # What is left of it, if anything, is a new line.
                items: Sequence[Verb | Refusal] = parser.feed(data)
            elif data is None:
                items = self._take_silence()
                if not items and shared.is_draining and self._leaves_at() <= monotonic():
                    return None
            else:
                self._is_ended = True
                return self._answer(parser.end())
            refusal = self._answer(items)
            if refusal is not None:
                return refusal
            self.was_active = True
            cells = shared.cells
            cells[shared.bursts] += 1
            cells[shared.service_ns] += perf_counter_ns() - started

    def _patience(self) -> float | None:
        """How many seconds to wait for more: to the end of the line, or of the drain's grace; None = any time."""
        shared, config, now = self._shared, self._shared.config, monotonic()
        patience = self._leaves_at() - now if shared.is_draining else math.inf
        if self._parser.partial:
            if self._line_deadline == math.inf and config.line_timeout_seconds:
                self._line_deadline = now + config.line_timeout_seconds
            patience = min(patience, self._line_deadline - now)
            if config.unterminated_after_seconds and self._parser.is_complete:
                patience = min(patience, config.unterminated_after_seconds)
        return None if patience == math.inf else patience

    def _leaves_at(self) -> float:
        """When a drain lets this client go, if it says nothing more."""
        if self._parser.partial:
            return self._shared.drain_started_at + DRAIN_GRACE_SECONDS
        return 0.0 if self._has_spoken else self._accepted_at + DRAIN_GRACE_SECONDS

    def _take_silence(self) -> Sequence[Verb | Refusal]:
        """Nothing came in time: return what that means."""
        shared = self._shared
        if self.is_overstayed:
            return [IDLE]
        if self._parser.partial and self._line_deadline <= monotonic():
            return [TOO_SLOW]
        return self._parser.silence() if shared.config.unterminated_after_seconds or shared.is_draining else []

    def _answer(self, items: Sequence[Verb | Refusal]) -> Refusal | None:
        """Answer in order; return the refusal that ends the conversation, if one does."""
        shared, cells = self._shared, self._shared.cells
        replies: list[bytes] = []
        for item in items:
            if isinstance(item, Verb):
                if item.may_block and replies:
                    self._send(replies)  # Nobody waits for a reply that is ready.
                    replies = []
                try:
                    replies.append(item.answer())
                    cells[item.cell] += 1
                    continue
                except Exception as error:  # noqa: BLE001 (a handler is somebody else's code)
                    _complain_of_handler(item.name, error)
                    item = INTERNAL  # noqa: PLW2901
            shared.refuse(item)
            replies.append(item.reply)
            if item.closes:
                self._send(replies)
                return item
        if replies:
            self._send(replies)
        return None

    def _send(self, replies: list[bytes]) -> None:
        """Send, waiting for a slow reader as long as it may take; nothing is read from it meanwhile."""
        data = b"".join(replies)
        try:
            sent = raw_socket(self._sock).send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self._sock.settimeout(self._shared.config.write_timeout_seconds or None)
            self._sock.sendall(memoryview(data)[sent:])


def close_cleanly(sock: gevent_socket.socket) -> None:
    """Close so that the client reads the last word and then an end, not a reset: wait for its own end a little."""
    deadline = monotonic() + LINGER_SECONDS
    try:
        sock.shutdown(socket.SHUT_WR)
        while (left := deadline - monotonic()) > 0:
            sock.settimeout(left)
            if not sock.recv(65536):
                break
    except OSError:
        pass
    finally:
        sock.close()


def _complain_of_handler(name: str, error: Exception) -> None:
    fields = {"gserver.command": name, **logs.error_fields(error)}
    logs.complain("command.failed", f"the handler of {name} raised {type(error).__name__}", fields)
