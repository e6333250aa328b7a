"""The wire as a pure state machine: bytes in, commands and refusals out.

Owns what a line is and what is said to one that is no command. Knows no socket, no clock and no
handler: a command is whatever object the caller's table holds for its name. However the bytes are
cut into pieces, the same items come out, in the same order. docs/protocol.md is the normative text.
"""

from collections.abc import Mapping
from typing import Generic, NamedTuple, TypeVar

C = TypeVar("C")

#: Longest name of a command.
MAX_NAME_BYTES = 32


class ErrorReply(NamedTuple):
    """An answer that is no command's. `name` is its name in metrics and logs."""

    name: str
    reply: bytes
    closes: bool


ERROR_REPLIES = (
    UNKNOWN_COMMAND := ErrorReply("unknown_command", b"ERR unknown command\n", closes=False),
    NOT_ASCII := ErrorReply("not_ascii", b"ERR not ASCII\n", closes=False),
    INTERNAL := ErrorReply("internal", b"ERR internal\n", closes=False),
    CLUSTER_UNAVAILABLE := ErrorReply(
        "cluster_unavailable", b"ERR cluster unavailable\n", closes=False
    ),
    LINE_TOO_LONG := ErrorReply("line_too_long", b"ERR line too long\n", closes=True),
    TOO_SLOW := ErrorReply("too_slow", b"ERR too slow\n", closes=True),
    IDLE := ErrorReply("idle", b"ERR idle\n", closes=True),
    TOO_MANY_CLIENTS := ErrorReply("too_many_clients", b"ERR too many clients\n", closes=True),
    TOO_MANY_FROM_ADDRESS := ErrorReply(
        "too_many_from_address", b"ERR too many clients from your address\n", closes=True
    ),
    PLAIN_TEXT := ErrorReply("plain_text", b"ERR TLS only\n", closes=True),
    # TLS has alerts of its own for it.
    TLS_FAILED := ErrorReply("tls_failed", b"", closes=True),
    # A browser is told nothing: what it got could be taken for a page (CWE-352).
    HTTP := ErrorReply("http", b"", closes=True),
    # What a page's server has put into a ClientHello may be lines.
    TLS := ErrorReply("tls", b"", closes=True),
    # Who does not read cannot be told that either.
    SLOW_READER := ErrorReply("slow_reader", b"", closes=True),
)


#: What a client begins with that takes the port for one of TLS (RFC 8446, 5.1).
TLS_BEGINNING = b"\x16\x03"


class Grammar(Generic[C]):
    """What can be said: the commands by their upper-case names, and how long a line may be."""

    def __init__(self, commands: Mapping[bytes, C], max_line_bytes: int) -> None:
        self.max_line_bytes = max_line_bytes
        self.commands = dict(commands)
        # The usual spellings, so that the usual line costs one look-up.
        self.spellings = {
            spelling + ending: command
            for name, command in commands.items()
            for spelling in (name, name.lower())
            for ending in (b"", b"\r")
            if len(name) <= max_line_bytes
        }
        #: Commands that may be answered without their newline: those that cannot grow into another.
        self.complete = {
            name for name in commands if not any(o != name and o.startswith(name) for o in commands)
        }


class Parser(Generic[C]):
    """One client's side of the conversation. After an item that closes, nothing more comes out.

    `is_first`: whether the client has yet to send its first line, which may be HTTP or TLS.
    """

    __slots__ = ("_grammar", "_is_closed", "_is_first", "partial")

    def __init__(self, grammar: Grammar[C], *, is_first: bool = True) -> None:
        self._grammar = grammar
        self._is_first = is_first
        self._is_closed = False
        #: The bytes of a line that has begun and not ended.
        self.partial = b""

    def feed(self, data: bytes) -> list[C | ErrorReply]:
        """Take what has arrived; return what it asks for, in order."""
        if self._is_closed:
            return []
        if self.partial:
            data = self.partial + data
        lines = data.split(b"\n")
        self.partial = lines.pop()
        spellings = self._grammar.spellings
        items: list[C | ErrorReply] = []
        for line in lines:
            item: C | ErrorReply | None = spellings.get(line)
            if item is None:
                item = self._read(line, is_first=self._is_first and not items)
                if item is None:
                    continue
                if isinstance(item, ErrorReply) and item.closes:
                    return self._close(items, item)
            items.append(item)
        if items:
            self._is_first = False
        if self._is_first and self.partial.startswith(TLS_BEGINNING):
            return self._close(items, TLS)
        if self._is_too_long(self.partial):
            return self._close(items, LINE_TOO_LONG)
        return items

    def end(self) -> list[C | ErrorReply]:
        """The client has finished sending: what is left is its last line."""
        if self._is_closed:
            return []
        line, self.partial = self.partial, b""
        item = self._read(line, is_first=self._is_first)
        return [] if item is None else [item]

    @property
    def is_complete(self) -> bool:
        """Whether the line begun is blank so far, or a whole command that lacks only its newline."""
        words = self.partial.strip().upper()
        return not words or words in self._grammar.complete

    def silence(self) -> list[C | ErrorReply]:
        """The client has paused: take the line begun as ended, if it `is_complete`."""
        if not self.is_complete:
            return []
        items = self.end()
        if items:
            self._is_first = False
        return items

    def _read(self, line: bytes, *, is_first: bool) -> C | ErrorReply | None:
        if is_first and line.startswith(TLS_BEGINNING):
            return TLS
        if self._is_too_long(line):
            return LINE_TOO_LONG
        words = line.strip()
        if not words:
            return None
        if is_first:
            parts = words.split()
            if len(parts) > 2 and parts[-1].upper().startswith(b"HTTP/"):
                return HTTP
        command = self._grammar.commands.get(words.upper())
        if command is not None:
            return command
        return UNKNOWN_COMMAND if words.isascii() else NOT_ASCII

    def _is_too_long(self, line: bytes) -> bool:
        # The line ending does not count: a last CR may be half of one.
        return len(line) - line.endswith(b"\r") > self._grammar.max_line_bytes

    def _close(self, items: list[C | ErrorReply], refusal: ErrorReply) -> list[C | ErrorReply]:
        self._is_closed = True
        self.partial = b""
        return [*items, refusal]
