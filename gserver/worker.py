"""The data plane: accepts clients and serves them. One of `--workers` processes with the same duties.

Reads and writes its column of the board; knows nothing of the other processes, of Redis or of StatsD.
"""

import contextlib
import logging
import signal
import socket
from time import monotonic
from typing import Any, cast

import gevent
from gevent.event import Event
from gevent.server import StreamServer

from gserver import commands, logs
from gserver.board import Board
from gserver.clientele import Clientele
from gserver.connection import Connection, close_cleanly
from gserver.process import RESERVED_FILES, Instructions, raise_file_limit, show_life
from gserver.protocol import TOO_MANY_CLIENTS, Refusal
from gserver.receiver import READ, raw_socket

#: Clients that are told that there are too many and waited for until they end, at once; more are not waited for.
MAX_TURNED_AWAY = RESERVED_FILES // 2
#: Connections that a drain takes over from the kernel's queue, at most.
MAX_LATE_ACCEPTS = 4096
HIGHEST = 2  # priority in libev
#: The part of the drain timeout that a worker uses; the rest is for processes to end in.
DRAIN_SHARE = 0.75


class _Server(StreamServer):
    """gevent's server on an inherited listener; it pauses while this process has no descriptor to spare."""

    _watcher: Any
    _do_read: Any

    def __init__(self, listener: Any, worker: "Worker", many: bool) -> None:
        super().__init__(listener, cast(Any, worker.handle), spawn=cast(Any, gevent.spawn_raw))
        self._worker = worker
        # A few at a time where other workers wait for clients too, so that the load spreads: with one at a time, 300
        # clients that send without end held a new one up for 11 s; with 16, for 0.2 s.
        self.max_accept = 16 if many else MAX_LATE_ACCEPTS

    def full(self) -> bool:
        return self._worker.is_full()

    def start_accepting(self) -> None:
        """Watch for new clients before the bytes of others: who has connected before a WHO is sent is in its answer."""
        if self._watcher is None:
            self._watcher = self.loop.io(self.socket.fileno(), READ, priority=HIGHEST)
            self._watcher.start(self._do_read)

    def do_read(self) -> Any:
        """Accept a client, and count it at that moment; return the arguments of `handle`, or None."""
        accepted = super().do_read()
        return accepted and (*accepted, self._worker.admit())


class Worker:
    """One worker process."""

    def __init__(self, instructions: Instructions) -> None:
        self._instructions = instructions
        self._config = config = instructions.config
        self._board: Board = instructions.board()
        self._clientele = Clientele(config, self._board, instructions.slot, commands.load(config.commands))
        self._capacity = raise_file_limit() - RESERVED_FILES
        self._open = 0
        self._turned_away = 0
        self._should_drain = Event()
        self._changed = Event()
        listener = socket.socket(fileno=instructions.listener_fd)
        self._server = _Server(listener, self, config.workers > 1)

    def run(self) -> None:
        """Serve until SIGTERM, then drain."""
        gevent.signal_handler(signal.SIGTERM, self._should_drain.set)
        gevent.spawn_raw(show_life, self._instructions, self._board)
        if self._config.idle_timeout_seconds:
            gevent.spawn_raw(self._sweep)
        self._server.start()
        self._instructions.report("ready")
        self._should_drain.wait()
        self._drain()

    def admit(self) -> bool:
        """Count a new client; return whether it may stay."""
        self._open += 1
        return self._clientele.admit()

    def handle(self, sock: Any, address: Any, is_admitted: bool) -> None:
        """Serve one client, in its greenlet, or turn it away."""
        try:
            if not is_admitted:
                self._turn_away(sock)
                return
            _log_client("client.accepted", "accepted", address, None)
            try:
                connection = Connection(sock, self._clientele)
                refusal = connection.run()
            finally:
                self._clientele.release()
            connection.close()
            _log_client("client.closed", "closed", address, refusal)
        finally:
            self._open -= 1
            self._changed.set()
            if self._server.started:
                self._server.start_accepting()  # It may have paused for want of descriptors.

    def _turn_away(self, sock: Any) -> None:
        message = f"a client was turned away: {self._config.max_clients} are connected (--max-clients)"
        logs.complain("client.turned_away", message)
        self._turned_away += 1
        try:
            raw_socket(sock).send(TOO_MANY_CLIENTS.reply)
            if self._turned_away <= MAX_TURNED_AWAY:
                close_cleanly(sock)
        except OSError:
            pass  # It has gone already.
        finally:
            sock.close()
            self._turned_away -= 1

    def is_full(self) -> bool:
        """Whether this process should leave new clients to the others, or to the kernel's queue."""
        if self._open > self._capacity + MAX_TURNED_AWAY:
            return True
        # Others may have room. When nobody has, new clients are let in to be told so.
        return self._open - self._turned_away >= self._capacity and self._board.clients() < self._config.max_clients

    def _sweep(self) -> None:
        pause = min(1.0, self._config.idle_timeout_seconds / 4)
        while True:
            gevent.sleep(pause)
            self._clientele.close_idle(monotonic())

    def _drain(self) -> None:
        """Take over who has connected already, stop accepting, and let everybody go, within the deadline."""
        deadline = monotonic() + self._config.drain_timeout_seconds * DRAIN_SHARE
        with contextlib.suppress(OSError):  # Out of descriptors: the rest of the queue is lost.
            for _ in range(MAX_LATE_ACCEPTS):
                accepted = self._server.do_read()
                if not accepted:
                    break
                self._server.do_handle(*accepted)
        self._server.close()
        self._clientele.drain()
        while self._open and (left := deadline - monotonic()) > 0:
            self._changed.clear()
            self._changed.wait(left)
        if self._open:
            message = f"{self._open} clients were cut off: their commands took longer than the drain may"
            logs.event(logging.WARNING, "worker.cut_off", message, {"gserver.clients": self._open})


def run(instructions: Instructions) -> None:
    """Be a worker; the supervisor ends it."""
    Worker(instructions).run()


def _log_client(action: str, verb: str, address: Any, refusal: Refusal | None) -> None:
    if not logging.root.isEnabledFor(logging.DEBUG):
        return  # Before the words are put together: this is paid for every client.
    host, port = address[:2]
    fields = {"client.address": host, "client.port": port}
    if refusal is not None:
        fields["gserver.reason"] = refusal.name
    logs.event(logging.DEBUG, action, f"{verb} {host} port {port}", fields)
