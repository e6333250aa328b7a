"""The clients of one worker from accept to close: who is answered where the bytes arrive, and who
in a greenlet.

A client begins at rest: a burst of nothing but built-in commands is answered in the event loop's
callback. All else wakes it (a command that may block, a line in pieces, a refusal, a reply that
does not fit, a deadline, a drain): `conversation` goes on in a greenlet, in plain blocking code,
until it has been quiet for a second or two. A greenlet each takes half as much CPU again, or more,
and 7 KB an idle client. Those at rest have an epoll of their own, one event of gevent's loop. A
watcher of gevent's for each takes an eighth more, and calls last come, first served, with twice the
99th percentile. (docs/performance.md)
"""

import _socket
import contextlib
import logging
from collections.abc import Callable
from time import monotonic
from typing import Any

import gevent
from gevent.monkey import get_original

from gserver import logs
from gserver.boot import RESERVED_FILES, fatal_on_error
from gserver.protocol import TOO_MANY_FROM_ADDRESS, ErrorReply
from gserver.serve.connection import Connection, PartialRecord, close
from gserver.serve.conversation import Conversation, linger
from gserver.serve.fastpath import FastPath
from gserver.serve.limits import Limits
from gserver.serve.receiver import BURST_BYTES, READ

#: Clients at rest that are answered in one turn of the event loop; then the others have theirs.
TURN_CLIENTS = 256
HIGHEST = 2  # priority in libev
#: How long a client that has a greenlet is quiet before it rests.
REST_AFTER_SECONDS = 1.0
#: Clients that are told that there are too many and waited for until they end, at once; more are
#: not waited for.
MAX_TURNED_AWAY = RESERVED_FILES // 2


class Dispatcher:
    """All clients of one worker. `on_close` is called whenever a socket has been closed."""

    def __init__(self, limits: Limits, on_close: Callable[[], None]) -> None:
        self._limits = limits
        self._on_close = on_close
        self._fastpath = FastPath(limits.grammar, limits.service, limits.cells)
        #: All clients, by the descriptors of their sockets.
        self._connections: dict[int, Connection] = {}
        #: Those that have a greenlet; the others are at rest.
        self._conversations: dict[Connection, Conversation] = {}
        #: The descriptors of those at rest, and that of the listener.
        self._epoll = get_original("select", "epoll")()
        #: The event that somebody wants to be accepted.
        self._knock: tuple[int, int] | None = None
        self._accept: Callable[[], object] = bool
        self._watcher = gevent.get_hub().loop.io(self._epoll.fileno(), READ, priority=HIGHEST)
        self._watcher.start(fatal_on_error(self._take_turn))
        #: Sockets that are open; those of clients who are told that there are too many; how many
        #: came in this turn.
        self.open = self.turned_away = self.turned_away_now = 0

    def start_accepting(self, listener_fd: int, accept: Callable[[], object]) -> None:
        """Call `accept` whenever somebody has connected; do nothing if that is so already."""
        if self._knock is None:
            self._epoll.register(listener_fd, READ)
            self._knock, self._accept = (listener_fd, READ), accept

    def stop_accepting(self) -> None:
        """End that."""
        if self._knock is not None:
            self._epoll.unregister(self._knock[0])
            self._knock = None

    def take_in(self, sock: _socket.socket, address: Any, has_spoken: bool = False) -> None:
        """Begin with a client that has been admitted; if it `has_spoken`, `sock` has that without being readable."""
        self.open += 1
        connection, fd = (
            Connection(sock, address if logging.root.isEnabledFor(logging.DEBUG) else None),
            sock.fileno(),
        )
        if self._connections.setdefault(fd, connection) is not connection:
            raise SystemError(
                f"somebody has closed descriptor {fd} of a client, and another one has got it"
            )
        _log_client("client.accepted", "accepted", connection, None)
        if self._limits.is_draining or self._limits.config.client_greenlets == "always":
            self._converse_with(connection, None)
        else:
            self._rest(connection)
            if has_spoken:
                self._answer([(fd, READ)])

    def turn_away(self, sock: _socket.socket, address: Any, refusal: ErrorReply) -> None:
        """Tell a client that has not been admitted."""
        self.open += 1
        self.turned_away += 1
        self.turned_away_now += 1
        gevent.spawn_raw(self._turn_away, sock, address, refusal)

    def sweep(self) -> None:
        """Close who has been idle too long; let rest who is quiet. One sweep costs less than a timer a command."""
        self._fastpath.forget()
        self._epoll.poll(
            0, 1
        )  # Raises OSError if somebody has closed it: nobody would be heard any more.
        now, idle_seconds = monotonic(), self._limits.config.idle_timeout_seconds
        for connection in self._connections.values():
            conversation = self._conversations.get(connection)
            if conversation and not conversation.receiver.is_waiting:
                continue  # What takes long is not the client's silence.
            quiet_since = max(
                connection.quiet_since, conversation.receiver.heard_at if conversation else 0.0
            )
            if idle_seconds and now - quiet_since >= idle_seconds:
                connection.is_overstayed = True
                self._interrupt(connection)
            elif (
                conversation
                and conversation.may_rest
                and now - connection.quiet_since >= REST_AFTER_SECONDS
            ):
                conversation.receiver.interrupt()

    def drain(self) -> None:
        """Let every client go as soon as what it has sent is answered."""
        self._limits.drain()
        for connection in self._connections.values():
            self._interrupt(connection)

    def _interrupt(self, connection: Connection) -> None:
        """Have its greenlet look what there is to be done; if it has none, wake it for that."""
        if conversation := self._conversations.get(connection):
            conversation.receiver.interrupt()
        else:
            self._wake(connection, None)

    def _take_turn(self) -> None:
        """Accept who has connected, then answer who has spoken, first come, first served."""
        events = self._epoll.poll(0, TURN_CLIENTS)
        self.turned_away_now = 0
        # Before the bytes of others: who has connected before a WHO is sent is in its answer. In a
        # full turn, the knock may be among the events that are left for the next one.
        if self._knock and (self._knock in events or len(events) == TURN_CLIENTS):
            self._accept()
        self._answer(events)

    def _answer(self, events: list[tuple[int, int]]) -> None:
        started, bursts = monotonic(), 0
        connections, answer = self._connections, self._fastpath.answer
        for fd, _ in events:
            connection = connections.get(fd)
            if connection is None:
                continue  # The listener.
            sock = connection.sock
            try:
                data = sock.recv(BURST_BYTES)
                replies = answer(data)
                if replies is None:
                    self._wake(connection, data) if data else self._let_go(connection)
                    continue
                bursts += 1
                connection.quiet_since, connection.has_spoken = started, True
                try:
                    sent = sock.send(replies)
                except BlockingIOError:
                    sent = 0
                if sent < len(replies):
                    self._wake(connection, None, replies[sent:])
            except PartialRecord as part:
                self._wake(
                    connection, part.data or None
                )  # As for a line in pieces: it has so long for the rest.
            except BlockingIOError:
                continue
            except OSError:
                self._let_go(connection)  # It is gone.
            except Exception as error:
                self._give_up(connection, error)
        if bursts:
            self._limits.note_service(bursts, round((monotonic() - started) * 1e9))

    def _wake(self, connection: Connection, data: bytes | None, unsent: bytes = b"") -> None:
        """Give a client at rest a greenlet."""
        self._epoll.unregister(connection.sock.fileno())
        self._converse_with(connection, data, unsent)

    def _converse_with(
        self, connection: Connection, data: bytes | None, unsent: bytes = b""
    ) -> None:
        self._conversations[connection] = conversation = Conversation(connection, self._limits)
        gevent.spawn_raw(self._converse, connection, conversation, data, unsent)

    def _converse(
        self, connection: Connection, conversation: Conversation, data: bytes | None, unsent: bytes
    ) -> None:
        """The client's greenlet."""
        refusal = None
        try:
            refusal = conversation.run(data, unsent)
        finally:
            del self._conversations[connection]
            if conversation.rests:
                self._rest(connection)
            else:
                fd = self._count_out(connection)
                try:
                    if not conversation.is_ended:
                        linger(connection.sock)
                finally:
                    self._close(connection, fd, refusal)

    def _rest(self, connection: Connection) -> None:
        try:
            self._epoll.register(connection.sock.fileno(), READ)
        except OSError as error:  # No memory, or fs.epoll.max_user_watches.
            self._give_up(connection, error)

    def _give_up(self, connection: Connection, error: Exception) -> None:
        logs.warn_ratelimited(
            "process.error", f"a client is let go: {error!r}", logs.error_fields(error)
        )
        self._let_go(connection)

    def _let_go(self, connection: Connection) -> None:
        """End with a client that has no greenlet."""
        with contextlib.suppress(OSError):  # It may not be in there.
            self._epoll.unregister(connection.sock.fileno())
        self._conversations.pop(connection, None)
        self._close(connection, self._count_out(connection), None)

    def _count_out(self, connection: Connection) -> int:
        """Return its descriptor, which it may have for a while yet."""
        connection.limit_farewell(self._limits.config.write_timeout_seconds)
        fd = connection.sock.fileno()
        del self._connections[fd]
        self._limits.release()
        return fd

    def _close(self, connection: Connection, fd: int, refusal: ErrorReply | None) -> None:
        self._limits.leave(fd)
        close(connection.sock)
        _log_client("client.closed", "closed", connection, refusal)
        self.open -= 1
        self._on_close()

    def _turn_away(self, sock: _socket.socket, address: Any, refusal: ErrorReply) -> None:
        config, host = self._limits.config, address[0]
        reason = f"{config.max_clients} are connected (--max-clients)"
        if refusal is TOO_MANY_FROM_ADDRESS:
            reason = (
                f"{config.max_clients_per_address} of its address are (--max-clients-per-address)"
            )
        logs.warn_ratelimited(
            "client.turned_away", f"{host} was turned away: {reason}", _fields(address, refusal)
        )
        try:
            sock.send(refusal.reply)
            if self.turned_away <= MAX_TURNED_AWAY:
                linger(sock)
        except OSError:
            pass  # It has gone already.
        finally:
            close(sock)
            self.turned_away -= 1
            self.open -= 1
            self._on_close()


def _log_client(action: str, verb: str, connection: Connection, refusal: ErrorReply | None) -> None:
    if (
        connection.address is not None
    ):  # Before the words are put together: this is paid for every client.
        host, port = connection.address[:2]
        logs.event(
            logging.DEBUG,
            action,
            f"{verb} {host} port {port}",
            _fields(connection.address, refusal),
        )


def _fields(address: Any, refusal: ErrorReply | None) -> dict[str, object]:
    fields = {"client.address": address[0], "client.port": address[1]}
    return fields if refusal is None else fields | {"gserver.reason": refusal.name}
