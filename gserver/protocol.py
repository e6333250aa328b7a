"""The wire as a pure state machine: bytes in, commands and error replies out.

It owns what a line is, and the reply to a line that is no command. It knows no socket, no clock and
no handler: a command is whatever object the caller's table holds for its name. However the bytes
are cut into pieces, the same items come out in the same order. docs/protocol.md is the normative
text.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

C = TypeVar("C")

#: Longest name of a command.
MAX_NAME_BYTES = 32
#: The first bytes of a TLS client: a handshake record (RFC 8446, 5.1).
TLS_BEGINNING = b"\x16\x03"


class ErrorReply(NamedTuple):
    """A reply that no command gives, or a close without one. `name` is for metrics and logs."""

    name: str
    reply: bytes
    closes: bool


ERROR_REPLIES = (
    UNKNOWN_COMMAND := ErrorReply("unknown_command", b"ERR unknown command\n", closes=False),
    NOT_ASCII := ErrorReply("not_ascii", b"ERR not ASCII\n", closes=False),
    # A command has its own: see `usage_error`.
    USAGE := ErrorReply("usage", b"ERR usage\n", closes=False),
    INTERNAL := ErrorReply("internal", b"ERR internal\n", closes=False),
    TIMEOUT := ErrorReply("timeout", b"ERR timeout\n", closes=False),
    TOO_MANY_AT_ONCE := ErrorReply("busy", b"ERR busy\n", closes=False),
    CLUSTER_UNAVAILABLE := ErrorReply(
        "cluster_unavailable", b"ERR cluster unavailable\n", closes=False
    ),
    LINE_TOO_LONG := ErrorReply("line_too_long", b"ERR line too long\n", closes=True),
    TOO_SLOW := ErrorReply("too_slow", b"ERR too slow\n", closes=True),
    TOO_IDLE := ErrorReply("idle", b"ERR idle\n", closes=True),
    TOO_MANY_CLIENTS := ErrorReply("too_many_clients", b"ERR too many clients\n", closes=True),
    TOO_MANY_FROM_ADDRESS := ErrorReply(
        "too_many_from_address", b"ERR too many clients from your address\n", closes=True
    ),
    PLAIN_TEXT := ErrorReply("plain_text", b"ERR TLS only\n", closes=True),
    # TLS has alerts of its own.
    TLS_FAILED := ErrorReply("tls_failed", b"", closes=True),
    # What a balancer sends is no text for clients.
    PROXY_FAILED := ErrorReply("proxy_failed", b"", closes=True),
    # A browser gets no reply: its page could read one as content (CWE-352).
    HTTP := ErrorReply("http", b"", closes=True),
    # A page's server can put lines of text into a browser's ClientHello.
    TLS := ErrorReply("tls", b"", closes=True),
    KICKED := ErrorReply("kicked", b"ERR closed by the operator\n", closes=True),
    # A client that does not read would not read this either.
    SLOW_READER := ErrorReply("slow_reader", b"", closes=True),
)


#: Those for which the service is to blame. All others are mistakes of a client, or its absence.
FAILURES = (INTERNAL, TIMEOUT, TOO_MANY_AT_ONCE, CLUSTER_UNAVAILABLE, TOO_MANY_CLIENTS)


def usage_error(usage: str) -> ErrorReply:
    """Return the reply to a command with wrong words. The usage is ASCII."""
    return USAGE._replace(reply=f"ERR usage: {usage}\n".encode("ascii"))


class Grammar(Generic[C]):
    """What can be said: the commands by their upper-case names, and the longest line in bytes.

    `with_words` has the commands that words may follow. Its functions take these words, and return
    the command with its arguments, or an error reply.
    """

    def __init__(
        self,
        commands: Mapping[bytes, C],
        max_line_bytes: int,
        with_words: Mapping[bytes, Callable[[Sequence[str]], C | ErrorReply]] | None = None,
    ) -> None:
        self.commands = dict(commands)
        self._with_words = dict(with_words or {})
        self._max_line_bytes = max_line_bytes
        #: Commands that are nothing but their name.
        self._bare = {name: self.commands[name] for name in commands.keys() - self._with_words}
        #: Those of them that are answered without their newline: no other name begins with theirs.
        self.complete = {
            name
            for name in self._bare
            if not any(other != name and other.startswith(name) for other in commands)
        }

    def read(self, line: bytes, *, is_first: bool = False) -> C | ErrorReply | None:
        """Return what a line without its LF asks for; None for a blank one.

        `is_first`: it is the client's first line, which may be HTTP or TLS.
        """
        if is_first and line.startswith(TLS_BEGINNING):
            return TLS
        if self.is_too_long(line):
            return LINE_TOO_LONG
        words = line.strip()
        if not words:
            return None
        if is_first and _is_http(words):
            return HTTP
        command = self._bare.get(words.upper())
        if command is not None:
            return command
        return self._read_words(words) if words.isascii() else NOT_ASCII

    def _read_words(self, line: bytes) -> C | ErrorReply:
        """Return what a line means that is not the name of a bare command."""
        name, *words = line.split()
        name = name.upper()
        if name in self._with_words:
            return self._with_words[name]([word.decode("ascii") for word in words])
        return usage_error(name.decode("ascii")) if name in self._bare else UNKNOWN_COMMAND

    def is_too_long(self, line: bytes) -> bool:
        """Whether a line, or the part of it that has arrived, is too long without its CR."""
        return len(line.removesuffix(b"\r")) > self._max_line_bytes


def _is_http(words: bytes) -> bool:
    parts = words.split()
    return len(parts) > 2 and parts[-1].upper().startswith(b"HTTP/")


class Parser(Generic[C]):
    """Reads one client's lines. After an item that closes, nothing more comes out.

    `is_first`: the client has not sent a line yet; its first may be HTTP or TLS.
    """

    __slots__ = ("_at", "_data", "_grammar", "_is_closed", "_is_first")

    def __init__(self, grammar: Grammar[C], *, is_first: bool = True) -> None:
        self._grammar = grammar
        self._is_first = is_first
        self._is_closed = False
        self._data = b""
        #: The index in `_data` at which the next line begins.
        self._at = 0

    @property
    def unread(self) -> bytes:
        """What has been received, and has not come out as a line yet."""
        return self._data[self._at :]

    def receive(self, data: bytes) -> None:
        """Take what has arrived."""
        if not self._is_closed:
            self._data, self._at = self.unread + data, 0

    @property
    def has_part(self) -> bool:
        """Whether there is something in `unread`."""
        return self._at < len(self._data)

    @property
    def has_line(self) -> bool:
        """Whether a whole line has arrived."""
        return self._data.find(b"\n", self._at) >= 0

    def next_line(self) -> C | ErrorReply | None:
        """Take a whole line, and return what it asks for; None for a blank one."""
        end = self._data.index(b"\n", self._at)
        line, self._at = self._data[self._at : end], end + 1
        return self._read(line)

    def check(self) -> ErrorReply | None:
        """Return what is wrong with the line whose end has not arrived, if that is known by now."""
        if self._is_first and self._data.startswith(TLS_BEGINNING, self._at):
            return self._close(TLS)
        if self._grammar.is_too_long(self.unread):
            return self._close(LINE_TOO_LONG)
        return None

    def skip(self, size: int) -> None:
        """Drop the next bytes, which are whole lines. They have been answered."""
        self._at += size
        self._is_first = False

    def put_back(self, line_at: int) -> None:
        """Go back to the beginning of a line, which was `position` there."""
        self._at = line_at

    @property
    def position(self) -> int:
        """How many of the bytes in `receive`'s buffer have been taken."""
        return self._at

    def feed(self, data: bytes) -> list[C | ErrorReply]:
        """Take what has arrived; return what it asks for, in order."""
        self.receive(data)
        items: list[C | ErrorReply] = []
        while self.has_line:
            if (item := self.next_line()) is not None:
                items.append(item)
        if error := self.check():
            items.append(error)
        return items

    def end(self) -> list[C | ErrorReply]:
        """Take what is left as the last line: the client has finished sending."""
        line, self._data, self._at = self.unread, b"", 0
        item = self._read(line)
        return [] if item is None else [item]

    @property
    def is_complete(self) -> bool:
        """Whether what is left is blank, or a whole command that lacks only its newline."""
        words = self.unread.strip().upper()
        return not words or words in self._grammar.complete

    def silence(self) -> list[C | ErrorReply]:
        """Take what is left as a line, if it `is_complete`: the client has paused."""
        return self.end() if self.is_complete else []

    def _read(self, line: bytes) -> C | ErrorReply | None:
        item = self._grammar.read(line, is_first=self._is_first)
        if item is not None:
            self._is_first = False
        if isinstance(item, ErrorReply) and item.closes:
            self._close(item)
        return item

    def _close(self, error: ErrorReply) -> ErrorReply:
        self._is_closed = True
        self._data, self._at = b"", 0
        return error
