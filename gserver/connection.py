"""One client, from accept to close, in plain blocking code: receive, feed the parser, answer, send.

Owns the client's deadlines.
"""

import math
import socket
import struct
from collections.abc import Sequence
from time import monotonic, perf_counter_ns

import gevent
from gevent import socket as gevent_socket

from gserver import logs
from gserver.clientele import Clientele
from gserver.commands import Command
from gserver.errors import ClusterUnavailable
from gserver.protocol import CLUSTER_UNAVAILABLE, IDLE, INTERNAL, SLOW_READER, TOO_SLOW, Parser, Refusal
from gserver.receiver import Receiver, raw_socket

#: At a drain, a client that has just connected, or whose line is still on its way, has so long to say it.
DRAIN_GRACE_SECONDS = 0.5
#: After the last word, how long to wait for the client's own end, so that no reset overtakes that word.
LINGER_SECONDS = 1.0


class Connection:
    """One client: `run` is its whole conversation, and then `close` its end."""

    __slots__ = (
        "_accepted_at",
        "_clientele",
        "_has_spoken",
        "_is_ended",
        "_line_deadline",
        "_parser",
        "_raw",
        "_sock",
        "idle_since",
        "is_overstayed",
        "receiver",
        "was_active",
    )

    def __init__(self, sock: gevent_socket.socket, clientele: Clientele) -> None:
        self._sock = sock
        self._raw = raw_socket(sock)
        self._clientele = clientele
        self._parser: Parser[Command] = Parser(clientele.grammar)
        self._accepted_at = self.idle_since = monotonic()
        self._line_deadline = math.inf
        self._has_spoken = self._is_ended = False
        self.receiver = Receiver(sock)
        self.was_active = self.is_overstayed = False

    def run(self) -> Refusal | None:
        """Serve the client to its end; return for what it was turned out, None when it left or was let go."""
        self._clientele.connections.add(self)
        try:
            return self._converse()
        except OSError as error:
            self._is_ended = True  # It is gone, and cannot be told anything.
            if not isinstance(error, TimeoutError) or error.errno is not None:
                return None
            # No errno: the deadline of `sendall`. What the kernel holds for the client would stay for
            # minutes; closing with a reset drops it.
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._clientele.refuse(SLOW_READER)
            return SLOW_READER
        finally:
            self._clientele.connections.discard(self)
            self.receiver.close()

    def close(self) -> None:
        """Close the socket: at once when the client has ended, else so that it reads what it was told."""
        if self._is_ended:
            self._sock.close()
        else:
            close_cleanly(self._sock)

    def _converse(self) -> Refusal | None:
        clientele, parser, receive = self._clientele, self._parser, self.receiver.receive
        while True:
            data = receive(self._patience() if parser.partial or clientele.is_draining else None)
            started = perf_counter_ns()
            if data:
                self._has_spoken = True
                self.is_overstayed = False
                if not parser.partial or b"\n" in data:
                    self._line_deadline = math.inf  # What is left of it, if anything, is a new line.
                items: Sequence[Command | Refusal] = parser.feed(data)
            elif data is None:
                items = self._take_silence()
                if not items and clientele.is_draining and self._leaves_at() <= monotonic():
                    return None
            else:
                self._is_ended = True
                return self._answer(parser.end())
            refusal = self._answer(items)
            if refusal is not None:
                return refusal
            self.was_active = True
            if items:
                clientele.cells[clientele.bursts] += 1
                clientele.cells[clientele.service_ns] += perf_counter_ns() - started

    def _patience(self) -> float | None:
        """How many seconds to wait for more: to the end of the line, or of the drain's grace; None = any time."""
        clientele, config, now = self._clientele, self._clientele.config, monotonic()
        patience = self._leaves_at() - now if clientele.is_draining else math.inf
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
            return self._clientele.drain_started_at + DRAIN_GRACE_SECONDS
        return 0.0 if self._has_spoken else self._accepted_at + DRAIN_GRACE_SECONDS

    def _take_silence(self) -> Sequence[Command | Refusal]:
        """Nothing came in time: return what that means."""
        clientele = self._clientele
        if self.is_overstayed:
            return [IDLE]
        if self._parser.partial and self._line_deadline <= monotonic():
            return [TOO_SLOW]
        return self._parser.silence() if clientele.config.unterminated_after_seconds or clientele.is_draining else []

    def _answer(self, items: Sequence[Command | Refusal]) -> Refusal | None:
        """Answer in order; return the refusal that ends the conversation, if one does."""
        clientele, cells = self._clientele, self._clientele.cells
        replies: list[bytes] = []
        for item in items:
            if isinstance(item, Command):
                if item.may_block:
                    if replies:
                        self._send(replies)  # Nobody waits for a reply that is ready.
                        replies = []
                    gevent.sleep(0)  # Others have their turn between two that take long.
                try:
                    replies.append(item.answer(clientele.service))
                    cells[item.cell] += 1
                    continue
                except gevent.GreenletExit:
                    raise  # The worker is ending.
                except ClusterUnavailable:
                    item = CLUSTER_UNAVAILABLE  # noqa: PLW2901
                except BaseException as error:  # noqa: BLE001 (somebody else's code: it ends its command, no more)
                    message = f"the handler of {item.name} raised {type(error).__name__}"
                    logs.complain("command.failed", message, {"gserver.command": item.name, **logs.error_fields(error)})
                    item = INTERNAL  # noqa: PLW2901
            clientele.refuse(item)
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
            sent = self._raw.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self._sock.settimeout(self._clientele.config.write_timeout_seconds or None)
            self._sock.sendall(memoryview(data)[sent:])


def close_cleanly(sock: gevent_socket.socket) -> None:
    """Close so that the client reads the last word and then an end, not a reset: wait for its own end a little."""
    deadline = monotonic() + LINGER_SECONDS
    try:
        sock.shutdown(socket.SHUT_WR)
        while (left := deadline - monotonic()) > 0:
            gevent.sleep(0)  # `recv` does not wait for who sends on without end: let the others have their turn.
            sock.settimeout(left)
            if not sock.recv(65536):
                break
    except OSError:
        pass
    finally:
        sock.close()
