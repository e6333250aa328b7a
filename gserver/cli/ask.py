"""A client for people and health checks: asks the first of several servers that answers.

Imports nothing of the server: it knows only the wire.
"""

import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic

from gserver.errors import FatalError, UsageError

#: A reply longer than this is no reply of a gserver.
MAX_REPLY_BYTES = 65536
#: What the replies to these look like: something else that listens there must not be taken for a
#: gserver.
REPLIES = {"WHO": "[0-9]+", "WHERE": "[!-~]+", "WHY": "42"}


@dataclass(frozen=True, slots=True)
class Trust:
    """Whom to trust in TLS, and who one is: files in PEM; "" for the system's CAs, no certificate, the host's name."""

    ca: str = ""
    cert: str = ""
    key: str = ""
    name: str = ""

    def secure(self) -> Callable[[socket.socket, str], socket.socket]:
        """Return what begins TLS on a socket to a host; raise `UsageError` for a file that is none."""
        import ssl  # Loaded only where it is wanted.

        option, path = "--tls-ca", self.ca
        try:
            context = ssl.create_default_context(cafile=self.ca or None)
            option, path = "--tls-cert", self.cert
            if self.cert:
                context.load_cert_chain(self.cert, self.key or None, lambda: "")
        except ssl.SSLError as error:
            key = ", its key with it or in --tls-key, not encrypted" if path == self.cert else ""
            raise UsageError(
                f"{option} {path} cannot be used: it must hold a certificate in PEM{key}"
            ) from error
        except OSError as error:
            also = f" or --tls-key {self.key}" if path == self.cert and self.key else ""
            raise UsageError(f"{option} {path}{also} cannot be read: {error.strerror}") from error
        return lambda sock, host: context.wrap_socket(sock, server_hostname=self.name or host)


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of `HOST:PORT`, `[IPV6]:PORT`; raise `UsageError` for anything else."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if (
        not colon
        or not host
        or "," in host
        or not re.fullmatch("[0-9]{1,5}", port)
        or not 0 < int(port) < 65536
    ):
        raise UsageError(
            f"{text!r} is no address: write HOST:PORT, such as 127.0.0.1:4242 or [::1]:4242"
        )
    return host, int(port)


def ask(
    commands: Sequence[str],
    servers: Sequence[tuple[str, int]],
    timeout_seconds: float,
    trust: Trust | None = None,
) -> list[str]:
    """Return a reply for each command, all of one server: the first that answers them all without
    an ERR.

    By TLS where `trust` says whom to trust. Each server has `timeout_seconds` for everything once
    its name is found. Raises `FatalError`, which names what each one did, when none answers.
    """
    for command in commands:
        if not command.strip() or not command.isprintable():
            raise UsageError(f"{command!r} is no command: name one word, such as WHO")
    secure = trust.secure() if trust else None
    reasons = []
    for host, port in servers:
        try:
            deadline = monotonic() + timeout_seconds
            with _connect(host, port, deadline) as plain:
                plain.settimeout(_left(deadline))
                with secure(plain, host) if secure else plain as sock:
                    return _ask_one(commands, sock, deadline)
        except (OSError, UnicodeError, FatalError) as error:
            reasons.append(f"{host}:{port} {_reason(error)}")
    raise FatalError("no server answered: " + "; ".join(reasons))


def _ask_one(commands: Sequence[str], sock: socket.socket, deadline: float) -> list[str]:
    sock.sendall("".join(f"{command}\n" for command in commands).encode())
    received = b""
    while received.count(b"\n") < len(commands):
        sock.settimeout(_left(deadline))
        data = sock.recv(4096)
        received += data
        if not data or len(received) > MAX_REPLY_BYTES:
            break
    replies = received.decode("latin-1").split("\n")[:-1]
    for reply in replies:
        if not reply.isprintable() or not reply.isascii():
            raise FatalError(f"sent what is no reply: {reply[:100]!r}")
        if reply.startswith("ERR"):
            raise FatalError(f"said {reply[:100]}")
    for command, reply in zip(commands, replies, strict=False):
        if not re.fullmatch(REPLIES.get(command.strip().upper(), ".*"), reply):
            raise FatalError(f"sent what is no reply to {command}: {reply[:100]!r}")
    if len(replies) < len(commands):
        raise FatalError("closed the connection without a reply")
    return replies[: len(commands)]


def _connect(host: str, port: int, deadline: float) -> socket.socket:
    """Connect to the first of the name's addresses that accepts; one deadline holds for all of them."""
    error: OSError = TimeoutError()
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for tried, (family, kind, protocol, _, address) in enumerate(found):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(_left(deadline) / (len(found) - tried))
            sock.connect(address)
        except OSError as failed:
            sock.close()
            error = failed
        else:
            return sock
    raise error


def _left(deadline: float) -> float:
    left = deadline - monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _reason(error: Exception) -> str:
    if isinstance(error, FatalError):
        return str(error)
    if isinstance(error, TimeoutError):
        return "did not answer in time"
    if isinstance(error, ConnectionRefusedError):
        return "refused the connection (is it running?)"
    if type(error).__module__ == "ssl":
        untrusted = getattr(error, "verify_message", "")
        if untrusted:
            return f"has a certificate that is not trusted: {untrusted} (--tls-ca, --tls-name)"
        return f"came to no TLS connection: {getattr(error, 'reason', '') or error}"
    return str(error.args[-1] if error.args else error)
