"""The listening socket: bound once by the supervisor, inherited by every worker, never closed by a reload."""

import errno
import logging
import os
import socket

from gserver import logs
from gserver.config import Config
from gserver.errors import Failure

#: A peer that died without a FIN is found out within about two minutes: 60 s of silence, then 4 probes
#: 15 s apart; unacknowledged data is given up on after the same time.
KEEPALIVE_IDLE_SECONDS = 60
KEEPALIVE_INTERVAL_SECONDS = 15
KEEPALIVE_PROBES = 4
USER_TIMEOUT_MILLISECONDS = 120_000

_REASONS = {
    errno.EADDRINUSE: "it is in use by another program: stop that one, or choose another {port}",
    errno.EACCES: "no permission: choose a {port} from 1024 up, or grant CAP_NET_BIND_SERVICE",
    errno.EADDRNOTAVAIL: "this machine has no such address: choose another {host}",
}


def bind(host: str, port: int, backlog: int = 64, prefix: str = "--") -> socket.socket:
    """Return a non-blocking listening socket; raise `Failure` when the address cannot be had.

    `prefix` is that of the options that the address comes from, for a person to know which.
    The options are set here, once: on Linux an accepted socket inherits them from its listener.
    """
    where, options = show_address(host, port), {"host": f"{prefix}host", "port": f"{prefix}port"}
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise Failure(
            f"cannot listen on {where}: the name {host!r} does not resolve: choose another {prefix}host"
        ) from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_SECONDS)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_SECONDS)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MILLISECONDS)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind(address)
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        reason = _REASONS.get(error.errno or 0, os.strerror(error.errno or 0))
        raise Failure(f"cannot listen on {where}: {reason.format(**options)}") from error
    listener.setblocking(False)
    return listener


def announce(config: Config) -> None:
    """Log where the server listens."""
    fields = {"server.address": config.host, "server.port": config.port, "gserver.workers": config.workers}
    fields |= {"gserver.max_clients": config.max_clients}
    fields |= {"gserver.cluster": config.cluster_name if config.redis_url else None}
    fields |= {"gserver.admin_port": config.admin_port if config.admin_port >= 0 else None}
    fields |= {"gserver.has_tls": bool(config.tls_cert)}
    where = show_address(config.host, config.port)
    talk = f"openssl s_client -quiet -connect {where}" if config.tls_cert else f"nc {config.host} {config.port}"
    hint = f": {talk}, then WHO, WHERE or WHY; Ctrl-C stops it"
    message = f"listening on {where}" + (" by TLS" if config.tls_cert else "")
    logs.event(logging.INFO, "server.listening", message + (hint if config.log_format == "text" else ""), fields)


def show_address(host: str, port: int) -> str:
    """Return `host:port`, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
