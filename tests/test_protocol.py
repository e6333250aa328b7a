"""The protocol without a socket: the table of cases, random input against an oracle, and pauses."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gserver.protocol import (
    ERROR_REPLIES,
    LINE_TOO_LONG,
    NOT_ASCII,
    UNKNOWN_COMMAND,
    ErrorReply,
    Grammar,
    Parser,
    usage_error,
)
from lab import wire_cases as wire
from lab.wire import WITH_WORDS, read, replies, say
from lab.wire_cases import CASES, LIMIT_BYTES, REPLIES, Case

#: A command is the table's value for its name: here, the reply itself.
GRAMMAR = Grammar(REPLIES, LIMIT_BYTES)
#: Includes a command that is a prefix of another, one of a single letter, and two with words.
NESTED = {**REPLIES, b"WHOAMI": b"you\n", b"X": b"ex\n", **dict.fromkeys(WITH_WORDS, b"")}


def bind(name: bytes, words: Sequence[str]) -> bytes | ErrorReply:
    reply = say(name, words)
    return usage_error(WITH_WORDS[name].usage.decode()) if reply is None else reply + b"\n"


def nested(limit: int) -> Grammar[bytes]:
    return Grammar(NESTED, limit, {name: partial(bind, name) for name in WITH_WORDS})


every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def replies_to(items: Iterable[bytes | ErrorReply]) -> bytes:
    return b"".join(item.reply if isinstance(item, ErrorReply) else item for item in items)


def fed(parser: Parser[bytes], pieces: Iterable[bytes]) -> bytes:
    return b"".join(replies_to(parser.feed(piece)) for piece in pieces)


def bytewise(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


def test_the_table_has_enough_cases_with_unique_names() -> None:
    assert max(Counter(case.name for case in CASES).values()) == 1
    assert len(CASES) >= 300


@every_case
def test_a_case_sent_at_once_gets_its_replies(case: Case) -> None:
    parser = Parser(GRAMMAR)
    assert fed(parser, [case.sent]) + replies_to(parser.end()) == case.replies


@every_case
def test_a_case_sent_byte_by_byte_has_the_same_replies(case: Case) -> None:
    parser = Parser(GRAMMAR)
    assert fed(parser, bytewise(case.sent)) + replies_to(parser.end()) == case.replies


@every_case
@pytest.mark.parametrize("is_whole", [True, False], ids=["in one piece", "in a second piece"])
def test_lines_after_a_case_are_answered_while_the_connection_is_open(
    case: Case, is_whole: bool
) -> None:
    parser = Parser(GRAMMAR)
    rest = b"\nWHY\n\xff\nwhere"
    pieces = [case.sent + rest] if is_whole else [case.sent, rest]
    more = wire.WHY + wire.NOT_ASCII + wire.WHERE if case.stays_open else b""
    assert fed(parser, pieces) + replies_to(parser.end()) == case.replies + more


@every_case
def test_a_closing_error_reply_is_the_last_one(case: Case) -> None:
    # Only this flag tells the connection to close, whether the reply is empty or not.
    items: list[bytes | ErrorReply] = Parser(GRAMMAR).feed(case.sent + b"\n")
    closes = [isinstance(item, ErrorReply) and item.closes for item in items]
    assert (bool(closes) and closes.pop()) is not case.stays_open
    assert not any(closes)


# Random input, against the oracle of the protocol, which the table has checked.


@every_case
def test_the_oracle_agrees_with_the_table(case: Case) -> None:
    assert replies(case.sent, REPLIES, LIMIT_BYTES) == case.replies
    is_closed = read(case.sent, REPLIES, LIMIT_BYTES).is_closed
    assert is_closed != case.stays_open or not case.sent.endswith(b"\n")


WORDS = st.sampled_from(
    [
        *b"WHO who WHERE Where WHY why WHOAMI X WH WHOA NOPE HTTP/1.1 \0 \x16\x03 \xff".split(b" "),
        *(b"", b"GET / HTTP/1.1", b"get / http/1.0", b"GET /", b"\xc3\xa9"),
        *(b"ECHO", b"echo a  b", b"Echo \0", b"PAIR", b"pair 1", b"PAIR 1\t2", b"PAIR 1 2 3"),
    ]
)
BLANKS = st.text(" \t\r\v\f", max_size=2).map(str.encode)
LINES = st.one_of(
    st.tuples(BLANKS, WORDS, BLANKS).map(b"".join),
    st.lists(WORDS, max_size=4).map(b" ".join),
    st.binary(max_size=12),
    st.integers(0, 20).map(lambda size: b"x" * size),
)
INPUTS = st.lists(
    st.tuples(LINES, st.sampled_from([b"\n", b"\r\n", b"\n\n", b""])).map(b"".join), max_size=12
).map(b"".join)
#: Small limits, so that random lines fall on both sides of them; and the default.
LIMITS = st.one_of(st.integers(1, 16), st.just(LIMIT_BYTES))
#: Each chunk, and whether a pause follows it.
CHUNK_SIZES = st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=40)


def cut(data: bytes, sizes: list[tuple[int, bool]]) -> list[tuple[bytes, bool]]:
    """The data in chunks of these sizes, and the rest in one more."""
    chunks = []
    for size, is_paused in sizes:
        chunks.append((data[:size], is_paused))
        data = data[size:]
    return [*chunks, (data, False)]


@settings(max_examples=500)
@given(data=INPUTS, sizes=CHUNK_SIZES, limit=LIMITS)
@example(data=b"WHO\n", sizes=[], limit=2)
@example(data=b"echo a b\nPAIR x\nPAIR\nWHO x\n", sizes=[], limit=LIMIT_BYTES)
@example(data=b"GET / HTTP/1.1\nWHO\n", sizes=[(3, False)], limit=LIMIT_BYTES)
def test_random_bytes_however_split_get_the_replies_of_the_oracle(
    data: bytes, sizes: list[tuple[int, bool]], limit: int
) -> None:
    parser = Parser(nested(limit))
    answered = fed(parser, [chunk for chunk, _ in cut(data, sizes)]) + replies_to(parser.end())
    assert answered == replies(data, NESTED, limit, WITH_WORDS)


@settings(max_examples=500)
@given(data=INPUTS, sizes=CHUNK_SIZES, limit=LIMITS)
@example(data=b"WHOAMI\n", sizes=[(3, True)], limit=LIMIT_BYTES)
@example(data=b" \r\n  WHY", sizes=[(1, True), (3, True)], limit=LIMIT_BYTES)
def test_a_pause_ends_only_a_complete_command_or_blanks(
    data: bytes, sizes: list[tuple[int, bool]], limit: int
) -> None:
    parser = Parser(nested(limit))
    answered = meant = b""
    for chunk, is_paused in cut(data, sizes):
        answered += fed(parser, [chunk])
        meant += chunk
        if is_paused:
            answered += replies_to(parser.silence())
            begun = meant.split(b"\n")[-1].strip().upper()
            if begun in (
                b"",
                b"WHERE",
                b"WHY",
                b"WHOAMI",
                b"X",
            ):  # Not WHO: it is a prefix of WHOAMI.
                meant += b"\n"
    assert answered + replies_to(parser.end()) == replies(meant, NESTED, limit, WITH_WORDS)


@settings(max_examples=200)
@given(chunks=st.lists(st.one_of(st.binary(max_size=3000), LINES), max_size=20), limit=LIMITS)
@example(chunks=[b"\r" * 20, b"\r"], limit=16)
@example(chunks=[b"x" * 5000], limit=LIMIT_BYTES)
def test_a_parser_never_holds_more_than_a_line_and_its_cr(chunks: list[bytes], limit: int) -> None:
    parser = Parser(nested(limit))
    for chunk in chunks:
        parser.feed(chunk)
        assert len(parser.unread) <= limit + 1


# Pauses.


@pytest.mark.parametrize("command", [*REPLIES, b"who", b"Where", b" why", b"WHY ", b"\tWHO\r"])
def test_a_pause_answers_a_complete_command_once(command: bytes) -> None:
    parser = Parser(GRAMMAR)
    assert parser.feed(command) == []
    assert parser.is_complete
    assert replies_to(parser.silence()) == REPLIES[command.strip().upper()]
    assert parser.silence() == []
    assert fed(parser, [b"\r\n"]) == b""  # The late newline is a blank line.
    assert parser.end() == []


@pytest.mark.parametrize(
    "begun",
    [b"W", b"WH", b"WHOA", b"WHO x", b"WHO\0", b"NOPE", b"\xff", b"GET / HTTP/1.1", b"x" * 1024],
)
def test_a_pause_does_not_answer_a_non_command(begun: bytes) -> None:
    parser = Parser(GRAMMAR)
    parser.feed(begun)
    assert not parser.is_complete
    assert parser.silence() == []
    assert parser.unread == begun


@pytest.mark.parametrize("blanks", [b"", b" ", b"\r", b" \t\r\v\f", b" " * LIMIT_BYTES])
def test_a_pause_drops_blanks(blanks: bytes) -> None:
    parser = Parser(GRAMMAR)
    parser.feed(blanks)
    assert parser.is_complete
    assert parser.silence() == []
    assert parser.unread == b""
    # They do not count in the next line.
    assert parser.feed(b"x" * LIMIT_BYTES + b"\n") == [UNKNOWN_COMMAND]


def test_blanks_ended_by_a_pause_do_not_count_as_the_first_line() -> None:
    parser = Parser(GRAMMAR)
    parser.feed(b"  ")
    parser.silence()
    assert fed(parser, [b"GET / HTTP/1.1\nWHO\n"]) == b""


def test_a_command_ended_by_a_pause_counts_as_the_first_line() -> None:
    parser = Parser(GRAMMAR)
    parser.feed(b"WHY")
    parser.silence()
    assert parser.feed(b"\nGET / HTTP/1.1\n") == [UNKNOWN_COMMAND]


def test_a_command_that_is_a_prefix_of_another_waits_for_its_newline() -> None:
    parser = Parser(nested(LIMIT_BYTES))
    parser.feed(b"who")
    assert not parser.is_complete
    assert parser.silence() == []
    assert fed(parser, [b"ami"]) == b""
    assert parser.is_complete  # No longer command starts with this one.
    assert replies_to(parser.silence()) == b"you\n"
    assert fed(parser, [b"WHO\n"]) == wire.WHO


def test_a_command_inside_another_but_not_a_prefix_does_not_wait() -> None:
    parser = Parser(Grammar({b"HO": b"ho\n", b"WHO": b"1\n"}, LIMIT_BYTES))
    parser.feed(b"HO")
    assert replies_to(parser.silence()) == b"ho\n"


# The end.


@pytest.mark.parametrize(
    "last", [b"x" * 1025, b"x" * 1025 + b"\n", b"GET / HTTP/1.1\n", b"\x16\x03"]
)
def test_nothing_is_parsed_after_a_closing_item(last: bytes) -> None:
    parser = Parser(GRAMMAR)
    [item] = parser.feed(last)
    assert isinstance(item, ErrorReply)
    assert item.closes
    assert parser.unread == b""
    for data in (b"WHO\n", b"WHY", b"\n", last):
        assert parser.feed(data) == []
        assert parser.silence() == []
        assert parser.unread == b""
    assert parser.end() == []


def test_a_line_is_rejected_as_soon_as_it_is_too_long() -> None:
    parser = Parser(GRAMMAR)
    assert parser.feed(b"x" * LIMIT_BYTES) == []
    assert parser.feed(b"\r") == []  # It may be half of a line ending.
    assert parser.feed(b"x") == [LINE_TOO_LONG]


def test_the_end_of_input_answers_the_rest_once() -> None:
    parser = Parser(GRAMMAR)
    parser.feed(b"WHY\nWHO\xff")
    assert parser.end() == [NOT_ASCII]
    assert parser.end() == []


def test_every_error_reply_has_a_unique_name_and_at_most_one_err_line() -> None:
    assert len({refusal.name for refusal in ERROR_REPLIES}) == len(ERROR_REPLIES)
    for refusal in ERROR_REPLIES:
        assert re.fullmatch(rb"(ERR [A-Za-z ]+\n)?", refusal.reply)
        assert refusal.reply or refusal.closes  # An unanswered line would shift all later replies.
