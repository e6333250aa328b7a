"""The checker of WHO's promise: it accepts a correct cluster, and finds each fault.

The cluster is a small model on a clock of its own: no socket, no Redis, no waiting. The checker
must find a seeded fault of the model, or its silence would prove nothing about the real program.
"""

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.history import Answer, Fact, Kind, Promise, Recorder, Verdict, check
from lab.running import Running

BEAT = 0.5
TTL = 5.0
PROMISE = Promise(delta=BEAT + 0.25, ttl=TTL)
RECOVERY = 2 * PROMISE.delta
#: Milliseconds after which no effect is left, so every reply has to be exact.
SILENCE = 2 * (TTL + RECOVERY) + PROMISE.delta

#: An action, its server, the milliseconds before it, and its length in milliseconds.
Step = tuple[str, int, int, int]
ACTIONS = ("connect", "close", "kill", "stop", "start", "outage", "wipe", "cut", "flush")


@dataclass
class Node:
    name: str
    count: int = 0
    is_up: bool = True
    is_ending: bool = False
    cuts: int = 0
    idle: list[int] = field(default_factory=list)
    asker: int = 0
    sent: int = 0
    remote: int = 0
    clock: float = -1
    known: set[str] = field(default_factory=set)
    hold_until: float = -1
    beat_at: float = -1
    turn: int = 0


class Cluster:
    """Servers that report to one Redis as gserver's do, clients, and the history of both."""

    def __init__(self, seed: int, bug: str = "") -> None:
        self.random, self.bug = random.Random(seed), bug
        self.now, self.outages = 100.0, 0
        self.history: list[Fact | Answer] = []
        self.keys = itertools.count(1)
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        self.nodes: list[Node] = []
        self.wipe_now()
        for _ in range(3):
            self.start()

    # The clock.

    def after(self, delay: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.queue, (self.now + delay, next(self.keys), action))

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.queue and self.queue[0][0] <= end:
            self.now, _, action = heapq.heappop(self.queue)
            action()
        self.now = end

    def moment(self) -> float:
        return self.random.uniform(0.0001, 0.02)

    def note(self, kind: Kind, node: Node | None = None, key: int = 0) -> None:
        self.history.append(Fact(self.now, kind, node.name if node else "", key))

    def steps(
        self, first: Kind, node: Node | None, key: int, action: Callable[[], None], last: Kind
    ) -> None:
        """Do something at an unknown moment between two that are noted."""
        self.note(first, node, key)

        def done() -> None:
            action()
            self.after(self.moment(), lambda: self.note(last, node, key))

        self.after(self.moment(), done)

    # Redis.

    def wipe_now(self) -> None:
        self.entries: dict[str, tuple[int, float]] = {}
        self.clock, self.beaten_at = 0.0, self.now

    def beat(self, node: Node, turn: int) -> None:
        if turn != node.turn or not node.is_up:
            return
        if self.outages or node.cuts:
            if self.bug == "a delta is lost":
                node.sent = node.count
            if self.bug == "local after a while" and self.now - node.beat_at > TTL:
                node.remote = 0
            self.beat_in(node, self.random.uniform(0.1, 1) * BEAT)
            return
        passed = self.now - self.beaten_at
        self.clock += min(passed, TTL / 4)
        self.beaten_at = self.now
        if self.bug != "no TTL":
            self.entries = {
                name: entry for name, entry in self.entries.items() if entry[1] > self.clock
            }
        is_missing = node.name not in self.entries
        count = node.count
        if self.bug == "a delta is lost" and not is_missing:
            count = self.entries[node.name][0] + node.count - node.sent
        self.entries[node.name] = (count, self.clock + TTL)
        self.learn(node, is_missing)
        self.beat_in(node, self.random.uniform(0.75, 0.95) * BEAT)

    def learn(self, node: Node, is_missing: bool) -> None:
        total = sum(count for count, _ in self.entries.values())
        remote = total if self.bug == "own share twice" else total - node.count
        # On the lease clock, which stands still while no server can report. On another clock an
        # outage would use up the hold.
        clock = self.now if self.bug == "hold by the wall clock" else self.clock
        if self.bug != "no hold" and node.clock >= 0:
            if self.clock < node.clock:
                node.hold_until = clock + TTL
            elif is_missing:
                node.hold_until = max(node.hold_until, clock + TTL / 3)
        if node.known <= self.entries.keys() or clock >= node.hold_until:
            node.hold_until, node.remote, node.known = -1, remote, set(self.entries)
        else:
            node.remote = max(node.remote, remote)
        node.sent, node.clock, node.beat_at = node.count, self.clock, self.now

    def beat_in(self, node: Node, delay: float) -> None:
        node.turn += 1
        turn = node.turn
        self.after(delay, lambda: self.beat(node, turn))

    def changed(self, node: Node, by: int) -> None:
        node.count += by
        if not self.outages and not node.cuts:
            self.beat_in(node, max(0.05, node.beat_at + 0.1 - self.now))

    # Actions.

    def start(self) -> None:
        node = Node(f"s{len(self.nodes)}")
        self.nodes.append(node)
        self.note(Kind.STARTED, node)
        self.beat_in(node, self.moment())
        node.asker = self.connect(node)
        self.after(0.1, lambda: self.ask(node))

    def connect(self, node: Node) -> int:
        key = next(self.keys)
        self.note(Kind.CONNECTING, node, key)

        def counted() -> None:
            self.note(Kind.COUNTED, node, key)
            node.idle.append(key)

        def arrive() -> None:
            if node.is_up:
                self.changed(node, 1)
                if key != node.asker:
                    self.after(self.moment(), counted)

        self.after(self.moment(), arrive)
        return key

    def close(self, node: Node) -> None:
        if node.idle:
            key = node.idle.pop(0)
            self.steps(
                Kind.CLOSING,
                node,
                key,
                lambda: self.changed(node, -1 if node.is_up else 0),
                Kind.CLOSED,
            )

    def ask(self, node: Node) -> None:
        sent = self.now

        def answer() -> None:
            if not node.is_up:
                return
            own = node.sent if self.bug == "own share stale" else node.count
            number = own + node.remote
            self.after(self.moment(), lambda: receive(number))

        def receive(number: int) -> None:
            self.history.append(Answer(node.name, sent, self.now, number, node.asker))
            self.note(Kind.COUNTED, node, node.asker)
            self.after(self.random.uniform(0, 0.3), lambda: self.ask(node))

        self.after(self.moment(), answer)

    def kill(self, node: Node) -> None:
        self.steps(Kind.KILLED, node, 0, lambda: setattr(node, "is_up", False), Kind.ENDED)

    def stop(self, node: Node) -> None:
        def leave() -> None:
            node.is_up = False
            if not self.outages and not node.cuts and self.bug != "late heartbeat":
                self.entries.pop(node.name, None)

        self.steps(Kind.STOPPING, node, 0, leave, Kind.ENDED)

    def break_for(self, seconds: float, node: Node | None = None, is_wiped: bool = False) -> None:
        key = next(self.keys)

        def turn(by: int) -> None:
            if node:
                node.cuts += by
            else:
                self.outages += by

        def mend() -> None:
            if is_wiped:
                self.wipe_now()
            turn(-1)
            self.after(self.moment(), lambda: self.note(Kind.HEALED, node, key))

        self.note(Kind.FAULT, node, key)
        turn(1)
        self.after(0.02 + seconds, mend)

    def do(self, step: Step) -> None:
        action, which, pause, length = step
        self.run(pause / 1000)
        up = [node for node in self.nodes if not node.is_ending]
        node = up[which % len(up)]
        # One server always continues: without heartbeats no lease ends.
        is_last = all(other is node or other.cuts for other in up)
        if action in ("kill", "stop", "cut") and is_last:
            return
        if action in ("kill", "stop"):
            node.is_ending = True
            getattr(self, action)(node)
        elif action in ("connect", "close"):
            getattr(self, action)(node)
        elif action == "start" and len(up) < 6:
            self.start()
        elif action in ("outage", "wipe", "cut"):
            self.break_for(
                length / 1000, node if action == "cut" else None, is_wiped=action == "wipe"
            )
        elif action == "flush":
            self.break_for(0, is_wiped=True)


def played(script: list[Step], seed: int, bug: str = "") -> Cluster:
    """Return the cluster after these actions and a silence."""
    cluster = Cluster(seed, bug)
    cluster.run(3)
    for step in script:
        cluster.do(step)
    longest = max([step[3] for step in script], default=0) / 1000
    cluster.run(longest + SILENCE)
    return cluster


def verdict_on(script: list[Step], seed: int, bug: str = "") -> Verdict:
    return check(played(script, seed, bug).history, PROMISE)


#: Faults of the model, and actions that reveal them.
BUGS: dict[str, list[Step]] = {
    # Changes are sent as differences, and one that does not arrive is lost.
    "a delta is lost": [("outage", 0, 0, 2000), ("connect", 0, 500, 0)],
    # A server believes an empty Redis.
    "no hold": [("flush", 0, 0, 0)] * 5,
    # The hold ends while no server can report. A dead server makes it necessary for long.
    "hold by the wall clock": [
        *[("start", 0, 0, 0)] * 3,
        ("kill", 5, 3000, 0),
        ("flush", 0, 0, 0),
        ("outage", 0, 250, 7000),
        ("connect", 0, 15_000, 0),
    ]
    * 4,
    # A dead server is counted for ever.
    "no TTL": [("kill", 0, 0, 0)],
    # A server sends a heartbeat after it has left.
    "late heartbeat": [("stop", 0, 0, 0)],
    # WHO uses the own count of the last heartbeat.
    "own share stale": [("connect", 0, 200, 0)] * 40,
    # WHO uses the total for the others' share.
    "own share twice": [],
    # The others are dropped when Redis has been away for a TTL.
    "local after a while": [("outage", 0, 0, 8000)],
}


def random_script(seed: int) -> list[Step]:
    rng = random.Random(seed)
    weights = (30, 20, 2, 2, 4, 2, 2, 3, 2)
    actions = rng.choices(ACTIONS, weights, k=40)
    return [
        (action, rng.randrange(6), rng.randrange(1500), rng.randrange(12_000)) for action in actions
    ]


steps = st.tuples(
    st.sampled_from(ACTIONS), st.integers(0, 5), st.integers(0, 3000), st.integers(0, 12_000)
)


@pytest.mark.outer
@settings(max_examples=100, deadline=None)
@given(st.lists(steps, max_size=25), st.integers(0, 2**32))
def test_a_correct_cluster_keeps_the_promise_whatever_happens(
    script: list[Step], seed: int
) -> None:
    verdict = verdict_on(script, seed)
    assert not verdict.violations, f"{verdict}"
    assert verdict.exact > 0


@pytest.mark.outer
@pytest.mark.parametrize("seed", range(20))
def test_busy_hours_of_a_correct_cluster_keep_the_promise_and_many_replies_must_be_exact(
    seed: int,
) -> None:
    verdict = verdict_on(random_script(seed), seed)
    assert not verdict.violations, f"{verdict}"
    assert verdict.exact > verdict.answers / 4


@pytest.mark.outer
@pytest.mark.parametrize("bug", BUGS)
def test_a_seeded_fault_is_found_and_the_same_actions_without_it_are_accepted(bug: str) -> None:
    verdicts = [verdict_on(BUGS[bug], seed) for seed in range(5)]
    assert not any(verdict.violations for verdict in verdicts), "\n".join(map(str, verdicts))
    assert all(verdict_on(BUGS[bug], seed, bug).violations for seed in range(5))


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


#: One client of server a, which is asked, and two of server b.
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

#: Facts, the server and the client that ask, and by moment the least and greatest number allowed.
CASES: dict[str, tuple[list[Fact], tuple[str, int], dict[float, tuple[int, int]]]] = {
    "without changes one number is correct": ([], ("a", 1), {10: (3, 3)}),
    "an own client counts from its first reply, and may while it connects or closes": (
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
    "while Redis is away and until all have recovered the others may have their old counts": (
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
    "a stopped server is gone within DELTA": (
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
    "a server stopped while it alone is cut off counts like a killed one": (
        B_STOPPED + fault(9, 10.4, "b"),
        ("a", 1),
        {16.2: (1, 3), 16.3: (1, 1)},
    ),
    "an outage drops no server, but being cut off after it does": (
        fault(10, 30) + fault(31, 40, "b"),
        ("a", 1),
        {20: (3, 3), 32: (1, 3)},
    ),
    "a server that alone is cut off may be dropped when its lease ends, until it has recovered": (
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
    "a third server that is cut off excuses nothing": (
        [*B_CHANGE, Fact(0, Kind.STARTED, "c"), *fault(10, 20, "c")],
        ("a", 1),
        {12.9: (4, 4)},
    ),
    "a server that has just started may know no other, and is known": (
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
def test_what_is_allowed(case: str) -> None:
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
        "a, asked 12.050..12.060 by client 1, said 9; allowed are 3..4: "
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
