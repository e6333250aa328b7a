"""One client from accept to close, as a state machine in the worker's event loop.

Nothing here waits. An idle client is a socket, a state, a flag and a time; its unfinished business
is its `Work`. A greenlet exists only while a handler that may block runs.
"""

import _socket
import logging
import struct
import sys
from collections import deque
from contextlib import suppress
from enum import Enum
from fcntl import ioctl
from math import ceil, inf
from select import EPOLLET, EPOLLIN, EPOLLOUT
from socket import (
    AF_UNIX,
    IPPROTO_TCP,
    SHUT_WR,
    SO_LINGER,
    SO_PEERCRED,
    SOL_SOCKET,
    TCP_USER_TIMEOUT,
)
from termios import FIONREAD
from time import monotonic
from typing import TYPE_CHECKING, cast

import gevent

from gserver import logs
from gserver.addresses import TCP, TLS, UNIX
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
from gserver.serve.fastpath import PIECE_BYTES
from gserver.serve.proxied import ProxiedSocket
from gserver.serve.proxy_header import ProxyHeaderError
from gserver.serve.tls import Handshake, IncompleteRecord, TlsSocket

if TYPE_CHECKING:
    from gserver.serve.loop import Loop

#: Bytes taken from a socket at once.
READ_BYTES = 4096
#: Time that a drain gives a client to finish a line, or to send its first one.
DRAIN_GRACE_SECONDS = 0.5
#: How long to wait for the client's end after the last line, so that no reset overtakes the line.
LINGER_SECONDS = 1.0

#: Process, user and group of a peer (unix(7)).
UCRED = "iII"

#: What the loop watches a socket for. MUTED: nothing, until it is watched for something again.
READ, WRITE, MUTED = EPOLLIN, EPOLLOUT, EPOLLET


class State(Enum):
    """The state of a client. From IDLE to MOVING it counts in WHO."""

    #: Accepted, but not admitted yet: its PROXY header or its TLS handshake is in progress.
    NEW = "new"
    #: Everything received has been answered.
    IDLE = "idle"
    #: Part of a line or of a TLS record has arrived, or more lines than are answered at once.
    READING = "reading"
    #: A handler that may block runs in a greenlet. Nothing is read meanwhile.
    BUSY = "busy"
    #: The client does not take its replies. Nothing is read meanwhile.
    BLOCKED = "blocked"
    #: It is about to be handed over to another worker. Nothing is done for it meanwhile.
    MOVING = "moving"
    #: The last line has been sent. The server waits for the client's end.
    CLOSING = "closing"
    #: The same for a client that was rejected by a limit.
    REJECTED = "rejected"
    #: The socket is closed.
    CLOSED = "closed"


NEW, IDLE, READING, BUSY, BLOCKED, MOVING = (
    State.NEW,
    State.IDLE,
    State.READING,
    State.BUSY,
    State.BLOCKED,
    State.MOVING,
)
CLOSING, REJECTED, CLOSED = State.CLOSING, State.REJECTED, State.CLOSED
COUNTED = IDLE, READING, BUSY, BLOCKED, MOVING


class Work:
    """The unfinished business of a client: bytes to parse, items to answer, replies to send."""

    __slots__ = (
        "closing_error",
        "command",
        "drain_bytes_left",
        "has_input_ended",
        "heard_at",
        "is_muted",
        "items",
        "line_deadline",
        "parser",
        "reply",
        "started_at",
        "unread",
        "unsent",
        "write_deadline",
    )

    def __init__(self) -> None:
        #: Received, but not parsed yet.
        self.unread = b""
        #: Holds the beginning of a line; None if there is none.
        self.parser: Parser[Command] | None = None
        #: When that line must have ended.
        self.line_deadline = inf
        #: When something arrived last, also in a drain.
        self.heard_at = 0.0
        #: Commands and errors to reply to.
        self.items: deque[Command | ErrorReply] = deque()
        #: When answering began. Time spent waiting for the client does not count.
        self.started_at = 0.0
        #: The name of the command whose handler runs in a greenlet.
        self.command = ""
        #: The reply of a handler that ran in a greenlet; None while it runs.
        self.reply: bytes | None = None
        #: Replies that the kernel has not taken yet. A view, since they may be large.
        self.unsent = memoryview(b"")
        #: When the client must have read them.
        self.write_deadline = inf
        #: The error reply after which the client is closed.
        self.closing_error: ErrorReply | None = None
        #: Data has arrived while a handler runs, so the socket is not watched.
        self.is_muted = False
        #: Whether the client has finished sending.
        self.has_input_ended = False
        #: Bytes still answered after the grace of a drain; None before that.
        self.drain_bytes_left: int | None = None

    @property
    def is_pending(self) -> bool:
        """Whether there is something to do although nothing more arrives."""
        return bool(self.unread or self.items or self.has_input_ended or self.closing_error)


#: What a client's bytes come from.
Sock = _socket.socket | ProxiedSocket | TlsSocket


class Client:
    """A client of one worker. The loop calls `on_event`, `on_turn` and `on_deadline`.

    All three may raise OSError if the connection is broken; the loop closes the client then.
    """

    __slots__ = (
        "address",
        "deadline",
        "has_spoken",
        "loop",
        "quiet_since",
        "sock",
        "state",
        "work",
    )

    def __init__(
        self, loop: "Loop", sock: "Sock", address: tuple[str, int] | None, now: float
    ) -> None:
        self.loop = loop
        self.sock: Sock = sock
        #: Host and port; None once it is admitted, unless its end is going to be logged.
        self.address = address
        self.state = NEW
        #: The moment at which the loop calls `on_deadline`; infinity for never.
        self.deadline = inf
        #: When it sent something last, or was accepted.
        self.quiet_since = now
        #: Whether it has sent a line that is not blank.
        self.has_spoken = False
        self.work: Work | None = None

    # Events

    def on_event(self, now: float) -> None:
        """The socket is readable or writable, whichever is watched."""
        state = self.state
        if state is IDLE or state is READING:
            self._read(now)
        elif state is BLOCKED:
            self._unblock(now)
        elif state is BUSY:
            self._mute()
        elif state is NEW:
            self.loop.enqueue(self)
        elif state is CLOSING or state is REJECTED:
            self._await_end()

    def on_turn(self, now: float) -> None:
        """It is this client's turn to continue."""
        if self.state is NEW:
            self._continue_admission(now)
        elif self.state is BUSY:
            if self.work and self.work.reply is not None:
                self._end_handler(self.work, self.work.reply, now)
        elif self.state is IDLE or self.state is READING:
            if self.work and self.work.is_pending:
                self._proceed(now)
            else:
                self._read(now)

    def on_deadline(self, now: float) -> None:
        """The deadline has passed. What has arrived by now is read first."""
        state = self.state
        if state is IDLE or state is READING:
            self._read(now, is_late=True)
        elif state is BLOCKED:
            self._unblock(now)
            if self.state is BLOCKED and self.deadline == inf:  # Not blocked by newer replies.
                self._reset()
        elif state is NEW:
            sock = self.sock
            self._continue_admission(now)
            if self.state is NEW and self.sock is sock:  # After a header, TLS has its own time.
                self._fail_admission(TimeoutError("it took too long"))
        elif state is CLOSING or state is REJECTED:
            self.close()

    def postpone(self, at: float) -> None:
        """Put off the deadline: the loop was late, not the client."""
        if self.work and self.work.line_deadline < at:
            self.work.line_deadline = at
        self.loop.set_deadline(self, at)

    def after_send(self, unsent: memoryview, now: float) -> None:
        """Continue after the loop has answered: there may be more to send, or to read."""
        tls = self._tls
        if unsent:
            self.block(unsent, now)
        elif tls and (tls.has_partial_record or tls.has_unread):
            self.await_input(now)

    def after_block(self, unsent: bytes | None, now: float) -> None:
        """Continue after the kernel had nothing to read, or no room for the replies."""
        if unsent:
            self.block(memoryview(unsent), now)
        elif self._has_part:
            self._note_part(now)
            self.await_input(now)

    # Reading and answering

    def _ensure_work(self) -> Work:
        if self.work is None:
            self.work = Work()
        return self.work

    def _read(self, now: float, *, is_late: bool = False) -> None:
        """Take what has arrived. `is_late`: without data, the client's time is over."""
        try:
            data = self.sock.recv(READ_BYTES)
        except IncompleteRecord:
            self._note_part(now)
            if now >= self._drains_at:
                self._look_for_the_rest(now)
            else:
                self._note_silence(now, is_late=is_late)
        except BlockingIOError:
            self._note_silence(now, is_late=is_late)
        else:
            self.take(data, now)

    def _note_silence(self, now: float, *, is_late: bool) -> None:
        if is_late or self._leaves_at() <= now:
            self._end_silence(now)
        else:
            self.await_input(now)

    def _note_part(self, now: float) -> None:
        """Part of a TLS record has arrived: the client is not silent. That prolongs no drain."""
        self._ensure_work().heard_at = now
        if now < self._drains_at:
            self.quiet_since = now

    def _look_for_the_rest(self, now: float) -> None:
        """In a drain, read on: a TLS record is longer than a read, and may have arrived."""
        work = self._ensure_work()
        self._count_drain_read(work, now)
        if self._has_had_its_share(work):
            self.finish()
        else:
            self.state = READING
            self.loop.enqueue(self)

    def take(self, data: bytes, now: float, *, is_tried: bool = False) -> None:
        """Answer what has been received; no data means that the client has finished sending.

        `is_tried`: the fast path has been tried with all of it.
        """
        if not data and self.work is None:
            self.close()  # Most clients leave so: there is nothing to answer.
            return
        work = self._ensure_work()
        self.state = READING
        if data:
            work.unread += data
            work.heard_at = now
            if now < self._drains_at:  # Blank lines do not prolong a drain.
                self.quiet_since = now
            else:
                self._count_drain_read(work, now)
        else:
            work.has_input_ended = True
        self._proceed(now, is_tried=is_tried)

    def _proceed(self, now: float, *, is_tried: bool = False) -> None:
        """Continue until it is the turn of the client, of a handler or of other clients."""
        work = self._ensure_work()
        has_had_turn = False
        while not work.closing_error:
            if work.items:
                may_go_on = self._answer(work, now)
            elif work.unread and has_had_turn:
                self.loop.enqueue(self)
                return
            elif work.unread:
                has_had_turn = True
                may_go_on = self._take_apart(work, now, is_tried=is_tried)
            elif work.has_input_ended and work.parser:
                work.items.extend(work.parser.end())
                work.parser, may_go_on = None, True
            else:
                break
            if not may_go_on:
                return
        if work.closing_error or work.has_input_ended or self._has_had_its_share(work):
            self.finish()
        else:
            self.await_input(now)

    def _take_apart(self, work: Work, now: float, *, is_tried: bool) -> bool:
        """Answer the next lines, or parse them; return False if the client must read first."""
        work.started_at = monotonic()
        if work.parser is None and not is_tried:
            replies = self._answer_lines(work)
            if replies is not None:
                work.line_deadline = inf
                self.has_spoken, self.quiet_since = True, now
                may_go_on = self._send(replies, now)
                self.loop.note_read(work.started_at)
                return may_go_on
        self._parse(work)
        return True

    def _answer_lines(self, work: Work) -> bytes | None:
        """Return what the fast path replies to whole lines; None if they need the parser."""
        data = work.unread
        end = data.rfind(b"\n") + 1
        replies = self._fast_replies(data[:end])
        if replies is None and end > PIECE_BYTES:
            end = data.rfind(b"\n", 0, PIECE_BYTES) + 1
            replies = self._fast_replies(data[:end])
        if replies is not None:
            work.unread = data[end:]
        return replies

    def _fast_replies(self, lines: bytes) -> bytes | None:
        return self.loop.answer(lines, self.has_spoken, self.sock) if lines else None

    def _parse(self, work: Work) -> None:
        """Parse the next piece, up to the end of a line if there is one in it."""
        data, parser = work.unread, work.parser
        if parser is None:
            parser = work.parser = Parser(self.loop.replies.grammar, is_first=not self.has_spoken)
        if parser.partial:
            end = data.find(b"\n", 0, PIECE_BYTES) + 1
        else:
            end = data.rfind(b"\n", 0, PIECE_BYTES) + 1
        if end == 0:
            end = PIECE_BYTES
        else:  # A line ends here. The next one, if there is one, has its own time.
            work.line_deadline = inf
        work.unread = data[end:]
        work.items.extend(parser.feed(data[:end]))
        if not parser.partial:
            work.parser = None

    def _answer(self, work: Work, now: float) -> bool:
        """Reply to items up to one that may block; return False if something is waited for."""
        replies: list[bytes] = []
        self.has_spoken, self.quiet_since = True, now
        while work.items:
            item = work.items[0]
            if isinstance(item, Command) and item.may_block:
                if replies:  # A reply that is ready does not wait for a handler.
                    return self._send(b"".join(replies), now)
                if self.loop.replies.begin(item):
                    work.items.popleft()
                    self._start_handler(item)
                    return False
                item = TOO_MANY_AT_ONCE
            work.items.popleft()
            replies.append(self.loop.replies.reply_to(item, self.sock))
            if isinstance(item, ErrorReply) and item.closes:
                work.closing_error = item
                work.items.clear()
        may_go_on = self._send(b"".join(replies), now)
        if not work.closing_error:
            self.loop.note_read(work.started_at)
        return may_go_on

    def _start_handler(self, command: Command) -> None:
        self.state = BUSY
        self._ensure_work().command = command.name
        self.loop.set_deadline(self, inf)
        gevent.spawn_raw(self._run_handler, command)

    def _mute(self) -> None:
        """Leave what arrives in the kernel while a handler runs.

        Once only: a reset cannot be masked, and is reported again after each change.
        """
        work = self._ensure_work()
        if not work.is_muted:
            work.is_muted = True
            self.loop.watch(self, MUTED)

    def _run_handler(self, command: Command) -> None:
        """In a greenlet of its own: run a handler that may block.

        Everything else is done in the loop, where nothing may wait, in this client's next turn.
        """
        reply = self.loop.replies.run(command, self.sock)
        if self.state is BUSY:
            self._ensure_work().reply = reply
            self.loop.enqueue(self)

    def _end_handler(self, work: Work, reply: bytes, now: float) -> None:
        work.reply = None
        self.state, self.quiet_since, work.is_muted = READING, now, False
        self.loop.watch(self, READ)
        may_go_on = self._send(reply, now)
        if not work.items:
            self.loop.note_read(now)
        work.started_at = now  # The time of a handler is its own.
        if may_go_on:
            self._proceed_or_move(now)

    def _send(self, data: bytes, now: float) -> bool:
        """Send; return False if the client must read before anything else is done for it."""
        if not data:
            return True
        if self.loop.reply_counts:
            self.loop.note_replies(self, data)
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        if sent == len(data):
            return True
        self.block(memoryview(data)[sent:], now)
        return False

    def block(self, unsent: memoryview, now: float) -> None:
        """Wait for the client to read, up to the write timeout; read nothing from it meanwhile."""
        work = self._ensure_work()
        work.unsent = unsent
        work.write_deadline = now + (self.loop.config.write_timeout_seconds or inf)
        self._await_reader(work)

    def _await_reader(self, work: Work) -> None:
        self.state = BLOCKED
        self.loop.watch(self, WRITE)
        self.loop.set_deadline(self, work.write_deadline)

    def _unblock(self, now: float) -> None:
        work = self._ensure_work()
        with suppress(BlockingIOError):
            work.unsent = work.unsent[self.sock.send(work.unsent) :]
        if work.unsent:
            return
        self.state, self.quiet_since, work.started_at = READING, now, now
        self.loop.watch(self, READ)
        self._proceed_or_move(now)

    # Handovers

    @property
    def _is_movable(self) -> bool:
        """Whether another process can serve it. TLS cannot move: its keys are in this process."""
        return not self.has_tls and self not in self.loop.probes

    @property
    def may_move(self) -> bool:
        """Whether it can be handed over now."""
        return self.state in (IDLE, READING, BLOCKED) and self._is_movable

    def _proceed_or_move(self, now: float) -> None:
        """Continue after a wait; in a handover, leave that to the next worker."""
        if self.loop.is_handing_over and self._is_movable:
            self.loop.park(self)
        else:
            self._proceed(now)

    def resume(self, now: float) -> None:
        """Continue where it was parked: in another worker, or here if the handover has failed."""
        work = self.work
        if work and work.unsent:
            self._await_reader(work)
        elif work and work.is_pending:
            self.state = READING
            self.loop.enqueue(self)
        else:
            self.await_input(now)

    # Silence

    @property
    def _has_part(self) -> bool:
        """Whether a line, or a TLS record, has begun and not ended."""
        has_line = self.work is not None and self.work.parser is not None
        tls = self._tls
        return has_line or bool(tls and tls.has_partial_record)

    def await_input(self, now: float) -> None:
        """Everything that has arrived is answered: wait for more, or leave in a drain."""
        has_part = self._has_part
        self.state = READING if has_part else IDLE
        work = self.work
        if has_part:
            work = self._ensure_work()
            seconds = self.loop.config.line_timeout_seconds
            if work.line_deadline == inf and seconds:
                work.line_deadline = now + seconds
        elif work and now < self._drains_at:  # In a drain it keeps `drain_bytes_left`.
            self.work = None
        elif work:
            work.line_deadline = inf
        tls = self._tls
        if (tls and tls.has_unread) or self._leaves_at() <= now:
            self.loop.enqueue(self)  # Something may have arrived: read once more.
        else:
            self.loop.set_deadline(self, self._silence_ends_at())

    def _silence_ends_at(self) -> float:
        """When to act on a client that sends nothing more."""
        config, work, at = self.loop.config, self.work, inf
        if config.idle_timeout_seconds:
            at = self.quiet_since + config.idle_timeout_seconds
        if work and self._has_part:
            at = min(at, work.line_deadline, self._pause_ends_at(work))
        return min(at, self._leaves_at())

    def _pause_ends_at(self, work: Work) -> float:
        """When a command without its newline is answered; infinity for never."""
        seconds = self.loop.config.unterminated_after_seconds
        if seconds and work.parser and work.parser.is_complete:
            return max(self.quiet_since, work.heard_at) + seconds
        return inf

    def _leaves_at(self) -> float:
        """When a drain closes this client if it sends nothing more; infinity without a drain."""
        at = self._drains_at + (DRAIN_GRACE_SECONDS if self._has_part else 0.0)
        return at if self.has_spoken else max(at, self.quiet_since + DRAIN_GRACE_SECONDS)

    def _grace_ends_at(self) -> float:
        """When a drain stops answering more than what has arrived; infinity without a drain."""
        since = self._drains_at if self.has_spoken else max(self._drains_at, self.quiet_since)
        return since + DRAIN_GRACE_SECONDS

    @property
    def _drains_at(self) -> float:
        """When its part of a drain begins; infinity without a drain. Until then it is served."""
        loop = self.loop
        return loop.drains_at(self.sock.fileno()) if loop.is_draining else inf

    def _end_silence(self, now: float) -> None:
        work, idle_seconds = self._ensure_work(), self.loop.config.idle_timeout_seconds
        is_over = self._leaves_at() <= now
        if idle_seconds and self.quiet_since + idle_seconds <= now:
            self._end_with(TOO_IDLE, now)
        elif (
            work.parser
            and work.parser.is_complete
            and (is_over or self._pause_ends_at(work) <= now)
        ):
            work.items.extend(work.parser.silence())
            work.parser = None
            self._proceed(now)
        elif self._has_part and work.line_deadline <= now:
            self._end_with(TOO_SLOW, now)
        elif is_over:
            self.finish()
        else:
            self.await_input(now)

    def _end_with(self, error: ErrorReply, now: float) -> None:
        work = self._ensure_work()
        work.parser = None
        work.items.append(error)
        work.started_at = now
        self.state = READING
        self._proceed(now)

    # Ends

    def kick(self, now: float) -> None:
        """Close it because the operator wants that. If it can read the reason, it does."""
        if self.state is IDLE or self.state is READING:
            self._end_with(KICKED, now)
        else:
            self._ensure_work().closing_error = KICKED
            self.loop.replies.count_error(KICKED)
            self.loop.note_end(self, KICKED)
            self.close()

    def drain(self, now: float) -> None:
        """Close once what has been received is answered."""
        if self.state is IDLE or self.state is READING:
            self.loop.enqueue(self)
        elif self.state is NEW:
            at = min(self.deadline, now + DRAIN_GRACE_SECONDS)
            self.loop.set_deadline(self, at)

    def _has_had_its_share(self, work: Work) -> bool:
        """Whether a drain closes it although it never pauses.

        What had arrived by the end of the grace is answered, and up to one read more, so that it is
        closed between two lines.
        """
        left, tls = work.drain_bytes_left, self._tls
        if left is None or left > READ_BYTES:
            return False
        is_between_lines = not self._has_part and not (tls and tls.has_unread)
        return left < 0 or is_between_lines

    def _count_drain_read(self, work: Work, now: float) -> None:
        """Count a read after the client's grace in a drain.

        As a full one: a short read has emptied the kernel's buffer. Bytes would not do, since those
        of TLS are more in the kernel than here.
        """
        if now < self._grace_ends_at():
            return
        if work.drain_bytes_left is None:
            arrived = int.from_bytes(ioctl(self.sock.fileno(), FIONREAD, bytes(4)), sys.byteorder)
            work.drain_bytes_left = arrived + READ_BYTES
        else:
            work.drain_bytes_left -= READ_BYTES

    def reject(self, error: ErrorReply) -> None:
        """Send the reason to a client that has not been admitted, and end."""
        self.state = REJECTED
        self.loop.replies.count_error(error)
        with suppress(BlockingIOError):
            self.sock.send(error.reply)
        if self.loop.may_linger_rejected():
            self._send_end()
        else:
            self._await_end()  # What is left unread resets the connection.
            self.close()

    def finish(self) -> None:
        """Close after the last line, once the client has read it."""
        if self.work and self.work.closing_error:
            self.loop.note_end(self, self.work.closing_error)
        if self.work and self.work.has_input_ended:
            self.close()
            return
        self._uncount()
        self.state = CLOSING
        self._send_end()

    def _await_end(self) -> None:
        """Read and discard what the client still sends, up to its end."""
        with suppress(BlockingIOError):
            if not self.sock.recv(65536):
                self.close()

    def _send_end(self) -> None:
        """Shut down the own side, and wait a moment for the client to shut down its side."""
        self.loop.watch(self, READ)
        self.loop.set_deadline(self, monotonic() + LINGER_SECONDS)
        self.sock.shutdown(SHUT_WR)

    def _reset(self) -> None:
        """Close with a reset: the kernel would hold the replies for the client for minutes."""
        self._ensure_work().closing_error = SLOW_READER
        self.loop.replies.count_error(SLOW_READER)
        self.loop.note_end(self, SLOW_READER)
        self.sock.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        """Close the socket. The second call does nothing."""
        if self.state is not CLOSED:
            self._uncount()
            was_rejected, self.state = self.state is REJECTED, CLOSED
            self.loop.remove(self, was_rejected=was_rejected)

    def _uncount(self) -> None:
        if self.state in COUNTED:
            self.loop.uncount(self)
            seconds = self.loop.config.write_timeout_seconds
            if seconds:  # The kernel gives up by then on what the client leaves unread.
                with suppress(OSError):  # The connection is broken.
                    self.sock.setsockopt(IPPROTO_TCP, TCP_USER_TIMEOUT, ceil(seconds * 1000))

    # Transport

    @property
    def _tls(self) -> TlsSocket | None:
        """The socket, if it is one with TLS."""
        return self.sock if isinstance(self.sock, TlsSocket) else None

    @property
    def has_tls(self) -> bool:
        """Whether it speaks TLS."""
        return isinstance(self.sock, TlsSocket)

    @property
    def transport(self) -> str:
        """How it has connected."""
        if isinstance(self.sock, TlsSocket):
            return TLS
        return UNIX if self.sock.family == AF_UNIX else TCP

    def credentials(self) -> tuple[int, int] | tuple[None, None]:
        """Return process and user of a Unix client when it connected; None for other clients."""
        if self.transport != UNIX:
            return None, None
        sock, size = cast("_socket.socket", self.sock), struct.calcsize(UCRED)
        pid, uid, _ = struct.unpack(UCRED, sock.getsockopt(SOL_SOCKET, SO_PEERCRED, size))
        return pid, uid

    # Before a client is admitted

    def _continue_admission(self, now: float) -> None:
        """Continue the header or the handshake with what has arrived."""
        if isinstance(self.sock, ProxiedSocket):
            self._read_header(self.sock, now)
            return
        try:
            handshake = cast(TlsSocket, self.sock).handshake(READ_BYTES)
        except OSError as error:
            self._fail_admission(error)
            return
        match handshake:
            case Handshake.RECEIVING:
                self.loop.watch(self, READ)
            case Handshake.SENDING:
                self.loop.watch(self, WRITE)
            case Handshake.DONE:
                self.loop.watch(self, READ)
                self.loop.admit(self, now)
            case Handshake.PLAIN_TEXT:
                self._reject_plain_text()
            case Handshake.ABANDONED:
                self.address = None  # It was never accepted, so its end is not logged.
                self.close()

    def _read_header(self, sock: ProxiedSocket, now: float) -> None:
        try:
            header = sock.read_header()
        except BlockingIOError:
            return
        except (EOFError, OSError) as error:
            if sock.has_begun:
                self._fail_admission(error)
            else:  # A probe that only connects.
                self.address = None
                self.close()
        except ProxyHeaderError as error:
            self._fail_admission(error)
        else:
            self.loop.admit_after_header(self, header, now)

    def _reject_plain_text(self) -> None:
        self.loop.replies.count_error(PLAIN_TEXT)
        self.loop.note_end(self, PLAIN_TEXT)
        self.state, self.address = CLOSING, None
        try:
            cast(TlsSocket, self.sock).send_plain(PLAIN_TEXT.reply)
            self._send_end()
        except OSError:  # The client has disconnected, which is no failed handshake either.
            self.close()

    def cut_off_admission(self) -> None:
        """End a handshake, since there are too many. If it has failed already, only close."""
        if self.state is NEW:
            self._fail_admission(ConnectionAbortedError("too many others are in progress"))
        else:
            self.close()

    def _fail_admission(self, error: Exception) -> None:
        """Count it, and close; a client that broke TLS can read the alert that says why."""
        reason = PROXY_FAILED if isinstance(self.sock, ProxiedSocket) else TLS_FAILED
        self.loop.replies.count_error(reason)
        self.loop.note_end(self, reason)
        if reason is PROXY_FAILED and self.address:
            fields = {**address_fields(self.address), "error.type": type(error).__name__}
            fields["error.message"] = str(error)
            message = f"the PROXY header of {fields['client.address']} has failed: {error}"
            if isinstance(error, ProxyHeaderError | TimeoutError):
                message += "; a balancer in --proxy-from must send one (HAProxy: send-proxy-v2)"
            logs.warn_ratelimited("client.proxy_failed", message, fields)
        elif logging.root.isEnabledFor(logging.DEBUG) and self.address:
            fields = {**address_fields(self.address), **logs.error_fields(error)}
            message = f"TLS handshake with {fields['client.address']} failed: {error}"
            logs.event(logging.DEBUG, "client.tls_failed", message, fields)
        self.address = None
        if isinstance(error, ProxyHeaderError) or type(error).__module__ == "ssl":
            self.state = CLOSING
            self._send_end()
        else:
            self.close()


def address_fields(address: tuple[str, int]) -> dict[str, object]:
    """Return the fields of a log event for a client's address."""
    return {"client.address": address[0], "client.port": address[1]}
