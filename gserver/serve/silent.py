"""Where silent clients wait: one epoll, without a greenlet for any of them.

A gevent watcher for each client would take a sixth more CPU. It would call the latest clients
first, with 1.75 times the 99th percentile of latency (docs/performance.md).
"""

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import islice, takewhile
from math import inf
from socket import SHUT_WR
from time import monotonic
from typing import Any

import gevent

from gserver.addresses import TLS
from gserver.boot import fatal_on_error
from gserver.protocol import TOO_IDLE, ErrorReply
from gserver.serve.client import Client, Rest
from gserver.serve.clients import DRAIN_GRACE_SECONDS, MAX_REJECTED, Clients
from gserver.serve.fastpath import FastPath
from gserver.serve.stream import LATE_SECONDS, READ, READ_BYTES
from gserver.serve.tls import IncompleteRecord

#: Clients answered in one turn of the loop. Then handlers and other clients have their turn.
TURN_CLIENTS = 256
#: Time in one turn for all conversations in the queue (`take_turn`) together.
QUEUE_SECONDS = 0.0001
#: Lowest in libev: new clients are accepted before the bytes of others are read.
PRIORITY = -2
#: How long to wait for the client's end after the last line, so that no reset overtakes the line.
LINGER_SECONDS = 1.0
#: How often to look for clients whose time is over: in a drain, and while one lingers.
SWEEP_SECONDS = 0.05
#: How often to look for idle clients in the time that they have.
IDLE_LOOKS = 50


class SilentClients:
    """The silent clients of one worker. `start` begins a conversation with one of them."""

    def __init__(self, clients: Clients, start: Callable[[Client, Rest], object]) -> None:
        self._clients = clients
        self._replies = clients.replies
        self._start = start
        self.answer = FastPath(clients.replies).answer
        self._has_tls = any(each.transport == TLS for each in clients.config.endpoints)
        self._idle_seconds = clients.config.idle_timeout_seconds or inf
        self._look_seconds = max(self._idle_seconds / IDLE_LOOKS, SWEEP_SECONDS)
        #: The events of the listeners whose clients are accepted now.
        self._listener_events: list[tuple[int, int]] = []
        #: Events that are served after the new clients that came with them.
        self._held: list[tuple[int, int]] | None = None
        #: Greenlets of conversations that wait for their turn.
        self._queue: deque[Any] = deque()
        loop = gevent.get_hub().loop
        self._watcher = loop.io(clients.epoll.fileno(), READ, priority=PRIORITY)
        self._watcher.start(fatal_on_error(self._take_turn))
        self._queue_timer = loop.timer(0)
        self._serve_queue_or_exit = fatal_on_error(self._serve_queue)
        self._sweep_timer: Any = loop.timer(0)
        self._sweep_or_exit = fatal_on_error(self._sweep)
        #: When to look next for clients whose time is over, and for idle ones.
        self._sweeps_at = self._looks_at = monotonic() + self._look_seconds
        self._sweep_after(self._look_seconds)

    # Listeners

    def watch_listener(self, fd: int) -> None:
        """Hold clients' events while this listener has connections to accept."""
        if (fd, READ) not in self._listener_events:
            self._listener_events.append((fd, READ))
            self._clients.epoll.register(fd, READ)

    def unwatch_listener(self, fd: int) -> None:
        """Stop holding clients' events for this listener."""
        if (fd, READ) in self._listener_events:
            self._listener_events.remove((fd, READ))
            self._clients.epoll.unregister(fd)

    # Turns

    def _take_turn(self) -> None:
        """Serve the clients that have sent something, first come, first served."""
        self._clients.rejected_now = 0
        events = self._poll()
        if events is not None:
            self._serve(events)

    def _poll(self) -> list[tuple[int, int]] | None:
        """Return events of clients, or None if new clients must be accepted first.

        A client that had connected before a WHO was sent is in its reply. gevent accepts new
        clients before it calls this loop again, which then serves the events that were held.
        """
        if self._held is not None:
            held, self._held = self._held, None
            return held
        events: list[tuple[int, int]] = self._clients.epoll.poll(0, TURN_CLIENTS)
        for event in self._listener_events:
            # In a full turn, it may be among those that are left for the next.
            if event in events or len(events) == TURN_CLIENTS:
                self._held = events
                return None
        return events

    def _serve(self, events: list[tuple[int, int]]) -> None:
        """Answer what can be answered at once; begin a conversation about the rest.

        This is the hot path: most clients are silent, and send whole lines that cannot block.
        """
        started, reads, clients = monotonic(), 0, self._clients
        # When the first of `reads` began. Conversations count theirs.
        since = started
        by_fd, answer, counts = clients.by_fd, self.answer, clients.reply_counts
        is_draining, has_tls = clients.is_draining, self._has_tls
        for fd, _ in events:
            client = by_fd.get(fd)
            if client is None or client.stream:
                self._count_reads(reads, since)
                self._pass_on(fd, client)
                reads, since = 0, monotonic()
                continue
            replies = b""
            try:
                data = client.sock.recv(READ_BYTES)
                found = None if is_draining else answer(data, client.has_spoken, client)
                if found is None:
                    self._begin(client, data)
                    continue
                replies = found
                reads += 1
                client.quiet_since, client.has_spoken = started, True
                if counts and client in counts:
                    counts[client] += replies.count(b"\n")
                sent = client.sock.send(replies)
                if sent < len(replies) or (has_tls and client.transport == TLS):
                    self._go_on(client, replies[sent:])
            except BlockingIOError as error:
                if replies or isinstance(error, IncompleteRecord):
                    self._start(client, Rest(unsent=replies))
            except Exception as error:  # noqa: BLE001 (one client must not end the service of all)
                clients.fail(client, error)
        self._count_reads(reads, since)

    def _pass_on(self, fd: int, client: Client | None) -> None:
        """Pass on the event of a client that is in a conversation, or that lingers."""
        if client and client.stream:
            client.stream.wake()
        elif fd in self._clients.lingering:
            self._try(self._await_end, self._clients.lingering[fd])

    def _begin(self, client: Client, data: bytes) -> None:
        """Begin a conversation about what has arrived; nothing means that the client has gone."""
        if data:
            self._clients.note_arrival(client, monotonic())
            self._start(client, Rest(data))
        else:
            self._clients.close(client)

    def _go_on(self, client: Client, unsent: bytes) -> None:
        """Begin a conversation if replies are left, or if TLS has more to read."""
        if unsent or client.has_partial_record or client.has_unread:
            self._start(client, Rest(unsent=unsent))

    def _count_reads(self, reads: int, since: float) -> None:
        """Count reads that have been answered together since then."""
        if reads:
            self._replies.count_reads(reads, round((monotonic() - since) * 1e9))

    def take_turn(self) -> None:
        """In the greenlet of a conversation: go on in one of the next turns."""
        if not self._queue:
            self._queue_timer.start(self._serve_queue_or_exit)
        self._queue.append(gevent.getcurrent())
        gevent.get_hub().switch()

    def _serve_queue(self) -> None:
        until = monotonic() + QUEUE_SECONDS
        while self._queue and monotonic() < until:
            self._queue.popleft().switch()
        if self._queue:
            self._queue_timer.start(self._serve_queue_or_exit)

    # Ends

    def drain(self, longest_spread_seconds: float = inf) -> None:
        """Close every client once what it has sent is answered, evenly over `--drain-spread`."""
        self._clients.begin_drain(longest_spread_seconds)
        for client in list(self._clients.by_fd.values()):
            if client.stream:
                client.stream.interrupt(None)
        self._sweep_after(0.0)

    def dismiss_probes(self, now: float) -> None:
        """Close the probes that are silent: they are not handed over."""
        for client in list(self._clients.probes):
            if not client.stream and client.quiet_since + DRAIN_GRACE_SECONDS <= now:
                self._try(self._end_silence, client)

    def linger(self, client: Client, error: ErrorReply | None = None) -> None:
        """Shut down the own side, and wait a moment for the client to shut down its side.

        `error` is the reply that has ended the client, for the logs. Raises OSError.
        """
        clients, fd = self._clients, client.sock.fileno()
        clients.end(client, error)
        del clients.by_fd[fd]
        clients.lingering[fd], client.quiet_since = client, monotonic()
        client.sock.shutdown(SHUT_WR)
        if self._sweeps_at > client.quiet_since + LINGER_SECONDS:
            self._sweep_after(LINGER_SECONDS)

    def reject(self, client: Client, error: ErrorReply) -> None:
        """Send the reason to a client that has not been admitted, and end."""
        clients = self._clients
        clients.replies.count_error(error)
        clients.rejected.add(client)
        clients.rejected_now += 1
        with suppress(BlockingIOError):
            client.sock.send(error.reply)
        if len(clients.rejected) <= MAX_REJECTED:
            self.linger(client, error)
        else:
            self._await_end(client)  # What is left unread resets the connection.
            clients.close(client, error)

    def _await_end(self, client: Client) -> None:
        """Read and discard what a client that lingers still sends, up to its end."""
        with suppress(BlockingIOError):
            if not client.sock.recv(65536):
                self._clients.close(client)

    def _try(self, step: Callable[[Client], object], client: Client) -> None:
        """Take a step with a client; close it if its connection, or our code, fails."""
        try:
            step(client)
        except Exception as error:  # noqa: BLE001 (one client must not end the service of all)
            self._clients.fail(client, error)

    # Times

    def _sweep_after(self, seconds: float) -> None:
        self._sweep_timer.stop()
        self._sweep_timer.close()
        self._sweeps_at = monotonic() + seconds
        if seconds < inf:
            self._sweep_timer = gevent.get_hub().loop.timer(seconds)
            self._sweep_timer.start(self._sweep_or_exit, update=True)

    def _sweep(self) -> None:
        """Close the clients whose time is over."""
        now, clients = monotonic(), self._clients
        if now > self._sweeps_at + LATE_SECONDS:  # This worker was late, not the clients.
            self._looks_at = now + LATE_SECONDS
        lingering = list(clients.lingering.values())
        for client in takewhile(lambda each: each.quiet_since + LINGER_SECONDS <= now, lingering):
            clients.close(client)
        due: list[Client] = []
        if clients.is_draining:
            due = list(islice(clients.leaving(now), TURN_CLIENTS))
        elif now >= self._looks_at:
            due = list(islice(clients.quiet_since(now - self._idle_seconds), TURN_CLIENTS))
            self._looks_at = now if len(due) == TURN_CLIENTS else now + self._look_seconds
        end = partial(self._end_silence, error=None if clients.is_draining else TOO_IDLE)
        for client in due:
            self._try(end, client)
        if len(due) == TURN_CLIENTS:
            self._sweep_after(0.0)
        elif clients.is_draining or clients.lingering:
            self._sweep_after(SWEEP_SECONDS)
        else:
            self._sweep_after(max(0.0, self._looks_at - now))

    def _end_silence(self, client: Client, error: ErrorReply | None = None) -> None:
        """Close a silent client, and send this error; if something has arrived, answer it first."""
        try:
            self._begin(client, client.sock.recv(READ_BYTES))
        except BlockingIOError as nothing:
            if isinstance(nothing, IncompleteRecord):
                self._start(client, Rest())
            elif error:
                self._replies.count_error(error)
                self._start(client, Rest(unsent=error.reply, error=error))
            else:
                self.linger(client)
