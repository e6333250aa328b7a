"""The listening sockets: bound or taken over once by the supervisor, inherited by children, kept open by reloads."""

import contextlib
import ctypes
import errno
import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import replace

from gserver import logs
from gserver.config import Config, show_address
from gserver.errors import FatalError, UsageError

#: A peer that died without a FIN is found out within about two minutes: 60 s of silence, then 4
#: probes 15 s apart; unacknowledged data is given up on after the same time.
KEEPALIVE_IDLE_SECONDS = 60
KEEPALIVE_INTERVAL_SECONDS = 15
KEEPALIVE_PROBES = 4
USER_TIMEOUT_MILLISECONDS = 120_000

_REASONS = {
    errno.EADDRINUSE: "it is in use by another program: stop that one, or choose another {port}",
    errno.EACCES: "no permission: choose a {port} from 1024 up, or grant CAP_NET_BIND_SERVICE",
    errno.EADDRNOTAVAIL: "this machine has no such address: choose another {host}",
}


#: Names by which a service manager tells the sockets of the two ports apart; one of any other name
#: is the first.
PORT, ADMIN_PORT = "gserver", "admin"
ADMIN_BACKLOG = 64


def open_ports(
    config: Config, handed_over: Sequence[tuple[str, int]]
) -> tuple[Config, socket.socket, socket.socket | None]:
    """Return a config that says where the ports are, the socket of the port, and that of the admin
    port or None.

    Taken from `handed_over`, names and descriptors, or else bound. Raises `FatalError` when one
    cannot be had, and `UsageError` when a socket was handed over that is not fit for use, or that
    there is no use for: who connected to it would wait for ever.
    """
    adopted: dict[str, socket.socket] = {}
    for name, fd in handed_over:
        role = name if name in (PORT, ADMIN_PORT) or PORT in dict(handed_over) else PORT
        if (
            role in adopted
            or role not in (PORT, ADMIN_PORT)
            or (role == ADMIN_PORT and config.admin_port < 0)
        ):
            wanted = f"one named {PORT}" + (
                f" and one named {ADMIN_PORT}" if config.admin_port >= 0 else ""
            )
            raise UsageError(
                f"socket {fd} ({name}) was handed over, and there is only use for {wanted}"
            )
        adopted[role] = _adopt(name, fd, config.backlog)
    port = adopted.get(PORT) or bind(config.host, config.port, config.backlog)
    config = replace(config, port=port.getsockname()[1])
    if PORT in adopted:
        config = replace(config, host=port.getsockname()[0])
    if config.admin_port < 0:
        return config, port, None
    admin = adopted.get(ADMIN_PORT) or bind(config.admin_host, config.admin_port, prefix="--admin-")
    config = replace(config, admin_port=admin.getsockname()[1])
    if ADMIN_PORT in adopted:
        config = replace(config, admin_host=admin.getsockname()[0])
    if config.contradiction:  # The address may be another one than the options have said.
        raise UsageError(config.contradiction)
    return config, port, admin


def bind(host: str, port: int, backlog: int = ADMIN_BACKLOG, prefix: str = "--") -> socket.socket:
    """Return a non-blocking listening socket; raise `FatalError` when the address cannot be had.

    `prefix` is that of the options that the address comes from, for a person to know which.
    """
    where, options = show_address(host, port), {"host": f"{prefix}host", "port": f"{prefix}port"}
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise FatalError(
            f"cannot listen on {where}: the name {host!r} does not resolve: choose another {prefix}host"
        ) from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        _listen(listener, backlog)
    except OSError as error:
        listener.close()
        reason = _REASONS.get(error.errno or 0, os.strerror(error.errno or 0))
        raise FatalError(f"cannot listen on {where}: {reason.format(**options)}") from error
    return listener


def _adopt(name: str, fd: int, backlog: int) -> socket.socket:
    """Return a socket that was handed over, as `bind` would have made it."""
    wrong = f"socket {fd} ({name}) was handed over, and is {{}}: a TCP socket that listens is wanted (ListenStream=)"
    try:
        listener = socket.socket(fileno=fd)
    except OSError as error:
        raise UsageError(wrong.format("no socket")) from error
    if listener.type != socket.SOCK_STREAM or listener.family not in (
        socket.AF_INET,
        socket.AF_INET6,
    ):
        kind = (getattr(each, "name", str(each)) for each in (listener.family, listener.type))
        raise UsageError(wrong.format(" ".join(kind)))
    if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise UsageError(wrong.format("not listening"))
    _listen(listener, backlog)
    return listener


def _listen(listener: socket.socket, backlog: int) -> None:
    """Listen, without blocking. The options are set here, once: on Linux an accepted socket inherits them."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_SECONDS)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_SECONDS)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MILLISECONDS)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.listen(backlog)
    listener.setblocking(False)


def keep(config: Config, port: socket.socket, admin: socket.socket | None) -> None:
    """Listen again where somebody has ended that, for all processes that share the socket: `ss -K`, a shutdown."""
    for listener, backlog in ((port, config.backlog), (admin, ADMIN_BACKLOG)):
        if (
            listener
            and listener.fileno() >= 0
            and not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        ):
            address = listener.getsockname()
            fields: dict[str, str] = {}
            try:
                # To AF_UNSPEC: else who is accepted would be as shut down as it is, and its error
                # an event for ever.
                ctypes.CDLL(None).connect(listener.fileno(), bytes(16), 16)
                listener.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                with contextlib.suppress(
                    OSError
                ):  # It has its port still, unless the system had chosen that.
                    listener.bind(address)
                listener.listen(backlog)
                outcome = "listening again"
            except OSError as error:
                outcome, fields = str(error), logs.error_fields(error)
            logs.warn_ratelimited(
                "server.port_closed",
                f"somebody has closed {show_address(*address[:2])}: {outcome}",
                fields,
            )


def announce(config: Config) -> None:
    """Log where the server listens."""
    fields = {
        "server.address": config.host,
        "server.port": config.port,
        "gserver.workers": config.workers,
    }
    fields |= {"gserver.max_clients": config.max_clients}
    fields |= {"gserver.cluster": config.cluster_name if config.redis_url else None}
    fields |= {"gserver.admin_port": config.admin_port if config.admin_port >= 0 else None}
    fields |= {"gserver.has_tls": bool(config.tls_cert)}
    where = show_address(config.host, config.port)
    talk = (
        f"openssl s_client -quiet -connect {where}"
        if config.tls_cert
        else f"nc {config.host} {config.port}"
    )
    hint = f": {talk}, then WHO, WHERE or WHY; Ctrl-C stops it"
    message = f"listening on {where}" + (" by TLS" if config.tls_cert else "")
    logs.event(
        logging.INFO,
        "server.listening",
        message + (hint if config.log_format == "text" else ""),
        fields,
    )
