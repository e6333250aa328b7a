"""The protocol as a table: input of a lone client to a server with the id `here`, and the replies.

Every reply is written here by hand or by the rule of its group, without the code under test. A last
line without its newline is ended by the end of input, or by a later newline: the reply is the same.
"""

from itertools import product
from typing import NamedTuple

from lab import wire

SERVER_ID = "here"
LIMIT_BYTES = 1024

WHO, WHERE, WHY = b"1\n", b"here\n", b"42\n"
UNKNOWN, NOT_ASCII, TOO_LONG = (
    reply + b"\n" for reply in (wire.UNKNOWN, wire.NOT_ASCII, wire.TOO_LONG)
)

REPLIES = {b"WHO": WHO, b"WHERE": WHERE, b"WHY": WHY}
USAGES = {command: wire.USAGE + command + b"\n" for command in REPLIES}
ENDINGS = {"LF": b"\n", "CRLF": b"\r\n"}


class Case(NamedTuple):
    """The input, all replies, and whether the connection is still open after the last line."""

    name: str
    sent: bytes
    replies: bytes
    stays_open: bool = True


def closed(name: str, sent: bytes, replies: bytes = b"") -> Case:
    """A case after which the server closes."""
    return Case(name, sent, replies, stays_open=False)


def alternating(word: bytes) -> bytes:
    """The word with every second letter in lower case: WhErE."""
    return bytes(byte | 0x20 if index % 2 else byte for index, byte in enumerate(word))


# Letters of either case; LF and CRLF.

SPELLINGS = (bytes, bytes.lower, bytes.title, lambda word: word.title().swapcase(), alternating)
SPELLED = [
    Case(f"{(word := spell(command)).decode()} {ending}", word + ENDINGS[ending], reply)
    for command, reply in REPLIES.items()
    for spell in SPELLINGS
    for ending in ENDINGS
]

# Blanks around a command are dropped: space, tab, CR, VT and FF.

BLANKS = {"space": b" ", "tab": b"\t", "CR": b"\r", "VT": b"\v", "FF": b"\f"}
BLANKS |= {"two spaces": b"  ", "every blank": b" \t\r\v\f"}
BLANKS_AROUND = [
    Case(f"{name} {where}", *sent)
    for name, blank in BLANKS.items()
    for where, sent in {
        "before": (blank + b"WHY\n", WHY),
        "after": (b"WHO" + blank + b"\n", WHO),
        "around, CRLF": (blank + b"where" + blank + b"\r\n", WHERE),
        "in the middle": (b"WH" + blank + b"Y\n", UNKNOWN),
    }.items()
]

# A blank line has no reply.

BLANK_LINES = {"LF": b"\n", "CRLF": b"\r\n", "CRCRLF": b"\r\r\n", "a space": b" \n"}
BLANK_LINES |= {"a tab": b"\t\n", "VT and FF": b"\v\f\r\n", "three of them": b"\n\r\n\n"}
BLANK_LINE_CASES = [
    Case(f"blank line, {name}, {where}", before + line + after, replies)
    for name, line in BLANK_LINES.items()
    for where, before, after, replies in (
        ("alone", b"", b"", b""),
        ("before", b"", b"WHY\n", WHY),
        ("between", b"WHO\n", b"WHY\n", WHO + WHY),
        ("after", b"WHERE\n", b"", WHERE),
    )
]

# Several lines at once: the replies come in the order of the commands.

PIPELINED = [
    *(
        Case(
            f"{b', '.join(commands).decode()}",
            b"\n".join(commands) + b"\n",
            b"".join(map(REPLIES.__getitem__, commands)),
        )
        for count in (2, 3)
        for commands in product(REPLIES, repeat=count)
    ),
    *(
        Case(
            f"{first.decode()} {one}, {second.decode()} {two}",
            first + ENDINGS[one] + second + ENDINGS[two],
            replies,
        )
        for first, second, replies in ((b"who", b"why", WHO + WHY), (b"why", b"where", WHY + WHERE))
        for one, two in (("LF", "CRLF"), ("CRLF", "LF"), ("CRLF", "CRLF"))
    ),
    *(
        Case(f"{command.decode()}, a thousand times", (command + b"\n") * 1000, reply * 1000)
        for command, reply in REPLIES.items()
    ),
    Case("a thousand of each", b"WHO\nWHERE\nWHY\n" * 1000, (WHO + WHERE + WHY) * 1000),
    Case("a thousand blank lines", b"\n" * 1000 + b"WHY\n", WHY),
    Case("unknown first", b"NOPE\nWHO\nWHY\n", UNKNOWN + WHO + WHY),
    Case("unknown between", b"WHO\nNOPE\nWHY\n", WHO + UNKNOWN + WHY),
    Case("unknown last", b"WHO\nWHY\nNOPE\n", WHO + WHY + UNKNOWN),
    Case("not ASCII between", b"WHO\n\xff\nWHY\n", WHO + NOT_ASCII + WHY),
    Case("refusals of both kinds", b"\xe9\nNOPE\n\xe9\nNOPE\n", (NOT_ASCII + UNKNOWN) * 2),
    Case("a thousand refusals", b"NOPE\n" * 1000, UNKNOWN * 1000),
]

# Not commands: words, prefixes and extensions. Commands with words that they do not take.

WORDS = (
    rb"HELP~QUIT~EXIT~PING~HELLO~EHLO localhost~USER root~WHAT~WHEN~OHW~null~?~.~-~--help~0~42~-1"
    rb"~*1~$3~{}~[]~#WHO~//~\n~\x57HO~WHO?~WHO!~WHO;~WHO.~WHO,~WHO:~/WHO~'WHO'~(WHO)~<WHO>~WHO,WHY"
    rb"~WHO;WHY~WHO&WHY~WHO+WHY~WHO/WHY~$(id)~`id`~%s%n%x~../../etc/passwd~' OR 1=1 --"
    rb"~<script>alert(1)</script>~{{7*7}}~ERR~ERR unknown command~ERR internal~1~here"
    rb'~"WHO"~WHO|WHY'
).split(b"~")
ARGUMENTS = (b" x", b"\tx", b" 1", b" WHO", b" WHERE", b" WHY", b" --help", b" x y z")
EXTENSIONS = (b"x", b"S", b"0", b"_", b"-", *REPLIES)
UNKNOWN_WORDS = [
    *(Case(f"the word {word.decode()}", word + b"\n", UNKNOWN) for word in WORDS),
    *(
        Case(f"{command.decode()} and then {more.decode()!r}", command + more + b"\n", reply)
        for command in REPLIES
        for more, reply in {
            **dict.fromkeys(ARGUMENTS, USAGES[command]),
            **dict.fromkeys(EXTENSIONS, UNKNOWN),
        }.items()
    ),
    *(
        Case(f"only {part.decode()} of {command.decode()}", part + b"\n", UNKNOWN)
        for command in REPLIES
        for part in (command[1:], *(command[:size] for size in range(1, len(command))))
    ),
]

# Control characters are not blanks, except the five above (other definitions of white space include
# 1C to 1F).

CONTROLS = [code for code in (*range(0x20), 0x7F) if code not in b"\t\n\v\f\r"]
CONTROL_CHARACTERS = [
    *(
        Case(f"byte {code:02X} alone", bytes([code]) + b"\n", UNKNOWN)
        for code in (0, 4, 0x1A, 0x1B, 0x1F, 0x7F)
    ),
    *(
        Case(f"byte {code:02X} before WHO", bytes([code]) + b"WHO\n", UNKNOWN)
        for code in (0, 4, 0x1A, 0x1C, 0x1F, 0x7F)
    ),
    *(
        Case(f"byte {code:02X} after WHO", b"WHO" + bytes([code]) + b"\n", UNKNOWN)
        for code in CONTROLS
    ),
    Case("NUL inside a command", b"W\0HO\n", UNKNOWN),
    Case("NUL after CR", b"WHO\r\0\n", USAGES[b"WHO"]),
    Case("many NULs", b"\0" * 500 + b"\nWHY\n", UNKNOWN + WHY),
    Case("backspace", b"WHX\bO\n", UNKNOWN),
    Case("LF CR", b"WHO\n\rWHY\n\r", WHO + WHY),
    Case("CR alone ends no line", b"WHO\rWHY\n", USAGES[b"WHO"]),
    Case("VT ends no line", b"WHO\vWHY\n", USAGES[b"WHO"]),
    Case("FF ends no line", b"WHO\fWHY\n", USAGES[b"WHO"]),
    Case("NUL after a blank", b"WHY \0\n", USAGES[b"WHY"]),
    Case("1E ends no line", b"WHO\x1eWHY\n", UNKNOWN),
    Case("ANSI colour", b"\x1b[31mWHO\x1b[0m\n", UNKNOWN),
    Case("ANSI colour after", b"WHO\x1b[0m\n", UNKNOWN),
    Case("ANSI clear screen", b"\x1b[2J\x1b[H\n", UNKNOWN),
    Case("ANSI window title", b"\x1b]0;pwned\x07\n", UNKNOWN),
    Case("ANSI arrow key", b"\x1b[A\n", UNKNOWN),
    Case("ANSI bracketed paste", b"\x1b[200~WHO\x1b[201~\n", UNKNOWN),
    Case("ANSI then a command", b"\x1b[2J\nWHO\n", UNKNOWN + WHO),
]

# Bytes above 127, text or not.

HIGH_BYTES = (0x80, 0x85, 0xA0, 0xC3, 0xD7, 0xFE, 0xFF)
TEXTS = {
    "e acute": "\u00e9",
    "no-break space, WHO": "\u00a0WHO",
    "WHO, next line": "WHO\u0085",
    "WHO, line separator, WHY": "WHO\u2028WHY",
    "WHO, zero width space": "WHO\u200b",
    "byte order mark, WHO": "\ufeffWHO",
    "fullwidth WHO": "\uff37\uff28\uff2f",
    "Cyrillic WHO": "W\u041d\u041e",
    "long s": "WHO\u017f",
    "emoji": "\U0001f600",
    "right to left": "\u202eOHW",
    "WHO with an argument": "WHO \u00e9",
}
BAD_UTF8 = {
    "a lone continuation": b"\x80\xbf",
    "a cut sequence": b"WHO\xe2\x82",
    "a sequence cut by a letter": b"\xc3(",
    "an overlong slash": b"\xc0\xaf",
    "an overlong W": b"\xc1\x97HO",
    "a surrogate": b"\xed\xa0\x80",
    "too large a code point": b"\xf4\x90\x80\x80",
}
NON_ASCII = [
    *(
        Case(f"byte {code:02X}{where}", before + bytes([code]) + after + b"\n", NOT_ASCII)
        for where, before, after in (
            (" alone", b"", b""),
            (" before WHO", b"", b"WHO"),
            (" after WHO", b"WHO", b""),
        )
        for code in HIGH_BYTES
    ),
    *(Case(f"UTF-8, {name}", text.encode() + b"\n", NOT_ASCII) for name, text in TEXTS.items()),
    *(
        Case(f"bad UTF-8, {name}", line + b"\nWHY\n", NOT_ASCII + WHY)
        for name, line in BAD_UTF8.items()
    ),
    Case("every byte but LF", bytes(code for code in range(256) if code != 10) + b"\n", NOT_ASCII),
    Case("every byte", bytes(range(256)) + b"\n", UNKNOWN + NOT_ASCII),  # The tenth ends a line.
    Case("UTF-16", "WHO\n".encode("utf-16-le"), UNKNOWN + UNKNOWN),  # W0H0O0 and, unterminated, 0.
    Case("telnet negotiation", b"\xff\xfd\x03\xff\xfb\x18WHO\r\n", NOT_ASCII),
    Case("telnet interrupt", b"\xff\xf4\xff\xfd\x06\r\nWHO\r\n", NOT_ASCII + WHO),
]

# How long a line may be. Its ending does not count, be it LF or CRLF.

LONG = b"x" * 2000
LENGTHS = {"limit-1": LIMIT_BYTES - 1, "limit": LIMIT_BYTES}
LENGTHS |= {"limit+1": LIMIT_BYTES + 1, "limit+2": LIMIT_BYTES + 2}
FILLINGS = (
    # The filling of the line, its end, and the reply if it is not too long.
    ("letters", b"x", b"", UNKNOWN),
    ("bytes above 127", b"\xe9", b"", NOT_ASCII),
    ("blanks", b" ", b"", b""),
    ("blanks, then WHY", b" ", b"WHY", WHY),
    ("NULs", b"\0", b"", UNKNOWN),
)
LENGTH_CASES = [
    *(
        Case(
            f"{filling}, {length}, {ending}",
            filler * (size - len(last)) + last + ENDINGS[ending],
            reply if size <= LIMIT_BYTES else TOO_LONG,
            stays_open=size <= LIMIT_BYTES,
        )
        for filling, filler, last, reply in FILLINGS
        for length, size in LENGTHS.items()
        for ending in ENDINGS
    ),
    Case("WHY and blanks, limit", b"WHY".ljust(LIMIT_BYTES) + b"\n", WHY),
    closed("WHY and blanks, limit+1", b"WHY".ljust(LIMIT_BYTES + 1) + b"\n", TOO_LONG),
    Case("CRCRLF, limit-1: the first CR counts", b"x" * (LIMIT_BYTES - 1) + b"\r\r\n", UNKNOWN),
    closed("CRCRLF, limit: the first CR counts", b"x" * LIMIT_BYTES + b"\r\r\n", TOO_LONG),
    closed("CR inside at the limit", b"x" * LIMIT_BYTES + b"\rx\n", TOO_LONG),
    # The last CR is half of an ending.
    Case("CRs alone, limit+1", b"\r" * (LIMIT_BYTES + 1) + b"\n", b""),
    closed("CRs alone, limit+2", b"\r" * (LIMIT_BYTES + 2) + b"\n", TOO_LONG),
    Case("unterminated, limit", b"x" * LIMIT_BYTES, UNKNOWN),
    Case("unterminated, limit, CR", b"x" * LIMIT_BYTES + b"\r", UNKNOWN),
    closed("unterminated, limit+1", b"x" * (LIMIT_BYTES + 1), TOO_LONG),
    closed("unterminated, limit+1, CR", b"x" * (LIMIT_BYTES + 1) + b"\r", TOO_LONG),
    closed("long after good ones", b"WHO\nWHY\n" + LONG + b"\n", WHO + WHY + TOO_LONG),
    closed("long and unterminated after a good one", b"WHO\n" + LONG, WHO + TOO_LONG),
    closed("long before good ones", LONG + b"\nWHO\nWHY\n", TOO_LONG),
    closed("long between", b"WHO\n" + LONG + b"\nWHY\n", WHO + TOO_LONG),
    closed("long twice", (LONG + b"\n") * 2, TOO_LONG),
    closed("very long", b"x" * 100_000 + b"\nWHO\n", TOO_LONG),
    closed("very long and blank", b" " * 100_000 + b"WHO\n", TOO_LONG),
    closed("a command said over and over on one line", b"WHO" * 1000 + b"\nWHO\n", TOO_LONG),
    Case(
        "good before and after the limit",
        b"WHO\n" + b"x" * LIMIT_BYTES + b"\nWHY\n",
        WHO + UNKNOWN + WHY,
    ),
    Case("ten of the limit", (b"x" * LIMIT_BYTES + b"\r\n") * 10 + b"WHY\n", UNKNOWN * 10 + WHY),
    Case("short lines that are long together", b"x\n" * 2000, UNKNOWN * 2000),
]

# A first line that looks like an HTTP request: no reply, closed, and nothing after it is run.

HTTP_LINES = (
    *(b"GET / HTTP/1.1", b"GET / HTTP/1.0", b"HEAD / HTTP/1.1", b"POST /x HTTP/1.1"),
    *(b"PUT /x HTTP/1.1", b"get / http/1.1", b"Post / Http/1.1", b"gET / hTtP/1.1"),
    *(b"GET / HTTP/2", b"PRI * HTTP/2.0", b"GET / HTTP/", b"OPTIONS * HTTP/1.1", b"a b HTTP/x"),
    *(b"CONNECT example.com:443 HTTP/1.1", b"GET http://example.com/ HTTP/1.1"),
    *(b"GET  /  HTTP/1.1", b"\t GET\t/\tHTTP/1.1 \t", b"GET /a b c HTTP/1.1"),
    *(b"WHO WHO HTTP/1.1", b"GET /\xc3 HTTP/1.1"),
)
NO_HTTP_LINES = (
    *(b"GET", b"GET /", b"GET /index.html", b"HTTP/1.1", b"GET HTTP/1.1"),
    *(b"GET / HTTP", b"GET / HTTPS/1", b"GET / XHTTP/1.1", b"GET /HTTP/1.1", b"GET /\0HTTP/1.1"),
    *(b"HTTP/1.1 200 OK", b"GET / HTTP/1.1 x", b"GET HTTP/1.1 /"),
)
REQUEST = b"POST /x HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 8\r\n\r\nWHO\nWHO\n"
BEFORE_HTTP = (*REPLIES.items(), (b"NOPE", UNKNOWN), (b"\xff", NOT_ASCII), (b"GET /", UNKNOWN))
HTTP = [
    *(
        closed(f"HTTP, {line.decode('latin1').strip()}, {ending}", line + ENDINGS[ending])
        for line in HTTP_LINES
        for ending in ENDINGS
    ),
    *(
        closed(f"HTTP after a blank line, {name}", line + b"GET / HTTP/1.1\r\n")
        for name, line in BLANK_LINES.items()
    ),
    closed("HTTP request with a body of commands", REQUEST),
    closed("HTTP request after blank lines", b"\r\n\n" + REQUEST),
    closed("HTTP, then commands", b"GET / HTTP/1.1\nWHO\nWHERE\nWHY\n"),
    closed("HTTP, then not ASCII", b"GET / HTTP/1.1\n\xff\n"),
    closed("HTTP, then a long line", b"GET / HTTP/1.1\n" + LONG + b"\n"),
    closed("HTTP, unterminated", b"GET / HTTP/1.1"),
    closed("HTTP, unterminated after a blank line", b"\r\nGET / HTTP/1.1"),
    closed("HTTP, limit", b"GET /".ljust(LIMIT_BYTES - 9, b"x") + b" HTTP/1.1\r\n"),
    closed("HTTP, limit+1", b"GET /".ljust(LIMIT_BYTES - 8, b"x") + b" HTTP/1.1\r\n", TOO_LONG),
    *(
        Case(f"no HTTP, {line.decode()}", line + b"\r\nWHY\n", UNKNOWN + WHY)
        for line in NO_HTTP_LINES
    ),
    Case("no HTTP, but a command with a word", b"WHO HTTP/1.1\r\nWHY\n", USAGES[b"WHO"] + WHY),
    *(
        Case(
            f"HTTP second, after {line.decode('latin1')}",
            line + b"\nGET / HTTP/1.1\nWHY\n",
            reply + UNKNOWN + WHY,
        )
        for line, reply in BEFORE_HTTP
    ),
    Case("HTTP second, not ASCII", b"WHO\nGET /\xc3 HTTP/1.1\n", WHO + NOT_ASCII),
    Case("HTTP second and third", b"WHO\n" + b"GET / HTTP/1.1\n" * 2, WHO + UNKNOWN * 2),
    Case("HTTP second, a whole request", b"WHY\n" + REQUEST, WHY + UNKNOWN * 3 + WHO * 2),
    Case("HTTP second, unterminated", b"WHO\nGET / HTTP/1.1", WHO + UNKNOWN),
]

# A first line that starts like TLS: the same.

HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
TLS = [
    closed("TLS", HELLO),
    closed("TLS, lines in it", HELLO + b"\nWHO\nWHERE\nWHY\n"),
    closed("TLS after blank lines", b"\r\n\n" + HELLO + b"\nWHO\n"),
    closed("TLS, long", HELLO + LONG + b"\nWHO\n"),
    closed("TLS, its two bytes alone", HELLO[:2]),
    closed("TLS, its two bytes and LF", HELLO[:2] + b"\n"),
    Case("TLS, its first byte alone", HELLO[:1] + b"\nWHO\n", UNKNOWN + WHO),
    Case("no TLS, a blank before", b" " + HELLO + b"\nWHO\n", NOT_ASCII + WHO),
    Case("TLS second", b"WHO\n" + HELLO + b"\nWHY\n", WHO + NOT_ASCII + WHY),
]

# A last line without its newline.

UNTERMINATED = [
    Case("nothing at all", b"", b""),
    *(
        Case(f"unterminated {command.decode()}{name}", before + command + after, replies + reply)
        for command, reply in REPLIES.items()
        for name, before, after, replies in (
            ("", b"", b"", b""),
            (", CR", b"", b"\r", b""),
            (", blanks", b" \t", b"  ", b""),
            (" after a command", b"WHY\n", b"", WHY),
            (" after blank lines", b"\n\r\n", b"", b""),
        )
    ),
    Case("unterminated who", b"who", WHO),
    Case("unterminated WH", b"WH", UNKNOWN),
    Case("unterminated WHOA", b"WHOA", UNKNOWN),
    Case("unterminated argument", b"WHO x", USAGES[b"WHO"]),
    Case("unterminated NUL", b"WHO\0", UNKNOWN),
    Case("unterminated byte above 127", b"WHY\nWHO\xff", WHY + NOT_ASCII),
    Case("unterminated blanks", b"WHO\n \t", WHO),
    Case("unterminated CR", b"\r", b""),
    Case("unterminated after a thousand", b"WHY\n" * 1000 + b"WHO", WHY * 1000 + WHO),
]

CASES = [
    *(*SPELLED, *BLANKS_AROUND, *BLANK_LINE_CASES, *PIPELINED, *UNKNOWN_WORDS),
    *(*CONTROL_CHARACTERS, *NON_ASCII, *LENGTH_CASES, *HTTP, *TLS, *UNTERMINATED),
]
