"""The oracle of the protocol, and hostile input for it, drawn from a grammar of difficult lines.

The oracle is written from docs/protocol.md, independently of gserver's code: it never sees how
bytes are split, but reads all of them with `split`. `wire_cases` checks it.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from random import Random
from typing import NamedTuple

#: The blanks of a line: docs/protocol.md, "Lines".
BLANKS = b" \t\r\v\f"
TOO_LONG, UNKNOWN, NOT_ASCII = b"ERR line too long", b"ERR unknown command", b"ERR not ASCII"
USAGE = b"ERR usage: "
#: A pause that is long enough for a line without its newline.
SILENCE = None
Cut = Iterable[bytes | None]


class Words(NamedTuple):
    """The words that may follow a command: at least `least`, at most `most`, as `usage` says."""

    least: int
    most: int
    usage: bytes


class Expected(NamedTuple):
    """The expected outcome for all bytes of one client: commands by name, error replies by text."""

    replies: list[bytes]
    #: Whether the server closes before the client has ended.
    is_closed: bool


NO_WORDS: Mapping[bytes, Words] = {}
#: Two commands with words, for tests.
WITH_WORDS = {
    b"ECHO": Words(0, 1000, b"ECHO [words ...]"),
    b"PAIR": Words(1, 2, b"PAIR first [second]"),
}


def say(name: bytes, words: Sequence[str]) -> bytes | None:
    """Return what one of them replies to words, without the newline; None if it takes others."""
    form = WITH_WORDS[name]
    if form.least <= len(words) <= form.most and all(word.isprintable() for word in words):
        return b" ".join([name, *(word.encode() for word in words)])
    return None


def read(
    sent: bytes,
    commands: Collection[bytes],
    limit: int,
    with_words: Mapping[bytes, Words] = NO_WORDS,
) -> Expected:
    """Return the expected outcome for a client that sends this and then ends.

    Words may follow the commands in `with_words`. The reply to one of them is its name in upper
    case, and its words.
    """
    replies: list[bytes] = []
    is_first = True
    for line in sent.split(b"\n"):
        if is_first and line[:2] == b"\x16\x03":
            return Expected(replies, True)
        if len(line) - line.endswith(b"\r") > limit:
            return Expected([*replies, TOO_LONG], True)
        words = line.strip(BLANKS)
        if not words:
            continue
        if is_first and len(parts := words.split()) >= 3 and parts[-1][:5].upper() == b"HTTP/":
            return Expected(replies, True)
        is_first = False
        replies.append(_reply(words, commands, with_words))
    return Expected(replies, False)


def _reply(line: bytes, commands: Collection[bytes], with_words: Mapping[bytes, Words]) -> bytes:
    if max(line) > 127:
        return NOT_ASCII
    name, *words = line.split()
    name = name.upper()
    if name not in commands:
        return UNKNOWN
    form = with_words.get(name, Words(0, 0, name))
    is_printable = all(32 < byte < 127 for word in words for byte in word)
    if not is_printable or not form.least <= len(words) <= form.most:
        return USAGE + form.usage
    return b" ".join([name, *words])


def replies(
    sent: bytes,
    commands: Mapping[bytes, bytes],
    limit: int,
    with_words: Mapping[bytes, Words] = NO_WORDS,
) -> bytes:
    """Return the replies to a client that sends this and then ends; `commands` has the values."""
    said = read(sent, commands, limit, with_words).replies
    commands = {name: reply for name, reply in commands.items() if name not in with_words}
    return b"".join(commands.get(reply, reply + b"\n") for reply in said)


def is_ended_by_silence(
    sent: bytes, commands: Collection[bytes], with_words: Collection[bytes] = ()
) -> bool:
    """Whether a pause ends the current line."""
    words = sent.rpartition(b"\n")[2].strip(BLANKS).upper()
    if not words:
        return True
    is_bare = words in commands and words not in with_words
    return is_bare and not any(c != words and c.startswith(words) for c in commands)


def merge_pieces(
    cut: Cut, commands: Collection[bytes], with_words: Collection[bytes] = ()
) -> bytes:
    """Join pieces and pauses: a pause that ends a line becomes a newline."""
    sent = b""
    for piece in cut:
        if piece is not SILENCE:
            sent += piece
        elif is_ended_by_silence(sent, commands, with_words):
            sent += b"\n"
    return sent


WORDS = (
    *b"WHO WHERE WHY who Where wHy WH W HO WHOWHY WHERES WHYNOT NAP 42 ERR QUIT {} %s%n".split(),
    *(b"WHO WHY", b"WHO x", b"*1\r\n$3\r\nWHO\r\n", b"\0", b"WHO\0", b"\x1b[2J", b"\x1c"),
    *(b"\x85", b"\xff", b"\xc3\xa9", b"\xa0WHO", b"WHO\xe2\x80\xa8", b"\x16\x03\x01\x02\x00\x01"),
    *(b"GET / HTTP/1.1", b"post /x http/1.0", b"a b c HTTP/", b"GET HTTP/1.1", b"GET / HTTPS/1"),
    *(b"GET /\0HTTP/1", b"x y z", b"'\"`$(id)", b"ECHO", b"echo a", b"ECHO a  b", b"Echo a b c"),
    *(b"ECHO \0", b"ECHO a\x1c", b"ECHO \xff", b"ECHO a HTTP/", b"WHY not"),
)
ENDS = (
    *(b"\n", b"\n", b"\n", b"\r\n", b"\r\n", b"\n\n", b"", b"\r", b" \n", b"\t\r\n", b"\v\f\n"),
    *(b"\n\r", b"\0\n", b" "),
)
STARTS = (b"", b"", b"", b"", b" ", b"\t", b"\r", b"\n", b"\r\n", b"\v\f", b"\0")
PLAIN = (b"WHO\n", b"WHERE\n", b"WHY\n", b"who\n", b"WHY\r\n", b"WHO\nWHY\n")


def draw(random: Random, limit: int) -> bytes:
    """Return all bytes of a client: mostly lines, some at the limit, some damaged."""
    kind = random.random()
    if kind < 0.15:  # Input for the fast path, or almost.
        sent = b"".join(random.choices(PLAIN, k=int(12 * random.random()) + 1))
    elif kind < 0.2:
        sent = random.randbytes(random.randrange(3 * limit // 2))
    else:
        parts: list[bytes] = []
        for _ in range(int(5 * random.random()) + 1):
            word = random.choice(WORDS)
            if random.random() < 0.15:
                word = _long(random, word, limit)
            parts += (random.choice(STARTS), word, random.choice(ENDS))
        sent = b"".join(parts)
    return _spoilt(random, sent) if random.random() < 0.2 else sent


def _long(random: Random, word: bytes, limit: int) -> bytes:
    """A line at or near the limit, or with many words."""
    size = max(0, limit + random.randrange(-3, 4))
    filler = random.choice((b" ", b"x", b"\0", b"\xe9", b"\r", b"WHO ", b"HTTP/ "))
    filling = (filler * (size // len(filler) + 1))[: max(0, size - len(word))]
    return filling + word if random.random() < 0.5 else word + filling


def _spoilt(random: Random, sent: bytes) -> bytes:
    """The input with a byte changed, added or removed, or a part repeated."""
    at, to = sorted((random.randrange(len(sent) + 1), random.randrange(len(sent) + 1)))
    what = random.randrange(4)
    if what == 0:
        return sent[:at] + bytes((random.randrange(256),)) + sent[at + 1 :]
    if what == 1:
        return sent[:at] + bytes((random.randrange(256),)) + sent[at:]
    return sent[:at] + sent[to:] if what == 2 else sent[:to] + sent[at:]


def pieces(random: Random, sent: bytes, most: int) -> list[bytes]:
    """The input in at most `most` pieces of random sizes."""
    cuts = sorted(random.randrange(len(sent) + 1) for _ in range(random.randrange(most)))
    return [sent[at:to] for at, to in zip([0, *cuts], [*cuts, len(sent)], strict=True)]
