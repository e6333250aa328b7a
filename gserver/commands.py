"""The commands and their handlers: ordinary blocking functions that return one line.

A handler may sleep, look up a name or call a database: only the client that asked waits.
`--commands MODULE` adds those that a module of your own defines; README.md shows one.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from gserver.protocol import MAX_NAME_BYTES

NAME = re.compile(rf"[A-Z][A-Z0-9_-]{{0,{MAX_NAME_BYTES - 1}}}")


@dataclass(frozen=True, slots=True)
class Service:
    """What a handler may know: the id of this server, and how many clients are connected."""

    server_id: str
    clients: Callable[[], int]


Handler = Callable[[Service], str | int]


@dataclass(frozen=True, slots=True, eq=False)
class Command:
    """A name on the wire and the function that answers it. `may_block` is false for the built-in ones."""

    name: str
    handler: Handler
    may_block: bool = True
    #: Of the scoreboard: where a worker counts it.
    cell: int = -1

    def answer(self, service: Service) -> bytes:
        """Return the reply as a line. Raises what the handler raises, and what `line` does."""
        return line(self.handler(service))


def line(reply: str | int) -> bytes:
    """Return the reply as a line, LF included; raise TypeError or ValueError for one that cannot be."""
    if not isinstance(reply, str | int):
        raise TypeError(f"a reply is a str or an int, not {type(reply).__name__}")
    text = str(reply)
    if not text.isprintable():
        raise ValueError("a reply is one printable line")
    return text.encode("ascii") + b"\n"


def command(name: str, *, may_block: bool = True) -> Callable[[Handler], Command]:
    """Decorate a handler as the command `name`: letters, digits, `-` and `_`, at most 32.

    The handler takes the `Service` and returns a str (or int) that is one line of printable ASCII.
    If it raises, or returns anything else, the client is told `ERR internal` and stays connected.
    """
    if not name.isascii() or not NAME.fullmatch(name.upper()):
        raise ValueError(
            f"{name!r} is no name for a command: use letters, digits, - and _, at most {MAX_NAME_BYTES}"
        )

    def decorate(handler: Handler) -> Command:
        return Command(name.upper(), handler, may_block)

    return decorate


@command("WHO", may_block=False)
def who(service: Service) -> int:
    """How many clients are connected, the asker among them."""
    return service.clients()


@command("WHERE", may_block=False)
def where(service: Service) -> str:
    """The globally unique id of the server that answers."""
    return service.server_id


@command("WHY", may_block=False)
def why(_service: Service) -> str:
    """The answer."""
    return "42"


BUILT_IN = (who, where, why)
