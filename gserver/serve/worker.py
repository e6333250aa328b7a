"""One worker process: accepts clients, serves them in its loop, and drains.

gevent's StreamServer accepts, and calls `Admission.serve` with each socket. A client that must wait
has a conversation: a blocking function in a greenlet of its own (`Conversations._converse`), made
cooperative by `patch_all` in `gserver/__main__.py`. All others are silent, in one epoll (`silent`).

There are `--workers` of them with the same duties. A worker writes its own slot of the scoreboard.
What it needs to know of others, it reads from the scoreboard. In a reload, the supervisor makes it
hand its clients over to a new worker (`handover`).
"""

import _socket
import logging
import os
import signal
import socket
from contextlib import suppress
from functools import partial
from ssl import SSLContext
from time import gmtime, monotonic, monotonic_ns, strftime, time
from typing import Any, cast

import gevent
from gevent.event import Event
from gevent.server import StreamServer

from gserver import logs
from gserver.addresses import TLS, Endpoint
from gserver.boot import (
    FATAL_ACCEPT_ERRORS,
    HAND_OVER,
    KEEP,
    KEPT,
    LEAVING,
    QUERY,
    READY,
    TAKE_OVER,
    Instructions,
    fatal_on_error,
    keep_heartbeat,
    room_for_clients,
)
from gserver.certificates import Certificates
from gserver.config import CLIENTS_SHARE
from gserver.errors import UsageError
from gserver.serve import roster, tls
from gserver.serve.clients import DRAIN_GRACE_SECONDS, MAX_REJECTED, Clients
from gserver.serve.command_module import load_commands
from gserver.serve.conversation import Conversations
from gserver.serve.handover import LOOK_SECONDS, HandoverError, Sender, SuccessorDiedError, receive
from gserver.serve.limits import Limits
from gserver.serve.replies import Replies

#: Connections accepted in one go by a worker that is alone: as many as the kernel's queue holds by
#: default. Every client that had connected before a WHO was sent is in its reply.
MAX_ACCEPTS = 1024
#: The same where other workers accept too, so that the load spreads, and where TLS handshakes must
#: begin before there are more. With one at a time, 300 clients that send without end kept a new one
#: waiting for 11 s; with 16, for 0.2 s.
MAX_SHARED_ACCEPTS = 16
#: Rejections in one turn of the loop (0.1 ms): a flood of connections must not starve clients.
MAX_REJECTIONS = 4
#: How long a worker with more than its share of clients leaves a new one to the other workers. Then
#: it accepts the client itself, in case they cannot.
YIELD_SECONDS = 0.001


class Acceptor(StreamServer):
    """gevent's server: it calls `Admission.serve` with each connection of an endpoint.

    What is overridden, and why:

    - `do_read` accepts bare sockets. gevent's own ones would take 0.5 KB and 8 us more for each.
    - `do_close` leaves the socket open, since a client outlives the call.
    - `full` leaves new clients to other workers, or to the kernel's queue, for a while.
    - `start_accepting` and `stop_accepting` say whether clients' events are held for new clients.
    - `is_fatal_error` ends the process, of which another takes the place; gevent would go on.
    """

    fatal_errors = FATAL_ACCEPT_ERRORS

    def __init__(self, endpoint: Endpoint, fd: int, worker: "Worker", *, is_alone: bool) -> None:
        """Accept the clients of one endpoint. `is_alone`: the server has one worker."""
        serve = partial(worker.conversations.admission.serve, transport=endpoint.transport)
        # No greenlet for each client: it gets one if it must wait.
        super().__init__(socket.socket(fileno=fd), cast(Any, serve), spawn=None)
        has_tls = endpoint.transport == TLS
        self.max_accept = MAX_ACCEPTS if is_alone and not has_tls else MAX_SHARED_ACCEPTS
        self._fd = fd  # gevent forgets its socket when it closes it.
        self._worker = worker
        self._kind = int(self.socket.family), int(self.socket.type), self.socket.proto
        self._has_yielded = self._is_paused = False

    def do_read(self) -> Any:
        """Accept a client; return its socket and address, or None if there is none."""
        try:
            fd, address = cast(Any, self.socket)._accept()
        except BlockingIOError:
            return None
        sock = _socket.socket(*self._kind, fd)
        sock.setblocking(False)
        self._has_yielded = False
        return sock, address

    def do_close(self, *_: object) -> None:
        """Leave the socket open: it is the client's."""

    def full(self) -> bool:
        """Return whether to pause. It ends when a client has gone, or after a time set here."""
        worker = self._worker
        if worker.is_full():
            return True
        if worker.clients.rejected_now >= MAX_REJECTIONS:
            worker.clients.rejected_now = 0
            self._resume_after(0.0)
            return True
        if not self._has_yielded and worker.is_ahead():
            self._has_yielded = True
            self._resume_after(YIELD_SECONDS)
            return True
        return False

    def start_accepting(self) -> None:
        """Accept, unless that is being done."""
        self._is_paused = False
        super().start_accepting()
        self._worker.conversations.silent.watch_listener(self._fd)

    def stop_accepting(self) -> None:
        """Leave new clients in the kernel's queue."""
        self._is_paused = True
        super().stop_accepting()
        self._worker.conversations.silent.unwatch_listener(self._fd)

    def is_fatal_error(self, ex: BaseException) -> bool:
        """End the process at a fatal error; gevent would only stop accepting."""
        if super().is_fatal_error(ex):
            raise SystemError("the listening socket is gone") from ex
        return False

    def _resume_after(self, seconds: float) -> None:
        gevent.spawn_later(seconds, self.resume)

    def resume(self) -> None:
        """Accept again after a pause, unless the server has been closed meanwhile."""
        if self._is_paused and self.started:
            self.start_accepting()

    def take_queue(self) -> None:
        """Accept what waits in the kernel's queue, although this worker ends."""
        with suppress(OSError):  # Out of descriptors: the rest of the queue is lost.
            for _ in range(MAX_ACCEPTS):
                accepted = self.do_read()
                if not accepted:
                    break
                cast(Any, self).do_handle(*accepted)


class Worker:
    """One worker, from its start to the end of its drain."""

    def __init__(self, instructions: Instructions) -> None:
        self._instructions = instructions
        self._config = config = instructions.config
        self._scoreboard = scoreboard = instructions.scoreboard()
        slot = instructions.slot
        capacity = room_for_clients(config)
        if capacity < 1:
            raise UsageError("the limit of open files is too low: raise it (ulimit -n, prlimit)")
        self._should_stop_accepting = Event()
        self._should_drain = False
        #: Hands the clients over, while that is being done.
        self._sender: Sender | None = None
        #: Slot and process of each successor that has taken clients, and of the last one.
        self._heirs: set[tuple[int, int]] = set()
        self._heir = (-1, 0)
        self._changed = Event()
        self.limits = Limits(config, scoreboard, slot)
        replies = Replies(config, scoreboard, slot, load_commands(config.commands))
        # Only now: a module that takes long to load does not hang.
        for name, value in (("pid", os.getpid()), ("started_at", monotonic_ns())):
            scoreboard.cells[scoreboard.cell(name, slot)] = value
        self.clients = Clients(
            config, self.limits, replies, capacity=capacity, on_close=self._on_close
        )
        self.conversations = Conversations(
            self.clients, self._make_tls_context(instructions.certificates)
        )
        #: One for each endpoint.
        self._acceptors = [
            Acceptor(endpoint, fd, self, is_alone=config.workers == 1)
            for endpoint, fd in zip(config.endpoints, instructions.listener_fds, strict=True)
        ]

    def run(self) -> None:
        """Serve until SIGTERM, then drain. After SIGUSR2, serve until the last client has gone."""
        gevent.signal_handler(signal.SIGTERM, self._handle_stop)
        gevent.signal_handler(signal.SIGUSR2, self._handle_retirement)
        # Without memory, a client could be left half done, and counted: exit, as for a SystemError.
        hub = cast(Any, gevent.get_hub())
        hub.SYSTEM_ERROR = (*hub.SYSTEM_ERROR, MemoryError)
        gevent.spawn_raw(keep_heartbeat, self._instructions, self._scoreboard)
        gevent.spawn_raw(fatal_on_error(self._obey))
        for acceptor in self._acceptors:
            acceptor.start()
        self._instructions.report(READY)
        self._should_stop_accepting.wait()
        self._close_port()
        while (self.clients.connections or self._sender) and not self._should_drain:
            self._wait_for_change(None)
        self._drain()

    def is_full(self) -> bool:
        """Whether new clients are left to other workers, or to the kernel's queue."""
        clients = self.clients
        if self._sender or clients.connections > clients.capacity + MAX_REJECTED:
            return True
        # A handshake can be ended to make room. Other workers may have room. If none has, a new
        # client is accepted, so that it gets the error reply.
        taken = clients.connections - len(clients.rejected)
        has_room = bool(self.conversations.admission.in_progress) or taken < clients.capacity
        return not has_room and self.limits.clients_of_server() < self._config.max_clients

    def is_ahead(self) -> bool:
        """Whether this worker has more than its share of the clients.

        Without that, the worker that wakes first accepts nearly all of a few clients.
        """
        workers, limits = self._config.workers, self.limits
        return workers > 1 and limits.clients > 1.1 * limits.clients_of_server() / workers + 2

    def _make_tls_context(self, certificates: Certificates) -> SSLContext | None:
        if not certificates.chain:
            return None
        context, expires_at = tls.make_context(certificates), tls.expires_at(certificates)
        cell = self._scoreboard.cell("tls_expires_at", self._instructions.slot)
        self._scoreboard.cells[cell] = expires_at
        if 0 < expires_at < time():
            day = strftime("%Y-%m-%d", gmtime(expires_at))
            message = f"the certificate of --tls-cert expired on {day}: clients that verify it fail"
            logs.warn_ratelimited("tls.expired", message)
        return context

    def _on_close(self) -> None:
        self._changed.set()
        self._resume_accepting()  # It may have paused because this worker was full.

    def _resume_accepting(self) -> None:
        for acceptor in self._acceptors:
            acceptor.resume()

    def _wait_for_change(self, seconds: float | None) -> None:
        self._changed.clear()
        self._changed.wait(seconds)

    def _handle_stop(self) -> None:
        self._should_drain = True
        self._changed.set()
        self._should_stop_accepting.set()

    def _handle_retirement(self) -> None:
        # A signal that does not come from the supervisor would leave the port without a worker.
        if self._scoreboard.get("port_closed"):
            self._should_stop_accepting.set()

    # Handovers

    def _obey(self) -> None:
        """Do what the supervisor orders. An order that lacks its descriptor has found no room."""
        control = socket.socket(fileno=self._instructions.control_fd)
        while True:
            orders, fds, _, _ = socket.recv_fds(control, 1024, 1, socket.MSG_CMSG_CLOEXEC)
            if not orders:
                return  # The supervisor has died: the heartbeat's greenlet ends the process.
            pair = socket.socket(fileno=fds[0]) if fds else None
            for line in orders.decode().splitlines():
                order, _, rest = line.partition(" ")
                if order == QUERY and pair:
                    gevent.spawn(roster.answer, self.conversations, rest, pair)
                elif order == KEEP and self._sender:
                    self._sender.give_up()
                elif order == HAND_OVER and pair:
                    # At once: the next order may be to give it up.
                    self._sender = Sender(self.conversations, pair)
                    gevent.spawn_raw(fatal_on_error(self._hand_over), self._sender)
                elif order == HAND_OVER:
                    self._report_kept("the old worker has no free descriptor")
                elif order == TAKE_OVER and pair:
                    slot = self._instructions.slot
                    gevent.spawn_raw(fatal_on_error(receive), self.conversations, slot, pair)

    def _hand_over(self, sender: Sender) -> None:
        """Hand all clients over and end; if that fails, accept and serve as before.

        Clients that cannot be handed over, or not yet, are served up to the drain timeout.
        """
        for acceptor in self._acceptors:
            acceptor.stop_accepting()
        problem: HandoverError | None = None
        try:
            self._send_all(sender)
        except HandoverError as error:
            problem = error
        sender.close()
        if isinstance(problem, SuccessorDiedError):
            self._heirs.discard(self._heir)
        elif sender.clients:
            self._heirs.add(self._heir)
        if problem is None or self._should_drain:
            self._instructions.report(LEAVING)
            self._handle_stop()
            return
        self._sender = None
        self._changed.set()
        self._resume_accepting()
        if self._scoreboard.get("port_closed"):
            self._should_stop_accepting.set()
        self._report_kept(str(problem))

    def _report_kept(self, reason: str) -> None:
        """Report why no clients have moved.

        If some have, neither of the two workers may end: the supervisor tries again.
        """
        has_moved = any(pid and self._pid_of(slot) == pid for slot, pid in self._heirs)
        self._instructions.report(KEPT, "" if has_moved else reason)

    def _pid_of(self, slot: int) -> int:
        """Return the process in a slot; 0 = none."""
        return self._scoreboard.cells[self._scoreboard.cell("pid", slot)]

    def _send_all(self, sender: Sender) -> None:
        """Hand over; return when no client is left, in a drain, or at the drain timeout.

        Raises `HandoverError` if clients are left then that could move.
        """
        clients, started_at = self.clients, monotonic()
        can_move = sender.greet()
        self._heir = sender.slot, self._pid_of(sender.slot) if can_move else 0
        if can_move:
            sender.send_ready()
        self._note_handover(sender.clients, monotonic() - started_at, can_move=can_move)
        until = monotonic() + self._config.drain_timeout_seconds
        while clients.connections and not clients.is_draining:
            now = monotonic()
            is_over = now >= until  # Before the last look: the machine may have slept.
            if can_move:
                sender.send_ready()
                self.conversations.silent.dismiss_probes(now)
            if is_over and can_move and any(map(clients.may_move, clients.by_fd.values())):
                raise HandoverError("the new worker takes no more clients")
            if is_over:
                self._add("clients_left_behind", self.limits.clients)
                return
            if self._scoreboard.get("port_closed"):
                self._should_stop_accepting.set()
            sender.wait(LOOK_SECONDS)

    def _note_handover(self, clients: int, seconds: float, *, can_move: bool) -> None:
        """Count and log what was handed over at once. Busy clients may follow."""
        self._add("handovers", 1)
        self._add("handover_ns", round(seconds * 1e9))
        staying, with_tls = self.limits.clients, self.limits.clients_by(TLS)
        message = f"handed over {clients} clients in {seconds:.2f} s"
        if staying:
            reason = "their commands still run, or descriptors are short"
            if staying == with_tls:
                reason = "TLS"
            elif not can_move:
                reason = "the new worker has another format"
            elif with_tls:
                reason = f"{with_tls} with TLS; for the others: {reason}"
            limit = self._config.drain_timeout_seconds
            message += f"; {staying} stay for up to {limit:g} s ({reason})"
        fields = {
            "gserver.clients": clients,
            "gserver.staying": staying,
            "gserver.seconds": round(seconds, 3),
        }
        logs.event(logging.INFO, "worker.handed_over", message, fields)

    def _add(self, name: str, increase: int) -> None:
        self._scoreboard.cells[self._scoreboard.cell(name, self._instructions.slot)] += increase

    def _close_port(self) -> None:
        """Stop accepting. Take what is in the kernel's queue if no other worker will."""
        is_last = bool(self._scoreboard.get("port_closed"))
        for acceptor in self._acceptors:
            if is_last:
                acceptor.take_queue()
            acceptor.close()

    def _drain(self) -> None:
        """Close every client, within the deadline."""
        # The supervisor may have waited before its SIGTERM. A worker that drains alone begins now.
        started_at = self._scoreboard.get("drain_started_at") / 1e9 or monotonic()
        deadline = started_at + self._config.drain_timeout_seconds * CLIENTS_SHARE
        # A client has its grace after its part of the spread.
        longest_spread = max(0.0, deadline - monotonic() - 2 * DRAIN_GRACE_SECONDS)
        self.conversations.silent.drain(longest_spread)
        while self.clients.connections and (left := deadline - monotonic()) > 0:
            self._wait_for_change(left)
        self.clients.replies.is_exiting = True
        clients = self.limits.clients
        if clients:
            message = f"clients cut off at the end of the drain: {clients}"
            logs.event(logging.WARNING, "worker.cut_off", message, {"gserver.clients": clients})


def run(instructions: Instructions) -> None:
    """Be a worker; the supervisor ends it."""
    Worker(instructions).run()
