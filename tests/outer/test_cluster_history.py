"""Random runs of real servers and a real Redis, checked by lab/history.py; and deliberate bugs.

Each place in a cluster has its own thread: it starts and ends servers, connects and closes
clients, and sends WHO at any time. Two more threads break Redis, and the path of one place to it.
Everything is drawn from one seed, but the times depend on the machine: a seed repeats the faults,
not their exact times. To repeat a failure, set GSERVER_HISTORY_SEED, which is in the tests'
names, and GSERVER_HISTORY_SECONDS for more rounds.
"""

import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from signal import SIGHUP
from typing import TypeVar

import psutil
import pytest

from lab import history
from lab.history import Answer, Fact, Kind, Promise, Verdict, check
from lab.redis_faults import (
    RedisFault,
    busy,
    frozen,
    out_of_memory,
    paused,
    read_only,
    too_few_replicas,
)
from lab.redises import Proxy, Redis, keys_of
from lab.rows import Notes
from lab.running import LIMIT, PATIENCE, ROOT, Client, Running, argv, stopped, until

#: Processes that share a test run (pytest-xdist) must give the tests the same names.
_RUN = random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID"))
SEED = int(os.environ.get("GSERVER_HISTORY_SEED", "0")) or _RUN.randrange(1, 1_000_000)
SECONDS = float(os.environ.get("GSERVER_HISTORY_SECONDS", "15"))
IS_LONG = SECONDS >= 180
#: After so many of the replies, the admin port is asked, too.
LOOK_SHARE = 0.01 if IS_LONG else 0.05
#: Seconds between two requests of a thread: a random number between these.
PAUSE_SECONDS = (0.0005, 0.005) if IS_LONG else (0.002, 0.03)
#: For an agent's checks of the count, round trips through a Proxy, and a busy machine. On two
#: cores, at loads up to 8, no run of half an hour in all needed more than 0.1 s.
SLACK = 0.35
pytestmark = pytest.mark.timeout(300 + 2 * SECONDS)
KEYS = keys_of()
#: Events that servers log only when something is wrong.
BAD = tuple(
    argv(".hung .error .failed .not_started .reload_failed .forced .cut_off worker.died .dropped")
)


class Recorder(history.Recorder):
    @contextmanager
    def closing(self, client: Client) -> Iterator[None]:
        """The server closes the client in the body; its end of input follows."""
        server, key = self._clients.pop(client)
        with suppress(OSError), client, self._span(Kind.CLOSING, Kind.CLOSED, server, key):
            yield
            client.rest()


@dataclass
class Life:
    """One run of a server, from start to end; `name` is the one in the recorder."""

    name: str
    born: float
    ended: float = inf


class Place:
    """A series of servers, often with the same id, with their own path to Redis."""

    def __init__(self, world: "World", proxies: list[Proxy], number: int) -> None:
        self.number, self.recorder = number, world.recorder
        self.link = f"link {number}"
        #: Its way to each Redis.
        self.proxies = proxies
        self.proxy = proxies[0]
        ways = zip(world.redises, proxies, strict=True)
        urls = " ".join(redis.url_at(proxy.port) for redis, proxy in ways)
        self._options = ["--redis-url", urls, *world.options]
        self._options += ["--workers", "2"] if number == 1 else []
        self._env, self._stack = world.env, world
        self.lives: list[Life] = []
        self._ids: set[str] = set()
        self.ended: list[Running] = []
        self.clients: list[Client] = []
        self.agents_killed = 0

    @property
    def name(self) -> str:
        return self.lives[-1].name

    def start(self, server_id: str = "") -> None:
        """Start a server, with one client."""
        self._options = [option for option in self._options if not option.startswith("--server-id")]
        self._options += [f"--server-id={server_id}"] if server_id else []
        self.lives.append(Life(f"{self.number}.{len(self.lives)}", time.monotonic()))
        self.server = self._stack.enter_context(Running(*self._options, env=self._env))
        self.recorder.note(Kind.RESTARTED if server_id in self._ids else Kind.STARTED, self.name)
        self._ids.add(server_id or self.name)
        self.connect()

    def connect(self) -> None:
        client = self.recorder.connect(self.name, self.server.port)
        self.clients.append(client)
        self.recorder.ask(client)

    def close(self, client: Client) -> None:
        self.clients.remove(client)
        self.recorder.close(client)

    def ask(self, rng: random.Random) -> int:
        return self.recorder.ask(rng.choice(self.clients))

    @contextmanager
    def next_agent(self, meanwhile: Callable[[], object]) -> Iterator[None]:
        """The body causes a new agent; then call `meanwhile` until it is ready."""
        agents, deadline = len(self.server.events("agent.ready")), time.monotonic() + LIMIT
        yield
        while len(self.server.events("agent.ready")) == agents:
            assert time.monotonic() < deadline, f"no new agent: {self.server.lines}"
            meanwhile()
            time.sleep(0.02)

    def end(self, is_clean: bool) -> None:
        if is_clean:
            assert self.recorder.stop(self.name, self.server) == 0
        else:
            self.recorder.kill(self.name, self.server)
        self.lives[-1].ended = time.monotonic()
        self.ended.append(self.server)
        self.drop_clients()

    def drop_clients(self) -> None:
        for client in self.clients:
            client.sock.close()
        self.clients.clear()

    def unexpected_events(self) -> list[str]:
        """Return the errors that its servers have logged, and deaths that no test has caused."""
        found: list[str] = []
        died: list[str] = []
        for server in {*self.ended, self.server}:
            events = server.events()
            found += [
                str(event) for event in events if event["event.action"].endswith(BAD)
            ] + server.errors
            died += [event["message"] for event in events if event["event.action"] == "agent.died"]
        if self.server not in self.ended and self.server.process.poll() is not None:
            found.append("the server has ended")
        if len(died) > self.agents_killed:
            found.append(f"{self.agents_killed} agents were killed, and these died: {died}")
        return found

    def logged(self, action: str, kind: str = "") -> int:
        events = [event for server in {*self.ended, self.server} for event in server.events(action)]
        return sum(kind in ("", event.get("gserver.kind")) for event in events)


class World(ExitStack[None]):
    """A Redis, and places for servers."""

    def __init__(
        self,
        folder: Path,
        interval: float,
        ttl: float,
        places: int,
        env: dict[str, str] | None = None,
        engines: int = 1,
    ) -> None:
        super().__init__()
        self.interval, self.ttl, self.env = interval, ttl, env
        self.promise = Promise(interval + SLACK * PATIENCE, ttl, SLACK * PATIENCE)
        times = f"--heartbeat-interval {interval} --member-ttl {ttl}"
        self.options = argv(f"{times} --admin-port 0")
        self.recorder = Recorder()
        with ExitStack() as stack:
            self.redises = [stack.enter_context(Redis(folder)) for _ in range(engines)]
            self.redis = self.redises[0]
            self.places = [
                Place(self, [stack.enter_context(Proxy(each.port)) for each in self.redises], n)
                for n in range(places)
            ]
            self.push(stack.pop_all())
        for place in self.places:
            self.callback(place.drop_clients)

    def history(self) -> list[Fact | Answer]:
        """Return the history; faults of a path to Redis are attributed to its servers."""
        facts = self.recorder.history
        links = {place.link: place for place in self.places}
        ends = {
            fact.key: fact.at
            for fact in facts
            if isinstance(fact, Fact) and fact.kind is Kind.HEALED
        }
        begins = {
            fact.key: fact.at
            for fact in facts
            if isinstance(fact, Fact) and fact.kind is Kind.FAULT
        }
        found: list[Fact | Answer] = []
        for it in facts:
            if isinstance(it, Fact) and it.server in links:
                lives = links[it.server].lives
                heirs = [
                    life
                    for life in lives
                    if life.born <= ends.get(it.key, inf) and life.ended >= begins[it.key]
                ]
                found += [it._replace(server=life.name) for life in heirs]
            else:
                found.append(it)
        return found

    def verdict(self) -> Verdict:
        return check(self.history(), self.promise)


# Faults. Each begins, and ends with its `with` block.

LinkFault = Callable[[Proxy], AbstractContextManager[None]]
Card = TypeVar("Card")


@contextmanager
def killed_and_back_empty(redis: Redis) -> Iterator[None]:
    redis.kill()
    yield
    redis.restart(keep_data=False)


@contextmanager
def killed_and_back_with_its_data(redis: Redis) -> Iterator[None]:
    redis.command("SAVE")
    redis.kill()
    yield
    redis.restart(keep_data=True)


@contextmanager
def wiped(redis: Redis) -> Iterator[None]:
    redis.wipe()
    yield


@contextmanager
def wiped_again(redis: Redis) -> Iterator[None]:
    redis.wipe()
    yield
    redis.wipe()


@contextmanager
def junk_in_the_keys(redis: Redis) -> Iterator[None]:
    for key in KEYS:
        redis.command("SET", key, "junk")
    yield
    redis.command("DEL", KEYS[1])


@contextmanager
def scripts_forgotten(redis: Redis) -> Iterator[None]:
    redis.forget_scripts()
    yield


@contextmanager
def connections_killed(redis: Redis) -> Iterator[None]:
    until(lambda: redis.command("CLIENT", "KILL", "TYPE", "normal"), "a server was connected")
    yield


def lossy(name: str, attribute: str, value: float = True) -> LinkFault:
    """A proxy with another value of an attribute."""

    @contextmanager
    def fault(proxy: Proxy) -> Iterator[None]:
        setattr(proxy, attribute, value)
        yield
        setattr(proxy, attribute, type(value)())

    fault.__name__ = name
    return fault


bytes_dropped = lossy("bytes_dropped", "is_dropping")
requests_dropped = lossy("requests_dropped", "drop_requests")
replies_dropped = lossy("replies_dropped", "drop_replies")
#: Heartbeats arrive, each after its timeout.
delayed = lossy("delayed", "delay_seconds", 0.6)


@contextmanager
def refused(proxy: Proxy) -> Iterator[None]:
    proxy.refuse()
    yield
    proxy.accept()


@contextmanager
def cut(proxy: Proxy) -> Iterator[None]:
    proxy.cut()
    yield
    proxy.cut()


# Further faults, for long runs.


@contextmanager
def back_with_an_old_backup(redis: Redis) -> Iterator[None]:
    """The first call makes the backup."""
    backup = redis.folder / "backup.rdb"
    if not backup.exists():
        redis.command("SAVE")
        shutil.copy(redis.folder / "dump.rdb", backup)
    redis.kill()
    yield
    shutil.copy(backup, redis.folder / "dump.rdb")
    redis.restart(keep_data=True)


@contextmanager
def entries_deleted(redis: Redis) -> Iterator[None]:
    for member in list(redis.members())[:2]:
        redis.command("HDEL", KEYS[0], member)
    yield


@contextmanager
def _altered(proxy: Proxy, alter: Callable[[bytes], Iterable[bytes]]) -> Iterator[None]:
    before, proxy.alter = proxy.alter, alter
    yield
    proxy.alter = before
    proxy.cut()


def in_slices(proxy: Proxy) -> AbstractContextManager[None]:
    def slices(data: bytes) -> Iterator[bytes]:
        for at in range(0, len(data), 10):
            yield data[at : at + 10]
            time.sleep(0.002)

    return _altered(proxy, slices)


def cut_in_the_middle_of_an_answer(proxy: Proxy) -> AbstractContextManager[None]:
    def half(data: bytes) -> Iterator[bytes]:
        yield data[: len(data) // 2]
        raise ConnectionResetError

    return _altered(proxy, half)


def garbage(proxy: Proxy) -> AbstractContextManager[None]:
    return _altered(proxy, lambda data: [random.randbytes(len(data))])


LASTING: list[RedisFault] = [
    frozen,
    killed_and_back_empty,
    killed_and_back_with_its_data,
    read_only,
    out_of_memory,
]
REDIS_FAULTS = [
    *LASTING,
    wiped,
    wiped_again,
    junk_in_the_keys,
    scripts_forgotten,
    connections_killed,
]
LINK_FAULTS: list[LinkFault] = [
    bytes_dropped,
    requests_dropped,
    replies_dropped,
    delayed,
    refused,
    cut,
]
#: Seconds of a round with clients that come and go, and without faults.
FAIR_SECONDS = 1.5
SERVER_EVENTS = ["reloaded", "killed", "stopped", "agent killed"]
if IS_LONG:
    LASTING += [back_with_an_old_backup, too_few_replicas, busy]
    REDIS_FAULTS += [back_with_an_old_backup, too_few_replicas, busy, paused, entries_deleted]
    LINK_FAULTS += [in_slices, cut_in_the_middle_of_an_answer, garbage]
    SERVER_EVENTS += ["paused", "agent paused"]
STARTS = ["started again with its id", "started again with a new id"]


class RandomRun(World):
    """A random run in rounds: clients come and go; then several faults at once; then a recovery.

    In every second round servers and clients do not change during the faults, so replies must be
    exact. The server of place 0 stays, and keeps its path to Redis: without heartbeats no lease
    ends.
    """

    def __init__(
        self, folder: Path, seed: int, interval: float, ttl: float, hand: int, engines: int = 1
    ) -> None:
        super().__init__(folder, interval, ttl, 4, engines=engines)
        self._seed, self._hand = seed, hand
        self.happened: Counter[str] = Counter()
        self._round = 0  # -1 after the last one.
        self._done: set[str] = set()
        self._said: dict[str, int] = {}
        #: Seconds for a hold and a recovery, and some for exact replies.
        self._calm_seconds = ttl + 5 * self.promise.delta

    def run(self, rounds: int) -> "RandomRun":
        """Run this many rounds, or more if there is time."""
        for place in self.places:
            place.start(f"place-{place.number}")
        end = time.monotonic() + SECONDS
        with ThreadPoolExecutor(len(self.places) + 3) as pool:
            tasks = [pool.submit(self._live, place) for place in self.places]
            tasks += [pool.submit(self._break_redis)]
            tasks += [
                pool.submit(self._break_links, places)
                for places in (self.places[1::2], self.places[2::2])
            ]

            def wait(condition: Callable[[], bool], what: str) -> None:
                until(lambda: condition() or any(task.done() for task in tasks), what, 4 * LIMIT)
                for task in tasks:
                    if task.done():  # too early
                        task.result()

            try:
                while self._round < rounds or time.monotonic() < end:
                    self._done.clear()
                    self._round += 1
                    wait(lambda: len(self._done) == len(tasks), "the faults are over")
                    time.sleep(self._calm_seconds)
                    wait(self._is_exact, "all report the total")
            finally:
                self._round = -1
            for task in tasks:
                task.result()
        return self

    def _is_exact(self) -> bool:
        total = sum(len(place.clients) for place in self.places)
        return [self._said.get(place.link) for place in self.places] == [total] * len(self.places)

    def _rng(self, name: str) -> random.Random:
        return random.Random(f"{self._seed} {self.interval} {name}")

    def _rounds(self, name: str) -> Iterator[int]:
        """Yield each round when its faults begin."""
        last = 0
        while self._round >= 0:
            if self._round > last:
                last = self._round
                time.sleep(FAIR_SECONDS + self.promise.delta)
                yield last
                self._done.add(name)
            time.sleep(0.01)

    # The thread of a place.

    def _live(self, place: Place) -> None:
        """Connect and close clients; in each round end or reload the server, or kill its agent."""
        rng, last = self._rng(place.link), 0
        events = SERVER_EVENTS if place.number else ["agent killed", "reloaded"]
        while self._round >= 0:
            if self._round > last:
                last = self._round
                self._let_time_pass(FAIR_SECONDS, place, rng)
                if last % 2:
                    self._let_time_pass(rng.uniform(0, self.ttl), place, rng)
                    self._happen(events[(place.number + last // 2) % len(events)], place, rng)
                    self._let_time_pass(1, place, rng)
                self._done.add(place.link)
            self._ask(place, rng)

    def _let_time_pass(self, seconds: float, place: Place, rng: random.Random) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if rng.random() < 0.05:
                self._come_or_go(place, rng)
            self._ask(place, rng)

    def _send_who(self, seconds: float, place: Place, rng: random.Random) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            place.ask(rng)
            time.sleep(rng.uniform(*PAUSE_SECONDS))

    def _ask(self, place: Place, rng: random.Random) -> None:
        self._said[place.link] = place.ask(rng)
        if rng.random() < LOOK_SHARE:
            self.recorder.look(place.name, place.server)
        time.sleep(rng.uniform(*PAUSE_SECONDS))

    def _come_or_go(self, place: Place, rng: random.Random) -> None:
        if (len(place.clients) > 1 and rng.random() < 0.5) or len(place.clients) > 8:
            place.close(rng.choice(place.clients))
        else:
            place.connect()

    def _happen(self, event: str, place: Place, rng: random.Random) -> None:
        if event == "reloaded":
            self._reload(place)
        elif event == "agent killed":
            with self.recorder.fault(place.name), place.next_agent(lambda: self._ask(place, rng)):
                (agent,) = place.server.agents()
                agent.kill()
                place.agents_killed += 1
        elif event.endswith("paused"):
            server, is_whole = place.server, event == "paused"
            processes = [psutil.Process(server.pid), *server.workers()] if is_whole else []
            with self.recorder.fault(place.link), stopped(*processes, *server.agents()):
                if is_whole:
                    time.sleep(rng.choice([0.5, 1.3]) * self.ttl)
                else:
                    # Not the admin port: it would wait for the agent, which would count as hung.
                    self._send_who(self.ttl / 4, place, rng)
        else:
            place.end(is_clean=event == "stopped")
            time.sleep(rng.choice([0, rng.uniform(0, 1)]))
            is_same = (place.number + len(place.lives)) % 2 == 0
            place.start(f"place-{place.number}" if is_same else "")
            self.happened[STARTS[is_same]] += 1
        self.happened[event] += 1

    def _reload(self, place: Place) -> None:
        """Reload, which keeps all clients; meanwhile, new ones send WHO once and close."""
        reloads = len(place.server.events("server.reloaded"))

        def visit() -> None:
            place.connect()
            place.close(place.clients[-1])

        with (
            self.recorder.move(place.name),
            self.recorder.fault(place.name),
            place.next_agent(visit),
        ):
            place.server.send_signal(SIGHUP)
        assert len(place.server.events("server.reloaded")) == reloads + 1

    # The threads that cause faults.

    def _seconds(self, fault: RedisFault | LinkFault, rng: random.Random) -> float:
        """Return the length of a fault: below or above the TTL; after the first, perhaps tiny."""
        lengths = [rng.uniform(1, 0.9 * self.ttl), 1.3 * self.ttl, rng.uniform(0, 0.3)]
        return rng.choice(lengths if self.happened[fault.__name__] else lengths[:2])

    def _deal(self, rng: random.Random, cards: list[Card], size: int) -> Iterator[list[Card]]:
        """Yield faults for each round, from one shuffled list after another."""
        pack: list[Card] = []
        while True:
            while len(pack) < size:
                pack += rng.sample(cards, len(cards))
            yield [pack.pop(0) for _ in range(size)]

    def _sides(self) -> list[int]:
        """Return which Redis this round's faults affect: both in every third round, or one."""
        turn = self._round % 3
        return [turn - 1] if turn and len(self.redises) > 1 else list(range(len(self.redises)))

    def _noted(self, server: str) -> AbstractContextManager[None]:
        """Note a fault, unless it affects one of two Redis: then it excuses nothing."""
        is_whole = len(self._sides()) == len(self.redises)
        return self.recorder.fault(server) if is_whole else nullcontext()

    def _break_redis(self) -> None:
        rng = self._rng("redis")
        hands = self._deal(rng, REDIS_FAULTS, self._hand)
        for _ in self._rounds("redis"):
            for fault in next(hands):
                time.sleep(rng.uniform(0, 0.5))
                with self._noted(""), ExitStack() as stack:
                    for side in self._sides():
                        stack.enter_context(fault(self.redises[side]))
                    time.sleep(self._seconds(fault, rng) if fault in LASTING else 0)
                self.happened[fault.__name__] += 1

    def _break_links(self, places: list[Place]) -> None:
        """Break the path of one of these places at a time."""
        rng = self._rng(name := f"links {places[0].number}")
        hands = self._deal(rng, LINK_FAULTS, self._hand // 2)
        for _ in self._rounds(name):
            for fault in next(hands):
                time.sleep(rng.uniform(0, 0.5))
                place = rng.choice(places)
                with self._noted(place.link), ExitStack() as stack:
                    for side in self._sides():
                        stack.enter_context(fault(place.proxies[side]))
                    time.sleep(self._seconds(fault, rng))
                self.happened[fault.__name__] += 1


@pytest.fixture(scope="module", params=[SEED], ids=lambda seed: f"GSERVER_HISTORY_SEED={seed}")
def random_runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[RandomRun]]:
    """Two runs at once: one with short times, which sees more; one with the defaults."""
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        folder = tmp_path_factory.mktemp("hours")
        random_runs = [
            stack.enter_context(RandomRun(folder, request.param, *it))
            for it in ((0.2, 2, 4), (0.5, 5, 2))
        ]
        yield list(pool.map(RandomRun.run, random_runs, (3, 2)))


@pytest.fixture(scope="module", params=[SEED], ids=lambda seed: f"GSERVER_HISTORY_SEED={seed}")
def two_engines(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RandomRun]:
    """A run with two Redis. In two of three rounds, all faults affect the same one of them."""
    folder = tmp_path_factory.mktemp("two")
    with RandomRun(folder, request.param, 0.2, 2, 4, engines=2) as run:
        yield run.run(3)


@pytest.mark.fault("Random histories with two Redis")
def test_with_two_redis_faults_of_one_of_them_excuse_no_reply(
    two_engines: RandomRun, notes: Notes
) -> None:
    verdict = two_engines.verdict()
    assert not verdict.violations, f"{verdict}\nload average: {os.getloadavg()}"
    assert verdict.exact > verdict.answers / 10, f"{verdict}"
    assert verdict.aged, "no age was judged"
    happened = two_engines.happened.most_common()
    notes.happened(", ".join(f"{what} {count} times" for what, count in happened))
    for name, count in {"replies": verdict.answers, "exact": verdict.exact}.items():
        notes.measured(name, count, "")
    found = [text for place in two_engines.places for text in place.unexpected_events()]
    assert not found, "\n".join(found)


@pytest.mark.fault("Random histories")
def test_no_reply_breaks_the_promise_whatever_happens(
    random_runs: list[RandomRun], notes: Notes
) -> None:
    for run in random_runs:
        verdict = run.verdict()
        assert not verdict.violations, f"{verdict}\nload average: {os.getloadavg()}"
        assert verdict.exact > verdict.answers / 10, f"{verdict}"
        notes.happened(
            ", ".join(f"{what} {count} times" for what, count in run.happened.most_common())
        )
        for name, count in {"replies": verdict.answers, "exact": verdict.exact}.items():
            notes.measured(f"{name} with a TTL of {run.ttl:g} s", count, "")


def test_no_process_logs_an_error_or_dies_by_itself(random_runs: list[RandomRun]) -> None:
    found = [
        text for run in random_runs for place in run.places for text in place.unexpected_events()
    ]
    assert not found, "\n".join(found)


def test_every_fault_has_happened_and_was_noticed(random_runs: list[RandomRun]) -> None:
    faults = [fault.__name__ for fault in [*REDIS_FAULTS, *LINK_FAULTS]]
    happened = sum((run.happened for run in random_runs), Counter[str]())
    assert set(happened) == {*faults, *SERVER_EVENTS, *STARTS}

    def logged(action: str, kind: str = "") -> int:
        return sum(place.logged(action, kind) for run in random_runs for place in run.places)

    kinds = {
        kind: logged("cluster.lost", kind)
        for kind in ("connection", "timeout", "read_only", "out_of_memory")
    }
    assert all(kinds.values()), kinds
    assert logged("cluster.reset")
    assert all(place.proxy.bytes_to_client for run in random_runs for place in run.places)
    assert sum(place.proxy.bytes_dropped for run in random_runs for place in run.places)


# Deliberate bugs, each with a scene that reveals it.


class Scene(World):
    """Three servers without faults, each with two clients."""

    def __init__(self, folder: Path, env: dict[str, str] | None = None) -> None:
        super().__init__(folder, 0.2, 1, 3, env)
        self._rng = random.Random(0)

    def begin(self) -> None:
        for place in self.places:
            place.start()
            place.connect()
        self.ask(2 * self.promise.delta)

    def ask(self, seconds: float) -> None:
        """Send WHO to all servers for these seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for place in self.places:
                if place.clients:
                    place.ask(self._rng)
            time.sleep(0.002)

    @contextmanager
    def away(self) -> Iterator[None]:
        """No server reaches Redis."""
        with self.recorder.fault():
            for place in self.places:
                place.proxy.refuse()
            yield
            for place in self.places:
                place.proxy.accept()


def one_comes_while_redis_is_away(scene: Scene) -> None:
    with scene.away():
        scene.ask(0.5)
        scene.places[0].connect()
        scene.ask(0.7)
    scene.ask(4 * scene.promise.delta)


def one_comes_while_replies_are_lost(scene: Scene) -> None:
    place = scene.places[0]
    with scene.recorder.fault(place.link), replies_dropped(place.proxy):
        place.connect()
        scene.ask(0.7)
    scene.ask(4 * scene.promise.delta)


def redis_is_wiped(scene: Scene) -> None:
    for _ in range(5):
        with scene.recorder.fault(), wiped(scene.redis):
            pass
        scene.ask(0.3)


def redis_is_away_for_longer_than_the_ttl(scene: Scene) -> None:
    for _ in range(2):
        with scene.away():
            scene.ask(1.3 * scene.ttl)
        scene.ask(0.5)


def one_is_killed(scene: Scene) -> None:
    scene.places[0].end(is_clean=False)
    scene.ask(scene.ttl + 2 * scene.promise.delta)


def one_is_killed_and_the_ages_are_read(scene: Scene) -> None:
    scene.ask(4 * scene.ttl)  # Before that, an agent is too new to know the age for sure.
    scene.places[0].end(is_clean=False)
    end = time.monotonic() + scene.ttl + 2 * scene.promise.delta
    while time.monotonic() < end:
        for place in scene.places[1:]:
            scene.recorder.look(place.name, place.server)
        scene.ask(0.05)


def one_is_stopped(scene: Scene) -> None:
    scene.ask(0.2)
    scene.places[0].end(is_clean=True)
    scene.ask(2 * scene.promise.delta)


def some_come(scene: Scene) -> None:
    for _ in range(5):
        for place in scene.places:
            place.connect()
            scene.ask(0.1)


def some_go(scene: Scene) -> None:
    for _ in range(10):
        for place in scene.places:
            place.connect()
            place.close(place.clients[-1])
    scene.ask(4 * scene.promise.delta)


def nothing_happens(scene: Scene) -> None:
    scene.ask(0.5)


#: A file, a text in it, and its replacement.
Change = tuple[str, str, str]
BUGS: dict[str, tuple[Callable[[Scene], None], list[Change]]] = {
    "a change that did not arrive is lost": (
        one_comes_while_redis_is_away,
        [
            (
                "cluster/heartbeat.py",
                "            reply = self._send(own_clients)\n",
                "            last_seen = getattr(self, '_seen', 0)\n"
                "            self._seen = own_clients\n"
                "            reported = getattr(self, '_reported', 0) + own_clients - last_seen\n"
                "            reply = self._send(reported)\n"
                "            self._reported = reported\n",
            )
        ],
    ),
    "a change is sent again after its reply was lost": (
        one_comes_while_replies_are_lost,
        [
            (
                "cluster/heartbeat.py",
                "            reply = self._send(own_clients)\n",
                "            reply = self._send(own_clients - getattr(self, '_reported', 0))\n"
                "            self._reported = own_clients\n",
            ),
            (
                "cluster/heartbeat.lua",
                "elseif may_write then\n",
                "elseif may_write then\n  clients = (old_clients or 0) + clients\n",
            ),
        ],
    ),
    "no hold": (
        redis_is_wiped,
        [
            (
                "cluster/membership.py",
                "self.remote_clients = max(self._held_clients, remote_clients)",
                "self.remote_clients = remote_clients",
            )
        ],
    ),
    "leases end by the wall clock, and a server that was away does not hold": (
        redis_is_away_for_longer_than_the_ttl,
        [
            ("cluster/heartbeat.lua", ", interval))", ", 1e9))"),
            ("cluster/membership.py", "reply.was_missing > 0", "False"),
        ],
    ),
    "no TTL": (
        one_is_killed,
        [("cluster/heartbeat.lua", "'-inf', clock, 'LIMIT'", "'-inf', -1, 'LIMIT'")],
    ),
    "the own share is that of the last heartbeat": (
        some_come,
        [
            (
                "metrics.py",
                '    Metric("remote_clients",',
                '    Metric("reported", Source.SERVER, Kind.STATE, ""),\n'
                '    Metric("remote_clients",',
            ),
            (
                "scoreboard.py",
                "return self.clients() + self.cells[self._remote_clients]",
                "return self.get('reported') + self.cells[self._remote_clients]",
            ),
            (
                "cluster/heartbeat.py",
                "        self._keep()\n",
                "        self._keep()\n        self._scoreboard.put('reported', own_clients)\n",
            ),
        ],
    ),
    "one of ten clients that close is still counted": (
        some_go,
        [
            (
                "serve/limits.py",
                "[self._clients] -= 1\n        self._cells[self._closed]",
                "[self._clients] -= self._cells[self._closed] % 10 > 0\n"
                "        self._cells[self._closed]",
            )
        ],
    ),
    "the own share counts twice": (
        nothing_happens,
        [("cluster/membership.py", "reply.total_clients - own_clients)", "reply.total_clients)")],
    ),
    "the age is that of the last reply": (
        one_is_killed_and_the_ages_are_read,
        [
            (
                "cluster/membership.py",
                "self._confirmed_at(reply.oldest_lease_end, sent_monotonic)",
                "sent_monotonic",
            )
        ],
    ),
    "a heartbeat after leaving": (
        one_is_stopped,
        [
            (
                "cluster/heartbeat.py",
                "            self._report(own_clients)\n",
                "            self._report(own_clients)\n"
                "            self._last = own_clients or getattr(self, '_last', 0)\n",
            ),
            (
                "cluster/heartbeat.py",
                "            self._send(LEAVE)\n",
                "            self._send(LEAVE)\n            self._send(self._last)\n",
            ),
        ],
    ),
}

QUICK_BUGS = (
    "no hold",
    "the own share is that of the last heartbeat",
    "a change is sent again after its reply was lost",
)


def changed(folder: Path, changes: list[Change]) -> dict[str, str]:
    """Return the environment of a server whose code has these changes."""
    shutil.copytree(ROOT / "gserver", folder / "gserver")
    for name, text, instead in changes:
        file = folder / "gserver" / name
        assert file.read_text().count(text) == 1, f"{text!r} is not in {name} exactly once"
        file.write_text(file.read_text().replace(text, instead))
    return {"PYTHONPATH": str(folder)}


def played(scene: Scene, play: Callable[[Scene], None]) -> Verdict:
    scene.begin()
    play(scene)
    return scene.verdict()


@pytest.mark.parametrize("bug", BUGS)
def test_every_deliberate_bug_applies_to_the_current_code(bug: str) -> None:
    for path, old, _ in BUGS[bug][1]:
        assert old in (ROOT / "gserver" / path).read_text()


@pytest.mark.fault("The checker finds deliberate bugs")
@pytest.mark.parametrize(
    "bug", [bug if bug in QUICK_BUGS else pytest.param(bug, marks=pytest.mark.long) for bug in BUGS]
)
def test_a_deliberate_bug_is_found_and_the_same_scene_without_it_is_accepted(
    bug: str, tmp_path: Path, notes: Notes
) -> None:
    play, changes = BUGS[bug]
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        scenes = [
            stack.enter_context(Scene(tmp_path, env)) for env in (None, changed(tmp_path, changes))
        ]
        right, wrong = pool.map(played, scenes, [play, play])
    assert not right.violations, f"{right}"
    assert right.exact > right.answers / 10
    assert wrong.violations
    notes.happened(f"{bug}: {len(wrong.violations)} replies broke the promise, none without it")
