"""The conversation with a client: one blocking function, from the first thing that has to wait.

It is read from top to bottom: PROXY header, TLS handshake, admission, lines and their handlers, the
last line. Each conversation runs in a greenlet of its own, and waits only in `stream`. When all is
answered, the client is silent again (`silent`).
"""

import logging
import struct
from collections.abc import Iterable
from functools import partial
from math import inf
from socket import SO_LINGER, SOL_SOCKET
from ssl import SSLContext, SSLError
from time import monotonic
from typing import Any, cast

import gevent

from gserver import logs
from gserver.addresses import TLS
from gserver.commands import Command
from gserver.protocol import (
    KICKED,
    PLAIN_TEXT,
    PROXY_FAILED,
    SLOW_READER,
    TLS_FAILED,
    TOO_IDLE,
    TOO_MANY_AT_ONCE,
    TOO_SLOW,
    ErrorReply,
    Parser,
)
from gserver.serve.admission import Admission
from gserver.serve.client import Client, Rest, address_fields
from gserver.serve.clients import Clients
from gserver.serve.fastpath import PIECE_BYTES
from gserver.serve.proxy_header import ProxyHeaderError, parse
from gserver.serve.silent import SilentClients
from gserver.serve.stream import Closed, Drained, Kicked, Moved, Stream
from gserver.serve.tls import HANDSHAKE_RECORD, IncompleteRecord, TlsSocket

#: What is to be sent, and the error reply at its end if that closes the client.
Answer = tuple[bytes, ErrorReply | None]


class Conversations:
    """The clients of one worker: they are admitted, silent, or in a conversation."""

    def __init__(self, clients: Clients, tls_context: SSLContext | None = None) -> None:
        self.clients = clients
        self.config = clients.config
        self.replies = clients.replies
        self.tls_context = tls_context
        self.silent = SilentClients(clients, self.start)
        self.admission = Admission(clients, self.silent, self.start)

    def start(
        self, client: Client, rest: Rest, *, is_new: bool = False, is_proxied: bool = False
    ) -> None:
        """Begin a conversation, in a greenlet of its own.

        `is_new`: the client is not admitted yet. `is_proxied`: it begins with a PROXY header.
        """
        gevent.spawn_raw(Conversation(self, client).run, rest, is_new, is_proxied)

    def take_back(self, parked: Iterable[Client]) -> None:
        """Continue to serve clients that were parked, here or by another worker."""
        for client in parked:
            rest = self.clients.parked.pop(client)
            try:
                self.clients.add(client)
                if rest != Rest():
                    self.start(client, rest)
            except Exception as error:  # noqa: BLE001 (one client must not end the service of all)
                self.clients.fail(client, error)

    def kick(self, client: Client) -> None:
        """Close a client because the operator wants that. If it can read the reason, it does."""
        stream = client.stream
        if not stream:
            self.replies.count_error(KICKED)
            self.start(client, Rest(unsent=KICKED.reply, error=KICKED))
        elif stream.is_sending or stream.command:
            self.end_at_once(client, KICKED)
            stream.interrupt(Closed())
        else:
            stream.interrupt(Kicked())

    def end_at_once(self, client: Client, error: ErrorReply) -> None:
        """Close a client that would not read a last line. Raises OSError."""
        self.replies.count_error(error)
        if error is SLOW_READER:  # With a reset: the kernel would hold the replies for minutes.
            client.sock.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
        self.clients.close(client, error)


class Conversation:
    """The conversation with one client."""

    __slots__ = "_client", "_parser", "_stream", "_worker"

    def __init__(self, worker: Conversations, client: Client) -> None:
        self._worker = worker
        self._client = client
        self._stream = client.stream = Stream(client, worker.clients, worker.silent)

    def run(self, rest: Rest, is_new: bool, is_proxied: bool) -> None:
        """Converse, and see to what ends the conversation early. Raises SystemError alone."""
        client, worker = self._client, self._worker
        try:
            try:
                self._converse(rest, is_new, is_proxied)
            except Moved as moved:
                worker.clients.park(client, moved.rest)
            except Kicked:
                worker.end_at_once(client, KICKED)
            except TimeoutError:
                worker.end_at_once(client, SLOW_READER)
        except Exception as error:  # noqa: BLE001 (one client must not end the service of all)
            worker.clients.fail(client, error)
        client.stream = None

    def _converse(self, rest: Rest, is_new: bool, is_proxied: bool) -> None:
        """Talk with the client until all is answered, or until it is closed.

        Raises TimeoutError if it does not read, an `Interrupted`, and OSError if it is broken.
        """
        if is_new:
            received = self._await_admission(is_proxied)
            if received is None:
                return
            rest = Rest(received)
        try:
            error = self._answer_lines(rest)
        except EOFError:
            self._worker.clients.close(self._client)
        except Drained:
            self._end()
        else:
            if error:
                self._end(error)
            else:
                self._stream.end()  # The client is silent again.

    def _end(self, error: ErrorReply | None = None) -> None:
        """Close after the last line, once the client has read it."""
        self._stream.end()
        self._worker.silent.linger(self._client, error)

    # Before the client is admitted

    def _await_admission(self, is_proxied: bool) -> bytes | None:
        """Read the PROXY header, do the TLS handshake, and admit the client.

        Return what has arrived beyond that; None if it was not admitted, which has been seen to.
        """
        client, worker = self._client, self._worker
        reason, received = PROXY_FAILED, b""
        try:
            if is_proxied:
                received = self._read_header()
            if client.transport == TLS:
                reason = TLS_FAILED
                client.sock, received = self._shake_hands(received), b""
        except EOFError:
            worker.clients.close(client)
        except _PlainTextError:
            worker.replies.count_error(PLAIN_TEXT)
            self._stream.send(PLAIN_TEXT.reply)
            self._end(PLAIN_TEXT)
        except (OSError, ProxyHeaderError) as error:
            self._fail_admission(reason, error)
        else:
            client.quiet_since = monotonic()
            if worker.admission.admit(client, is_proxied=is_proxied):
                return received
        finally:
            worker.admission.end(client)
        return None

    def _read_header(self) -> bytes:
        """Receive the PROXY header; return what follows it.

        Raises EOFError for a probe that only connects, `ProxyHeaderError` and OSError.
        """
        until, received, header = _in(self._worker.config.proxy_header_timeout_seconds), b"", None
        while not header:
            try:
                data = self._stream.receive(until)
            except ConnectionResetError:
                data = b""
            if not data and not received:
                raise EOFError
            if not data:
                raise ConnectionAbortedError("the connection ended before the header")
            received += data
            header = parse(received)
        self._client.quiet_since = monotonic()
        self._worker.admission.note_header(self._client, header)
        return received[header.size :]

    def _shake_hands(self, received: bytes) -> TlsSocket:
        """Do the TLS handshake, of which something may have been received.

        Raises EOFError for a client that leaves before it begins, `_PlainTextError`, and OSError.
        """
        worker, stream = self._worker, self._stream
        until = _in(worker.config.tls_handshake_timeout_seconds)
        received = received or stream.receive(until)
        if not received:
            raise EOFError
        if not received.startswith(HANDSHAKE_RECORD):
            raise _PlainTextError
        tls = TlsSocket(cast(Any, self._client.sock), cast(SSLContext, worker.tls_context))
        is_over = False
        while not is_over:
            if not received:
                raise ConnectionAbortedError("the client has gone")
            try:
                is_over = tls.handshake(received)
            finally:  # If it has failed, the client reads why.
                stream.send(tls.outgoing(), until)
            if not is_over:
                received = stream.receive(until)
        return tls

    def _fail_admission(self, reason: ErrorReply, error: Exception) -> None:
        """Count it, and close; a client that broke TLS can read the alert that says why."""
        self._worker.replies.count_error(reason)
        fields = {**address_fields(self._client.peer), **logs.error_fields(error)}
        address = fields["client.address"]
        if reason is PROXY_FAILED:
            message = f"the PROXY header of {address} has failed: {error}"
            if isinstance(error, ProxyHeaderError | TimeoutError):
                message += "; a balancer in --proxy-from must send one (HAProxy: send-proxy-v2)"
            logs.warn_ratelimited("client.proxy_failed", message, fields)
        elif logging.root.isEnabledFor(logging.DEBUG):
            message = f"TLS handshake with {address} failed: {error}"
            logs.event(logging.DEBUG, "client.tls_failed", message, fields)
        if isinstance(error, ProxyHeaderError | SSLError):
            self._end(reason)
        else:
            self._worker.clients.close(self._client, reason)

    # Lines

    def _answer_lines(self, rest: Rest) -> ErrorReply | None:
        """Answer lines until all is answered; return the error reply that ends the client.

        Raises EOFError at the client's end, `Drained` in a drain, and what `_converse` raises.
        """
        client, stream, worker = self._client, self._stream, self._worker
        parser = self._parser = Parser(worker.replies.grammar, is_first=not client.has_spoken)
        parser.receive(rest.unread)
        replies, error = rest.unsent, rest.error
        write_ends, line_ends = rest.write_ends, rest.line_ends
        # The fast path has been tried with whole lines; others have not had their turn since.
        is_tried, has_had_turn = rest.unread.endswith(b"\n"), False
        try:
            while True:
                if replies:
                    stream.send(replies, write_ends)
                if error:
                    return error
                replies, write_ends = b"", None
                if parser.has_line:
                    if has_had_turn:
                        stream.take_turn()
                    replies, error = self._answer_some(is_tried)
                    is_tried, has_had_turn, line_ends = False, True, inf
                elif not parser.has_part and stream.may_be_silent:
                    return None
                elif error := parser.check():
                    replies = worker.replies.reply_to(error, client)
                else:
                    line_ends = self._line_ends(line_ends)
                    replies, error = self._await_more(line_ends)
                    has_had_turn = False
        except Moved as moved:
            moved.rest.unread, moved.rest.line_ends = parser.unread, line_ends
            moved.rest.error = error
            raise

    def _line_ends(self, line_ends: float) -> float:
        """Return when the line, or the TLS record, must have ended, if one has begun."""
        if self._parser.has_part or self._client.has_partial_record:
            return min(line_ends, _in(self._worker.config.line_timeout_seconds))
        return inf

    def _answer_some(self, is_tried: bool) -> Answer:
        """Answer the next lines: one command that may block, or a piece of lines that cannot.

        `is_tried`: the fast path cannot answer them.
        """
        started_at, parser = monotonic(), self._parser
        # What runs in the fast path must not block, so own commands run only in the hub.
        may_be_quick = not is_tried and not self._worker.replies.has_quick_own
        replies = self._answer_quickly() if may_be_quick else None
        if replies is not None:
            self._count_read(started_at)
            return replies, None
        ready: list[bytes] = []
        error, may_block, ends_at = None, False, parser.position + PIECE_BYTES
        while parser.has_line and parser.position < ends_at and not (error or may_block):
            line_at = parser.position
            item = parser.next_line()
            may_block = isinstance(item, Command) and item.may_block
            if may_block and ready:  # A reply that is ready does not wait for a handler.
                parser.put_back(line_at)
            elif item is not None:
                reply, error = self._reply_to(item)
                ready.append(reply)
        if ready and not error:
            self._count_read(monotonic() if may_block else started_at)  # Handlers have own times.
        return b"".join(ready), error

    def _answer_quickly(self) -> bytes | None:
        """Return what the fast path replies to whole lines; None if they need the parser."""
        client, unread = self._client, self._parser.unread
        all_lines = unread.rfind(b"\n") + 1
        for size in (all_lines, unread.rfind(b"\n", 0, PIECE_BYTES) + 1):
            if size and (size == all_lines or size < PIECE_BYTES < all_lines):
                replies = self._worker.silent.answer(unread[:size], client.has_spoken, client)
                if replies is not None:
                    client.has_spoken, client.quiet_since = True, monotonic()
                    self._parser.skip(size)
                    return replies
        return None

    def _reply_to(self, item: Command | ErrorReply) -> Answer:
        """Reply to a command or an error. Here a handler that may block runs."""
        client, replies = self._client, self._worker.replies
        client.has_spoken, client.quiet_since = True, monotonic()
        if isinstance(item, Command) and item.may_block:
            if replies.begin(item):
                return self._stream.run(item.name, partial(replies.run, item, client)), None
            item = TOO_MANY_AT_ONCE
        closing_error = item if isinstance(item, ErrorReply) and item.closes else None
        return replies.reply_to(item, client), closing_error

    def _await_more(self, line_ends: float) -> Answer:
        """Wait for more, and give it to the parser; or answer to a silence, or to the end.

        Raises EOFError at the end if there is nothing to answer, and what `Stream.receive` raises.
        """
        parser, config, pause_ends = self._parser, self._worker.config, inf
        idle_ends = self._client.quiet_since + (config.idle_timeout_seconds or inf)
        has_part = parser.has_part
        is_command = has_part and parser.is_complete
        if is_command:
            pause_ends = self._stream.heard_at + (config.unterminated_after_seconds or inf)
        try:
            until = min(idle_ends, pause_ends, line_ends)
            data = self._stream.receive(until, has_part=has_part)
        except IncompleteRecord:
            return b"", None
        except Kicked:
            items: list[Command | ErrorReply] = [KICKED]
        except Drained as drained:
            if drained.is_cut or not is_command:
                raise
            items = parser.silence()
        except TimeoutError:
            now = monotonic()
            error = TOO_IDLE if idle_ends <= now else TOO_SLOW
            items = parser.silence() if pause_ends <= now < idle_ends else [error]
        else:
            if not data and not has_part:
                raise EOFError
            parser.receive(data)
            items = [] if data else parser.end()
        return self._reply_to(items[0]) if items else (b"", None)

    def _count_read(self, started_at: float) -> None:
        self._worker.replies.count_reads(1, round((monotonic() - started_at) * 1e9))


class _PlainTextError(Exception):
    """The client does not speak TLS."""


def _in(seconds: float) -> float:
    """Return the moment in so many seconds; 0 = never."""
    return monotonic() + (seconds or inf)
