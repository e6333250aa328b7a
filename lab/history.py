"""Correct replies to WHO: a history of facts, a checker of replies, and a recorder of histories.

The promise: a server's own share is exact. Any other server's share is its true count at some
instant of the last DELTA (heartbeat interval + slack). During a Redis fault, and for a while after
it, the window reaches back to DELTA before the fault. The clients of a killed server count for a
TTL at most. Those of a server that left are removed at once. A server that is cut off alone may be
dropped. In a reload, a client that is handed over counts twice for a moment.

A server also says how old its count of the others is. Then each share is its true count at some
instant of that time, whatever faults there were: they excuse nothing.

Only the sum of the shares is visible. So a reply is judged by the sums of their least and greatest
values. If nothing changed in the window, the two are equal: `Verdict.exact` is the number of
replies for which only one number was allowed.
"""

import itertools
import signal
import time
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from enum import Enum
from http.client import HTTPException
from math import inf
from typing import NamedTuple

from lab.admin import status
from lab.running import LIMIT, Client, Running

#: How long the admin port may take.
LOOK_SECONDS = 1.0


class Kind(Enum):
    CONNECTING = "a client begins to connect"
    COUNTED = "a client has received a reply"
    CLOSING = "a client begins to close"
    CLOSED = "the server has closed a client"
    STARTED = "a server replies"
    RESTARTED = "a server replies with the id of an earlier one"
    KILLED = "a server is about to be killed"
    STOPPING = "a server is about to be stopped"
    ENDED = "the processes of a server have ended"
    FAULT = "Redis, or one server's path to it, is about to fail"
    HEALED = "Redis, or the path, works again"
    MOVING = "a server is about to hand its clients over to new workers"
    MOVED = "the old workers have ended"


class Fact(NamedTuple):
    """An event at a monotonic time. Each start of a server has its own name."""

    at: float
    kind: Kind
    server: str  #: A fault of "" affects all servers.
    key: int = 0  #: Number of the client or the fault; 0 is the server itself.


class Answer(NamedTuple):
    server: str
    sent: float
    received: float
    number: int
    client: int
    #: Seconds: the age of the others' counts, as the admin port says it; None for a reply to WHO.
    age: float | None = None


class Promise(NamedTuple):
    delta: float  #: Seconds: heartbeat interval, plus slack for round trips and a busy machine.
    ttl: float
    slack: float = 0.0  #: The slack alone.


#: The least and greatest allowed value, and the start of the window.
Share = tuple[int, int, float]
#: The first time of each kind for a client, a server or a fault; infinity if it never happened.
Times = defaultdict[Kind, float]


class Judgement(NamedTuple):
    answer: Answer
    low: int
    high: int
    shares: dict[str, Share]

    def __str__(self) -> str:
        server, sent, received, number, client, age = self.answer
        shares = [
            f"{name} {low}..{high} since {since:.3f}"
            for name, (low, high, since) in self.shares.items()
        ]
        asked = f"{server}, asked {sent:.3f}..{received:.3f} by client {client}, replied {number}"
        if age is not None:
            asked += f" of age {age:.3f}"
        return f"{asked}; allowed are {self.low}..{self.high}: {', '.join(shares)}"


class Verdict(NamedTuple):
    answers: int
    exact: int
    aged: int  #: Answers that were judged by their age.
    violations: list[Judgement]

    def __str__(self) -> str:
        wrong = f"{len(self.violations)} of {self.answers} replies broke the promise"
        exact = f"{self.exact} had to be exact"
        return "\n".join([f"{wrong}; {exact}", *map(str, self.violations[:10])])


class _Steps:
    """The number of time spans that include an instant."""

    def __init__(self, spans: Iterable[tuple[float, float]]) -> None:
        ordered = sorted(
            change for begin, end in spans if begin < end for change in ((begin, 1), (end, -1))
        )
        self.times = [at for at, _ in ordered]
        self.values = list(itertools.accumulate((change for _, change in ordered), initial=0))

    def between(self, begin: float, end: float) -> list[int]:
        """Return the values in [begin, end], with those before and after a change at either end."""
        return self.values[bisect_left(self.times, begin) : bisect_right(self.times, end) + 1]


class _Fault(NamedTuple):
    began: float
    ended: float
    server: str
    over: float  #: The end of its visible effects.


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
        )  # Its count between its end and its removal by Redis.
        self.least = _Steps((c[Kind.COUNTED], min(c[Kind.CLOSING], self.ending)) for c in clients)
        spans = [(c[Kind.CONNECTING], min(c[Kind.CLOSED], self.ended)) for c in clients]
        moves = [(t[Kind.MOVING], t[Kind.MOVED]) for t in keyed.values() if Kind.MOVING in t]
        twice = [
            (max(begin, moving), min(end, moved)) for begin, end in spans for moving, moved in moves
        ]
        self.most = _Steps(spans + twice)


class _Checker:
    def __init__(self, facts: list[Fact], promise: Promise) -> None:
        self.delta, self.recovery, self.ttl = promise.delta, 2 * promise.delta, promise.ttl
        self.slack = promise.slack
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
            ):  # It first checks whether the previous server is alive.
                faults = [
                    fault.ended
                    for fault in self._of(name)
                    if fault.began <= server.joined + self.recovery
                ]
                server.joined = max([server.joined, *faults]) + self.recovery
        held = -inf
        for at, fault in enumerate(self.faults):
            if fault.began <= held or self._is_slow(fault):  # A hold continues.
                held = max(held, fault.over + self.ttl)
                self.faults[at] = fault._replace(over=held)

    def _of(self, *servers: str) -> list[_Fault]:
        return [fault for fault in self.faults if fault.server in ("", *servers)]

    def _since(self, sent: float, received: float, faults: list[_Fault]) -> float:
        """Return the start of the window; consecutive faults add up."""
        for fault in reversed(faults):
            if fault.began <= received and fault.over >= sent:
                sent = min(sent, fault.began)
        return sent - self.delta

    def _leave(self, name: str, server: _Server) -> None:
        """Set how long a killed server, or one that could not leave, counts without faults."""
        is_away = any(f.began <= server.ended and f.over >= server.ending for f in self._of(name))
        if server.times[Kind.KILLED] < inf or is_away:
            server.gone += self.ttl  # The window's DELTA is added later.
            since = self._since(server.ending, server.ended, self._of(name))
            server.ghost = max(server.most.between(since, server.ended))

    def _is_slow(self, fault: _Fault) -> bool:
        """Whether a server is missing at that time, so a hold lasts for a full TTL."""
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
        if answer.age is not None:
            return low, high, answer.sent
        return (
            low + 1 if asker[Kind.COUNTED] > answer.sent else max(low, 1),
            high,
            answer.sent,
        )  # The asking client counts itself.

    def _other(self, answer: Answer, name: str, server: _Server) -> Share:
        _, sent, received, *_ = answer
        if answer.age is not None:
            since = sent - answer.age - self.slack
            return 0, max(server.most.between(since, received)), since
        since = self._since(sent, received, self._of(answer.server, name))
        low, high = (
            min(server.least.between(since, received)),
            max(server.most.between(since, received)),
        )
        for fault in self.faults:  # Cut off alone until its lease ended.
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
        )  # A newly started server may know no other.
        return low if is_known else 0, high, since

    def knows_its_age(self, answer: Answer) -> bool:
        """Whether its agent knows the lease clock of the last TTLs: it is not a new one.

        Time in which the lease clock may have paused does not count.
        """
        if answer.age is None:
            return True
        own = [fault.over for fault in self.faults if fault.server == answer.server]
        since = max(
            [self.servers[answer.server].joined, *(over for over in own if over < answer.sent)]
        )
        paused = sum(
            max(0.0, min(answer.received, fault.over) - max(since, fault.began))
            for fault in self.faults
        )
        return answer.sent - since - paused > 3 * self.ttl

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
    answers = [it for it in history if isinstance(it, Answer)]
    judged = [checker.judge(it) for it in answers if checker.knows_its_age(it)]
    broken = [it for it in judged if not it.low <= it.answer.number <= it.high]
    exact = sum(it.low == it.high for it in judged)
    aged = sum(it.answer.age is not None for it in judged)
    return Verdict(len(judged), exact, aged, broken)


class Recorder:
    """Acts on real servers and notes the times: before an action begins, after it is certain.

    Any thread may use it.
    """

    def __init__(self) -> None:
        self.history: list[Fact | Answer] = []  # Only appended to, which is atomic.
        self._keys = itertools.count(1)
        self._clients: dict[Client, tuple[str, int]] = {}

    def note(self, kind: Kind, server: str, key: int = 0) -> None:
        """Note an action. STARTED is noted when a server listens, before its first client."""
        self.history.append(Fact(time.monotonic(), kind, server, key))

    def connect(self, server: str, port: int, source: str = "") -> Client:
        """Connect a client. Once it has a reply, it is certainly counted."""
        key = next(self._keys)
        self.note(Kind.CONNECTING, server, key)
        client = Client(port, source=source)
        self._clients[client] = (server, key)
        return client

    def ask(self, client: Client) -> int:
        """Send WHO. Do not reuse a client that got no reply: a late one would confuse it."""
        (server, key), sent = self._clients[client], time.monotonic()
        number = client.who()
        self.history.append(Answer(server, sent, time.monotonic(), number, key))
        self.note(Kind.COUNTED, server, key)
        return number

    def look(self, server: str, running: Running) -> None:
        """Ask the admin port for the count and its age. Nothing is noted if it does not answer."""
        sent = time.monotonic()
        with suppress(OSError, HTTPException):
            found = status(running, LOOK_SECONDS)["cluster"]
            if found["age_seconds"] is not None:
                said = found["clients"], 0, found["age_seconds"]
                self.history.append(Answer(server, sent, time.monotonic(), *said))

    def close(self, client: Client) -> None:
        """Close, and wait until the server closes too; after a reset, the time stays unknown."""
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
        """Note a fault of Redis, or of one server's path to it, while the body runs."""
        return self._span(Kind.FAULT, Kind.HEALED, server, next(self._keys))

    def move(self, server: str) -> AbstractContextManager[None]:
        """Note that the server's clients are handed over to new workers while the body runs."""
        return self._span(Kind.MOVING, Kind.MOVED, server, next(self._keys))

    @contextmanager
    def _span(self, begin: Kind, end: Kind, server: str, key: int = 0) -> Iterator[None]:
        self.note(begin, server, key)
        yield  # After an error the end stays unknown.
        self.note(end, server, key)
