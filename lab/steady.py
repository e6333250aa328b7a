"""Servers of one cluster with permanent clients, and watchers that find any wrong reply to WHO."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import groupby
from typing import Any, NamedTuple

import psutil

from lab.host import HERE, Host
from lab.running import LIMIT, PATIENCE, Client, Running, until

PAUSE_SECONDS = 0.005
#: Delay of a reply on a busy machine. A reply that waited for Redis would take ten times as long.
NOISE_SECONDS = 0.02


class Answer(NamedTuple):
    """A reply to WHO, with the time of the request and the duration."""

    asked: float
    clients: int
    seconds: float


class Watcher:
    """Sends WHO to one server all the time, over one connection.

    It knows the allowed replies, and since when. `is_back`: it reconnects when it has lost its
    connection.
    """

    def __init__(self, connect: Callable[[], Client], *, is_back: bool = False) -> None:
        self.answers: list[Answer] = []
        self._checked = 0
        self._allowed: list[tuple[float, frozenset[int]]] = []
        self._failure = ""
        self._connect, self._is_back = connect, is_back
        self._client = connect()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        while not self._is_over.wait(PAUSE_SECONDS):
            asked = time.monotonic()
            try:
                count = self._client.who()
                self.answers.append(Answer(asked, count, time.monotonic() - asked))
            except (OSError, ValueError, AssertionError) as error:
                if not self._is_back:
                    self._failure = repr(error)
                    return
                self._client.sock.close()
                with suppress(OSError):
                    self._client = self._connect()

    def allow(self, *counts: int) -> None:
        """Allow only these replies from now on. The first call starts the watch."""
        if not self._allowed:
            self._checked = len(self.answers) + 1  # one may be in flight
        self._allowed.append((time.monotonic(), frozenset(counts)))

    def says(self, count: int) -> bool:
        """Whether the reply to a request from now on is this number."""
        now, seen = time.monotonic(), len(self.answers)
        until(
            lambda: self._failure or any(answer.asked >= now for answer in self.answers[seen:]),
            "a reply",
        )
        return not self._failure and self.answers[-1].clients == count

    def problems(self) -> list[str]:
        """The errors since the last call: a reply must be allowed while it was pending."""
        answers = self.answers[self._checked :]
        self._checked += len(answers)
        ends = [began for began, _ in self._allowed[1:]] + [float("inf")]
        phases = [
            (began, end, counts) for (began, counts), end in zip(self._allowed, ends, strict=True)
        ]
        del self._allowed[:-1]

        def is_true(answer: Answer) -> bool:
            asked, came = answer.asked, answer.asked + answer.seconds
            return any(
                answer.clients in counts
                for began, end, counts in phases
                if began <= came and end >= asked
            )

        runs = [
            list(run)
            for _, run in groupby(answers, lambda answer: (is_true(answer), answer.clients))
        ]
        described = [
            (run[0], f"{run[0].clients} at {run[0].asked - answers[0].asked:.3f} s") for run in runs
        ]
        if self._failure or not answers:
            return [f"no reply: {self._failure}"]
        if all(is_true(first) for first, _ in described):
            return []
        return [
            "it replied "
            + ", ".join(text + (" (WRONG)" * (not is_true(first))) for first, text in described)
        ]

    def stop(self) -> None:
        """Stop sending; the client stays connected."""
        self._is_over.set()
        self._thread.join(LIMIT)

    def close(self) -> None:
        self.stop()
        self._client.sock.close()


class SteadyServer(ExitStack[None]):
    """A server with `share` clients, one of which watches."""

    def __init__(
        self, share: int, *options: str, env: dict[str, str] | None = None, **more: Any
    ) -> None:
        super().__init__()
        self.share = share
        #: Suffixes of events that a healthy server does not log.
        self.bad: tuple[str, ...] = ("died", "hung", "not_started")
        self._read = self._read_errors = 0
        self.server = self.enter_context(Running(*options, env=env, **more))
        self.server.wait_for(
            "worker.ready", self.server.events("server.listening")[0]["gserver.workers"]
        )
        self.clients: list[Client] = [
            self.enter_context(self.server.client()) for _ in range(share - 1)
        ]
        self.watcher = Watcher(self.server.client)
        self.callback(self.watcher.close)

    def problems(self) -> list[str]:
        """The errors since the last call: in replies, processes, logs and stderr."""
        server = self.server
        lines, errors = server.lines[self._read :], server.errors[self._read_errors :]
        self._read += len(lines)
        self._read_errors += len(errors)
        found = self.watcher.problems() + errors + [line for line in lines if "Traceback" in line]
        found += [line for line in lines if json.loads(line)["event.action"].endswith(self.bad)]
        return found + ["the server has ended"] * (server.process.poll() is not None)


class Cluster(ExitStack[None]):
    """Such servers with one Redis, and one server without Redis for comparison."""

    def __init__(
        self,
        url: str,
        interval: float,
        ttl: float,
        env: dict[str, str] | None = None,
        shares: tuple[int, ...] = (5, 3, 2),
        hosts: Sequence[Host] = (HERE,) * 3,
    ) -> None:
        super().__init__()
        self.interval, self.ttl = interval, ttl
        self._env = env
        self.options = (
            "--redis-url",
            url,
            "--heartbeat-interval",
            str(interval),
            "--member-ttl",
            str(ttl),
        )
        self.members: list[SteadyServer] = []
        with ExitStack() as stack:
            self._bystander = stack.enter_context(SteadyServer(1)).watcher
            self._bystander.allow(1)
            for share, host in zip(shares, hosts, strict=False):
                member = SteadyServer(share, *self.options, env=env, host=host)
                self.members.append(stack.enter_context(member))
            until(lambda: self.all_report(self.total), f"all servers report {self.total}")
            self.allow(self.total)
            self.push(stack.pop_all())

    @property
    def total(self) -> int:
        return sum(member.share for member in self.members)

    @property
    def recovery_seconds(self) -> float:
        """Time after a fault until WHO is exact everywhere: two heartbeats of each server."""
        return (2 * self.interval + 1) * PATIENCE

    @property
    def answers(self) -> int:
        """The number of replies of all servers so far."""
        return sum(len(member.watcher.answers) for member in self.members)

    def processes(self) -> list[psutil.Process]:
        """The supervisors, the workers and the agents."""
        return [each for member in self.members for each in member.server.processes()]

    def descriptors(self) -> list[int]:
        """The descriptors of each process: the least of some samples."""
        looks, processes = [], self.processes()
        for _ in range(4):
            looks.append([process.num_fds() for process in processes])
            time.sleep(0.02)
        return [min(each) for each in zip(*looks, strict=True)]

    def resident(self) -> int:
        """The resident memory of all processes, in bytes."""
        return sum(process.memory_info().rss for process in self.processes())

    def allow(self, *counts: int) -> None:
        for member in self.members:
            member.watcher.allow(*counts)

    def all_report(self, count: int) -> bool:
        return all(member.watcher.says(count) for member in self.members)

    def watch(self, seconds: float) -> None:
        """Let time pass; its replies are checked later."""
        time.sleep(seconds)

    def events(self, action: str, kind: str = "") -> list[int]:
        """The number of such events that each server has logged."""
        found = (member.server.events(action) for member in self.members)
        return [
            sum(kind in ("", event.get("gserver.kind")) for event in events) for events in found
        ]

    @contextmanager
    def expecting(self, action: str, kind: str = "") -> Iterator[None]:
        """The body makes every server log another event of this action."""
        with ExitStack() as stack:
            for member in self.members:
                stack.enter_context(member.server.expecting(action, kind))
            yield

    @contextmanager
    def guests(self, *hosts: int) -> Iterator[None]:
        """One more client of each of these servers, which count it at once; the others follow."""
        between = range(self.total, self.total + len(hosts) + 1)
        members = [self.members[host] for host in hosts]
        with ExitStack() as stack:
            self.allow(*between)
            for member in members:
                stack.enter_context(member.server.client()).who()
                member.share += 1
            if len(hosts) == 1:
                members[0].watcher.allow(self.total)
            try:
                yield
            finally:
                self.allow(*between)
                for member in members:
                    member.share -= 1

    @contextmanager
    def settled_guests(self) -> Iterator[None]:
        """One more client of every server; counts are exact before, during and after the body."""
        with self.guests(*range(len(self.members))):
            self.settle()
            yield
            self.settle()
        self.settle()

    @contextmanager
    def one_more(self, share: int) -> Iterator[SteadyServer]:
        """A fourth server; the body must end it."""
        total = self.total
        self.allow(*range(total, total + share + 1))
        with SteadyServer(share, *self.options, env=self._env) as member:
            member.watcher.allow(*range(total + share + 1))
            self.members.append(member)
            self.settle()
            yield member

    def end(self, member: SteadyServer, how: Callable[[Running], object]) -> None:
        """End a server and its clients. Without Redis, no other server learns of it."""
        member.watcher.stop()
        assert not member.problems()
        how(member.server)
        self.members.remove(member)

    def start_over(self) -> None:
        """Reset after the previous fault, whatever its outcome."""
        self.allow(*range(2 * self.total + 1000))
        until(lambda: self.all_report(self.total), f"all servers report {self.total}")
        for member in self.members:
            member.problems()
        self.allow(self.total)

    def settle(self, limit: float | None = None) -> None:
        """Wait until all servers are exact, and check that they stay so."""
        until(
            lambda: self.all_report(self.total),
            f"all servers report {self.total}",
            limit or self.recovery_seconds,
        )
        self.allow(self.total)
        self.watch(2 * self.interval)

    def check(self) -> None:
        """Check that all replies were correct, and that no process has died or logged an error."""
        assert not self._bystander.problems()
        wrong = {member.server.port: member.problems() for member in self.members}
        assert not any(wrong.values()), wrong

    def assert_as_quick_as_alone(self, since: float) -> None:
        """The p99 reply time equals that of the server without Redis, except for noise."""
        alone = _p99([self._bystander], since)
        together = _p99([member.watcher for member in self.members], since)
        assert together <= (2 * alone + NOISE_SECONDS) * PATIENCE, (
            f"WHO took {together:.4f} s, {alone:.4f} s without a Redis"
        )


def _p99(watchers: list[Watcher], since: float) -> float:
    seconds = sorted(a.seconds for watcher in watchers for a in watcher.answers if a.asked >= since)
    return seconds[len(seconds) * 99 // 100]
