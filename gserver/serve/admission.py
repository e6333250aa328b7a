"""Takes on new connections: what they must do first, and how many may be doing it.

Behind a balancer, a connection begins with a PROXY header; with TLS, with a handshake. Both are
part of the conversation. A plain client is admitted at once, and is silent from then on.
"""

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from ipaddress import IPv4Network, IPv6Network, ip_address
from socket import SO_SNDBUF, SOL_SOCKET
from typing import Any

from gserver import logs
from gserver.addresses import TCP, TLS, UNIX, plain_host
from gserver.protocol import TOO_MANY_CLIENTS, TOO_MANY_FROM_ADDRESS, ErrorReply
from gserver.serve.client import Client, Rest, address_fields
from gserver.serve.clients import Clients, log_client
from gserver.serve.proxy_header import ProxyHeader
from gserver.serve.silent import SilentClients
from gserver.serve.stream import CutOff

#: Limit on TLS handshakes and PROXY headers in progress in one worker; at most a quarter of its
#: open files. One more ends the oldest, since an honest one takes milliseconds.
MAX_ADMISSIONS = 1024
#: Connections on which a balancer speaks for itself, in one worker. One more counts as a client: a
#: balancer may say LOCAL of clients, too.
MAX_PROBES = 16
#: The send buffer of a Unix socket, which the kernel doubles. What a client has not read stays as
#: long as it keeps its own socket, since a Unix socket cannot be reset.
UNIX_SEND_BYTES = 32_768


class Admission:
    """Admits the clients of one worker. `start` begins a conversation with one that must wait."""

    def __init__(
        self, clients: Clients, silent: SilentClients, start: Callable[..., object]
    ) -> None:
        self._clients = clients
        self._limits = clients.limits
        self._silent = silent
        self._start = start
        self._max_admissions = min(MAX_ADMISSIONS, clients.capacity // 4)
        self._has_balancers = bool(clients.config.proxy_from)
        self._is_balancer = lru_cache(1024)(partial(_is_in, clients.config.balancers))
        #: Clients with a header or a handshake in progress, the oldest first.
        self.in_progress: dict[Client, None] = {}
        #: Those of them that will be rejected, because their address was at its limit.
        self._surplus: dict[Client, None] = {}

    def serve(self, sock: Any, address: Any, *, transport: str = TCP) -> None:
        """Take on a connection that was accepted by an endpoint with this transport."""
        client = Client(sock, address, transport)
        try:
            self._take_on(client)
        except Exception as error:  # noqa: BLE001 (one client must not end the service of all)
            self._clients.fail(client, error)

    def _take_on(self, client: Client) -> None:
        fd, is_proxied, has_tls = client.sock.fileno(), False, client.transport == TLS
        if client.transport == UNIX:
            self._limits.exempt(fd)
            client.sock.setsockopt(SOL_SOCKET, SO_SNDBUF, UNIX_SEND_BYTES)
        elif self._has_balancers and self._is_balancer(client.address[0]):
            is_proxied = True
        else:
            self._limits.count_address(fd, client.address[0])
        self._clients.add(client)
        must_wait = is_proxied or has_tls
        if not self._has_room(client, must_wait=must_wait, is_proxied=is_proxied):
            self._clients.close(client)
        elif must_wait:
            self._begin(client, is_surplus=not is_proxied and self._is_surplus(client))
            self._start(client, Rest(), is_new=True, is_proxied=is_proxied)
        else:
            self.admit(client)

    def _has_room(self, client: Client, *, must_wait: bool, is_proxied: bool) -> bool:
        """Return whether there is room for a new client. If need be, end a header or handshake.

        A client that is going to be rejected takes the place of another such client, or none, so
        that one address cannot end the handshakes of others.
        """
        is_full = self._clients.connections > self._clients.capacity
        has_too_many = must_wait and len(self.in_progress) >= self._max_admissions
        if not self.in_progress or not (is_full or has_too_many):
            return True
        fd = client.sock.fileno()
        if not must_wait and self._limits.would_reject(fd):
            return True  # There are descriptors for those that are rejected at once.
        is_surplus = not is_proxied and self._limits.is_over_address_limit(fd)
        if is_surplus and not self._surplus:
            return False
        oldest = next(iter(self._surplus or self.in_progress))
        self.end(oldest)
        if oldest.stream:
            oldest.stream.interrupt(CutOff("too many others are in progress"))
        return True

    def note_header(self, client: Client, header: ProxyHeader) -> None:
        """Note what a PROXY header says of a client. A handshake may follow, with its own time."""
        self.end(client)
        if header.client:
            client.address = header.client
        if header.is_local and len(self._clients.probes) < MAX_PROBES:
            self._clients.probes.add(client)
        else:
            self._limits.count_address(client.sock.fileno(), client.peer[0])
        self._begin(client, is_surplus=self._is_surplus(client))

    def _begin(self, client: Client, *, is_surplus: bool) -> None:
        self.in_progress[client] = None
        if is_surplus:
            self._surplus[client] = None

    def _is_surplus(self, client: Client) -> bool:
        """Whether a client will be rejected, because its address is at its limit."""
        is_over = self._limits.is_over_address_limit(client.sock.fileno())
        return is_over and client not in self._clients.probes

    def end(self, client: Client) -> None:
        """Note that a client's header or handshake is over."""
        self.in_progress.pop(client, None)
        self._surplus.pop(client, None)

    def admit(self, client: Client, *, is_proxied: bool = False) -> bool:
        """Count a client and return True, or reject it and return False. Raises OSError."""
        clients = self._clients
        is_probe = client in clients.probes
        error = None if is_probe else self._limits.admit(client.sock.fileno(), client.transport)
        if error:
            self._log_rejection(client.peer, error)
            self._silent.reject(client, error)
            return False
        client.is_counted = not is_probe
        if logging.root.isEnabledFor(logging.DEBUG):
            log_client("client.accepted", "accepted", client, {})
            clients.reply_counts[client] = 0
        elif not is_proxied:
            client.address = None
        return True

    def _log_rejection(self, address: tuple[str, int], error: ErrorReply) -> None:
        config = self._clients.config
        reasons = {
            TOO_MANY_CLIENTS: f"{config.max_clients} clients are connected (--max-clients)",
            TOO_MANY_FROM_ADDRESS: f"its address has {config.max_clients_per_address} clients"
            " (--max-clients-per-address)",
        }
        fields = {**address_fields(address), "gserver.reason": error.name}
        message = f"{fields['client.address']} was rejected: {reasons[error]}"
        logs.warn_ratelimited("client.rejected", message, fields)


def _is_in(networks: Sequence[IPv4Network | IPv6Network], host: str) -> bool:
    address = ip_address(plain_host(host).partition("%")[0])
    return any(address in network for network in networks)
