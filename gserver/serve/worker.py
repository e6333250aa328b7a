"""The data plane: accepts clients and serves them. One of `--workers` processes with the same
duties.

Reads and writes its column of the scoreboard; knows nothing of the other processes, of Redis or of
StatsD.
"""

import _socket
import contextlib
import logging
import os
import signal
import socket
from time import gmtime, monotonic, monotonic_ns, strftime, time
from typing import TYPE_CHECKING, Any, cast

import gevent
from gevent.event import Event
from gevent.server import StreamServer

from gserver import commands, logs
from gserver.boot import (
    FATAL_ACCEPT_ERRORS,
    RESERVED_FILES,
    Instructions,
    fatal_on_error,
    keep_heartbeat,
    raise_file_limit,
)
from gserver.certificates import Certificates
from gserver.errors import UsageError
from gserver.scoreboard import Scoreboard
from gserver.serve.dispatcher import MAX_TURNED_AWAY, Dispatcher
from gserver.serve.limits import Limits

if TYPE_CHECKING:
    from gserver.serve.handshakes import Handshakes

#: Connections that a drain takes over from the kernel's queue, at most.
MAX_LATE_ACCEPTS = 4096
#: Of those who are turned away, who are not counted, so many in a turn: a flood of them waits for
#: the clients, 0.1 ms.
MAX_TURNED_AWAY_NOW = 4
#: How long a worker that is ahead leaves a new client to the others; it takes one itself then, in
#: case they cannot.
YIELD_SECONDS = 0.001
#: The part of the drain timeout that a worker uses; the rest is for processes to end in.
DRAIN_SHARE = 0.75


class _Server(StreamServer):
    """gevent's server on an inherited listener; it pauses while this process has no descriptor to spare."""

    _do_read: Any
    _start_accepting_if_started: Any
    fatal_errors = FATAL_ACCEPT_ERRORS

    def __init__(self, listener: Any, worker: "Worker", few_at_a_time: bool) -> None:
        super().__init__(listener, cast(Any, worker.handle))
        self._worker = worker
        self._kind = int(self.socket.family), int(self.socket.type), self.socket.proto
        # A few where other workers wait for clients too, so that the load spreads: with one at a
        # time, 300 clients that send without end held a new one up for 11 s; with 16, for 0.2 s.
        # And where handshakes must begin before more.
        self.max_accept = 16 if few_at_a_time else MAX_LATE_ACCEPTS
        self._has_yielded = False

    def full(self) -> bool:
        return self._worker.is_full()

    def is_fatal_error(self, error: BaseException) -> bool:
        if super().is_fatal_error(error):
            raise error  # gevent would accept no more, and all else would go on.
        return False

    def start_accepting(self) -> None:
        self._worker.dispatcher.start_accepting(self.socket.fileno(), self._do_read)

    def stop_accepting(self) -> None:
        self._worker.dispatcher.stop_accepting()
        super().stop_accepting()

    def do_read(self) -> Any:
        """Accept a client, unless others are to have a moment for it; return the arguments of `handle`, or None."""
        if self._worker.is_ahead() and not self._has_yielded:
            self.stop_accepting()
            self._has_yielded = True
            self._timer = self.loop.timer(YIELD_SECONDS)
            self._timer.start(self._start_accepting_if_started)
            return None
        self._has_yielded = False
        return (
            None
            if self._worker.dispatcher.turned_away_now >= MAX_TURNED_AWAY_NOW
            else self.accept()
        )

    def accept(self) -> Any:
        """Accept a client; return the arguments of `handle`, which counts it at the same moment, or
        None.

        The socket is the bare one: gevent's around it would take 0.5 KB more, and lend it methods
        that are not used.
        """
        try:
            fd, address = cast(Any, self.socket)._accept()
        except BlockingIOError:
            return None
        sock = _socket.socket(*self._kind, fd)
        sock.setblocking(False)
        return sock, address

    def do_handle(self, *args: Any) -> None:
        """Begin with a client here, in the loop's callback: it needs no greenlet yet."""
        self._worker.handle(*args)


class Worker:
    """One worker process."""

    def __init__(self, instructions: Instructions) -> None:
        self._instructions = instructions
        self._config = config = instructions.config
        self._scoreboard: Scoreboard = instructions.scoreboard()
        for name, value in (("pid", os.getpid()), ("started_at", monotonic_ns())):
            self._scoreboard.cells[self._scoreboard.cell(name, instructions.slot)] = value
        self._limits = Limits(
            config, self._scoreboard, instructions.slot, commands.load(config.commands)
        )
        self.dispatcher = Dispatcher(self._limits, self._on_close)
        self._capacity = raise_file_limit() - RESERVED_FILES
        if self._capacity < 1:  # It was lowered since the supervisor's start.
            raise UsageError(
                "a process may open too few files by now: raise the limit (ulimit -n, prlimit)"
            )
        self._should_close = Event()
        self._should_drain = False
        self._changed = Event()
        self._handshakes = self._prepare_tls(instructions.certificates) if config.tls_cert else None
        listener = socket.socket(fileno=instructions.listener_fd)
        self._server = _Server(listener, self, config.workers > 1 or self._handshakes is not None)

    def run(self) -> None:
        """Serve until SIGTERM, then drain. After SIGUSR2: accept no more, and serve until the last client has gone."""
        gevent.signal_handler(signal.SIGTERM, self._heed_stop)
        gevent.signal_handler(signal.SIGUSR2, self._heed_retirement)
        # Where memory runs out, a client may be left half done, and counted: end, as for a
        # SystemError.
        hub = cast(Any, gevent.get_hub())
        hub.SYSTEM_ERROR = (*hub.SYSTEM_ERROR, MemoryError)
        gevent.spawn_raw(keep_heartbeat, self._instructions, self._scoreboard)
        gevent.spawn_raw(fatal_on_error(self._sweep))
        self._server.start()
        self._instructions.report("ready")
        self._should_close.wait()
        self._close_port()
        while self.open and not self._should_drain:
            self._changed.clear()
            self._changed.wait()
        self._drain()

    def handle(self, sock: _socket.socket, address: Any) -> None:
        """Begin with who has connected."""
        if self._limits.addresses:
            self._limits.addresses.enter(sock.fileno(), address[0])
        if self._handshakes:
            if self.open >= self._capacity:
                self._handshakes.end_oldest()
            self._handshakes.begin(sock, address)
        else:
            self._take_in(sock, address)

    def _take_in(self, sock: _socket.socket, address: Any, has_spoken: bool = False) -> None:
        """Take in a client, or turn it away."""
        refusal = self._limits.admit(sock.fileno())
        if refusal is None:
            self.dispatcher.take_in(sock, address, has_spoken)
        else:
            self.dispatcher.turn_away(sock, address, refusal)

    @property
    def open(self) -> int:
        """How many sockets of clients there are."""
        return self.dispatcher.open + (self._handshakes.open if self._handshakes else 0)

    def is_full(self) -> bool:
        """Whether this process should leave new clients to the others, or to the kernel's queue."""
        dispatcher = self.dispatcher
        if self.open > self._capacity + MAX_TURNED_AWAY:
            return True
        # Others may have room. When nobody has, new clients are let in to be told so.
        return (
            dispatcher.open - dispatcher.turned_away >= self._capacity
            and self._scoreboard.clients() < self._config.max_clients
        )

    def is_ahead(self) -> bool:
        """Whether this worker has more than its share: else who wakes first takes nearly all of a few clients."""
        limits, workers = self._limits, self._config.workers
        return (
            workers > 1
            and limits.cells[limits.clients] > 1.1 * limits.count_clients() / workers + 2
        )

    def _prepare_tls(self, certificates: Certificates) -> "Handshakes":
        from gserver.serve import tls  # Loaded only where they are wanted.
        from gserver.serve.handshakes import Handshakes

        context, expires_at = tls.make_context(certificates), tls.expires_at(certificates)
        self._scoreboard.cells[self._scoreboard.cell("tls_expires_at", self._instructions.slot)] = (
            expires_at
        )
        if 0 < expires_at < time():
            day = strftime("%Y-%m-%d", gmtime(expires_at))
            message = f"the certificate of --tls-cert has expired on {day}: clients that check it refuse it"
            logs.warn_ratelimited("tls.expired", message)
        return Handshakes(context, self._capacity // 4, self._limits, self._take_in, self._on_close)

    def _on_close(self) -> None:
        self._changed.set()
        if self._server.started:
            self._server.start_accepting()  # It may have paused for want of descriptors.

    def _sweep(self) -> None:
        while True:
            gevent.sleep(min(1.0, (self._config.idle_timeout_seconds or 4.0) / 4))
            self.dispatcher.sweep()

    def _heed_stop(self) -> None:
        self._should_drain = True
        self._changed.set()
        self._should_close.set()

    def _heed_retirement(self) -> None:
        if self._scoreboard.get(
            "draining"
        ):  # Else it is not from the supervisor, and the port would have nobody.
            self._should_close.set()

    def _close_port(self) -> None:
        """Take over who has connected already, and stop accepting."""
        with contextlib.suppress(OSError):  # Out of descriptors: the rest of the queue is lost.
            for _ in range(MAX_LATE_ACCEPTS):
                accepted = self._server.accept()
                if not accepted:
                    break
                self._server.do_handle(*accepted)
        self._server.close()

    def _drain(self) -> None:
        """Let everybody go, within the deadline."""
        deadline = monotonic() + self._config.drain_timeout_seconds * DRAIN_SHARE
        self.dispatcher.drain()
        if self._handshakes:
            self._handshakes.drain()
        while self.open and (left := deadline - monotonic()) > 0:
            self._changed.clear()
            self._changed.wait(left)
        if self.open:
            message = f"{self.open} clients were cut off: their commands, or their own ends, took longer than the drain may"
            logs.event(logging.WARNING, "worker.cut_off", message, {"gserver.clients": self.open})


def run(instructions: Instructions) -> None:
    """Be a worker; the supervisor ends it."""
    Worker(instructions).run()
