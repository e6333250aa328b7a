"""Commands and their handlers. This is the module that authors of commands import.

A handler is an ordinary blocking function. It may sleep, look up a name or query a database; only
the client that sent the command waits. `--commands MODULE` adds the commands of a module of your
own: README.md has an example.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass

from gserver.protocol import MAX_NAME_BYTES

NAME = re.compile(rf"[A-Z][A-Z0-9_-]{{0,{MAX_NAME_BYTES - 1}}}")


@dataclass(frozen=True, slots=True)
class Service:
    """What a handler may use: this server's id, and a function that counts the connected clients.

    In a cluster, `clients` counts the clients of all servers. It may raise `ClusterUnavailable`.
    """

    server_id: str
    clients: Callable[[], int]


Handler = Callable[[Service], str | int]


@dataclass(frozen=True, slots=True, eq=False)
class Command:
    """The name of a command in upper case, and its handler."""

    name: str
    handler: Handler
    #: Whether the handler may block. If so, it runs in a greenlet.
    may_block: bool = True
    #: Index of the scoreboard cell in which a worker counts this command.
    cell: int = -1

    def answer(self, service: Service) -> bytes:
        """Run the handler; return its reply line. Raises what it or `encode_reply` raises."""
        return encode_reply(self.handler(service))


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


def command(name: str, *, may_block: bool = True) -> Callable[[Handler], Command]:
    """Make the decorated function the handler of the command `name`.

    A name has letters, digits, `-` and `_`, a letter first, and at most 32 of them. Clients may
    write it in any case.

    The handler takes the `Service` and returns a str or an int: one line of printable ASCII. If it
    raises an exception or returns anything else, the client gets `ERR internal` and stays
    connected.

    Set `may_block=False` only for a handler that never waits for anything: it runs in the event
    loop, which serves all clients of the worker.

    Raises ValueError for a bad name, TypeError for a function that cannot be a handler.
    """
    if not isinstance(name, str):
        shown = getattr(name, "__name__", "name").upper()
        raise TypeError(f'the decorator needs a name: @command("{shown}")')
    if not name.isascii() or not NAME.fullmatch(name.upper()):
        raise ValueError(
            f"{name!r} is not a command name: use letters, digits, - and _, a letter first,"
            f" at most {MAX_NAME_BYTES}"
        )

    def decorate(handler: Handler) -> Command:
        problem = handler_problem(handler)
        if problem:
            raise TypeError(f"the handler of {name.upper()} {problem}")
        return Command(name.upper(), handler, may_block)

    return decorate


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
    if not _takes_one_argument(handler):
        return "must take exactly one argument, the service, as in def handler(service)"
    return ""


def _takes_one_argument(handler: Callable[..., object]) -> bool:
    # A decorator may have added or removed arguments, so the signature of the function that it
    # wraps does not count.
    try:
        signature = inspect.signature(handler, follow_wrapped=False)
    except ValueError:
        return True  # A function written in C may have no signature.
    try:
        signature.bind(None)
    except TypeError:
        return False
    return True


@command("WHO", may_block=False)
def who(service: Service) -> int:
    """The number of connected clients, including the one that asks."""
    return service.clients()


@command("WHERE", may_block=False)
def where(service: Service) -> str:
    """The globally unique id of the server that replies."""
    return service.server_id


@command("WHY", may_block=False)
def why(_service: Service) -> str:
    """The answer."""
    return "42"


BUILT_IN = (who, where, why)
