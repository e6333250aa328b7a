"""A client that has a greenlet, in plain blocking code: receive, feed the parser, answer, send.

Owns the client's deadlines.
"""

import math
import os
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic, perf_counter_ns

import gevent
from gevent.socket import wait_read, wait_write

from gserver import logs
from gserver.commands import Command
from gserver.errors import EXIT_RUNTIME, ClusterUnavailable
from gserver.protocol import (
    CLUSTER_UNAVAILABLE,
    IDLE,
    INTERNAL,
    SLOW_READER,
    TOO_SLOW,
    ErrorReply,
    Parser,
)
from gserver.serve.connection import HELD_UP_SECONDS, Connection
from gserver.serve.limits import Limits
from gserver.serve.receiver import BURST_BYTES, Receiver

#: At a drain, a client that has just connected, or whose line is still on its way, has so long to
#: say it.
DRAIN_GRACE_SECONDS = 0.5
#: After the last word, how long to wait for the client's own end, so that no reset overtakes that
#: word.
LINGER_SECONDS = 1.0
_PID = os.getpid()


class Conversation:
    """From when a client wakes until it rests again or is let go."""

    def __init__(self, connection: Connection, limits: Limits) -> None:
        self._connection = connection
        self._limits = limits
        self.receiver = Receiver(connection.sock)
        self._parser: Parser[Command] = Parser(limits.grammar, is_first=not connection.has_spoken)
        self._line_deadline = math.inf
        #: Of what it goes on to send when the grace of a drain is over, so many bytes are still
        #: answered.
        self._left: int | None = None
        #: Whether the client has ended, or is gone: it can be told nothing more.
        self.is_ended = False
        #: How long replies have waited for the client to read: its time, not the service's.
        self._stalled_ns = 0
        #: Whether the client is to rest now: else it has left, or is to be closed.
        self.rests = False

    def run(self, data: bytes | None, unsent: bytes) -> ErrorReply | None:
        """Serve the client until it `rests` or is let go; return for what it was turned out, None
        for nothing.

        Begins with what is still to be sent and what has been received (None: look whether there is
        something).
        """
        try:
            if unsent:
                self._send(unsent)
                self._connection.quiet_since = monotonic()
            return self._converse(
                self.receiver.receive(0) if data is None else self.receiver.piece(data)
            )
        except _SlowReader:
            # What the kernel holds for the client would stay for minutes; closing with a reset
            # drops it.
            self._connection.sock.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            self._limits.refuse(SLOW_READER)
            self.is_ended = True
            return SLOW_READER
        except OSError:
            self.is_ended = True
            return None
        finally:
            self.receiver.close()

    @property
    def may_rest(self) -> bool:
        """Whether there is nothing to do but to wait for a new line."""
        return not self._has_part and self._limits.config.client_greenlets == "when-needed"

    @property
    def _has_part(self) -> bool:
        """Whether a line has begun, or a record of TLS."""
        return bool(self._parser.partial) or getattr(self._connection.sock, "has_part", False)

    def _converse(self, data: bytes | None) -> ErrorReply | None:
        limits, connection, parser = self._limits, self._connection, self._parser
        while True:
            started, self._stalled_ns = perf_counter_ns(), 0
            if data:
                connection.is_overstayed = False
                if not parser.partial or b"\n" in data:
                    self._line_deadline = (
                        math.inf
                    )  # What is left of it, if anything, is a new line.
                items: Sequence[Command | ErrorReply] = parser.feed(data)
            elif data is None:
                items = self._take_silence()
                if not items and self._is_over():
                    return None
            else:
                self.is_ended = True
                return self._answer(parser.end())
            refusal = self._answer(items)
            if refusal is not None:
                return refusal
            if items or (data and not limits.is_draining):  # Blank lines prolong no drain.
                connection.quiet_since = monotonic()
            if items:
                connection.has_spoken = True
                limits.note_service(1, perf_counter_ns() - started - self._stalled_ns)
            if limits.is_draining and self._has_had_enough(len(data or b"")):
                return None
            data = self.receiver.receive(self._patience())

    def _is_over(self) -> bool:
        """Whether a client that says nothing is to leave, for a drain, or to rest."""
        if self._limits.is_draining:
            return self._leaves_at() <= monotonic()
        self.rests = self.may_rest
        return self.rests

    def _patience(self) -> float | None:
        """How many seconds to wait for more: to the end of the line, or of the drain's grace; None = any time."""
        limits, config, has_part = self._limits, self._limits.config, self._has_part
        if not has_part:
            self._line_deadline = (
                math.inf
            )  # A silence, or a record without data, may have ended what had begun.
            if not limits.is_draining:
                return None
        now = monotonic()
        patience = self._leaves_at() - now if limits.is_draining else math.inf
        if has_part:
            if self._line_deadline == math.inf and config.line_timeout_seconds:
                self._line_deadline = now + config.line_timeout_seconds
            patience = min(patience, self._line_deadline - now)
            if (
                config.unterminated_after_seconds
                and self._parser.partial
                and self._parser.is_complete
            ):
                patience = min(patience, config.unterminated_after_seconds)
        return None if patience == math.inf else patience

    def _leaves_at(self) -> float:
        """When a drain lets this client go, if it says nothing more."""
        if self._has_part:
            return self._limits.drain_started_at + DRAIN_GRACE_SECONDS
        return (
            0.0
            if self._connection.has_spoken
            else self._connection.quiet_since + DRAIN_GRACE_SECONDS
        )

    def _has_had_enough(self, taken: int) -> bool:
        """Whether a client that never pauses in a drain has been answered all that had come by the
        end of the grace.

        A burst more, so that who sends one line after another meets the pause that others leave at.
        """
        if monotonic() < self._limits.drain_started_at + DRAIN_GRACE_SECONDS:
            return False
        if self._left is None:
            self._left = self.receiver.unread + BURST_BYTES
        else:
            self._left -= taken
        return self._left < 0

    def _take_silence(self) -> Sequence[Command | ErrorReply]:
        """Nothing came in time: return what that means."""
        limits = self._limits
        if self._connection.is_overstayed:
            return [IDLE]
        now, pause = monotonic(), limits.config.unterminated_after_seconds
        # A loop that was held up finds both over: the silence after a command was so first, and
        # answers it.
        has_paused = 0 < pause <= now - self._connection.quiet_since and self._parser.is_complete
        if (
            self._has_part
            and self._line_deadline <= now
            and not (self._parser.partial and has_paused)
        ):
            return [TOO_SLOW]
        return self._parser.silence() if pause or limits.is_draining else []

    def _answer(self, items: Sequence[Command | ErrorReply]) -> ErrorReply | None:
        """Answer in order; return the refusal that ends the conversation, if one does."""
        limits, cells = self._limits, self._limits.cells
        replies: list[bytes] = []
        for item in items:
            if isinstance(item, Command):
                if item.may_block:
                    self._send(b"".join(replies))  # Nobody waits for a reply that is ready.
                    replies = []
                    gevent.sleep(0)  # Others have their turn between two that take long.
                try:
                    reply = item.answer(limits.service)
                    _end_if_forked()
                    replies.append(reply)
                    cells[item.cell] += 1
                    continue
                except ClusterUnavailable:
                    item = CLUSTER_UNAVAILABLE
                except (
                    BaseException
                ) as error:  # (somebody else's code: it ends its command, no more)
                    _end_if_forked()
                    if isinstance(error, gevent.GreenletExit) and limits.is_draining:
                        raise  # The worker is ending.
                    message = f"the handler of {item.name} raised {type(error).__name__}"
                    logs.warn_ratelimited(
                        "command.failed",
                        message,
                        {"gserver.command": item.name, **logs.error_fields(error)},
                        key=f"{item.name} {type(error).__name__}",
                    )
                    item = INTERNAL
            limits.refuse(item)
            replies.append(item.reply)
            if item.closes:
                self._send(b"".join(replies))
                return item
        self._send(b"".join(replies))
        return None

    def _send(self, data: bytes) -> None:
        """Send, waiting for a slow reader as long as it may take; nothing is read from it meanwhile."""
        if not data:
            return
        sock, deadline = self._connection.sock, 0.0
        seconds = self._limits.config.write_timeout_seconds or math.inf
        rest = memoryview(data)
        while True:
            try:
                rest = rest[sock.send(rest) :]
                if not rest:
                    return
            except BlockingIOError:
                pass
            now = monotonic()
            if now > deadline + HELD_UP_SECONDS:  # It begins, or begins again.
                deadline = now + seconds
            elif now >= deadline:
                raise _SlowReader
            with suppress(_SlowReader):
                wait_write(
                    sock.fileno(), None if deadline == math.inf else deadline - now, _SlowReader
                )
            self._stalled_ns += round((monotonic() - now) * 1e9)


def _end_if_forked() -> None:
    """End a child that a handler has forked and let come back: it would count this worker's clients, and serve them."""
    if os.getpid() != _PID:
        os._exit(EXIT_RUNTIME)


class _SlowReader(Exception):
    """The client has not read its replies in time."""


def linger(sock: socket.SocketType) -> None:
    """Wait a little for its own end before a close: so the client reads the last word and an end, not a reset."""
    deadline = monotonic() + LINGER_SECONDS
    try:
        sock.shutdown(socket.SHUT_WR)
        while (left := deadline - monotonic()) > 0:
            wait_read(sock.fileno(), left)
            if not sock.recv(65536):
                break
    except OSError:
        pass
