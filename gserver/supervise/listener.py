"""The listening sockets of the port and of the admin port.

The supervisor binds them, or takes them over from a service manager. Children inherit them, so the
port stays open over reloads and crashes.
"""

import ctypes
import errno
import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from gserver import logs
from gserver.config import Config, show_address
from gserver.errors import FatalError, UsageError

#: A peer that died without a FIN is noticed within two minutes: 60 s of silence, then 4 probes 15 s
#: apart. Unacknowledged data is given up after the same time.
KEEPALIVE_IDLE_SECONDS = 60
KEEPALIVE_INTERVAL_SECONDS = 15
KEEPALIVE_PROBES = 4
USER_TIMEOUT_MILLISECONDS = 120_000
ADMIN_BACKLOG = 64

#: Names by which a service manager tells the two sockets apart (`FileDescriptorName=`). Without
#: these names, the first socket is the port.
PORT, ADMIN_PORT = "gserver", "admin"

_REASONS = {
    errno.EADDRINUSE: "it is in use by another program: stop that one, or choose another {port}",
    errno.EACCES: "no permission: choose a {port} from 1024 up, or grant CAP_NET_BIND_SERVICE",
    errno.EADDRNOTAVAIL: "this machine has no such address: choose another {host}",
}


class Listener:
    """A listening socket and the address that it keeps."""

    def __init__(self, sock: socket.socket, backlog: int) -> None:
        self.sock = sock
        self._address = sock.getsockname()
        self._backlog = backlog

    def reopen_if_closed(self) -> None:
        """Listen again if the socket was shut down from outside (`ss -K`).

        That reopens it for all processes that share it.
        """
        if self.sock.fileno() < 0 or _is_listening(self.sock):
            return
        message = f"{show_address(*self._address[:2])} was shut down by another process"
        fields: dict[str, str] = {}
        try:
            self._reopen()
            message += ": listening again"
        except OSError as error:
            message += f" and cannot be reopened: {error}; retrying every second"
            fields = logs.error_fields(error)
        logs.warn_ratelimited("server.port_closed", message, fields)

    def _reopen(self) -> None:
        """Listen again on the same address; raise OSError if that cannot be had."""
        # connect(AF_UNSPEC) clears the shutdown state and the pending error. Otherwise accepted
        # sockets would inherit it, and epoll would report it for ever.
        ctypes.CDLL(None).connect(self.sock.fileno(), bytes(16), 16)
        self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        try:
            self.sock.bind(self._address)
        except OSError as error:
            # EINVAL: it still has its port. It has lost one that the kernel had chosen, and
            # `listen` without a port would take any other.
            if error.errno != errno.EINVAL:
                raise
        self.sock.listen(self._backlog)


class Ports(NamedTuple):
    """The listeners of the port, and of the admin port or None."""

    port: Listener
    admin_port: Listener | None


def open_ports(config: Config, handed_over: Sequence[tuple[str, int]]) -> tuple[Config, Ports]:
    """Open the port and the admin port.

    `handed_over` are the names and descriptors from a service manager; a socket that is not among
    them is bound. Returns the configuration with the real addresses, and the listeners. Raises
    `FatalError` if an address cannot be had, and `UsageError` for a socket that was handed over and
    cannot be used: its clients would wait for ever.
    """
    adopted = _adopt_all(config, handed_over)
    port = adopted.get(PORT) or bind(config.host, config.port, config.backlog)
    config = replace(config, port=port.getsockname()[1])
    if PORT in adopted:
        config = replace(config, host=port.getsockname()[0])
    if config.admin_port < 0:
        return config, Ports(Listener(port, config.backlog), None)
    admin = adopted.get(ADMIN_PORT) or bind(config.admin_host, config.admin_port, prefix="--admin-")
    config = replace(config, admin_port=admin.getsockname()[1])
    if ADMIN_PORT in adopted:
        config = replace(config, admin_host=admin.getsockname()[0])
    if config.contradiction:  # The address may not be the one of the options.
        raise UsageError(config.contradiction)
    return config, Ports(Listener(port, config.backlog), Listener(admin, ADMIN_BACKLOG))


def _adopt_all(config: Config, handed_over: Sequence[tuple[str, int]]) -> dict[str, socket.socket]:
    """Take over sockets; return them by `PORT` and `ADMIN_PORT`."""
    usable = [PORT] if config.admin_port < 0 else [PORT, ADMIN_PORT]
    has_named_port = any(name == PORT for name, _ in handed_over)
    adopted: dict[str, socket.socket] = {}
    for name, fd in handed_over:
        is_named = has_named_port or name == ADMIN_PORT
        role = name if is_named else PORT
        if role in adopted or role not in usable:
            wanted = " and ".join(f"one named {each}" for each in usable)
            raise UsageError(
                f"socket {fd} ({name}) was passed by the service manager,"
                f" but gserver uses only {wanted}"
            )
        adopted[role] = _adopt(name, fd, config.backlog)
    return adopted


def inherit(port_fd: int, admin_port_fd: int, backlog: int) -> Ports:
    """Return the ports of the program that this one has replaced; -1 is no admin port."""
    port = Listener(socket.socket(fileno=port_fd), backlog)
    if admin_port_fd < 0:
        return Ports(port, None)
    return Ports(port, Listener(socket.socket(fileno=admin_port_fd), ADMIN_BACKLOG))


def bind(host: str, port: int, backlog: int = ADMIN_BACKLOG, prefix: str = "--") -> socket.socket:
    """Return a non-blocking listening socket; raise `FatalError` if the address cannot be had.

    `prefix` is that of the options that the address comes from: the error names them.
    """
    where = show_address(host, port)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = f"the name {host!r} does not resolve: choose another {prefix}host"
        raise FatalError(f"cannot listen on {where}: {reason}") from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        _listen(listener, backlog)
    except OSError as error:
        listener.close()
        reason = _REASONS.get(error.errno or 0, os.strerror(error.errno or 0))
        reason = reason.format(host=f"{prefix}host", port=f"{prefix}port")
        raise FatalError(f"cannot listen on {where}: {reason}") from error
    return listener


def _adopt(name: str, fd: int, backlog: int) -> socket.socket:
    """Return a socket that was handed over, with the options of one from `bind`."""
    try:
        listener = socket.socket(fileno=fd)
    except OSError as error:
        raise _unusable(name, fd, "not a socket") from error
    families = (socket.AF_INET, socket.AF_INET6)
    if listener.type != socket.SOCK_STREAM or listener.family not in families:
        kinds = (getattr(each, "name", str(each)) for each in (listener.family, listener.type))
        raise _unusable(name, fd, " ".join(kinds))
    if not _is_listening(listener):
        raise _unusable(name, fd, "not listening")
    _listen(listener, backlog)
    return listener


def _unusable(name: str, fd: int, kind: str) -> UsageError:
    return UsageError(
        f"socket {fd} ({name}) was passed by the service manager, but is {kind}:"
        " it must be a listening TCP socket (ListenStream=)"
    )


def _is_listening(listener: socket.socket) -> bool:
    return bool(listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _listen(listener: socket.socket, backlog: int) -> None:
    """Listen, without blocking. On Linux, accepted sockets inherit the options set here."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_SECONDS)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_SECONDS)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MILLISECONDS)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.listen(backlog)
    listener.setblocking(False)


def announce(config: Config) -> None:
    """Log where the server listens."""
    fields = {
        "server.address": config.host,
        "server.port": config.port,
        "gserver.workers": config.workers,
        "gserver.max_clients": config.max_clients,
        "gserver.cluster": config.cluster_name if config.redis_url else None,
        "gserver.admin_port": config.admin_port if config.admin_port >= 0 else None,
        "gserver.has_tls": bool(config.tls_cert),
    }
    where = show_address(config.host, config.port)
    message = f"listening on {where}"
    client = f"nc {config.host} {config.port}"
    if config.tls_cert:
        message += " (TLS)"
        client = f"openssl s_client -quiet -connect {where}"
    if config.log_format == "text":
        message += f" (process {os.getpid()}): {client}, then WHO, WHERE or WHY; Ctrl-C stops it"
    logs.event(logging.INFO, "server.listening", message, fields)
