"""Addresses: of the endpoints, where clients connect; of clients; and networks.

An endpoint is written as a URL: `tcp://127.0.0.1:4242`, `tls://[::]:4244`,
`unix:/run/gserver.sock?mode=0660`. Pure: only localhost is resolved, no file is looked at.
"""

import contextlib
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

#: The transports: plain TCP, TLS, and a socket file of this machine, without TLS.
TCP, TLS, UNIX = "tcp", "tls", "unix"
TRANSPORTS = TCP, TLS, UNIX
#: The mode of a socket file, if none is given: its owner and group may connect.
SOCKET_MODE = 0o660
#: The kernel's limit on the path of a socket file (unix(7)).
MAX_PATH_BYTES = 107

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where clients connect, and how they speak there."""

    transport: str
    host: str = ""
    port: int = 0
    #: The socket file of a Unix socket.
    path: str = ""
    #: Its mode; None if none was given.
    mode: int | None = None

    def __str__(self) -> str:
        if self.transport == UNIX:
            return f"unix:{self.path}" + ("" if self.mode is None else f"?mode={self.mode:04o}")
        return f"{self.transport}://{show_address(self.host, self.port)}"

    def overlaps(self, other: "Endpoint") -> bool:
        """Whether the two cannot both be bound. `::` and an IPv4 address can, with one port."""
        if UNIX in (self.transport, other.transport):
            return self.path == other.path != ""
        has_one_family = (":" in self.host) == (":" in other.host)
        is_same_port = self.port == other.port != 0
        return is_same_port and has_one_family and hosts_overlap(self.host, other.host)


def parse_endpoint(text: str) -> Endpoint:
    """Return the endpoint that a URL names; raise ValueError with a reason for people."""
    transport, _, rest = text.partition(":")
    if transport == UNIX:
        return _parse_unix(text, rest)
    if transport not in (TCP, TLS) or not re.fullmatch("//[^/?#]+", rest):
        raise ValueError(
            f"{text!r} is not an endpoint: use tcp://HOST:PORT, tls://HOST:PORT or unix:PATH"
        )
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(
            f"{text!r}: the port is a number from 0 to 65535, and IPv6 has brackets, as in"
            " tcp://[::1]:4242"
        ) from error
    if "@" in rest:
        raise ValueError(f"{text!r} contains a user name: remove it")
    if not host or port is None:
        problem = "no port" if host else "no host: 0.0.0.0 or :: stand for all"
        raise ValueError(f"{text!r} has {problem}")
    # urlsplit takes `[::1]x:1`, and leading zeros.
    if rest.removeprefix("//").lower() != show_address(host, port).lower():
        raise ValueError(f"{text!r} is not HOST:PORT after {transport}://")
    return Endpoint(transport, host, port)


def _parse_unix(text: str, rest: str) -> Endpoint:
    path, question, query = rest.partition("?")
    if path.startswith("///"):  # As in a URL with an empty host.
        path = path.removeprefix("//")
    if not re.fullmatch(r"(?!//|@)[!-~]+", path) or path.endswith("/"):
        raise ValueError(
            f"{text!r} is not unix:PATH with a path of printable ASCII, such as"
            " unix:/run/gserver.sock"
        )
    if len(path) > MAX_PATH_BYTES:
        raise ValueError(f"{path!r} is too long for a socket: at most {MAX_PATH_BYTES} characters")
    if question and not re.fullmatch("mode=[0-7]{3,4}", query):
        raise ValueError(f"{query!r} is not a mode in octal digits, such as mode=0660")
    mode = int(query.removeprefix("mode="), 8) if query else None
    if mode and mode > 0o777:
        raise ValueError(f"{query!r} is more than read, write and execute (mode=0777)")
    return Endpoint(UNIX, path=path, mode=mode)


def show_endpoints(endpoints: Iterable[Endpoint]) -> str:
    """Return the URLs with blanks between them, as `--bind` has them."""
    return " ".join(map(str, endpoints))


def client_address(name: Any) -> tuple[str, int]:
    """Return host and port for what `getpeername` or `accept` returns.

    They are `unix` and 0 for a Unix socket.
    """
    if isinstance(name, tuple):
        return plain_host(name[0]), int(name[1])
    return UNIX, 0


def parse_networks(text: str) -> tuple[Network, ...]:
    """Return the networks of a list such as `10.0.0.0/8,fd00::/8`; raise ValueError."""
    return tuple(_parse_network(word.strip()) for word in text.split(","))


def _parse_network(text: str) -> Network:
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        hint = "such as 10.0.0.0/8, or 10.0.0.7 for one address"
        reason = "its end must be zeros" if "host bits" in str(error) else f"use one {hint}"
        raise ValueError(f"{text!r} is not a network: {reason}") from error
    if isinstance(network, ipaddress.IPv6Network) and network.network_address.ipv4_mapped:
        raise ValueError(f"{text!r} has addresses of IPv4: write them so, without ::ffff:")
    return network


def is_any_ipv6(host: str) -> bool:
    """Whether it stands for all IPv6 addresses: `::`, however it is written."""
    return ":" in host and any(address.is_unspecified for address in _addresses(host))


def is_loopback(host: str) -> bool:
    """Whether an address, or the name `localhost`, can be reached from this machine only."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host.lower() == "localhost"


def plain_host(host: str) -> str:
    """Return an IP address without the prefix that IPv4 has on an IPv6 socket."""
    rest = host.removeprefix("::ffff:")
    return rest if "." in rest else host


def show_address(host: str, port: int) -> str:
    """Return `host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def hosts_overlap(first: str, second: str) -> bool:
    """Whether sockets on two addresses cannot have the same port. Only localhost is resolved."""
    if first == second:
        return True
    return any(
        _covers(one, other) or _covers(other, one)
        for one in _addresses(first)
        for other in _addresses(second)
    )


def _addresses(host: str) -> list[Address]:
    names = ["127.0.0.1", "::1"] if host.lower() == "localhost" else [host]
    try:
        return [ipaddress.ip_address(name) for name in names]
    except ValueError:
        return []


def _covers(wide: Address, narrow: Address) -> bool:
    # A socket on `::` accepts IPv4, too.
    if wide.is_unspecified:
        return wide.version == 6 or narrow.version == 4
    return wide == narrow
