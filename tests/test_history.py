"""The checker of WHO's promise, case by case, and the recorder of histories.

outer/test_cluster_history.py shows that it accepts real servers and finds deliberate bugs.
"""

import pytest

from lab.history import Answer, Fact, Kind, Promise, Recorder, check
from lab.running import Running

INTERVAL = 0.5
TTL = 5.0
PROMISE = Promise(delta=INTERVAL + 0.25, ttl=TTL)
# Single cases, calculated by hand. DELTA is 0.75 s, the recovery 1.5 s, the TTL 5 s.

NEVER = 1e9


def client(server: str, key: int, at: float, closing: float = NEVER) -> list[Fact]:
    """A client that takes 0.1 s to connect and 0.1 s to close."""
    times = {
        Kind.CONNECTING: at,
        Kind.COUNTED: at + 0.1,
        Kind.CLOSING: closing,
        Kind.CLOSED: closing + 0.1,
    }
    return [Fact(at, kind, server, key) for kind, at in times.items()]


def span(
    begin: Kind, end: Kind, server: str, times: tuple[float, float], key: int = 0
) -> list[Fact]:
    return [Fact(times[0], begin, server, key), Fact(times[1], end, server, key)]


def fault(begin: float, end: float, server: str = "") -> list[Fact]:
    return span(Kind.FAULT, Kind.HEALED, server, (begin, end), key=int(begin * 1000))


#: One client of server a, which sends WHO, and two of server b.
TWO_SERVERS = [
    *(Fact(0, Kind.STARTED, name) for name in "ab"),
    *client("a", 1, 1),
    *client("b", 11, 1),
    *client("b", 12, 1),
]
A_CHANGE = client("a", 2, 12, 22)
B_CHANGE = client("b", 13, 12, 22)
B_KILLED = span(Kind.KILLED, Kind.ENDED, "b", (10, 10.1))
B_STOPPED = span(Kind.STOPPING, Kind.ENDED, "b", (10, 10.5))
C_RESTARTED = [Fact(10, Kind.RESTARTED, "c"), *client("c", 21, 10)]
C_STARTED = [Fact(10, Kind.STARTED, "c"), *client("c", 21, 10)]

#: Facts, the asking server and client, and by time the least and greatest allowed number.
CASES: dict[str, tuple[list[Fact], tuple[str, int], dict[float, tuple[int, int]]]] = {
    "without changes one number is correct": ([], ("a", 1), {10: (3, 3)}),
    "an own client counts from its first reply, and may count while it connects or closes": (
        A_CHANGE,
        ("a", 1),
        {11.9: (3, 3), 12.05: (3, 4), 12.2: (4, 4), 21.9: (4, 4), 22.05: (3, 4), 22.2: (3, 3)},
    ),
    "the client that asks is counted": (A_CHANGE, ("a", 2), {12.05: (4, 4)}),
    "a client of another server is counted within DELTA": (
        B_CHANGE,
        ("a", 1),
        {11.9: (3, 3), 12.05: (3, 4), 12.8: (3, 4), 12.9: (4, 4), 22.8: (3, 4), 22.9: (3, 3)},
    ),
    "while Redis is away, and until all have recovered, the others may have their old counts": (
        B_CHANGE + fault(10, 20),
        ("a", 1),
        {11.9: (3, 3), 12.9: (3, 4), 21.4: (3, 4), 21.6: (4, 4)},
    ),
    "a fault does not excuse forgetting older clients": (
        B_CHANGE + fault(13, 20),
        ("a", 1),
        {14: (4, 4), 19: (4, 4)},
    ),
    "faults that follow each other add up": (
        B_CHANGE + fault(10, 15) + fault(16, 19),
        ("a", 1),
        {17: (3, 4), 20.4: (3, 4), 20.6: (4, 4)},
    ),
    "own changes count at once during a fault too": (
        A_CHANGE + fault(10, 20),
        ("a", 1),
        {12.2: (4, 4)},
    ),
    "a killed server counts for a TTL at most": (
        B_KILLED,
        ("a", 1),
        {9.9: (3, 3), 10.05: (1, 3), 15.8: (1, 3), 15.9: (1, 1)},
    ),
    "a server killed in an outage counts for a TTL after it": (
        B_KILLED + fault(8, 20),
        ("a", 1),
        {15.9: (1, 3), 25.7: (1, 3), 26.6: (1, 1)},
    ),
    "a server that waits for a dead one holds the last count for a TTL": (
        [*B_KILLED, Fact(0, Kind.STARTED, "c"), *client("c", 21, 1, 12), *fault(11, 11.1)],
        ("a", 1),
        {13: (1, 4), 17.5: (1, 4), 17.7: (1, 1)},
    ),
    "a stopped server is dropped within DELTA": (
        B_STOPPED,
        ("a", 1),
        {9.9: (3, 3), 10.2: (1, 3), 11.2: (1, 3), 11.3: (1, 1)},
    ),
    "a server stopped without Redis counts like a killed one": (
        B_STOPPED + fault(9, 11),
        ("a", 1),
        {11.3: (1, 3), 16.7: (1, 3), 17.6: (1, 1)},
    ),
    "a hold at a fault continues": (
        B_KILLED + fault(15, 15.1) + fault(20, 25),
        ("a", 1),
        {19: (1, 3), 31.4: (1, 3), 31.6: (1, 1)},
    ),
    "a server stopped while cut off alone counts like a killed one": (
        B_STOPPED + fault(9, 10.4, "b"),
        ("a", 1),
        {16.2: (1, 3), 16.3: (1, 1)},
    ),
    "an outage drops no server, but being cut off after it does": (
        fault(10, 30) + fault(31, 40, "b"),
        ("a", 1),
        {20: (3, 3), 32: (1, 3)},
    ),
    "a server cut off alone may be dropped when its lease ends, until it has recovered": (
        fault(10, 30, "b"),
        ("a", 1),
        {14.2: (3, 3), 14.3: (1, 3), 31.4: (1, 3), 31.6: (3, 3)},
    ),
    "a server cut off for less than its lease is not dropped": (
        fault(10, 12.6, "b") + fault(14, 16),
        ("a", 1),
        {12.5: (3, 3), 15: (3, 3)},
    ),
    "a server that is cut off may have its old count": (
        B_CHANGE + fault(10, 12.6, "b"),
        ("a", 1),
        {12.9: (3, 4), 14: (3, 4), 14.2: (4, 4)},
    ),
    "a server that is cut off may have the old counts of the others": (
        A_CHANGE + fault(10, 20, "b"),
        ("b", 11),
        {11.9: (3, 3), 19: (3, 4), 21.4: (3, 4), 21.6: (4, 4)},
    ),
    "a server that stops long after a fault is dropped within DELTA": (
        B_STOPPED + fault(2, 3),
        ("a", 1),
        {11.2: (1, 3), 11.3: (1, 1)},
    ),
    "a server without clients that stops adds none": (
        [Fact(0, Kind.STARTED, "c"), *span(Kind.STOPPING, Kind.ENDED, "c", (10, 10.5))],
        ("a", 1),
        {10.2: (3, 3), 11.2: (3, 3)},
    ),
    "a fault that has not ended excuses old counts for as long as it lasts": (
        [*B_CHANGE, Fact(10, Kind.FAULT, "", 7)],
        ("a", 1),
        {12.9: (3, 4), 99: (3, 4)},
    ),
    "a third server that is cut off excuses nothing": (
        [*B_CHANGE, Fact(0, Kind.STARTED, "c"), *fault(10, 20, "c")],
        ("a", 1),
        {12.9: (4, 4)},
    ),
    "a server that has just started may know no other, and is known to them": (
        C_STARTED,
        ("c", 21),
        {10.5: (1, 4), 10.9: (4, 4)},
    ),
    "a server that takes over an id waits before it joins": (
        C_RESTARTED,
        ("a", 1),
        {12.2: (3, 4), 12.3: (4, 4)},
    ),
    "a server that takes over an id in an outage waits after it": (
        C_RESTARTED + fault(9.5, 20),
        ("a", 1),
        {22.2: (3, 4), 22.3: (4, 4)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_checker_allows_exactly_these_numbers(case: str) -> None:
    facts, (server, asker), expected = CASES[case]
    history: list[Fact | Answer] = [*TWO_SERVERS, *facts]
    history += [Answer(server, at, at + 0.01, -1, asker) for at in expected]
    verdict = check(history, PROMISE)
    assert {v.answer.sent: (v.low, v.high) for v in verdict.violations} == expected
    assert verdict.exact == sum(low == high for low, high in expected.values())


@pytest.mark.parametrize(("number", "is_right"), [(2, False), (3, True), (4, True), (5, False)])
def test_both_bounds_are_allowed(number: int, is_right: bool) -> None:
    verdict = check([*TWO_SERVERS, *B_CHANGE, Answer("a", 12.05, 12.06, number, 1)], PROMISE)
    assert (not verdict.violations) == is_right
    assert (verdict.answers, verdict.exact) == (1, 0)


def test_a_violation_names_the_reply_its_time_and_the_allowed_values() -> None:
    verdict = check([*TWO_SERVERS, *B_CHANGE, Answer("a", 12.05, 12.06, 9, 1)], PROMISE)
    assert str(verdict) == (
        "1 of 1 replies broke the promise; 0 had to be exact\n"
        "a, asked 12.050..12.060 by client 1, replied 9; allowed are 3..4: "
        "a 1..1 since 12.050, b 2..3 since 11.300"
    )


def test_a_server_that_never_started_is_an_error_of_the_history() -> None:
    with pytest.raises(ValueError, match="empty"):
        check(client("a", 1, 1), PROMISE)


@pytest.mark.outer
def test_a_recorder_notes_its_actions_on_real_servers_in_order() -> None:
    recorder = Recorder()
    with Running() as one, Running() as two:
        recorder.note(Kind.STARTED, "one")
        recorder.note(Kind.STARTED, "two")
        stays = recorder.connect("one", one.port)
        goes = recorder.connect("one", one.port)
        lost = recorder.connect("two", two.port)
        with stays:
            assert [recorder.ask(asker) for asker in (stays, goes, stays, lost)] == [2, 2, 2, 1]
            recorder.close(goes)
            assert recorder.ask(stays) == 1
            with recorder.fault():
                recorder.kill("two", two)
            recorder.close(lost)
            assert recorder.stop("one", one) == 0
    kinds = [(it.kind.name, it.server, it.key) for it in recorder.history if isinstance(it, Fact)]
    # The end of a dead server's client depends on the kernel.
    kinds = [kind for kind in kinds if kind[2] != 3]
    assert kinds[:4] == [
        ("STARTED", "one", 0),
        ("STARTED", "two", 0),
        ("CONNECTING", "one", 1),
        ("CONNECTING", "one", 2),
    ]
    assert kinds[-8:] == [
        ("CLOSED", "one", 2),
        ("COUNTED", "one", 1),
        ("FAULT", "", 4),
        ("KILLED", "two", 0),
        ("ENDED", "two", 0),
        ("HEALED", "", 4),
        ("STOPPING", "one", 0),
        ("ENDED", "one", 0),
    ]
    times = [fact.at if isinstance(fact, Fact) else fact.received for fact in recorder.history]
    assert times == sorted(times)
    assert [it.number for it in recorder.history if isinstance(it, Answer)] == [2, 2, 2, 1, 1]
    # Without a cluster each server counts only its own clients, as a new server may.
    assert not check(recorder.history, Promise(delta=3600, ttl=TTL)).violations
