"""The event loop of one worker: tells each client of its events, its turn and its deadline.

All sockets of clients are in one epoll, which is one event of gevent's loop. A gevent watcher for
each client would take a sixth more CPU. It would call the latest clients first, with 1.75 times the
99th percentile of latency (docs/performance.md).
"""

import errno
import logging
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from ipaddress import IPv4Network, IPv6Network, ip_address
from math import inf
from socket import SO_SNDBUF, SOL_SOCKET
from time import monotonic, monotonic_ns, time
from typing import TYPE_CHECKING, Any, cast

import gevent
from gevent.monkey import get_original

from gserver import logs
from gserver.addresses import TCP, TLS, UNIX, client_address, plain_host
from gserver.boot import RESERVED_FILES, fatal_on_error
from gserver.config import Config
from gserver.protocol import TOO_MANY_CLIENTS, TOO_MANY_FROM_ADDRESS, ErrorReply
from gserver.serve.client import (
    CLOSED,
    DRAIN_GRACE_SECONDS,
    IDLE,
    MOVING,
    NEW,
    READ,
    READ_BYTES,
    Client,
    address_fields,
)
from gserver.serve.deadlines import Deadlines
from gserver.serve.fastpath import FastPath
from gserver.serve.limits import Limits
from gserver.serve.proxied import ProxiedSocket
from gserver.serve.proxy_header import ProxyHeader
from gserver.serve.replies import Replies
from gserver.serve.tls import TlsSocket

if TYPE_CHECKING:
    from ssl import SSLContext

#: Clients answered in one turn of the loop. Then handlers and other clients have their turn.
TURN_CLIENTS = 256
#: Time in one turn for all clients in the queue (`enqueue`) together.
QUEUE_SECONDS = 0.0001
#: Lowest in libev: new clients are accepted before the bytes of others are read.
PRIORITY = -2
#: If a deadline is noticed this late, the process was stopped or overloaded: the client gets this
#: much longer.
LATE_SECONDS = 1.0
#: Rejected clients that may linger at the same time; others are closed at once.
MAX_REJECTED = RESERVED_FILES // 2
#: Clients that were rejected, or closed for a reason, and are remembered.
MAX_RECENT = 200
GOLDEN_RATIO = (5**0.5 - 1) / 2
#: Limit on TLS handshakes and PROXY headers in progress in one worker; at most a quarter of its
#: open files. One more ends the oldest, since an honest one takes milliseconds.
MAX_ADMISSIONS = 1024
#: Connections on which a balancer speaks for itself, in one worker. One more counts as a client: a
#: balancer may say LOCAL of clients, too.
MAX_PROBES = 16


#: The send buffer of a Unix socket, which the kernel doubles. What a client has not read stays as
#: long as it keeps its own socket, since a Unix socket cannot be reset.
UNIX_SEND_BYTES = 32_768


class Loop:
    """All clients of one worker."""

    def __init__(
        self,
        config: Config,
        limits: Limits,
        replies: Replies,
        *,
        capacity: int,
        on_close: Callable[[], object] = lambda: None,
        tls_context: "SSLContext | None" = None,
    ) -> None:
        self.config = config
        self.limits = limits
        self.replies = replies
        self.answer = FastPath(replies).answer
        #: Called whenever a socket has been closed.
        self._on_close = on_close
        self._tls_context = tls_context
        #: Connections for which there are descriptors.
        self.capacity = capacity
        self._max_admissions = min(MAX_ADMISSIONS, capacity // 4)
        #: All clients by the descriptors of their sockets, handshakes and rejected ones included.
        self.clients: dict[int, Client] = {}
        #: Balancers: their connections begin with a PROXY header.
        self._is_balancer = lru_cache(1024)(partial(_is_in, config.balancers))
        #: Clients that are balancers themselves, which check the server: they are in no count.
        self.probes: set[Client] = set()
        #: Clients with a header or a handshake in progress, the oldest first.
        self.admissions: dict[Client, None] = {}
        #: Those of them that will be rejected, because their address was at its limit.
        self.surplus_admissions: dict[Client, None] = {}
        #: When each client was accepted, in monotonic nanoseconds, by descriptor. An array, since a
        #: number in each client would take four times the memory.
        self.accepted_ns = array("q")
        #: The last clients that were rejected, or closed for a reason.
        self.recent_ends: deque[dict[str, Any]] = deque(maxlen=MAX_RECENT)
        #: How many replies a client was sent, if its end is going to be logged.
        self.reply_counts: dict[Client, int] = {}
        #: Clients that wait for their turn, in its order.
        self.queue: dict[Client, None] = {}
        #: Rejected clients that are still open, and those rejected since the last turn.
        self.rejected = self.rejected_now = 0
        self.drain_started_at = inf
        self._spread_seconds = 0.0
        #: In a handover, the clients that are ready for it: nothing is done for them here.
        self.parked: deque[Client] = deque()
        self.is_handing_over = False
        hub = gevent.get_hub()
        self._epoll = get_original("select", "epoll")()
        #: The events of the listeners whose clients are accepted now.
        self._listener_events: list[tuple[int, int]] = []
        #: Events that are served after the new clients that came with them.
        self._held: list[tuple[int, int]] | None = None
        self._watcher = hub.loop.io(self._epoll.fileno(), READ, priority=PRIORITY)
        self._watcher.start(fatal_on_error(self._take_turn))
        self._queue_timer = hub.loop.timer(0)
        self._serve_queue_or_exit = fatal_on_error(self._serve_queue)
        self._deadlines: Deadlines[Client] = Deadlines()
        self._deadline_timer: Any = hub.loop.timer(0)
        self._expire_or_exit = fatal_on_error(self._expire)
        self._expires_at = inf

    @property
    def is_draining(self) -> bool:
        """Whether clients are closed once what they have sent is answered."""
        return self.drain_started_at < inf

    def drains_at(self, fd: int) -> float:
        """Return when a drain reaches a client: at once, or spread by `--drain-spread`.

        Multiples of the golden ratio spread consecutive descriptors evenly.
        """
        return self.drain_started_at + self._spread_seconds * (fd * GOLDEN_RATIO % 1.0)

    # New clients

    def watch_listener(self, fd: int) -> None:
        """Hold clients' events while this listener has connections to accept."""
        if (fd, READ) not in self._listener_events:
            self._listener_events.append((fd, READ))
            self._epoll.register(fd, READ)

    def unwatch_listener(self, fd: int) -> None:
        """Stop holding clients' events for this listener."""
        if (fd, READ) in self._listener_events:
            self._listener_events.remove((fd, READ))
            self._epoll.unregister(fd)

    def add(self, sock: Any, address: Any, *, transport: str = TCP) -> None:
        """Take on a connection that was accepted by an endpoint with this transport."""
        now = monotonic()
        fd = sock.fileno()
        has_tls, is_local = transport == TLS, transport == UNIX
        is_proxied = not is_local and bool(self.config.proxy_from) and self._is_balancer(address[0])
        if is_proxied:
            sock = ProxiedSocket(sock, address, has_tls=has_tls)
        elif is_local:
            self.limits.exempt(fd)
            sock.setsockopt(SOL_SOCKET, SO_SNDBUF, UNIX_SEND_BYTES)
        else:
            self.limits.count_address(fd, address[0])
        client = Client(self, sock, client_address(address), now)
        if not self._attach(client, monotonic_ns()):
            return
        if not self._has_room(client, is_proxied=is_proxied, has_tls=has_tls):
            client.address = None  # It was never accepted, so its end is not logged.
            client.close()
        elif is_proxied:
            self._await_admission(client, self.config.proxy_header_timeout_seconds, now)
        else:
            self._begin(client, now, has_tls=has_tls)

    def admit_after_header(self, client: Client, header: ProxyHeader, now: float) -> None:
        """Go on with a client whose PROXY header has been read."""
        self._end_admission(client)
        client.address = client_address(client.sock.getpeername())
        if header.is_local and len(self.probes) < MAX_PROBES:
            self.probes.add(client)
        else:
            self.limits.count_address(client.sock.fileno(), client.address[0])
        self._begin(client, now, has_tls=cast(ProxiedSocket, client.sock).has_tls)

    def _begin(self, client: Client, now: float, *, has_tls: bool) -> None:
        """Begin the TLS handshake, or admit the client."""
        if has_tls:
            context = cast("SSLContext", self._tls_context)
            client.sock = TlsSocket(cast(Any, client.sock), context)
            self._begin_handshake(client, now)
        else:
            self.guard(client, self.admit, client, now)

    def _attach(self, client: Client, accepted_ns: int) -> bool:
        """Watch a client's socket; return False if that failed, and the client is closed."""
        fd = client.sock.fileno()
        missing = fd + 1 - len(self.accepted_ns)
        if missing > 0:
            self.accepted_ns.extend([0] * missing)
        self.accepted_ns[fd] = accepted_ns
        if self.clients.setdefault(fd, client) is not client:
            raise SystemError(f"descriptor {fd} of a client was closed by other code, and reused")
        try:
            self._epoll.register(fd, READ)
        except OSError as error:
            self._fail(client, _fatal_unless_out_of_memory(error))
            return False
        return True

    def _begin_handshake(self, client: Client, now: float) -> None:
        """Wait for the client's handshake."""
        self._await_admission(client, self.config.tls_handshake_timeout_seconds, now)
        if self.limits.is_over_address_limit(client.sock.fileno()) and client not in self.probes:
            self.surplus_admissions[client] = None

    def _has_room(self, client: Client, *, is_proxied: bool, has_tls: bool) -> bool:
        """Return whether there is room for a new client. If need be, end a header or handshake.

        A client that is going to be rejected takes the place of another such client, or none, so
        that one address cannot end the handshakes of others.
        """
        must_wait = is_proxied or has_tls
        is_full = len(self.clients) > self.capacity
        has_too_many = must_wait and len(self.admissions) >= self._max_admissions
        if not self.admissions or not (is_full or has_too_many):
            return True
        fd = client.sock.fileno()
        if not must_wait and self.limits.would_reject(fd):
            return True  # There are descriptors for those that are rejected at once.
        is_surplus = not is_proxied and self.limits.is_over_address_limit(fd)
        if is_surplus and not self.surplus_admissions:
            return False
        oldest = next(iter(self.surplus_admissions or self.admissions))
        self.guard(oldest, oldest.cut_off_admission)
        return True

    def _await_admission(self, client: Client, seconds: float, now: float) -> None:
        """Wait for a header or a handshake, for `seconds` at most; 0 = no limit."""
        self.admissions[client] = None
        longest = DRAIN_GRACE_SECONDS if self.is_draining else inf
        self.set_deadline(client, now + min(seconds or inf, longest))

    def _end_admission(self, client: Client) -> None:
        self.admissions.pop(client, None)
        self.surplus_admissions.pop(client, None)

    def admit(self, client: Client, now: float) -> None:
        """Count a client, or reject it. Its handshake is over, if there was one."""
        self._end_admission(client)
        is_probe = client in self.probes
        error = None if is_probe else self.limits.admit(client.sock.fileno(), client.transport)
        if error:
            self.rejected += 1
            self.rejected_now += 1
            self._log_rejection(client.address, error)
            self.note_end(client, error)
            client.reject(error)
            return
        client.state = IDLE
        client.quiet_since = now
        if logging.root.isEnabledFor(logging.DEBUG):
            log_client("client.accepted", "accepted", client)
            self.reply_counts[client] = 0
        else:
            client.address = None
        if client.has_tls or self.is_draining:
            client.await_input(now)
        elif self.config.idle_timeout_seconds:
            self.set_deadline(client, now + self.config.idle_timeout_seconds)

    def uncount(self, client: Client) -> None:
        """Take an admitted client out of the count, if it is in it."""
        if client not in self.probes:
            self.limits.uncount(client.transport)

    def dismiss_probes(self, now: float) -> None:
        """Close the probes that are silent: they are not handed over."""
        for client in list(self.probes):
            if client.state is IDLE and client.quiet_since + DRAIN_GRACE_SECONDS <= now:
                self.guard(client, client.finish)

    def may_linger_rejected(self) -> bool:
        """Whether one more rejected client may linger."""
        return self.rejected <= MAX_REJECTED

    def _log_rejection(self, address: Any, error: ErrorReply) -> None:
        config = self.config
        reasons = {
            TOO_MANY_CLIENTS: f"{config.max_clients} clients are connected (--max-clients)",
            TOO_MANY_FROM_ADDRESS: f"its address has {config.max_clients_per_address} clients"
            " (--max-clients-per-address)",
        }
        fields = {**address_fields(address), "gserver.reason": error.name}
        message = f"{fields['client.address']} was rejected: {reasons[error]}"
        logs.warn_ratelimited("client.rejected", message, fields)

    # Handovers

    def park(self, client: Client) -> None:
        """Do nothing more for a client, which is about to be handed over."""
        client.state = MOVING
        self.queue.pop(client, None)
        with suppress(OSError):  # Its descriptor was closed by other code: `release` finds that.
            self._epoll.unregister(client.sock.fileno())
        self.parked.append(client)

    def adopt(self, client: Client, accepted_ns: int) -> None:
        """Continue to serve a client that another worker, or a failed handover, has parked here."""
        if self._attach(client, accepted_ns):
            self.guard(client, client.resume, monotonic())

    def take_back(self, clients: Iterable[Client]) -> None:
        """Continue to serve clients that were parked."""
        for client in clients:
            fd = client.sock.fileno()
            del self.clients[fd]
            self.adopt(client, self.accepted_ns[fd])

    def release(self, client: Client) -> None:
        """Forget a client that another worker serves by now. It is uncounted by the caller."""
        client.state = CLOSED
        self._forget(client)

    # Turns

    def _take_turn(self) -> None:
        """Serve the clients that have sent something, first come, first served."""
        self.rejected_now = 0
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
        events: list[tuple[int, int]] = self._epoll.poll(0, TURN_CLIENTS)
        for event in self._listener_events:
            # In a full turn, it may be among those that are left for the next.
            if event in events or len(events) == TURN_CLIENTS:
                self._held = events
                return None
        return events

    def _serve(self, events: list[tuple[int, int]]) -> None:
        """Tell clients of their events. Idle clients, which most are, are answered right here."""
        started, reads, has_tls = monotonic(), 0, self._tls_context is not None
        # When the first of `reads` began. Clients that are not answered here count theirs.
        since = started
        clients, answer, is_draining = self.clients, self.answer, self.is_draining
        counts = self.reply_counts
        for fd, _ in events:
            client = clients.get(fd)
            if client is None:
                continue  # The listener, or a client that was closed in this turn.
            if client.state is not IDLE or is_draining:
                if client not in self.queue:  # Else its turn is to come.
                    self._count_reads(reads, since)
                    self.guard(client, client.on_event, started)
                    reads, since = 0, monotonic()
                continue
            replies = None
            try:
                data = client.sock.recv(READ_BYTES)
                replies = answer(data, client.has_spoken, client.sock)
                if replies is None:
                    self._count_reads(reads, since)
                    self.guard(client, client.take, data, started, is_tried=True)
                    reads, since = 0, monotonic()
                    continue
                reads += 1
                client.quiet_since, client.has_spoken = started, True
                if counts:
                    self.note_replies(client, replies)
                sent = client.sock.send(replies)
                if sent < len(replies) or (has_tls and client.has_tls):
                    self.guard(client, client.after_send, memoryview(replies)[sent:], started)
            except BlockingIOError:
                self.guard(client, client.after_block, replies, started)
            except Exception as error:  # noqa: BLE001 (one client must not end the service of all)
                self._fail(client, error)
        self._count_reads(reads, since)

    def note_replies(self, client: Client, replies: bytes) -> None:
        """Count the replies to a client whose end is going to be logged."""
        if client in self.reply_counts:
            self.reply_counts[client] += replies.count(b"\n")

    def _count_reads(self, reads: int, since: float) -> None:
        """Count reads that have been answered together since then."""
        if reads:
            self.replies.count_reads(reads, round((monotonic() - since) * 1e9))

    def guard(
        self, client: Client, step: Callable[..., object], *arguments: Any, **named: Any
    ) -> None:
        """Take a step with a client; close the client if its connection, or our code, fails."""
        try:
            step(*arguments, **named)
        except Exception as error:  # noqa: BLE001 (one client must not end the service of all)
            self._fail(client, error)

    def _fail(self, client: Client, error: Exception) -> None:
        """Close a client after an error in the call that is being handled."""
        if isinstance(error, SystemError):
            raise error  # The process cannot go on.
        if not isinstance(error, OSError):  # That one means that the connection is broken.
            self._log_failure(error)
        client.close()

    def _log_failure(self, error: Exception) -> None:
        message = f"closed a client after an internal error: {error!r}"
        logs.warn_ratelimited("process.error", message, logs.error_fields(error))

    def enqueue(self, client: Client) -> None:
        """Call the client's `on_turn` in one of the next turns."""
        if not self.queue:
            self._queue_timer.start(self._serve_queue_or_exit)
        self.queue[client] = None

    def _serve_queue(self) -> None:
        queue, now = self.queue, monotonic()
        until = now + QUEUE_SECONDS
        while queue and now < until:
            client = next(iter(queue))
            del queue[client]
            self.guard(client, client.on_turn, now)
            now = monotonic()
        if queue:
            self._queue_timer.start(self._serve_queue_or_exit)

    def note_read(self, started_at: float) -> None:
        """Count a read whose answering began then."""
        self._count_reads(1, started_at)

    def watch(self, client: Client, events: int) -> None:
        """Report these events of the client's socket from now on."""
        try:
            self._epoll.modify(client.sock.fileno(), events)
        except OSError as error:
            raise _fatal_unless_out_of_memory(error) from error

    # Deadlines

    def set_deadline(self, client: Client, at: float) -> None:
        """Call the client's `on_deadline` then, instead of when it was set before."""
        if at == inf:
            client.deadline = inf
            return
        self._deadlines.put(client, at)
        if client.deadline < self._expires_at:
            self._start_deadline_timer(self._deadlines.next_at)

    def _start_deadline_timer(self, at: float) -> None:
        self._expires_at = at
        self._deadline_timer.stop()
        self._deadline_timer.close()
        self._deadline_timer = gevent.get_hub().loop.timer(max(0.0, at - monotonic()))
        self._deadline_timer.start(self._expire_or_exit, update=True)

    def _expire(self) -> None:
        """Act on the deadlines that have passed, unless the loop itself was late."""
        self._expires_at = inf
        now = monotonic()
        for client in self._deadlines.pop(now):
            if client.deadline > now:
                continue  # It has had its turn a moment ago.
            # A client that waits for its turn is not late, but a handshake has one deadline.
            has_turn_to_come = client in self.queue and client.state is not NEW
            is_loop_late = now > client.deadline + LATE_SECONDS and not self.is_draining
            if has_turn_to_come or is_loop_late:
                client.postpone(now + LATE_SECONDS)
            else:
                client.deadline = inf
                self.guard(client, client.on_deadline, now)
        if self._deadlines.next_at < self._expires_at:
            self._start_deadline_timer(self._deadlines.next_at)

    # Ends

    def drain(self, longest_spread_seconds: float = inf) -> None:
        """Close every client once what it has sent is answered, evenly over `--drain-spread`."""
        self.drain_started_at = now = monotonic()
        self._spread_seconds = min(self.config.drain_spread_seconds, longest_spread_seconds)
        for client in list(self.clients.values()):
            self.guard(client, client.drain, now)

    def remove(self, client: Client, *, was_rejected: bool) -> None:
        """Forget a client, and close its socket. Raises SystemError if other code has closed it."""
        self.queue.pop(client, None)
        self._end_admission(client)
        if was_rejected:
            self.rejected -= 1
        else:
            self._log_end(client)
        # A forked child that also has the socket would keep it in the epoll.
        with suppress(OSError):
            self._epoll.unregister(client.sock.fileno())
        self._forget(client)

    def note_end(self, client: Client, error: ErrorReply) -> None:
        """Keep why a client was rejected or closed."""
        address, port = self.peer(client)
        end = {"at": round(time(), 3), "address": address, "port": port, "reason": error.name}
        self.recent_ends.append(end)

    def peer(self, client: Client) -> tuple[str, int]:
        """Return address and port of a client; "" and 0 if its connection was reset."""
        try:
            return client.address or client_address(client.sock.getpeername())
        except OSError:
            return "", 0

    def _log_end(self, client: Client) -> None:
        """Log the end of a client at debug level, if it was admitted."""
        if not logging.root.isEnabledFor(logging.DEBUG):
            return
        fd = client.sock.fileno()
        fields: dict[str, object] = {}
        if 0 <= fd < len(self.accepted_ns):
            fields["event.duration"] = monotonic_ns() - self.accepted_ns[fd]
        if client in self.reply_counts:
            fields["gserver.replies"] = self.reply_counts[client]
        ending = client.work.closing_error if client.work else None
        if ending:
            fields["gserver.reason"] = ending.name
        log_client("client.closed", "closed", client, fields)

    def _forget(self, client: Client) -> None:
        self.reply_counts.pop(client, None)
        self.probes.discard(client)
        fd = client.sock.fileno()
        client.deadline = inf
        if self.clients.get(fd) is client:
            del self.clients[fd]
            self.limits.uncount_address(fd)
        try:
            client.sock.close()
        except OSError as error:
            raise SystemError("a client's descriptor was closed by other code") from error
        # A stale deadline may refer to the client for a while: its buffers must not stay.
        client.work, client.sock = None, cast(Any, None)
        self._on_close()


def _is_in(networks: Sequence[IPv4Network | IPv6Network], host: str) -> bool:
    address = ip_address(plain_host(host).partition("%")[0])
    return any(address in network for network in networks)


def _fatal_unless_out_of_memory(error: OSError) -> Exception:
    """Return what an error of epoll means: an error of one client, or of the whole worker."""
    if error.errno in (errno.ENOMEM, errno.ENOSPC):  # The latter: fs.epoll.max_user_watches.
        return RuntimeError(f"a socket cannot be watched: {error.strerror}")
    return SystemError("a descriptor of the worker was closed by other code")


def log_client(
    action: str, verb: str, client: Client, more: Mapping[str, object] | None = None
) -> None:
    """Log an event of a client at debug level, if its address was kept for that."""
    if client.address is None:
        return
    host, port = client.address
    fields = {**address_fields(client.address), **(more or {})}
    pid, uid = client.credentials()
    if pid is not None:
        fields |= {"client.user.id": str(uid), "gserver.client_pid": pid}
        logs.event(logging.DEBUG, action, f"{verb} {host} uid {uid} pid {pid}", fields)
    else:
        logs.event(logging.DEBUG, action, f"{verb} {host} port {port}", fields)
