"""All connections of one worker, from accept to close: their epoll, their count and their ends."""

import errno
import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from fcntl import ioctl
from math import ceil, inf
from select import EPOLLIN
from socket import IPPROTO_TCP, TCP_USER_TIMEOUT
from termios import FIONREAD
from time import monotonic, time
from typing import Any

from gevent.monkey import get_original

from gserver import logs
from gserver.addresses import TLS
from gserver.boot import RESERVED_FILES
from gserver.config import Config
from gserver.protocol import ErrorReply
from gserver.serve.client import Client, Rest, address_fields
from gserver.serve.limits import Limits
from gserver.serve.replies import Replies

#: Time that a drain gives a client to finish a line, or to send its first one.
DRAIN_GRACE_SECONDS = 0.5
#: Rejected clients that may linger at the same time; others are closed at once.
MAX_REJECTED = RESERVED_FILES // 2
#: Clients that were rejected, or closed for a reason, and are remembered.
MAX_RECENT = 200
GOLDEN_RATIO = (5**0.5 - 1) / 2


class Clients:
    """All connections of one worker."""

    def __init__(
        self,
        config: Config,
        limits: Limits,
        replies: Replies,
        *,
        capacity: int,
        on_close: Callable[[], object] = lambda: None,
    ) -> None:
        self.config = config
        self.limits = limits
        self.replies = replies
        #: Connections for which there are descriptors.
        self.capacity = capacity
        #: Called whenever a socket has been closed.
        self._on_close = on_close
        self.epoll: Any = get_original("select", "epoll")()
        #: Clients by the descriptors of their sockets, those that are not admitted yet included.
        self.by_fd: dict[int, Client] = {}
        #: Those that have been sent their last line, the oldest first: only their end is awaited.
        self.lingering: dict[int, Client] = {}
        #: Those of them that were rejected, and how many were since the last turn of the loop.
        self.rejected: set[Client] = set()
        self.rejected_now = 0
        #: Balancers that check the server: they are served, and are in no count.
        self.probes: set[Client] = set()
        #: The last clients that were rejected, or closed for a reason.
        self.recent_ends: deque[dict[str, Any]] = deque(maxlen=MAX_RECENT)
        #: How many replies a client was sent, if its end is going to be logged.
        self.reply_counts: dict[Client, int] = {}
        self.drain_started_at = inf
        self._spread_seconds = 0.0
        #: In a handover, the clients that are ready for it: nothing is done for them here.
        self.parked: dict[Client, Rest] = {}
        self.is_handing_over = False

    @property
    def connections(self) -> int:
        """How many descriptors are in use."""
        return len(self.by_fd) + len(self.lingering) + len(self.parked)

    def quiet_since(self, moment: float) -> Iterator[Client]:
        """Yield the silent clients that have sent nothing since then."""
        clients = self.by_fd.values()
        return (each for each in clients if each.quiet_since <= moment and not each.stream)

    def add(self, client: Client) -> None:
        """Watch a new client's socket.

        Raises SystemError if other code has closed a descriptor, RuntimeError without memory.
        """
        fd = client.sock.fileno()
        if fd in self.lingering or self.by_fd.setdefault(fd, client) is not client:
            raise SystemError(f"descriptor {fd} of a client was closed by other code, and reused")
        try:
            self.epoll.register(fd, EPOLLIN)
        except OSError as error:
            raise _fatal_unless_out_of_memory(error) from error

    def watch(self, client: Client, events: int) -> None:
        """Report these events of the client's socket from now on."""
        try:
            self.epoll.modify(client.sock.fileno(), events)
        except OSError as error:
            raise _fatal_unless_out_of_memory(error) from error

    # Handovers

    def is_movable(self, client: Client) -> bool:
        """Whether another process can serve it. TLS cannot move: its keys are in this process."""
        return client.is_counted and client.transport != TLS

    def may_move(self, client: Client) -> bool:
        """Whether it can be handed over now: no handler runs for it."""
        stream = client.stream
        return (not stream or stream.waits_for != 0) and self.is_movable(client)

    def park(self, client: Client, rest: Rest) -> None:
        """Do nothing more for a client, which is about to be handed over."""
        fd = client.sock.fileno()
        with suppress(OSError):  # Its descriptor was closed by other code: `forget` finds that.
            self.epoll.unregister(fd)
        del self.by_fd[fd]  # Events of it that are held are not served.
        client.stream = None
        self.parked[client] = rest

    # Drains

    @property
    def is_draining(self) -> bool:
        """Whether clients are closed once what they have sent is answered."""
        return self.drain_started_at < inf

    def begin_drain(self, longest_spread_seconds: float) -> None:
        """Close every client from now on, evenly over `--drain-spread`."""
        self.drain_started_at = monotonic()
        self._spread_seconds = min(self.config.drain_spread_seconds, longest_spread_seconds)

    def drains_at(self, client: Client) -> float:
        """Return when a drain reaches a client; infinity without a drain. Until then it is served.

        Multiples of the golden ratio spread consecutive descriptors evenly.
        """
        if not self.is_draining:
            return inf
        share = client.sock.fileno() * GOLDEN_RATIO % 1.0
        return self.drain_started_at + self._spread_seconds * share

    def leaving(self, now: float) -> Iterator[Client]:
        """Yield the silent clients that a drain closes now."""
        passed, spread = now - self.drain_started_at, self._spread_seconds
        for fd, client in self.by_fd.items():
            is_reached = fd * GOLDEN_RATIO % 1.0 * spread <= passed
            if is_reached and not client.stream and self.leaves_at(client) <= now:
                yield client

    def note_arrival(self, client: Client, now: float) -> bool:
        """Note that something has arrived. Return False in a drain, which that does not prolong."""
        if now >= self.drains_at(client):
            return False
        client.quiet_since = now
        return True

    def leaves_at(self, client: Client, has_part: bool = False) -> float:
        """Return when a drain closes a client that sends nothing more; infinity without a drain.

        `has_part`: a line, or a TLS record, has begun and not ended.
        """
        if not self.is_draining:
            return inf
        if not self.is_admitted(client):  # The spread is not for a header or a handshake.
            return max(self.drain_started_at, client.quiet_since) + DRAIN_GRACE_SECONDS
        at = self.drains_at(client) + (DRAIN_GRACE_SECONDS if has_part else 0.0)
        return at if client.has_spoken else max(at, client.quiet_since + DRAIN_GRACE_SECONDS)

    # Ends

    def is_admitted(self, client: Client) -> bool:
        """Whether a client is served: it is counted, or a balancer that checks the server."""
        return client.is_counted or client in self.probes

    def close(self, client: Client, error: ErrorReply | None = None) -> None:
        """Close the socket, because of this error. The second call does nothing.

        Raises SystemError if other code has closed it.
        """
        if client.is_closed:
            return
        self.end(client, error)
        # A forked child that also has the socket would keep it in the epoll.
        with suppress(OSError):
            self.epoll.unregister(client.sock.fileno())
        self.forget(client)

    def fail(self, client: Client, error: Exception) -> None:
        """Close a client whose connection is broken, or whose service has raised an error."""
        if isinstance(error, SystemError):
            raise error  # The process cannot go on.
        if not isinstance(error, OSError):
            message = f"closed a client after an internal error: {error!r}"
            logs.warn_ratelimited("process.error", message, logs.error_fields(error))
        self.close(client)

    def end(self, client: Client, error: ErrorReply | None = None) -> None:
        """Take a client out of WHO, and note its end, because of this error. Only once."""
        seconds = self.config.write_timeout_seconds
        if self.is_admitted(client) and seconds:
            with suppress(OSError):  # The kernel gives up by then on what the client leaves unread.
                client.sock.setsockopt(IPPROTO_TCP, TCP_USER_TIMEOUT, ceil(seconds * 1000))
        if client.is_counted:
            client.is_counted = False
            self.limits.uncount(client.transport)
        self.probes.discard(client)
        if error:
            address, port = client.peer
            end = {"at": round(time(), 3), "address": address, "port": port, "reason": error.name}
            self.recent_ends.append(end)
        replies = self.reply_counts.pop(client, None)
        if replies is not None and logging.root.isEnabledFor(logging.DEBUG):
            duration = round((monotonic() - client.accepted_at) * 1e9)
            fields: dict[str, object] = {"event.duration": duration, "gserver.replies": replies}
            reason = {"gserver.reason": error.name} if error else {}
            log_client("client.closed", "closed", client, fields | reason)

    def forget(self, client: Client) -> None:
        """Close the socket of a client that is not counted here, or that another worker serves."""
        self.rejected.discard(client)
        self.reply_counts.pop(client, None)
        fd = client.sock.fileno()
        self.by_fd.pop(fd, None)
        self.lingering.pop(fd, None)
        self.limits.uncount_address(fd)
        try:
            client.sock.close()
        except OSError as error:
            raise SystemError("a client's descriptor was closed by other code") from error
        self._on_close()


def log_client(action: str, verb: str, client: Client, more: Mapping[str, object]) -> None:
    """Log an event of a client at debug level."""
    host, port = client.peer
    pid, uid = client.credentials
    fields = {**address_fields((host, port)), **more}
    if pid is not None:
        fields |= {"client.user.id": str(uid), "gserver.client_pid": pid}
    place = f"port {port}" if pid is None else f"uid {uid} pid {pid}"
    logs.event(logging.DEBUG, action, f"{verb} {host} {place}", fields)


def bytes_in_kernel(client: Client) -> int:
    """Return how many bytes of a client have arrived and have not been read."""
    return int.from_bytes(ioctl(client.sock.fileno(), FIONREAD, bytes(4)), sys.byteorder)


def _fatal_unless_out_of_memory(error: OSError) -> Exception:
    """Return what an error of epoll means: an error of one client, or of the whole worker."""
    if error.errno in (errno.ENOMEM, errno.ENOSPC):  # The latter: fs.epoll.max_user_watches.
        return RuntimeError(f"a socket cannot be watched: {error.strerror}")
    return SystemError("a descriptor of the worker was closed by other code")
