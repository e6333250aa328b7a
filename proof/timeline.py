"""WHO on each server, and its true value, during a Redis failover and during a partition.

`bin/timeline --write` writes proof/results/timelines.json, docs/plots/who-*.svg and the sections of
docs/reliability.md.
"""

import itertools
import json
import math
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from lab.history import Answer, Fact, Kind, Promise, Recorder, check
from lab.member import Member
from lab.netns import both_ways
from lab.redises import FAILOVER_LIMIT
from lab.running import LIMIT, PATIENCE, ROOT, Client, until
from lab.seed import draw
from proof.world import NAMES, World, machine, need_root, undisturbed, write

FILE = ROOT / "proof/results/timelines.json"
PAUSE_SECONDS = 0.01
#: The tolerance of the judge: the heartbeat interval, polling of the count, and 25 ms for round
#: trips and the requests themselves.
DELTA = 0.5 + 0.1 * PATIENCE
#: The least and greatest number of clients of each server.
FEWEST, MOST = 4, 24
PERIOD_SECONDS = 11.0

Steps = list[tuple[float, int]]


class Crowd:
    """Clients of each server that connect and leave, and one that sends WHO all the time."""

    def __init__(self, members: list[Member], seed: int) -> None:
        self.recorder = Recorder()
        self.began = time.monotonic()
        self.is_full = False
        self._random, self._members = random.Random(seed), members
        self._clients: dict[str, list[Client]] = {member.name: [] for member in members}
        self._is_over = threading.Event()
        for member in members:
            self.recorder.note(Kind.STARTED, member.name)
        self.failures: list[str] = []
        jobs = [self._come_and_go, *(self._asking(member) for member in members)]
        self._threads = [
            threading.Thread(target=self._run, args=(job,), daemon=True) for job in jobs
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as error:  # noqa: BLE001 (any exception fails the timeline)
            self.failures.append(repr(error))

    def _connect(self, member: Member) -> Client:
        with member.host.inside():
            return self.recorder.connect(member.name, member.server.port)

    def _asking(self, member: Member) -> Callable[[], None]:
        def ask() -> None:
            with self._connect(member) as client:
                while not self._is_over.wait(PAUSE_SECONDS):
                    self.recorder.ask(client)

        return ask

    def _come_and_go(self) -> None:
        while not self._is_over.wait(self._random.uniform(0.01, 0.08)):
            turn = 2 * math.pi * (time.monotonic() - self.began) / PERIOD_SECONDS
            came = False
            for number, member in enumerate(self._members):
                wanted = FEWEST + (MOST - FEWEST) * (1 + math.sin(turn + number)) / 2
                clients = self._clients[member.name]
                if len(clients) < wanted - 1:
                    clients.append(self._connect(member))
                    self.recorder.ask(clients[-1])
                    came = True
                elif len(clients) > wanted + 1:
                    self.recorder.close(clients.pop(self._random.randrange(len(clients))))
            self.is_full = self.is_full or not came

    def stop(self) -> None:
        """Stop sending, and close the clients."""
        self._is_over.set()
        for thread in self._threads:
            thread.join(LIMIT)
        for client in itertools.chain(*self._clients.values()):
            client.sock.close()
        assert not self.failures, self.failures


class Timeline:
    """The events and their times while a crowd is connected."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.crowd = Crowd(world.members, seed)
        until(lambda: self.crowd.is_full or self.crowd.failures, "all clients are connected")
        self.began = time.monotonic()
        self.events: list[tuple[float, str]] = []

    def happened(self, what: str, at: float | None = None) -> None:
        """Note an event."""
        self.events.append(((at or time.monotonic()) - self.began, what))

    def let_pass(self, seconds: float) -> None:
        """Let time pass."""
        time.sleep(seconds)
        assert not self.crowd.failures, self.crowd.failures

    @contextmanager
    def regained(self) -> Iterator[None]:
        """After the body, wait until each server that lost Redis in it reaches Redis again."""
        servers = [member.server for member in self.world.members]
        before = [
            {name: len(server.events(f"cluster.{name}")) for name in ("lost", "regained")}
            for server in servers
        ]
        yield
        noticed = [
            (s, n)
            for s, n in zip(servers, before, strict=True)
            if len(s.events("cluster.lost")) > n["lost"]
        ]
        assert noticed, "no server has noticed"
        for server, counts in noticed:
            server.wait_for("cluster.regained", counts["regained"] + 1, FAILOVER_LIMIT)

    def report(self) -> dict[str, Any]:
        """End the timeline; return its report."""
        self.crowd.stop()
        history, began = self.crowd.recorder.history, self.began
        verdict = check(history, Promise(DELTA, self.world.ttl))
        answers = {
            name: [it for it in history if isinstance(it, Answer) and it.server == name]
            for name in NAMES
        }
        return {
            "seconds": round(time.monotonic() - began, 3),
            "events": sorted((round(at, 3), what) for at, what in self.events),
            "answers": verdict.answers,
            "delta": DELTA,
            "broken": len(verdict.violations),
            "first broken": [str(it) for it in verdict.violations[:3]],
            "slowest ms": round(
                1000 * max(it.received - it.sent for each in answers.values() for it in each), 1
            ),
            "truth": truth((it for it in history if isinstance(it, Fact)), began),
            "said": {
                name: steps((it.received - began, it.number) for it in each)
                for name, each in answers.items()
            },
        }


def truth(facts: Iterable[Fact], began: float) -> Steps:
    """The number of clients over time.

    Each client counts as connecting and leaving in the middle of the possible time.
    """
    times: dict[tuple[str, int], dict[Kind, float]] = {}
    for fact in facts:
        if fact.key:
            times.setdefault((fact.server, fact.key), {}).setdefault(fact.kind, fact.at)
    changes = [
        ((each[begin] + each[end]) / 2 - began, change)
        for each in times.values()
        for begin, end, change in (
            (Kind.CONNECTING, Kind.COUNTED, 1),
            (Kind.CLOSING, Kind.CLOSED, -1),
        )
        if begin in each and end in each
    ]
    changes.sort()
    counts = itertools.accumulate(change for _, change in changes)
    return steps((at, count) for (at, _), count in zip(changes, counts, strict=True))


def steps(points: Iterable[tuple[float, int]]) -> Steps:
    """The points at which the value changes."""
    found: Steps = []
    for at, count in points:
        if not found or found[-1][1] != count:
            found.append((round(at, 3), count))
    return found


def failover(timeline: Timeline, seconds: float = 7) -> None:
    """Kill the primary."""
    world, recorder = timeline.world, timeline.crowd.recorder
    timeline.let_pass(seconds)
    primary = world.redis.primary()
    with recorder.fault():
        timeline.happened("primary killed")
        with timeline.regained():
            primary.kill()
            others = [each for each in world.redis.redises if each is not primary]
            until(
                lambda: any(each.role() == "master" for each in others),
                "another server is primary",
                FAILOVER_LIMIT,
            )
            timeline.happened("a replica is primary")
    timeline.happened("all have reported to it")
    timeline.let_pass(seconds)


def partition(timeline: Timeline, seconds: float = 5) -> None:
    """Cut off A from Redis and the Sentinels, for longer than its lease."""
    world, recorder = timeline.world, timeline.crowd.recorder
    first, *others = world.members
    counts = [len(member.server.events("cluster.servers")) for member in others]
    ways = both_ways(first.host, *world.redis_hosts)
    timeline.let_pass(seconds)
    with recorder.fault(first.name), timeline.regained():
        with world.network.cut(*ways) as cut:
            timeline.happened("A cut off from Redis", cut.after)
            for member, count in zip(others, counts, strict=True):
                dropped = datetime.fromisoformat(
                    member.server.wait_for("cluster.servers", count + 1)["@timestamp"]
                )
                ago = time.time() - dropped.timestamp()
                timeline.happened(f"{member.name} drops A", time.monotonic() - ago)
            timeline.let_pass(seconds)
        timeline.happened("link of A restored")
    timeline.happened("first heartbeat of A")
    timeline.let_pass(seconds)


SCENARIOS: dict[str, Callable[[Timeline], None]] = {"failover": failover, "partition": partition}


def record(
    folder: Path,
    seed: int,
    scenario: Callable[[Timeline], None],
    interval: float = 0.5,
    ttl: float = 5.0,
) -> dict[str, Any]:
    """Record one timeline, on its own cluster."""
    with World(folder, interval, ttl) as running:
        timeline = Timeline(running, seed)
        scenario(timeline)
        return {"seed": seed, **timeline.report()}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--seed", type=int, help="Seed of the clients' connects and disconnects.")
@click.option(
    "--write",
    "is_kept",
    is_flag=True,
    help="Write proof/results/timelines.json, its plots, and docs/reliability.md.",
)
@click.option(
    "--render",
    is_flag=True,
    help="Only write plots and page again, from proof/results/timelines.json.",
)
def main(seed: int | None, is_kept: bool, render: bool) -> None:
    """Record WHO through a failover and a partition, and report it. Needs root; takes a minute."""
    if not render:
        need_root()
    from proof import page, timeline_plots

    if not render:
        seed = seed or draw()
        with undisturbed(), tempfile.TemporaryDirectory() as folder:
            report: dict[str, Any] = {"machine": machine()}
            for name, scenario in SCENARIOS.items():
                click.echo(f"{name}, --seed {seed} ...", err=True)
                (place := Path(folder) / name).mkdir()
                report[name] = record(place, seed, scenario)
                click.echo(page.describe(report[name]))
        if is_kept:
            write(report, FILE)
    if is_kept or render:
        timeline_plots.draw(json.loads(FILE.read_text()))
        page.render()


if __name__ == "__main__":
    main(prog_name="bin/timeline")
