"""The fastpath way: the same replies and the same counts as by the parser, or none at all."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gserver.commands import BUILT_IN, Command, command
from gserver.config import Config
from gserver.protocol import ErrorReply, Parser
from gserver.scoreboard import Scoreboard
from gserver.serve.fastpath import FastPath
from gserver.serve.limits import Limits
from tests.wire_cases import CASES, Case


@command("QUICK", may_block=False)
def quick(_service: object) -> str:
    return "never blocks"


@command("NAP")
def nap(_service: object) -> str:
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
    """What a worker answers by: its fastpath way, and its parser."""

    def __init__(self, config: Config = CONFIG, clients: int = 3) -> None:
        self.scoreboard = Scoreboard.create(2)
        self.limits = Limits(config, self.scoreboard, 1, (*BUILT_IN, quick, nap))
        for fd in range(clients):
            self.limits.admit(fd)
        self.fastpath = FastPath(self.limits.grammar, self.limits.service, self.limits.cells)

    def counts(self) -> dict[str, int]:
        """How often each command was answered."""
        return {
            name: count
            for name, count in self.scoreboard.totals().items()
            if name.startswith("commands.")
        }

    def parsed(self, data: bytes) -> tuple[bytes, dict[str, int]] | None:
        """The replies to data by way of the parser, and the counts; None where there is anything
        but replies.
        """
        parser: Parser[Command] = Parser(self.limits.grammar)
        items = parser.feed(data)
        if parser.partial or not items or any(isinstance(item, ErrorReply) for item in items):
            return None
        commands = [item for item in items if isinstance(item, Command)]
        counts = dict.fromkeys(self.counts(), 0)
        for item in commands:
            counts[f"commands.{item.name}"] += 1
        return b"".join(item.answer(self.limits.service) for item in commands), counts


def check(worker: Worker, data: bytes) -> bytes | None:
    """Answer by the fastpath way; see that it is what the parser says, or that nothing has
    happened.
    """
    before = worker.counts()
    replies = worker.fastpath.answer(data)
    counted = {name: count - before[name] for name, count in worker.counts().items()}
    if replies is None:
        assert not any(counted.values())
    else:
        assert (replies, counted) == worker.parsed(data)
    return replies


@pytest.fixture(scope="module")
def worker() -> Worker:
    return Worker()


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_case_is_answered_as_the_table_says_or_not_at_all(case: Case) -> None:
    worker = Worker(clients=1)
    assert check(worker, case.sent) in (None, case.replies)


@given(st.lists(st.sampled_from(LINES), max_size=12).map(b"".join))
def test_lines_in_any_order_are_answered_as_by_the_parser_or_not_at_all(
    worker: Worker, data: bytes
) -> None:
    check(worker, data)


@given(st.text(alphabet="WHOERY\r\n", max_size=24))
def test_what_is_nearly_a_command_is_answered_as_by_the_parser_or_not_at_all(
    worker: Worker, text: str
) -> None:
    check(worker, text.encode())


@given(st.lists(st.sampled_from(LINES[:3]), min_size=1).map(b"".join))
def test_whole_lines_in_capitals_are_answered(worker: Worker, data: bytes) -> None:
    assert check(worker, data) is not None


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("line", [b"WHO", b"where", b"WHY", b"who", b"why", b"WHERE"])
def test_a_single_line_in_the_usual_spellings_is_answered(
    worker: Worker, line: bytes, ending: bytes
) -> None:
    assert check(worker, line + ending) in (b"3\n", b"here\n", b"42\n")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"WHO",
        b"WHO\nWH",
        b"HO\n",
        b"QUICK\n",
        b"NAP\n",
        b"WHO\nNAP\n",
        b"WHO\nNOPE\nWHY\n",
        b"GET / HTTP/1.1\r\n",
    ],
)
def test_all_else_is_left_to_the_parser(worker: Worker, data: bytes) -> None:
    assert check(worker, data) is None


@pytest.mark.parametrize("server_id", ["WHO", "WHY", "WHERE", "xWHO", "WHEREWHERE", "42"])
def test_an_id_that_is_a_command_is_answered_as_it_is(server_id: str) -> None:
    worker = Worker(replace(CONFIG, server_id=server_id))
    assert check(worker, b"WHERE\nWHO\nWHERE\nWHY\nWHERE\n") == b"ID\n3\nID\n42\nID\n".replace(
        b"ID", server_id.encode()
    )


def test_who_is_counted_anew_each_time(worker: Worker) -> None:
    assert worker.limits.admit(3) is None
    assert [check(worker, b"WHO\n"), check(worker, b"WHY\nWHO\n")] == [b"4\n", b"42\n4\n"]
    worker.limits.release()
    assert check(worker, b"WHO\n") == b"3\n"


@pytest.mark.parametrize("data", [b"WHO\n", b"WHY\nWHO\nWHERE\n"])
def test_a_who_that_cannot_be_answered_is_left_to_the_parser_uncounted(data: bytes) -> None:
    worker = Worker(replace(CONFIG, redis_url="redis://localhost", on_cluster_loss="error"))
    assert check(worker, data) is None
    assert check(worker, b"WHY\nWHERE\n") == b"42\nhere\n"


def test_a_line_that_is_too_long_is_none() -> None:
    assert check(Worker(replace(CONFIG, max_line_bytes=5)), b"WHERE\nWHO\n") == b"here\n3\n"
