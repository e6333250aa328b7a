"""The listening sockets of the endpoints, and of the admin port.

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
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, NamedTuple

from gserver import logs
from gserver.addresses import (
    SOCKET_MODE,
    TCP,
    TLS,
    UNIX,
    Endpoint,
    is_any_ipv6,
    show_address,
    show_endpoints,
)
from gserver.config import Config, parse_bind
from gserver.errors import FatalError, UsageError
from gserver.supervise import privileges

#: A peer that died without a FIN is noticed within two minutes: 60 s of silence, then 4 probes 15 s
#: apart. Unacknowledged data is given up after the same time.
KEEPALIVE_IDLE_SECONDS = 60
KEEPALIVE_INTERVAL_SECONDS = 15
KEEPALIVE_PROBES = 4
USER_TIMEOUT_MILLISECONDS = 120_000
ADMIN_BACKLOG = 64

#: The name of the admin port among passed sockets (`FileDescriptorName=`). `tcp` and `tls` say what
#: a socket with a port speaks. Any other name: as without `--bind`.
ADMIN_PORT = "admin"
#: The options that name a host and a port.
SHORT_FORM = "--host", "--port"
LONG_FORM = "--bind", "--bind"
ADMIN_FORM = "--admin-host", "--admin-port"
#: Another gserver locks the folder of a socket file for milliseconds; another program may do so for
#: longer.
LOCK_SECONDS, LOCK_RETRY_SECONDS = 2.0, 0.01

_NETWORK = socket.AF_INET, socket.AF_INET6
_REASONS = {
    errno.EADDRINUSE: "it is in use by another program: stop that one, or choose another {port}",
    errno.EACCES: "no permission: choose a {port} from 1024 up, or grant CAP_NET_BIND_SERVICE",
    errno.EADDRNOTAVAIL: "this machine has no such address: choose another {host}",
}
_FILE_REASONS = {
    errno.EADDRINUSE: "it is in use by another program: stop that one, or choose another path",
    errno.ENOTSOCK: "there is another file, which is no socket: remove it, or choose another path",
    errno.EPERM: "another user's socket is there: remove it, or choose another path",
    errno.ENOENT: "the folder does not exist: make it, or choose another path",
    errno.EACCES: "no permission to read the folder, or to make a file in it: choose another path",
    errno.EAGAIN: "another program has locked the folder: choose another one",
}


class SocketFile(NamedTuple):
    """A socket file that gserver has made: its path, and what tells it from other files there."""

    path: str
    device: int
    inode: int

    @classmethod
    def at(cls, path: str) -> "SocketFile | None":
        """Return the file that is there now, or None. Raises OSError if that cannot be known."""
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            return None
        return cls(path, found.st_dev, found.st_ino)

    def remove(self) -> None:
        """Remove it, unless another one has replaced it."""
        with suppress(OSError):  # With --user, its folder may belong to root.
            if SocketFile.at(self.path) == self:
                os.unlink(self.path)


class Listener:
    """A listening socket and the address that it keeps."""

    def __init__(self, sock: socket.socket, backlog: int, file: SocketFile | None = None) -> None:
        """`file` is the one to remove at the end."""
        self.sock = sock
        self.file = file
        self._has_told_loss = False
        #: Whether no client can connect by it, as `reopen_if_closed` has found.
        self.is_lost = False
        self._address = sock.getsockname()
        self._backlog = backlog

    def close(self) -> None:
        """Stop listening. The second call does nothing."""
        if self.file and self.sock.fileno() >= 0:
            # First: while it listens, no other server takes the file for a stale one.
            self.file.remove()
        self.sock.close()

    @property
    def has_lost_file(self) -> bool:
        """Whether its socket file was removed, or replaced by another one."""
        if self.file is None or self.sock.fileno() < 0:
            return False
        try:
            return SocketFile.at(self.file.path) != self.file
        except OSError:  # With --user, its folder may be closed to this process.
            return False

    def reopen_if_closed(self) -> None:
        """Listen again if the socket was shut down from outside (`ss -K`).

        That reopens it for all processes that share it. A socket file cannot be had back, so its
        loss is logged.
        """
        self.is_lost = self.has_lost_file
        if self.is_lost and not self._has_told_loss:
            self._has_told_loss = True
            message = f"{self._address} was removed or replaced: no client can connect by it"
            logs.warn_ratelimited("server.port_closed", f"{message}; SIGHUP makes it again")
        if self.sock.family is socket.AF_UNIX or self.sock.fileno() < 0 or _is_listening(self.sock):
            return
        message = f"{show_address(*self._address[:2])} was shut down by another process"
        fields: dict[str, str] = {}
        try:
            self._reopen()
            message += ": listening again"
        except OSError as error:
            self.is_lost = True
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


def close_all(listeners: Iterable[Listener]) -> None:
    """Stop listening on all of them. The second call does nothing."""
    for each in listeners:
        each.close()


class Ports(NamedTuple):
    """The listeners of the endpoints, in their order, and of the admin port, if there is one."""

    endpoints: tuple[Listener, ...]
    admin: tuple[Listener, ...]


def open_ports(config: Config, handed_over: Sequence[tuple[str, int]]) -> tuple[Config, Ports]:
    """Open the endpoints and the admin port.

    `handed_over` are the names and descriptors from a service manager. Endpoints among them replace
    those of the options, and an admin port that of the options. Returns the configuration with the
    real addresses, and the listeners. Raises `FatalError` if an address cannot be had, and
    `UsageError` for a socket that was handed over and cannot be used: its clients would wait for
    ever.
    """
    adopted, adopted_admin = _adopt_all(config, handed_over)
    opened: list[Listener] = []
    try:
        endpoints = [endpoint for endpoint, _ in adopted] or _bind_all(config, opened)
        opened += [Listener(sock, config.backlog) for _, sock in adopted]
        config, admin = _open_admin_port(config.with_endpoints(endpoints), adopted_admin)
        # The addresses may not be those of the options.
        if problem := config.contradiction or config.endpoint_contradiction:
            raise UsageError(problem)
    except FatalError:
        close_all(opened)
        raise
    return config, Ports(tuple(opened), admin)


def _open_admin_port(
    config: Config, adopted: socket.socket | None
) -> tuple[Config, tuple[Listener, ...]]:
    """Return the configuration with the real address, and the listener, if there is one."""
    if config.admin_port < 0:
        return config, ()
    sock = adopted or bind(config.admin_host, config.admin_port, form=ADMIN_FORM)
    host, port = sock.getsockname()[:2]
    # An address that was bound stays as the user has written it: it may be a name.
    config = replace(config, admin_port=port, admin_host=host if adopted else config.admin_host)
    return config, (Listener(sock, ADMIN_BACKLOG),)


def _bind_all(config: Config, opened: list[Listener]) -> list[Endpoint]:
    """Open the endpoints, and add them to `opened`; return them with their real ports."""
    endpoints = []
    form = LONG_FORM if config.bind else SHORT_FORM
    for endpoint in config.endpoints:
        if endpoint.transport == UNIX:
            opened.append(_bind_file(endpoint, config.backlog, config.user))
            endpoints.append(endpoint)
        else:
            is_v6_only = _shares_port(endpoint, config.endpoints)
            sock = bind(endpoint.host, endpoint.port, config.backlog, form, is_v6_only=is_v6_only)
            opened.append(Listener(sock, config.backlog))
            endpoints.append(replace(endpoint, port=sock.getsockname()[1]))
    return endpoints


def _shares_port(endpoint: Endpoint, endpoints: Sequence[Endpoint]) -> bool:
    """Whether it is `::`, and another endpoint has its port on an IPv4 address."""
    others = (other for other in endpoints if other.transport != UNIX and ":" not in other.host)
    return is_any_ipv6(endpoint.host) and any(other.port == endpoint.port != 0 for other in others)


def _adopt_all(
    config: Config, handed_over: Sequence[tuple[str, int]]
) -> tuple[list[tuple[Endpoint, socket.socket]], socket.socket | None]:
    """Take over sockets; return the endpoints, and the admin port if it is among them."""
    endpoints: list[tuple[Endpoint, socket.socket]] = []
    admin = None
    for name, fd in handed_over:
        if name != ADMIN_PORT:
            endpoints.append(_adopt_endpoint(config, name, fd))
        elif config.admin_port < 0 or admin:
            problem = "it has passed one already"
            if not admin:
                problem = "there is no admin port: set --admin-port"
            raise UsageError(
                f"socket {fd} (admin) was passed by the service manager, but {problem}"
            )
        else:
            admin = _adopt(name, fd, ADMIN_BACKLOG, _NETWORK)
    return endpoints, admin


def _adopt_endpoint(config: Config, name: str, fd: int) -> tuple[Endpoint, socket.socket]:
    """Take over an endpoint. A Unix socket is plain. The name tells TCP from TLS, or --tls-cert."""
    sock = _adopt(name, fd, config.backlog, (*_NETWORK, socket.AF_UNIX))
    address = sock.getsockname()
    if sock.family is socket.AF_UNIX:
        endpoint = Endpoint(UNIX, path=address if isinstance(address, str) else "")
        if not _is_text(endpoint):
            raise UsageError(
                f"socket {fd} ({name}) was passed by the service manager, but has a path that"
                f" --bind cannot name: {address!r}"
            )
        return endpoint, sock
    default = TLS if config.tls_cert else TCP
    return Endpoint(name if name in (TCP, TLS) else default, *address[:2]), sock


def _is_text(endpoint: Endpoint) -> bool:
    """Whether it can be written as text. So children, and an upgraded supervisor, get it."""
    with suppress(ValueError):
        return parse_bind(str(endpoint)) == str(endpoint) and "?" not in endpoint.path
    return False


def inherit(
    endpoint_fds: Sequence[int], files: Sequence[Any], admin_fds: Sequence[int], backlog: int
) -> Ports:
    """Return the ports of the program that this one has replaced. `files` are those to remove."""
    endpoints = [
        Listener(socket.socket(fileno=fd), backlog, SocketFile._make(file) if file else None)
        for fd, file in zip(endpoint_fds, files, strict=True)
    ]
    admin = [Listener(socket.socket(fileno=fd), ADMIN_BACKLOG) for fd in admin_fds]
    return Ports(tuple(endpoints), tuple(admin))


def bind(
    host: str,
    port: int,
    backlog: int = ADMIN_BACKLOG,
    form: tuple[str, str] = SHORT_FORM,
    *,
    is_v6_only: bool = False,
) -> socket.socket:
    """Return a non-blocking listening socket; raise `FatalError` if the address cannot be had.

    `form` has the options that the host and the port come from: the error names them. A socket on
    `::` accepts IPv4 too, unless `is_v6_only`.
    """
    where = show_address(host, port)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = f"the name {host!r} does not resolve: choose another {form[0]}"
        raise FatalError(f"cannot listen on {where}: {reason}") from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family is socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(is_v6_only))
        listener.bind(address)
        _listen(listener, backlog)
    except OSError as error:
        listener.close()
        reason = _REASONS.get(error.errno or 0, os.strerror(error.errno or 0))
        reason = reason.format(host=form[0], port=form[1])
        raise FatalError(f"cannot listen on {where}: {reason}") from error
    return listener


def renew(config: Config, listeners: Sequence[Listener]) -> tuple[Listener, ...]:
    """Return the listeners of the endpoints, with new ones for those that have lost their files.

    One that cannot be had again stays as it is.
    """
    found = []
    for endpoint, listener in zip(config.endpoints, listeners, strict=True):
        if listener.has_lost_file:
            try:
                found.append(_bind_file(endpoint, config.backlog, config.user))
            except FatalError as error:
                logs.warn_ratelimited("server.port_closed", str(error))
                found.append(listener)
        else:
            found.append(listener)
    return tuple(found)


def _bind_file(endpoint: Endpoint, backlog: int, user: str) -> Listener:
    """Return the listener of a Unix socket, whose file belongs to `--user`.

    Replaces a socket file that nobody listens on. Raises `FatalError`.
    """
    sock, file, path = None, None, endpoint.path
    # The file has its mode from the beginning.
    before = os.umask(0o777 & ~(SOCKET_MODE if endpoint.mode is None else endpoint.mode))
    try:
        with _locked(os.path.dirname(path) or "."):
            _remove_if_stale(path)
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(path)
            file = SocketFile.at(path)
            _listen(sock, backlog)
        if file:
            privileges.give_socket(*file, user)
        return Listener(sock, backlog, file)
    except (OSError, FatalError) as error:
        if file:
            file.remove()
        if sock:
            sock.close()
        if isinstance(error, FatalError):
            raise
        reason = _FILE_REASONS.get(error.errno or 0, os.strerror(error.errno or 0))
        raise FatalError(f"cannot listen on {path}: {reason}") from error
    finally:
        os.umask(before)


@contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Lock a folder, so that two servers that start at once do not remove each other's new file."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        give_up_at = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= give_up_at:
                    raise
            time.sleep(LOCK_RETRY_SECONDS)
        yield
    finally:
        os.close(fd)


def _remove_if_stale(path: str) -> None:
    """Remove a socket file that nobody listens on. Raises OSError for any other file."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.ENOTSOCK, path)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except FileNotFoundError:
            return
        except PermissionError as error:
            raise OSError(errno.EPERM, path) from error
        except BlockingIOError:
            pass  # Its queue is full.
    raise OSError(errno.EADDRINUSE, path)


def _adopt(
    name: str, fd: int, backlog: int, families: Sequence[socket.AddressFamily]
) -> socket.socket:
    """Return a socket that was handed over, with the options of one from `bind`."""
    wanted = "listening stream" if socket.AF_UNIX in families else "listening TCP"
    try:
        listener = socket.socket(fileno=fd)
    except OSError as error:
        raise _unusable(name, fd, "not a socket", wanted) from error
    if listener.type != socket.SOCK_STREAM or listener.family not in families:
        kinds = (getattr(each, "name", str(each)) for each in (listener.family, listener.type))
        raise _unusable(name, fd, " ".join(kinds), wanted)
    if not _is_listening(listener):
        raise _unusable(name, fd, "not listening", wanted)
    _listen(listener, backlog)
    return listener


def _unusable(name: str, fd: int, kind: str, wanted: str) -> UsageError:
    return UsageError(
        f"socket {fd} ({name}) was passed by the service manager, but is {kind}:"
        f" it must be a {wanted} socket (ListenStream=)"
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
    first = config.endpoints[0]
    fields = {
        "server.address": first.host or first.path,
        "server.port": None if first.transport == UNIX else first.port,
        "gserver.endpoints": show_endpoints(config.endpoints),
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
        if config.admin_port >= 0:
            admin = show_address(config.admin_host, config.admin_port)
            message += f"; its state: http://{admin}/"
    logs.event(logging.INFO, "server.listening", message, fields)


def describe(config: Config) -> str:
    """Return where the server listens, for people."""
    if config.bind:
        return ", ".join(map(str, config.endpoints))
    where = show_address(config.host, config.port)
    return f"{where} (TLS)" if config.tls_cert else where


def _client_for(endpoint: Endpoint) -> str:
    """Return the shell command of a client."""
    if endpoint.transport == UNIX:
        return f"nc -U {endpoint.path}"
    if endpoint.transport == TLS:
        return f"openssl s_client -quiet -connect {show_address(endpoint.host, endpoint.port)}"
    return f"nc {endpoint.host} {endpoint.port}"
