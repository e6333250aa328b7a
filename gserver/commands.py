"""Commands and their handlers. This is the module that authors of commands import.

A handler is an ordinary blocking function. It may sleep, look up a name or query a database; only
the client that sent the command waits. `--commands MODULE` adds the commands of a module of your
own: README.md has an example.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import inf, isfinite
from typing import Any, Protocol

from gserver.addresses import client_address
from gserver.arguments import Parameters, parameters_of
from gserver.protocol import MAX_NAME_BYTES, ErrorReply, usage_error

NAME = re.compile(rf"[A-Z][A-Z0-9_-]{{0,{MAX_NAME_BYTES - 1}}}")


class Peer(Protocol):
    """The connection of a client, as far as a handler may ask for it."""

    def getpeername(self) -> Any:
        """Return address and port, and more for IPv6. Raises OSError after a reset."""


class Request:
    """One command of one client, as its handler sees it."""

    __slots__ = ("_address", "_sock", "clients", "deadline", "server_id")

    def __init__(
        self,
        server_id: str,
        clients: Callable[[], int],
        sock: Peer | None = None,
        deadline: float = inf,
    ) -> None:
        #: What WHERE replies.
        self.server_id = server_id
        #: Returns what WHO replies: in a cluster, the clients of all servers. It may raise
        #: `ClusterUnavailable`.
        self.clients = clients
        #: When the handler is interrupted, by `time.monotonic()`; infinity for never.
        self.deadline = deadline
        self._sock = sock
        self._address: tuple[str, int] | None = None

    @property
    def address(self) -> str:
        """The client's IP address; `unix` if it has come by a Unix socket.

        "" if the connection was reset before the handler began.
        """
        return self._peer_name()[0]

    @property
    def port(self) -> int:
        """The client's port; 0 if it has none, or if the connection was reset before."""
        return self._peer_name()[1]

    @property
    def tls_name(self) -> str:
        """The name in the client's certificate; "" if it has shown none."""
        return getattr(self._sock, "peer_certificate_name", "")

    def remember_client(self) -> None:
        """Ask the kernel for the client's address now: after a reset it is not known any more."""
        self._peer_name()

    def _peer_name(self) -> tuple[str, int]:
        if self._address is None:
            self._address = "", 0
            with suppress(OSError):
                if self._sock:
                    self._address = client_address(self._sock.getpeername())
        return self._address


Handler = Callable[..., str | int]


@dataclass(frozen=True, slots=True, eq=False)
class Command:
    """The name of a command in upper case, its handler, and what may be given to it."""

    name: str
    handler: Handler
    #: Whether the handler may block. If so, it runs in a greenlet.
    may_block: bool = True
    #: Seconds after which a handler that may block is interrupted; None for `--command-timeout`.
    timeout: float | None = None
    #: How many may run at once in a worker; None for `--command-at-once`.
    at_once: int | None = None
    parameters: Parameters = field(default_factory=Parameters)
    #: The words of one line, and the arguments that they are.
    words: tuple[str, ...] = ()
    arguments: tuple[Any, ...] = ()

    @property
    def usage(self) -> str:
        """How people write it: `RESOLVE name [port]`."""
        return f"{self.name} {self.parameters.usage}".rstrip()

    def bind(self, words: Sequence[str]) -> "Command | ErrorReply":
        """Return the command with the words that follow it, or the error reply if they are bad."""
        arguments = self.parameters.parse(words)
        if arguments is None:
            return usage_error(self.usage)
        return replace(self, words=tuple(words), arguments=arguments)

    def run(self, request: Request) -> str | int:
        """Run the handler with its arguments; return its reply. Raises what it raises."""
        return self.handler(request, *self.arguments)

    def answer(self, request: Request) -> bytes:
        """Run the handler; return its reply line. Raises what it or `encode_reply` raises."""
        return encode_reply(self.run(request))


def encode_reply(reply: str | int) -> bytes:
    """Return the reply as one line of printable ASCII, with its LF.

    Raises TypeError if the reply is neither a str nor an int, ValueError if it is not such a line.
    """
    if not isinstance(reply, str | int):
        raise TypeError(f"a reply must be a str or an int, not {type(reply).__name__}")
    text = str(reply)
    if not (text.isascii() and text.isprintable()):
        raise ValueError("a reply must be one line of printable ASCII")
    return text.encode("ascii") + b"\n"


def command(
    name: str, *, may_block: bool = True, timeout: float | None = None, at_once: int | None = None
) -> Callable[[Handler], Command]:
    """Make the decorated function the handler of the command `name`.

    A name has letters, digits, `-` and `_`, a letter first, and at most 32 of them. Clients may
    write it in any case.

    The handler takes the `Request`, and the words that follow the command as its other arguments:
    `def resolve(request, name: str, port: int = 80)`. It returns a str or an int: one line of
    printable ASCII. If it raises an exception or returns anything else, the client gets
    `ERR internal` and stays connected.

    After `timeout` seconds the handler is interrupted, and the client gets `ERR timeout`. If
    `at_once` of them run in a worker, a client gets `ERR busy`. 0 is no limit. The defaults are
    those of `--command-timeout` and `--command-at-once`.

    Set `may_block=False` only for a handler that never waits for anything: it runs in the event
    loop, which serves all clients of the worker. It has neither of the two limits.

    Raises ValueError for a bad name or limit, TypeError for a function that cannot be a handler.
    """
    if not isinstance(name, str):
        shown = getattr(name, "__name__", "name").upper()
        raise TypeError(f'the decorator needs a name: @command("{shown}")')
    if not name.isascii() or not NAME.fullmatch(name.upper()):
        raise ValueError(
            f"{name!r} is not a command name: use letters, digits, - and _, a letter first,"
            f" at most {MAX_NAME_BYTES}"
        )
    _check_limits(name.upper(), timeout, at_once, may_block=may_block)

    def decorate(handler: Handler) -> Command:
        problem = handler_problem(handler)
        if problem:
            raise TypeError(f"the handler of {name.upper()} {problem}")
        parameters = parameters_of(handler)
        return Command(name.upper(), handler, may_block, timeout, at_once, parameters)

    return decorate


def _check_limits(
    name: str, timeout: float | None, at_once: int | None, *, may_block: bool
) -> None:
    if not may_block and (timeout, at_once) != (None, None):
        raise TypeError(f"{name} cannot have timeout or at_once with may_block=False")
    if timeout is not None and not (_is_number(timeout, int | float) and isfinite(timeout)):
        raise ValueError(f"the timeout of {name} must be a number of seconds, or 0 for no limit")
    if at_once is not None and not _is_number(at_once, int):
        raise ValueError(f"at_once of {name} must be a whole number, or 0 for no limit")


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and value >= 0


def handler_problem(handler: object) -> str:
    """Return why this object cannot be a handler, as the end of a sentence; "" if it can."""
    if isinstance(handler, type):
        return "must be a function, not a class"
    if not callable(handler):
        return f"must be a function, not a {type(handler).__name__}"
    # An object may be callable because of its method `__call__`.
    for function in (handler, type(handler).__call__):
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            return "is an async function: use def, and calls that block"
        if inspect.isgeneratorfunction(function):
            return "is a generator: use return, not yield"
    try:
        parameters_of(handler)
    except TypeError as error:
        return str(error)
    return ""


@command("WHO", may_block=False)
def who(request: Request) -> int:
    """The number of connected clients, including the one that asks."""
    return request.clients()


@command("WHERE", may_block=False)
def where(request: Request) -> str:
    """The globally unique id of the server that replies."""
    return request.server_id


@command("WHY", may_block=False)
def why(_request: Request) -> str:
    """The answer."""
    return "42"


BUILT_IN = (who, where, why)
