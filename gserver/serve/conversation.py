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
from gserver.boot import fatal_on_error
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
from gserver.serve.admission import Admission, Arrival
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
    """The conversations of one worker."""

    def __init__(self, clients: Clients, tls_context: SSLContext | None = None) -> None:
        self.clients = clients
        self._config = clients.config
        self._replies = clients.replies
        self._tls_context = tls_context
        self.silent = SilentClients(clients, self.start)
        self.admission = Admission(clients, self.silent, self.start)
        self._run_or_exit = fatal_on_error(self._run)

    def start(self, client: Client, rest: Rest, arrival: Arrival | None = None) -> None:
        """Begin a conversation, in a greenlet of its own."""
        client.stream = Stream(client, self.clients, self.silent)
        gevent.spawn_raw(self._run_or_exit, client, client.stream, rest, arrival)

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
            self._replies.count_error(KICKED)
            self.start(client, Rest(unsent=KICKED.reply, error=KICKED))
        elif stream.is_sending or stream.command:
            self._end_at_once(client, KICKED)
            stream.interrupt(Closed())
        else:
            stream.interrupt(Kicked())

    def _run(self, client: Client, stream: Stream, rest: Rest, arrival: Arrival | None) -> None:
        """Hold a conversation, and see to an end that it does not see to itself."""
        try:
            self._converse(client, stream, rest, arrival)
        except Moved as moved:
            self.clients.park(client, moved.rest)
        except Kicked:
            self._end_at_once(client, KICKED)
        except TimeoutError:  # Close with a reset: the kernel would hold the replies for minutes.
            client.sock.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
            self._end_at_once(client, SLOW_READER)
        except Exception as error:  # noqa: BLE001 (one client must not end the service of all)
            self.clients.fail(client, error)
        client.stream = None

    def _end_at_once(self, client: Client, error: ErrorReply) -> None:
        """Close a client that would not read a last line."""
        self._replies.count_error(error)
        self.clients.note_end(client, error)
        self.clients.close(client, error)

    def _converse(
        self, client: Client, stream: Stream, rest: Rest, arrival: Arrival | None
    ) -> None:
        """Talk with a client until it is silent or has gone.

        Raises TimeoutError if it does not read, an `Interrupted`, and OSError if it is broken.
        """
        if arrival:
            received = self._await_admission(client, stream, arrival)
            if received is None:
                return
            rest = Rest(received)
        try:
            error = self._answer_lines(client, stream, rest)
        except EOFError:
            self.clients.close(client)
        except Drained:
            self._end(client, stream)
        else:
            if error:
                self._end(client, stream, error)
            else:
                stream.end()  # The client is silent again.

    def _end(self, client: Client, stream: Stream, error: ErrorReply | None = None) -> None:
        """Close after the last line, once the client has read it."""
        stream.end()
        if error:
            self.clients.note_end(client, error)
        self.silent.linger(client, error)

    # Before a client is admitted

    def _await_admission(self, client: Client, stream: Stream, arrival: Arrival) -> bytes | None:
        """Read the PROXY header, do the TLS handshake, and admit the client.

        Return what has arrived beyond that; None if it was not admitted, which has been seen to.
        """
        reason, received = PROXY_FAILED, b""
        try:
            if arrival.is_proxied:
                received = self._read_header(client, stream)
            if arrival.has_tls:
                reason = TLS_FAILED
                client.sock, received = self._shake_hands(client, stream, received), b""
        except EOFError:
            self.clients.close(client)
        except _PlainTextError:
            self._reject_plain_text(client, stream)
        except (OSError, ProxyHeaderError) as error:
            self._fail_admission(client, stream, reason, error)
        else:
            client.quiet_since = monotonic()
            if self.admission.admit(client, is_proxied=arrival.is_proxied):
                return received
        finally:
            self.admission.end(client)
        return None

    def _read_header(self, client: Client, stream: Stream) -> bytes:
        """Receive the PROXY header; return what follows it.

        Raises EOFError for a probe that only connects, `ProxyHeaderError` and OSError.
        """
        until, received, header = _in(self._config.proxy_header_timeout_seconds), b"", None
        while not header:
            try:
                data = stream.receive(until)
            except ConnectionResetError:
                data = b""
            if not data and not received:
                raise EOFError
            if not data:
                raise ConnectionAbortedError("the connection ended before the header")
            received += data
            header = parse(received)
        self.admission.note_header(client, header)
        client.quiet_since = monotonic()
        return received[header.size :]

    def _shake_hands(self, client: Client, stream: Stream, received: bytes) -> TlsSocket:
        """Do the TLS handshake, of which something may have been received.

        Raises EOFError for a client that leaves before it begins, `_PlainTextError`, and OSError.
        """
        until = _in(self._config.tls_handshake_timeout_seconds)
        received = received or stream.receive(until)
        if not received:
            raise EOFError
        if not received.startswith(HANDSHAKE_RECORD):
            raise _PlainTextError
        tls, is_over = TlsSocket(cast(Any, client.sock), cast(SSLContext, self._tls_context)), False
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

    def _reject_plain_text(self, client: Client, stream: Stream) -> None:
        self._replies.count_error(PLAIN_TEXT)
        self.clients.note_end(client, PLAIN_TEXT)
        stream.send(PLAIN_TEXT.reply)
        self._end(client, stream)

    def _fail_admission(
        self, client: Client, stream: Stream, reason: ErrorReply, error: Exception
    ) -> None:
        """Count it, and close; a client that broke TLS can read the alert that says why."""
        self._replies.count_error(reason)
        self.clients.note_end(client, reason)
        fields = {**address_fields(client.peer), **logs.error_fields(error)}
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
            self._end(client, stream)
        else:
            self.clients.close(client)

    # Lines

    def _answer_lines(self, client: Client, stream: Stream, rest: Rest) -> ErrorReply | None:
        """Answer lines until all is answered; return the error reply that ends the client.

        Raises EOFError at the client's end, TimeoutError if it does not read its replies, `Drained`
        and other `Interrupted`, and OSError.
        """
        parser = Parser(self._replies.grammar, is_first=not client.has_spoken)
        parser.receive(rest.unread)
        replies, error = rest.unsent, rest.error
        write_ends, line_ends = rest.write_ends, rest.line_ends
        # The fast path has been tried with whole lines; others have not had their turn since.
        is_tried, has_had_turn = rest.unread.endswith(b"\n"), False
        try:
            while True:
                stream.send(replies, write_ends)
                if error:
                    return error
                replies, write_ends = b"", None
                if parser.has_line:
                    if has_had_turn:
                        stream.take_turn()
                    line_ends, has_had_turn = inf, True
                    replies, error = self._answer_some(client, stream, parser, is_tried=is_tried)
                    is_tried = False
                elif error := parser.check():
                    replies = self._replies.reply_to(error, client)
                elif parser.unread or stream.has_partial_record:
                    line_ends = min(line_ends, _in(self._config.line_timeout_seconds))
                    replies, error = self._await_rest(client, stream, parser, line_ends)
                elif stream.may_be_silent:
                    return None
                else:
                    replies, error = self._await_rest(client, stream, parser, inf)
        except Moved as moved:
            moved.rest.unread, moved.rest.line_ends = parser.unread, line_ends
            moved.rest.error = error
            raise

    def _answer_some(
        self, client: Client, stream: Stream, parser: "Parser[Command]", *, is_tried: bool
    ) -> Answer:
        """Answer the next lines: one command that may block, or a piece of lines that cannot.

        `is_tried`: the fast path cannot answer them.
        """
        started_at = client.quiet_since = monotonic()
        replies = None if is_tried else self._answer_quickly(client, parser)
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
                reply, error = self._reply_to(client, stream, item)
                ready.append(reply)
        if ready and not error:
            self._count_read(monotonic() if may_block else started_at)  # Handlers have own times.
        return b"".join(ready), error

    def _answer_quickly(self, client: Client, parser: "Parser[Command]") -> bytes | None:
        """Return what the fast path replies to whole lines; None if they need the parser."""
        unread = parser.unread
        all_lines = unread.rfind(b"\n") + 1
        for size in (all_lines, unread.rfind(b"\n", 0, PIECE_BYTES) + 1):
            if size and (size == all_lines or size < PIECE_BYTES < all_lines):
                replies = self.silent.answer(unread[:size], client.has_spoken, client)
                if replies is not None:
                    client.has_spoken = True
                    parser.skip(size)
                    return replies
        return None

    def _reply_to(self, client: Client, stream: Stream, item: Command | ErrorReply) -> Answer:
        """Reply to a command or an error. Here a handler that may block runs."""
        client.has_spoken = True
        if isinstance(item, Command) and item.may_block:
            if self._replies.begin(item):
                return stream.run(item.name, partial(self._replies.run, item, client)), None
            item = TOO_MANY_AT_ONCE
        closing_error = item if isinstance(item, ErrorReply) and item.closes else None
        return self._replies.reply_to(item, client), closing_error

    def _await_rest(
        self, client: Client, stream: Stream, parser: "Parser[Command]", line_ends: float
    ) -> Answer:
        """Wait for more of a line, and note it; or answer to a silence, and to the client's end.

        Raises EOFError at the end if there is nothing to answer, and what `Stream.receive` raises.
        """
        config = self._config
        idle_ends, pause_ends = client.quiet_since + (config.idle_timeout_seconds or inf), inf
        is_command = parser.unread != b"" and parser.is_complete
        if is_command:
            pause_ends = stream.heard_at + (config.unterminated_after_seconds or inf)
        try:
            until = min(idle_ends, pause_ends, line_ends)
            data = stream.receive(until, has_part=parser.unread != b"")
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
            if not data and not parser.unread:
                raise EOFError
            parser.receive(data)
            items = [] if data else parser.end()
        client.quiet_since = client.quiet_since if not items else monotonic()
        return self._reply_to(client, stream, items[0]) if items else (b"", None)

    def _count_read(self, started_at: float) -> None:
        self._replies.count_reads(1, round((monotonic() - started_at) * 1e9))


class _PlainTextError(Exception):
    """The client does not speak TLS."""


def _in(seconds: float) -> float:
    """Return the moment in so many seconds; 0 = never."""
    return monotonic() + (seconds or inf)
