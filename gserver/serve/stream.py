"""Where a conversation waits: to receive until a time, and to send everything until a time.

What can happen to a waiting client is decided here, once. Each of it ends the wait with an
exception of its own: the client is too slow (TimeoutError), a drain, the operator, a handover. If
the worker itself was late, the client gets more time.
"""

from collections.abc import Callable
from math import inf
from select import EPOLLET, EPOLLIN, EPOLLOUT
from time import monotonic
from typing import TYPE_CHECKING, Any

import gevent

from gserver.addresses import TLS
from gserver.serve.client import Client, Rest
from gserver.serve.clients import DRAIN_GRACE_SECONDS, Clients, bytes_in_kernel
from gserver.serve.tls import IncompleteRecord

if TYPE_CHECKING:
    from gserver.serve.silent import SilentClients

#: Bytes taken from a socket at once.
READ_BYTES = 4096
#: If the end of a wait is noticed this late, the process was stopped or overloaded: the client gets
#: this much longer.
LATE_SECONDS = 1.0

#: What the epoll watches a socket for. MUTED: nothing, until it is watched for something again.
READ, WRITE, MUTED = EPOLLIN, EPOLLOUT, EPOLLET


class Interrupted(Exception):
    """A wait has ended, though neither the client nor the time has ended it."""


class Drained(Interrupted, TimeoutError):
    """A drain has begun, and nothing more of the client arrives in its time.

    `is_cut`: more arrives, but the client has had its share.
    """

    def __init__(self, *, is_cut: bool = False) -> None:
        super().__init__("the server stops")
        self.is_cut = is_cut


class Kicked(Interrupted):
    """The operator wants the client closed."""


class Closed(Interrupted):
    """The client has been closed by other code, which has seen to everything."""


class CutOff(Interrupted, ConnectionAbortedError):
    """The place of the client's handshake is needed for another one."""


class Moved(Interrupted):
    """The client moves to another worker. `rest` is what is left of the conversation."""

    def __init__(self) -> None:
        super().__init__()
        self.rest = Rest()


class Stream:
    """The connection of a client in a conversation."""

    __slots__ = (
        "_clients",
        "_excused_until",
        "_greenlet",
        "_interruption",
        "_reads_left",
        "_silent",
        "_watched",
        "client",
        "command",
        "heard_at",
        "waits_for",
    )

    def __init__(self, client: Client, clients: Clients, silent: "SilentClients") -> None:
        self.client = client
        self._clients = clients
        self._silent = silent
        #: READ or WRITE while the conversation waits for that; else 0.
        self.waits_for = 0
        #: The name of the command whose handler runs.
        self.command = ""
        #: When something arrived last, also in a drain.
        self.heard_at = monotonic()
        #: The greenlet that waits for the socket.
        self._greenlet: Any = None
        self._watched = READ
        #: What is going to end this wait, or the next one.
        self._interruption: Interrupted | None = None
        #: The worker was late: no deadline before this ends a wait.
        self._excused_until = -inf
        #: Reads that are answered in a drain after the client's grace; None before that.
        self._reads_left: int | None = None

    # The two waits

    def receive(self, until: float, *, has_part: bool = False) -> bytes:
        """Wait for bytes; return them, or b"" at the client's end.

        `has_part`: the client is in the middle of a line. Raises TimeoutError at the time,
        IncompleteRecord if only part of a TLS record has come, an `Interrupted`, and OSError.
        """
        client = self.client
        has_part = has_part or client.has_partial_record
        self._check_share(is_between_lines=not has_part and not client.has_unread)
        if not client.has_unread:
            self._wait(READ, min(until, self._clients.leaves_at(client, has_part)))
        while True:
            now = monotonic()
            try:
                data = client.sock.recv(READ_BYTES)
            except IncompleteRecord:
                self._note_arrival(now)
                raise
            except BlockingIOError:
                leaves_at = self._clients.leaves_at(client, has_part)
                if leaves_at <= now:
                    raise Drained from None
                self._wait(READ, min(self._in_time(until, now), leaves_at))
            else:
                self._note_arrival(now)
                return data

    def send(self, data: bytes | memoryview, until: float | None = None) -> None:
        """Send everything, until the write timeout or this time.

        Raises TimeoutError, an `Interrupted`, and OSError. A `Moved` has what is left.
        """
        client, counts = self.client, self._clients.reply_counts
        if client.is_closed:
            raise Closed
        if counts and client in counts:
            counts[client] += bytes(data).count(b"\n")
        data = self._try_to_send(data)
        if not data:
            return
        if until is None:
            until = monotonic() + (self._clients.config.write_timeout_seconds or inf)
        try:
            while data:
                self._wait(WRITE, self._in_time(until, monotonic()))
                data = self._try_to_send(data)
        except Moved as moved:
            moved.rest.unsent, moved.rest.write_ends = data, until
            raise
        client.quiet_since = monotonic()
        self._move_if_wanted()

    def _try_to_send(self, data: bytes | memoryview) -> bytes | memoryview:
        """Send what the kernel takes; return the rest."""
        try:
            sent = self.client.sock.send(data)
        except BlockingIOError:
            sent = 0
        return b"" if sent == len(data) else memoryview(data)[sent:]

    def _in_time(self, until: float, now: float) -> float:
        """Return until when to wait. Raises TimeoutError if that has passed.

        If this worker was late, the client gets more time.
        """
        until = max(until, self._excused_until)
        if until + LATE_SECONDS < now and not self._clients.is_draining:
            until = self._excused_until = now + LATE_SECONDS
        if until <= now:
            raise TimeoutError("it took too long")
        return until

    def _wait(self, events: int, until: float) -> None:
        """Wait until the socket is ready, the time has come, or `wake` is called."""
        self._raise_interruption()
        if self._watched != events:
            self._watched = events
            self._clients.watch(self.client, events)
        hub = gevent.get_hub()
        timer = None if until == inf else hub.loop.timer(max(0.0, until - monotonic()))
        self._greenlet, self.waits_for = gevent.getcurrent(), events
        try:
            if timer:
                timer.start(self._end_wait, update=True)
            hub.switch()
        finally:
            self._greenlet, self.waits_for = None, 0
            if timer:
                timer.stop()
                timer.close()
        self._raise_interruption()

    # What others do to a conversation

    def wake(self) -> None:
        """End the wait: the socket may be ready. Called in the hub.

        If the conversation does not wait for the socket, what arrives is left in the kernel.
        """
        if self._greenlet:
            self._greenlet.switch()
        elif self._watched != MUTED:
            self._watched = MUTED
            self._clients.watch(self.client, MUTED)

    def interrupt(self, interruption: Interrupted | None) -> None:
        """End the wait, or the next one, with this exception. None: only look at the time again."""
        self._interruption = interruption or self._interruption
        gevent.get_hub().loop.run_callback(self._end_wait)

    def _end_wait(self) -> None:
        if self._greenlet:
            self._greenlet.switch()

    def _move_if_wanted(self) -> None:
        """After something that took time, in a handover: move at the next wait."""
        clients = self._clients
        if not self._interruption and clients.is_handing_over and clients.is_movable(self.client):
            self._interruption = Moved()

    def _raise_interruption(self) -> None:
        interruption, self._interruption = self._interruption, None
        if isinstance(interruption, Moved) and not self._clients.is_handing_over:
            return  # The handover has failed meanwhile.
        if interruption:
            raise interruption

    # What a conversation asks

    def take_turn(self) -> None:
        """Let other clients have their turn."""
        self._raise_interruption()
        self.waits_for = READ
        try:
            self._silent.take_turn()
        finally:
            self.waits_for = 0
        self._raise_interruption()

    def run(self, name: str, handler: Callable[[], bytes]) -> bytes:
        """Run the handler of a command that may block; return its reply.

        Replies of one turn are sent together, which takes a tenth less CPU (docs/performance.md).
        """
        self.command = name
        try:
            reply = handler()
            self._silent.take_turn()
            return reply
        finally:
            self.command = ""
            self.client.quiet_since = monotonic()
            self._move_if_wanted()

    def end(self) -> None:
        """Leave the client to the epoll: the conversation is over."""
        self.client.stream = None
        if self._watched != READ and not self.client.is_closed:
            self._clients.watch(self.client, READ)

    @property
    def is_sending(self) -> bool:
        """Whether the client does not take its replies."""
        return self.waits_for == WRITE

    @property
    def may_be_silent(self) -> bool:
        """Whether only the client can go on, if all is answered."""
        client = self.client
        if client.transport == TLS and (client.has_unread or client.has_partial_record):
            return False
        return not self._clients.is_draining or monotonic() < self._clients.drains_at(client)

    # Drains

    def _note_arrival(self, now: float) -> None:
        """Note that the client is not silent. In a drain that prolongs nothing, and is counted.

        A read counts as a full one: a short read has emptied the kernel's buffer. Bytes would not
        do, since those of TLS are more in the kernel than here.
        """
        client = self.client
        self.heard_at = now
        if self._clients.note_arrival(client, now):
            return
        drains_at = self._clients.drains_at(client)
        grace_begins = drains_at if client.has_spoken else max(drains_at, client.quiet_since)
        if now < grace_begins + DRAIN_GRACE_SECONDS:
            return
        if self._reads_left is None:
            self._reads_left = -(-bytes_in_kernel(client) // READ_BYTES) + 1
        else:
            self._reads_left -= 1

    def _check_share(self, *, is_between_lines: bool) -> None:
        """Raise `Drained` if a drain closes the client although it never pauses.

        What had arrived by the end of the grace is answered, and up to one read more, so that it is
        closed between two lines.
        """
        left = self._reads_left
        if left is not None and (left < 0 or (left <= 1 and is_between_lines)):
            raise Drained(is_cut=True)
