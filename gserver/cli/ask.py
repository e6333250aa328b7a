"""A client for people and health checks: asks several servers in turn until one replies.

Imports nothing of the server; it knows only the wire (docs/protocol.md).
"""

import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic, sleep
from typing import TYPE_CHECKING, NamedTuple

from gserver.errors import FatalError, UsageError

if TYPE_CHECKING:
    import ssl

#: The kernel's limit on the path of a Unix socket (unix(7)).
MAX_PATH_BYTES = 107
#: Pause before another attempt at a socket file whose server has a full queue.
RETRY_SECONDS = 0.02
#: A server that sends more than this without a newline is not believed to be a gserver.
MAX_REPLY_BYTES = 16 * 1024 * 1024
#: The built-in commands and their replies: another program that listens there is recognised.
REPLIES = {"WHO": "[0-9]+", "WHERE": "[!-~]+", "WHY": "42"}
#: Error replies about the state of the server, not about a command: another server may do better.
REJECTIONS = (
    "ERR too many clients",
    "ERR too many clients from your address",
    "ERR TLS only",
    "ERR idle",
    "ERR too slow",
    "ERR closed by the operator",
    "ERR cluster unavailable",
)
#: What OpenSSL says of a peer that answers a ClientHello with something else than TLS.
NOT_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "UNKNOWN_PROTOCOL")


#: Host and port of a server, or the path of its Unix socket.
Address = tuple[str, int] | str


class Server(NamedTuple):
    """Where a server is, and whether it speaks TLS there; None if its address does not say."""

    address: Address
    has_tls: bool | None = None

    def speaks_tls(self, *, default: bool) -> bool:
        """Whether to use TLS; `default` is for an address that does not say."""
        return default if self.has_tls is None else self.has_tls


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """PEM files, and the name to expect. "": the system's CAs, no certificate, the host's name."""

    ca: str = ""
    cert: str = ""
    key: str = ""
    name: str = ""

    def context(self) -> "ssl.SSLContext":
        """Return the context of a client; raise `UsageError` if a file cannot be used."""
        import ssl  # Loaded only if it is needed: it takes longer than all the rest.

        option, path = "--tls-ca", self.ca
        try:
            context = ssl.create_default_context(cafile=self.ca or None)
            option, path = "--tls-cert", self.cert
            if self.cert:
                # Without a password, OpenSSL would ask for one on the terminal.
                context.load_cert_chain(self.cert, self.key or None, password=lambda: "")
        except ssl.SSLError as error:
            key = " and, here or in --tls-key, its unencrypted key" if path == self.cert else ""
            raise UsageError(
                f"{option} {path} cannot be used: it must contain a certificate in PEM{key}"
            ) from error
        except OSError as error:
            also = f" or --tls-key {self.key}" if path == self.cert and self.key else ""
            raise UsageError(f"{option} {path}{also} cannot be read: {error.strerror}") from error
        return context


@dataclass(slots=True)
class Answer:
    """What one server said: replies in the order of the commands, and a line for each failure."""

    replies: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def parse_server(text: str) -> Server:
    """Return the server at HOST:PORT, tcp://HOST:PORT, tls://HOST:PORT or unix:PATH.

    The last three say whether it speaks TLS. Raises `UsageError` for other texts.
    """
    if text.startswith("unix:"):
        return Server(_parse_path(text), has_tls=False)
    transport, separator, rest = text.rpartition("://")
    if separator and transport not in ("tcp", "tls"):
        rest = ""
    host, colon, port = rest.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    is_port = re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 65536
    if not colon or not host or "," in host or "/" in host or not is_port:
        raise UsageError(
            f"{text!r} is not an address: write HOST:PORT, such as 127.0.0.1:4242 or [::1]:4242,"
            " tls://HOST:PORT for TLS, or unix:PATH"
        )
    return Server((host, int(port)), transport == "tls" if separator else None)


def _parse_path(text: str) -> str:
    path = text.removeprefix("unix:").partition("?")[0]
    path = path.removeprefix("//") if path.startswith("///") else path
    if not path or len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise UsageError(
            f"{text!r} is not a Unix socket: write unix:PATH, of {MAX_PATH_BYTES} bytes at most"
        )
    return path


def ask(
    commands: Sequence[str],
    servers: Sequence[Server],
    timeout_seconds: float,
    tls: TlsOptions | None = None,
) -> Answer:
    """Send the commands to the servers in turn; return the answer of the first that replies to all.

    An error reply to a command counts as a reply. Each server has `timeout_seconds` for everything
    after the look-up of its name. If no server replies to all commands, the answer is that of the
    first that has replied to some. Raises `FatalError` with the reason for each server if none has.
    With `tls`, a server whose address does not say whether it speaks TLS is asked by TLS.
    """
    for command in commands:
        if not command.strip() or not command.isprintable():
            raise UsageError(f"{command!r} is not a command: use one word, such as WHO")
    options, default = tls or TlsOptions(), tls is not None
    needs_tls = any(server.speaks_tls(default=default) for server in servers)
    context = options.context() if needs_tls else None
    partial: Answer | None = None
    reasons = []
    for server in servers:
        answer, address = Answer(), server.address
        if isinstance(address, str):
            host = name = address
        else:
            host, name = address[0], f"{address[0]}:{address[1]}"
        try:
            deadline = monotonic() + timeout_seconds
            with _connect(address, deadline) as sock:
                if context and server.speaks_tls(default=default):
                    sock.settimeout(_left(deadline))
                    with _start_tls(sock, context, options.name or host) as secure:
                        _converse(commands, secure, deadline, answer)
                else:
                    _converse(commands, sock, deadline, answer)
        except (OSError, UnicodeError, FatalError) as error:
            reasons.append(f"{name} {_reason(error)}")
            partial = partial or (answer if answer.replies or answer.failures else None)
        else:
            return answer
    if partial:
        return Answer(partial.replies, [*partial.failures, *reasons])
    raise FatalError("no server answered: " + "; ".join(reasons))


def _start_tls(sock: socket.socket, context: "ssl.SSLContext", name: str) -> socket.socket:
    """Return the socket after the handshake; raise `FatalError` if the peer does not speak TLS."""
    import ssl

    try:
        return context.wrap_socket(sock, server_hostname=name)
    except (ssl.SSLEOFError, ConnectionError) as error:
        raise FatalError(
            "closed the connection in the TLS handshake: it does not speak TLS, or is stopping"
        ) from error
    except ssl.SSLError as error:
        if error.reason in NOT_TLS:
            raise FatalError("does not speak TLS: ask without it") from error
        raise


def _converse(
    commands: Sequence[str], sock: socket.socket, deadline: float, answer: Answer
) -> None:
    """Send the commands and put what the server replies into `answer`.

    Raises `FatalError` for a reply that a gserver would not send, and for one that rejects the
    client; `OSError` if the connection fails. `answer` then holds what had arrived before.
    """
    sock.settimeout(_left(deadline))
    sock.sendall("".join(f"{command}\n" for command in commands).encode())
    lines = _lines(sock, deadline)
    for command in commands:
        try:
            reply = next(lines, None)
        except TimeoutError as error:
            raise FatalError(f"did not answer in time{_to(command, commands)}") from error
        if reply is None:
            raise FatalError(f"closed the connection without a reply{_to(command, commands)}")
        if not reply.isprintable() or not reply.isascii():
            raise FatalError(f"sent an invalid reply: {reply[:100]!r}")
        if reply in REJECTIONS:
            raise FatalError(f"replied {reply}")
        if reply == "ERR" or reply.startswith("ERR "):
            answer.failures.append(f"{command}: {reply[:100]}")
        elif not re.fullmatch(REPLIES.get(command.strip().upper(), ".*"), reply):
            raise FatalError(f"sent an invalid reply to {command}: {reply[:100]!r}")
        else:
            answer.replies.append(reply)


def _to(command: str, commands: Sequence[str]) -> str:
    """Return which of several commands has no reply, for the end of a sentence."""
    return f" (no reply to {command})" if len(commands) > 1 else ""


def _lines(sock: socket.socket, deadline: float) -> Iterator[str]:
    """Yield the lines that arrive until the server closes the connection."""
    partial = bytearray()
    while True:
        sock.settimeout(_left(deadline))
        data = sock.recv(65536)
        if not data:
            return
        first, *others = data.split(b"\n")
        partial += first
        for other in others:
            yield partial.decode("latin-1")
            partial = bytearray(other)
        if len(partial) > MAX_REPLY_BYTES:
            raise FatalError(f"sent a reply of more than {MAX_REPLY_BYTES} bytes")


def _connect(to: Address, deadline: float) -> socket.socket:
    """Connect to the first address of the name that accepts, with one deadline for all of them."""
    if isinstance(to, str):
        return _connect_file(to, deadline)
    error: OSError = TimeoutError()
    found = socket.getaddrinfo(*to, type=socket.SOCK_STREAM)
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


def _connect_file(path: str, deadline: float) -> socket.socket:
    """Connect to a socket file. If the server's queue is full, the kernel does not wait."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        while True:
            sock.settimeout(_left(deadline))
            with suppress(BlockingIOError):
                sock.connect(path)
                return sock
            sleep(RETRY_SECONDS)
    except OSError:
        sock.close()
        raise


def _left(deadline: float) -> float:
    left = deadline - monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _reason(error: Exception) -> str:
    """Return why a server gave no answer, for a sentence that begins with its address."""
    if isinstance(error, FatalError):
        return str(error)
    if isinstance(error, TimeoutError):
        return "did not answer in time"
    if isinstance(error, ConnectionRefusedError | FileNotFoundError):
        is_there = isinstance(error, ConnectionRefusedError)
        return ("refused the connection" if is_there else "does not exist") + " (is it running?)"
    if type(error).__module__ == "ssl":
        untrusted = getattr(error, "verify_message", "")
        if untrusted:
            return f"has a certificate that is not trusted: {untrusted} (--tls-ca, --tls-name)"
        return f"failed the TLS handshake: {getattr(error, 'reason', '') or 'connection closed'}"
    return str(error.args[-1] if error.args else error)
