"""What WHO may say: a history of facts, a checker that judges each answer by it, and a recorder of
real ones.

The promise: the own share is exact. Every other server's share is its true count at some instant of
the last DELTA (beat interval + slack); a Redis fault, and a while after it, stretches this back to
DELTA before the fault. A killed server's clients count for a TTL at most; those of one that left
are gone at once; one cut off alone may be dropped.

The shares are seen only as a sum, so an answer is judged by the sums of their least and greatest
values. Where nothing changed for the length of the window the two are equal: `Verdict.exact` says
how often one number only was allowed.
"""

import itertools
import signal
import time
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from enum import Enum
from math import inf
from typing import NamedTuple

from tests.running import LIMIT, Client, Running


class Kind(Enum):
    CONNECTING = "a client begins to connect"
    COUNTED = "a reply was read on it"
    CLOSING = "it begins to close"
    CLOSED = "the server has let it go"
    STARTED = "a server answers"
    RESTARTED = "it answers, with the id of one that ran before"
    KILLED = "it is about to be killed"
    STOPPING = "it is about to be told to stop"
    ENDED = "its processes are gone"
    FAULT = "Redis, or one server's way to it, is about to fail"
    HEALED = "it works again"


class Fact(NamedTuple):
    """Something known at a monotonic time. Each start of a server has another name, restarts too."""

    at: float
    kind: Kind
    server: str  #: whose; a fault of "" is everybody's
    key: int = 0  #: which client or fault; 0 is the server itself


class Answer(NamedTuple):
    server: str
    sent: float
    received: float
    number: int
    client: int


class Promise(NamedTuple):
    delta: float  #: in seconds: the beat interval, and slack for round trips and a busy machine
    ttl: float


#: The least and the greatest it may be, and since when.
Share = tuple[int, int, float]
#: When each thing happened first to a client, server or fault; infinity for what never did.
Times = defaultdict[Kind, float]


class Judgement(NamedTuple):
    answer: Answer
    low: int
    high: int
    shares: dict[str, Share]

    def __str__(self) -> str:
        server, sent, received, number, client = self.answer
        shares = [
            f"{name} {low}..{high} since {since:.3f}"
            for name, (low, high, since) in self.shares.items()
        ]
        asked = f"{server}, asked {sent:.3f}..{received:.3f} by client {client}, said {number}"
        return f"{asked}; allowed are {self.low}..{self.high}: {', '.join(shares)}"


class Verdict(NamedTuple):
    answers: int
    exact: int
    violations: list[Judgement]

    def __str__(self) -> str:
        broken = f"{len(self.violations)} of {self.answers} answers broke the promise; {self.exact} had to be exact"
        return "\n".join([broken, *map(str, self.violations[:10])])


class _Steps:
    """How many of some spans of time include an instant."""

    def __init__(self, spans: Iterable[tuple[float, float]]) -> None:
        ordered = sorted(
            change for begin, end in spans if begin < end for change in ((begin, 1), (end, -1))
        )
        self.times = [at for at, _ in ordered]
        self.values = list(itertools.accumulate((change for _, change in ordered), initial=0))

    def between(self, begin: float, end: float) -> list[int]:
        """The values in [begin, end]; a change at either end counts as not yet done and as done."""
        return self.values[bisect_left(self.times, begin) : bisect_right(self.times, end) + 1]


class _Fault(NamedTuple):
    began: float
    ended: float
    server: str
    over: float  #: until then its traces may be seen


class _Server:
    def __init__(self, keyed: dict[int, Times]) -> None:
        clients = [times for times in keyed.values() if Kind.CONNECTING in times]
        self.times, self.ended = keyed[0], keyed[0][Kind.ENDED]
        self.ending = min(keyed[0][Kind.KILLED], keyed[0][Kind.STOPPING])
        self.joined = min(
            keyed[0][kind] for kind in (Kind.STARTED, Kind.RESTARTED) if kind in keyed[0]
        )
        self.gone, self.ghost = (
            self.ended,
            0,
        )  # what it may count for from its end until Redis forgets it
        self.least = _Steps((c[Kind.COUNTED], min(c[Kind.CLOSING], self.ending)) for c in clients)
        self.most = _Steps((c[Kind.CONNECTING], min(c[Kind.CLOSED], self.ended)) for c in clients)


class _Checker:
    def __init__(self, facts: list[Fact], promise: Promise) -> None:
        self.delta, self.recovery, self.ttl = promise.delta, 2 * promise.delta, promise.ttl
        self.times: dict[str, dict[int, Times]] = defaultdict(
            lambda: defaultdict(lambda: Times(lambda: inf))
        )
        for fact in sorted(facts, key=lambda fact: fact.at):
            self.times[fact.server][fact.key].setdefault(fact.kind, fact.at)
        spans = (
            (t[Kind.FAULT], t[Kind.HEALED], name)
            for name, keyed in self.times.items()
            for t in keyed.values()
        )
        self.faults = [
            _Fault(*span, span[1] + self.recovery) for span in sorted(spans) if span[0] < inf
        ]
        self.servers = {name: _Server(keyed) for name, keyed in self.times.items() if name}
        for name, server in self.servers.items():
            self._leave(name, server)
            if (
                server.times[Kind.RESTARTED] < inf
            ):  # it first watches whether the one before it lives
                faults = [
                    fault.ended
                    for fault in self._of(name)
                    if fault.began <= server.joined + self.recovery
                ]
                server.joined = max([server.joined, *faults]) + self.recovery
        held = -inf
        for at, fault in enumerate(self.faults):
            if fault.began <= held or self._is_slow(fault):  # what is held at a fault is held on
                held = max(held, fault.over + self.ttl)
                self.faults[at] = fault._replace(over=held)

    def _of(self, *servers: str) -> list[_Fault]:
        return [fault for fault in self.faults if fault.server in ("", *servers)]

    def _since(self, sent: float, received: float, faults: list[_Fault]) -> float:
        """Since when a count that is seen may have been true. One fault on the heels of another
        adds up.
        """
        for fault in reversed(faults):
            if fault.began <= received and fault.over >= sent:
                sent = min(sent, fault.began)
        return sent - self.delta

    def _leave(self, name: str, server: _Server) -> None:
        """Until when one may count that was killed, or could not say that it left, if no fault
        lengthens it.
        """
        is_away = any(f.began <= server.ended and f.over >= server.ending for f in self._of(name))
        if server.times[Kind.KILLED] < inf or is_away:
            server.gone += self.ttl  # a window's DELTA comes on top
            since = self._since(server.ending, server.ended, self._of(name))
            server.ghost = max(server.most.between(since, server.ended))

    def _is_slow(self, fault: _Fault) -> bool:
        """Whether somebody is missing then: those who hold what they knew wait in vain, and so for
        a whole TTL.
        """
        cut = [(other.server, other.began, other.over) for other in self.faults if other.server]
        dead = [
            (name, server.ending, server.gone + self.delta) for name, server in self.servers.items()
        ]
        return any(
            n != fault.server and began <= fault.over and over >= fault.began
            for n, began, over in cut + dead
        )

    def _own(self, answer: Answer) -> Share:
        server, asker = self.servers[answer.server], self.times[answer.server][answer.client]
        low, high = (
            f(s.between(answer.sent, answer.received))
            for f, s in ((min, server.least), (max, server.most))
        )
        return (
            low + 1 if asker[Kind.COUNTED] > answer.sent else max(low, 1),
            high,
            answer.sent,
        )  # it counts itself

    def _other(self, answer: Answer, name: str, server: _Server) -> Share:
        _, sent, received, *_ = answer
        since = self._since(sent, received, self._of(answer.server, name))
        low, high = (
            min(server.least.between(since, received)),
            max(server.most.between(since, received)),
        )
        for fault in self.faults:  # cut off alone until its lease was over
            if (
                fault.server == name
                and fault.began <= received
                and since + self.delta <= fault.over
            ):
                lease_over = self._since(fault.began, fault.began, self._of(name)) + self.ttl
                low = 0 if min(received, fault.over) >= lease_over else low
        if server.ending <= received and since <= server.gone:
            high = max(high, server.ghost)
        is_known = since >= max(
            server.joined, self.servers[answer.server].joined
        )  # who has just started knows nobody
        return low if is_known else 0, high, since

    def judge(self, answer: Answer) -> Judgement:
        others = {
            n: self._other(answer, n, server)
            for n, server in self.servers.items()
            if n != answer.server
        }
        shares = {answer.server: self._own(answer), **others}
        return Judgement(
            answer, sum(s[0] for s in shares.values()), sum(s[1] for s in shares.values()), shares
        )


def check(history: Sequence[Fact | Answer], promise: Promise) -> Verdict:
    checker = _Checker([it for it in history if isinstance(it, Fact)], promise)
    judged = [checker.judge(it) for it in history if isinstance(it, Answer)]
    broken = [it for it in judged if not it.low <= it.answer.number <= it.high]
    return Verdict(len(judged), sum(it.low == it.high for it in judged), broken)


class Recorder:
    """Does things to real servers and notes when: before what begins, after what is certain. Any
    thread may use it.
    """

    def __init__(self) -> None:
        self.history: list[Fact | Answer] = []  # only ever appended to, which is atomic
        self._keys = itertools.count(1)
        self._clients: dict[Client, tuple[str, int]] = {}

    def note(self, kind: Kind, server: str, key: int = 0) -> None:
        """Note what others do, too: STARTED as soon as a server listens, before its first client."""
        self.history.append(Fact(time.monotonic(), kind, server, key))

    def connect(self, server: str, port: int, source: str = "") -> Client:
        """Connect a client; it is known to be counted from its first answer on."""
        key = next(self._keys)
        self.note(Kind.CONNECTING, server, key)
        client = Client(port, source=source)
        self._clients[client] = (server, key)
        return client

    def ask(self, client: Client) -> int:
        """Ask WHO. Never ask a client again that got no answer: a late one would pass for the next."""
        (server, key), sent = self._clients[client], time.monotonic()
        number = client.who()
        self.history.append(Answer(server, sent, time.monotonic(), number, key))
        self.note(Kind.COUNTED, server, key)
        return number

    def close(self, client: Client) -> None:
        """Close, and wait until the server has let go, which closes last. If it resets, nothing is
        known.
        """
        server, key = self._clients.pop(client)
        with suppress(OSError), client, self._span(Kind.CLOSING, Kind.CLOSED, server, key):
            client.end()

    def kill(self, server: str, running: Running) -> None:
        with self._span(Kind.KILLED, Kind.ENDED, server):
            running.kill()

    def stop(
        self,
        server: str,
        running: Running,
        number: signal.Signals = signal.SIGTERM,
        limit: float = LIMIT,
    ) -> int:
        with self._span(Kind.STOPPING, Kind.ENDED, server):
            return running.stop(number, limit)

    def fault(self, server: str = "") -> AbstractContextManager[None]:
        """Break Redis, or the way of one server to it, and mend it in the body."""
        return self._span(Kind.FAULT, Kind.HEALED, server, next(self._keys))

    @contextmanager
    def _span(self, begin: Kind, end: Kind, server: str, key: int = 0) -> Iterator[None]:
        self.note(begin, server, key)
        yield  # an error leaves the end open: unknown
        self.note(end, server, key)
