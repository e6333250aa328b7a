"""The listening sockets of the ways in, and of the admin port.

The supervisor binds them, or takes them over from a service manager. Children inherit them, so they
stay open over reloads and crashes.
"""

import ctypes
import errno
import fcntl
import logging
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import NamedTuple

from gserver import logs
from gserver.addresses import SOCKET_MODE, TCP, TLS, UNIX, Way, show_address, show_ways
from gserver.config import Config
from gserver.errors import FatalError, UsageError
from gserver.supervise import privileges

#: A peer that died without a FIN is noticed within two minutes: 60 s of silence, then 4 probes 15 s
#: apart. Unacknowledged data is given up after the same time.
KEEPALIVE_IDLE_SECONDS = 60
KEEPALIVE_INTERVAL_SECONDS = 15
KEEPALIVE_PROBES = 4
USER_TIMEOUT_MILLISECONDS = 120_000
ADMIN_BACKLOG = 64

#: The name by which a service manager tells the admin port from the ways in
#: (`FileDescriptorName=`). Those of ways in are their kinds; any other name is that of a way
#: without `--bind`.
ADMIN_PORT = "admin"
#: Without --bind, a way in is named by two options.
SHORT_FORM = "--host", "--port"

_REASONS = {
    errno.EADDRINUSE: "it is in use by another program: stop that one, or choose another {port}",
    errno.EACCES: "no permission: choose a {port} from 1024 up, or grant CAP_NET_BIND_SERVICE",
    errno.EADDRNOTAVAIL: "this machine has no such address: choose another {host}",
}
#: The families of the sockets that have a host and a port.
_NETWORK = socket.AF_INET, socket.AF_INET6
_ADMIN_OPTIONS = "--admin-host", "--admin-port"
_FILE_REASONS = {
    errno.ENOENT: "the folder does not exist: make it, or choose another path",
    errno.EACCES: "no permission to make a file there: choose another path",
    errno.EPERM: "no permission to make a file there: choose another path",
}


class Listener:
    """A listening socket and the address that it keeps."""

    def __init__(self, sock: socket.socket, backlog: int, own_path: str = "") -> None:
        """`own_path` is the socket file that gserver has made, and removes."""
        self.sock = sock
        self._address = sock.getsockname()
        self._backlog = backlog
        self._own_path = own_path
        self._file = _identity(own_path)

    def close(self) -> None:
        """Stop listening, and remove the socket file, unless another server has replaced it."""
        if self.sock.fileno() < 0:
            return
        self.sock.close()
        if self._file and _identity(self._own_path) == self._file:
            with suppress(OSError):  # With --user, its folder may belong to root.
                os.unlink(self._own_path)

    def reopen_if_closed(self) -> None:
        """Listen again if the socket was shut down from outside (`ss -K`).

        That reopens it for all processes that share it.
        """
        if self.sock.family is socket.AF_UNIX or self.sock.fileno() < 0 or _is_listening(self.sock):
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
    """The listeners of the ways in, in their order, and that of the admin port, if there is one."""

    ways: tuple[Listener, ...]
    admin: tuple[Listener, ...]


def open_ports(config: Config, handed_over: Sequence[tuple[str, int]]) -> tuple[Config, Ports]:
    """Open the ways in and the admin port.

    `handed_over` are the names and descriptors from a service manager. If a way in is among them,
    none is bound; the same applies to the admin port. Returns the configuration with the real
    addresses, and the listeners. Raises `FatalError` if an address cannot be had, and `UsageError`
    for a socket that was handed over and cannot be used: its clients would wait for ever.
    """
    adopted, adopted_admin = _adopt_all(config, handed_over)
    opened: list[Listener] = []
    try:
        ways = [way for way, _ in adopted] or _bind_all(config, opened)
        opened += [Listener(sock, config.backlog) for _, sock in adopted]
        config = config.with_ways(ways)
        config, admin = _open_admin_port(config, adopted_admin)
        if config.contradiction:  # The addresses may not be those of the options.
            raise UsageError(config.contradiction)
    except FatalError:
        for each in opened:
            each.close()
        raise
    return config, Ports(tuple(opened), admin)


def _open_admin_port(
    config: Config, adopted: socket.socket | None
) -> tuple[Config, tuple[Listener, ...]]:
    """Return the configuration with the real address, and the listener, if there is one."""
    if config.admin_port < 0:
        return config, ()
    sock = adopted or bind(config.admin_host, config.admin_port, options=_ADMIN_OPTIONS)
    host, port = sock.getsockname()[:2]
    # An address that was bound stays as the user has written it: it may be a name.
    config = replace(config, admin_port=port, admin_host=host if adopted else config.admin_host)
    return config, (Listener(sock, ADMIN_BACKLOG),)


def _bind_all(config: Config, opened: list[Listener]) -> list[Way]:
    """Open the ways in, and add them to `opened`; return them with their real ports and modes."""
    ways = []
    for way in config.ways:
        if way.kind == UNIX:
            ways.append(replace(way, mode=SOCKET_MODE if way.mode is None else way.mode))
            sock = _bind_file(ways[-1], config.backlog, config.user)
        else:
            options = ("--bind", "--bind") if config.bind else SHORT_FORM
            is_v6_only = _shares_port(way, config.ways)
            sock = bind(way.host, way.port, config.backlog, options, is_v6_only=is_v6_only)
            ways.append(replace(way, port=sock.getsockname()[1]))
        opened.append(Listener(sock, config.backlog, way.path))
    return ways


def _shares_port(way: Way, ways: Sequence[Way]) -> bool:
    """Whether another way in has the port on IPv4, so that `::` may not have it there, too."""
    others = (other for other in ways if other.kind != UNIX and ":" not in other.host)
    return way.host == "::" and any(other.port == way.port != 0 for other in others)


def _adopt_all(
    config: Config, handed_over: Sequence[tuple[str, int]]
) -> tuple[list[tuple[Way, socket.socket]], socket.socket | None]:
    """Take over sockets; return the ways in, and the admin port if it is among them."""
    ways: list[tuple[Way, socket.socket]] = []
    admin = None
    for name, fd in handed_over:
        if name != ADMIN_PORT:
            ways.append(_adopt_way(config, name, fd))
        elif config.admin_port < 0 or admin:
            problem = "it has passed one already"
            if not admin:
                problem = "there is no admin port: set --admin-port"
            raise UsageError(
                f"socket {fd} (admin) was passed by the service manager, but {problem}"
            )
        else:
            admin = _adopt(name, fd, ADMIN_BACKLOG, _NETWORK)
    return ways, admin


def _adopt_way(config: Config, name: str, fd: int) -> tuple[Way, socket.socket]:
    """Take over a way in. Its kind is that of the socket file, or its name, or that of the port."""
    sock = _adopt(name, fd, config.backlog, (*_NETWORK, socket.AF_UNIX))
    if sock.family is socket.AF_UNIX:
        return Way(UNIX, path=_shown_path(sock.getsockname())), sock
    default = TLS if config.tls_cert else TCP
    host, port = sock.getsockname()[:2]
    return Way(name if name in (TCP, TLS) else default, host, port), sock


def _shown_path(name: str | bytes) -> str:
    """Return the path of a socket; that of one without a file begins with @ (unix(7))."""
    return name if isinstance(name, str) else "@" + name[1:].decode("ascii", "backslashreplace")


def inherit(way_fds: Sequence[int], admin_fds: Sequence[int], config: Config) -> Ports:
    """Return the ports of the program that this one has replaced."""
    ways = [
        Listener(socket.socket(fileno=fd), config.backlog, "" if way.mode is None else way.path)
        for way, fd in zip(config.ways, way_fds, strict=True)
    ]
    admin = [Listener(socket.socket(fileno=fd), ADMIN_BACKLOG) for fd in admin_fds]
    return Ports(tuple(ways), tuple(admin))


def bind(
    host: str,
    port: int,
    backlog: int = ADMIN_BACKLOG,
    options: tuple[str, str] = SHORT_FORM,
    *,
    is_v6_only: bool = False,
) -> socket.socket:
    """Return a non-blocking listening socket; raise `FatalError` if the address cannot be had.

    `options` are those that the host and the port come from: the error names them.
    """
    where = show_address(host, port)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = f"the name {host!r} does not resolve: choose another {options[0]}"
        raise FatalError(f"cannot listen on {where}: {reason}") from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_v6_only:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        _listen(listener, backlog)
    except OSError as error:
        listener.close()
        reason = _REASONS.get(error.errno or 0, os.strerror(error.errno or 0))
        reason = reason.format(host=options[0], port=options[1])
        raise FatalError(f"cannot listen on {where}: {reason}") from error
    return listener


def _bind_file(way: Way, backlog: int, user: str) -> socket.socket:
    """Return a listening Unix socket, whose file belongs to `--user`.

    A file that is there already is replaced if it is a socket without a listener.
    """
    listener = socket.socket(socket.AF_UNIX)
    # The file has its mode from the beginning.
    before = os.umask(0o777 & ~(way.mode or 0))
    try:
        with _locked(os.path.dirname(way.path) or "."):
            _remove_if_stale(way.path)
            listener.bind(way.path)
            _listen(listener, backlog)
        privileges.give(way.path, user)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            reason = "it is in use by another program: stop that one, or choose another path"
        elif error.errno == errno.ENOTSOCK:
            reason = "there is another file, which is no socket: remove it, or choose another path"
        else:
            reason = _FILE_REASONS.get(error.errno or 0, os.strerror(error.errno or 0))
        raise FatalError(f"cannot listen on {way.path}: {reason}") from error
    finally:
        os.umask(before)
    return listener


@contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Two servers that start at once must not take each other's new file for a stale one."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _remove_if_stale(path: str) -> None:
    """Remove a socket file that nobody listens on. Raises OSError for any other file."""
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise OSError(errno.ENOTSOCK, path)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass  # Its queue is full.
    raise OSError(errno.EADDRINUSE, path)


def _identity(path: str) -> tuple[int, int] | None:
    """Return what tells a file from others of the same path; None if it is not there."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _adopt(
    name: str, fd: int, backlog: int, families: Sequence[socket.AddressFamily]
) -> socket.socket:
    """Return a socket that was handed over, with the options of one from `bind`."""
    try:
        listener = socket.socket(fileno=fd)
    except OSError as error:
        raise _unusable(name, fd, "not a socket") from error
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
        " it must be a listening stream socket (ListenStream=)"
    )


def _is_listening(listener: socket.socket) -> bool:
    return bool(listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _listen(listener: socket.socket, backlog: int) -> None:
    """Listen, without blocking. On Linux, accepted sockets inherit the options set here."""
    if listener.family is not socket.AF_UNIX:
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
    first = config.ways[0]
    fields = {
        "server.address": first.host or first.path,
        "server.port": None if first.kind == UNIX else first.port,
        "gserver.ways": show_ways(config.ways),
        "gserver.workers": config.workers,
        "gserver.max_clients": config.max_clients,
        "gserver.cluster": config.cluster_name if config.redis_url else None,
        "gserver.admin_port": config.admin_port if config.admin_port >= 0 else None,
        "gserver.has_tls": bool(config.tls_cert),
    }
    message = f"listening on {describe(config)}"
    if config.log_format == "text":
        message += (
            f" (process {os.getpid()}): {_client_for(first)}, then WHO, WHERE or WHY; Ctrl-C stops"
            " it"
        )
    logs.event(logging.INFO, "server.listening", message, fields)


def describe(config: Config) -> str:
    """Return where the server listens, for people."""
    if config.bind:
        return ", ".join(map(str, config.ways))
    where = show_address(config.host, config.port)
    return f"{where} (TLS)" if config.tls_cert else where


def _client_for(way: Way) -> str:
    """Return the shell command of a client."""
    if way.kind == UNIX:
        return f"nc -U {way.path}"
    if way.kind == TLS:
        return f"openssl s_client -quiet -connect {show_address(way.host, way.port)}"
    return f"nc {way.host} {way.port}"
