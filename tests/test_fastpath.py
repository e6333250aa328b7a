"""The fast path gives the same replies and counts as the parser, or declines."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gserver.addresses import TCP
from gserver.commands import BUILT_IN, Command, command
from gserver.config import Config
from gserver.protocol import ErrorReply, Parser
from gserver.scoreboard import Scoreboard
from gserver.serve.fastpath import (
    MAX_LINES,
    MAX_LONG_PLANS,
    MAX_MISSES,
    MAX_SHORT_BYTES,
    MAX_SHORT_PLANS,
    PIECE_BYTES,
    FastPath,
)
from gserver.serve.limits import Limits
from gserver.serve.replies import Replies
from lab.wire_cases import CASES, Case


@command("QUICK", may_block=False)
def quick(_request: object) -> str:
    return "never blocks"


@command("NAP")
def nap(_request: object) -> str:
    return "may block"


CONFIG = Config(server_id="here")
LINES = (
    b"WHO\n",
    b"WHERE\n",
    b"WHY\n",
    b"who\r\n",
    b"Why\n",
    b"QUICK\n",
    b"NAP\n",
    b"NOPE\n",
    b"\n",
    b"WHO",
    b"W",
    b"O\n",
)


class Worker:
    """The parts of a worker that answer: the fast path and the parser."""

    def __init__(self, config: Config = CONFIG, clients: int = 3) -> None:
        self.scoreboard = Scoreboard.create(2)
        self.limits = Limits(config, self.scoreboard, 1)
        self.replies = Replies(config, self.scoreboard, 1, (*BUILT_IN, quick, nap))
        for fd in range(clients):
            self.limits.admit(fd, TCP)
        self.fastpath = FastPath(self.replies)

    def counts(self) -> dict[str, int]:
        """The counters of commands and error replies."""
        return {
            name: count
            for name, count in self.scoreboard.totals().items()
            if name.startswith(("commands.", "error_replies."))
        }

    def parsed(self, data: bytes, has_spoken: bool) -> tuple[bytes, dict[str, int]] | None:
        """The parser's replies and counts; None for a read that is not for the fast path."""
        parser: Parser[Command] = Parser(self.replies.grammar, is_first=not has_spoken)
        items = parser.feed(data)
        if parser.unread or not items:
            return None
        replies, counts = b"", dict.fromkeys(self.counts(), 0)
        for item in items:
            if isinstance(item, ErrorReply):
                if item.closes or not has_spoken:
                    return None
                replies += item.reply
                counts[f"error_replies.{item.name}"] += 1
            else:
                if item.may_block:
                    return None
                replies += item.answer(self.replies.request(None))
                counts[f"commands.{item.name}"] += 1
        return replies, counts


def check(worker: Worker, data: bytes, has_spoken: bool = True) -> bytes | None:
    """Answer on the fast path; check that the parser agrees, or that nothing was counted."""
    before = worker.counts()
    replies = worker.fastpath.answer(data, has_spoken)
    counted = {name: count - before[name] for name, count in worker.counts().items()}
    if replies is None:
        assert not any(counted.values())
    else:
        assert (replies, counted) == worker.parsed(data, has_spoken)
    return replies


@pytest.fixture(scope="module")
def worker() -> Worker:
    return Worker()


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_case_gets_the_replies_of_the_table_or_none(case: Case) -> None:
    worker = Worker(clients=1)
    assert check(worker, case.sent, has_spoken=False) in (None, case.replies)


@given(st.lists(st.sampled_from(LINES), max_size=12).map(b"".join), st.booleans())
def test_lines_in_any_order_get_the_parsers_replies_or_none(
    worker: Worker, data: bytes, has_spoken: bool
) -> None:
    for _ in range(2):  # The second time from the cache.
        check(worker, data, has_spoken)


@given(st.text(alphabet="WHOERY\r\n", max_size=24), st.booleans())
def test_a_near_command_gets_the_parsers_replies_or_none(
    worker: Worker, text: str, has_spoken: bool
) -> None:
    check(worker, text.encode(), has_spoken)


@given(st.lists(st.sampled_from((*LINES[:6], *LINES[7:9])), min_size=1, max_size=60).map(b"".join))
def test_whole_lines_that_cannot_block_are_answered(worker: Worker, data: bytes) -> None:
    is_blank = not data.strip()
    assert (check(worker, data) is None) == is_blank


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b" \n"])
@pytest.mark.parametrize("line", [b"WHO", b"where", b"Why", b" who", b"why", b"WheRe"])
def test_a_single_line_in_any_spelling_is_answered(
    worker: Worker, line: bytes, ending: bytes
) -> None:
    for has_spoken in (False, True):
        assert check(worker, line + ending, has_spoken) in (b"3\n", b"here\n", b"42\n")


def filled(worker: Worker, pattern: bytes, count: int) -> int:
    """Let a worker answer this many different reads; return the number of cached plans."""
    for number in range(count):
        assert check(worker, pattern % number) is not None
    return len(worker.fastpath._plans)


SHORT, LONG = b"who\nNOPE%d\n", b"who\n" * 20 + b"NOPE%d\n"


@pytest.mark.parametrize("missed", [b"WHO\nWHY\n", b"why\nNOPE\n"], ids=["upper case", "mixed"])
def test_the_cache_is_cleared_after_many_misses(missed: bytes) -> None:
    worker = Worker()
    for _ in range(2):
        assert filled(worker, LONG, MAX_LONG_PLANS) == MAX_LONG_PLANS
        assert filled(worker, SHORT, MAX_SHORT_PLANS - MAX_LONG_PLANS) == MAX_SHORT_PLANS
        for _ in range(MAX_MISSES - 1):
            worker.fastpath.answer(missed, has_spoken=True)
        assert len(worker.fastpath._plans) == MAX_SHORT_PLANS
        assert check(worker, missed) is not None
        assert len(worker.fastpath._plans) == 0


def test_the_cache_limits_the_number_and_size_of_reads() -> None:
    worker = Worker()
    short, longer = b"NOPE%59d\n", b"NOPE%60d\n"
    assert (len(short % 0), len(longer % 0)) == (MAX_SHORT_BYTES, MAX_SHORT_BYTES + 1)
    assert filled(worker, short, MAX_LONG_PLANS + 1) == MAX_LONG_PLANS + 1
    assert filled(worker, longer, MAX_LONG_PLANS + 1) == 2 * MAX_LONG_PLANS + 1
    assert filled(worker, short, MAX_LONG_PLANS + 2) == 2 * MAX_LONG_PLANS + 2


@pytest.mark.parametrize("data", [b"WHO\n", b"WHO\n" * (PIECE_BYTES // 4)])
def test_a_read_in_upper_case_is_cached_if_there_is_room(data: bytes) -> None:
    worker = Worker()
    assert check(worker, data) is not None
    assert set(worker.fastpath._plans) == {data}


def test_the_first_read_may_be_a_custom_command() -> None:
    assert check(Worker(), b"QUICK\n", has_spoken=False) == b"never blocks\n"


def test_lines_are_cached_up_to_a_limit_and_then_dropped() -> None:
    worker = Worker()
    lines = worker.fastpath._lines
    before = len(lines)
    for number in range(MAX_LINES - before):
        assert check(worker, b"NOPE%d\n" % number) is not None
        assert len(lines) == before + number + 1
    check(worker, b"nope\n")
    assert len(lines) == 1
    check(worker, b"x" * MAX_SHORT_BYTES + b"\n" + b"y" * (MAX_SHORT_BYTES + 1) + b"\n")
    assert len(lines) == 2


@pytest.mark.parametrize("data", [b"WHO\nWHERE\nWHY\n" * 200, b"who\n" * 128])
def test_long_reads_are_answered(worker: Worker, data: bytes) -> None:
    assert check(worker, data) is not None


@pytest.mark.parametrize(
    "data",
    [b"", b"\n", b"WHO", b"WHO\nWH", b"NAP\n", b"WHO\nNAP\n", b"who\n" * 500, b"x" * 2000 + b"\n"],
)
def test_other_input_is_left_to_the_parser(worker: Worker, data: bytes) -> None:
    assert check(worker, data) is None


@pytest.mark.parametrize("data", [b"HO\n", b"WHO\nNOPE\nWHY\n", b"GET / HTTP/1.1\r\n"])
def test_a_first_read_with_an_unknown_command_is_left_to_the_parser(
    worker: Worker, data: bytes
) -> None:
    assert check(worker, data, has_spoken=False) is None
    assert check(worker, data) is not None


@pytest.mark.parametrize("server_id", ["WHO", "WHY", "WHERE", "xWHO", "WHEREWHERE", "42"])
def test_a_server_id_that_is_a_command_is_still_only_a_reply(server_id: str) -> None:
    worker = Worker(replace(CONFIG, server_id=server_id))
    assert check(worker, b"WHERE\nWHO\nWHERE\nWHY\nWHERE\n") == b"ID\n3\nID\n42\nID\n".replace(
        b"ID", server_id.encode()
    )


def test_the_number_of_clients_is_never_cached(worker: Worker) -> None:
    assert worker.limits.admit(3, TCP) is None
    assert [check(worker, b"WHO\n"), check(worker, b"WHY\nWHO\n")] == [b"4\n", b"42\n4\n"]
    worker.limits.uncount(TCP)
    assert check(worker, b"WHO\n") == b"3\n"


@pytest.mark.parametrize("data", [b"WHO\n", b"WHY\nWHO\nWHERE\n"])
def test_a_who_that_cannot_be_answered_is_left_to_the_parser_uncounted(data: bytes) -> None:
    worker = Worker(replace(CONFIG, redis_url="redis://localhost", on_cluster_loss="error"))
    assert check(worker, data) is None
    assert check(worker, b"WHY\nWHERE\n") == b"42\nhere\n"


def test_a_line_that_is_too_long_is_left_to_the_parser() -> None:
    assert check(Worker(replace(CONFIG, max_line_bytes=5)), b"WHERE\nWHO\n") == b"here\n3\n"
