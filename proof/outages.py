"""How long real faults last, for replies and for WHO.

`bin/availability --measure` writes proof/results/outages.json.
"""

import itertools
import select
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from lab.child import Child
from lab.member import Member
from lab.netns import both_ways
from lab.redises import FAILOVER_LIMIT, Redis
from lab.running import LIMIT, ROOT, Client, stopped, until
from lab.steady import Watcher
from proof.probes import LIMIT_SECONDS, PERIOD_SECONDS
from proof.world import World, machine, undisturbed

FILE = ROOT / "proof/results/outages.json"
#: Length of a fault of Redis, or of one server's path to it, that has no length of its own.
LASTING_SECONDS = 8.0
#: An outage is over when no request has failed for this long.
CALM_SECONDS = 1.5
SHARE = 5  #: clients of each server


class Outage(NamedTuple):
    """Seconds from the fault, or from its end, to the last failure, and the share that failed.

    The last figure is the share that failed after a retry too.
    """

    seconds: float
    share: float
    retried: float = 0.0


# Faults. The body begins when the fault is in effect; the end of the `with` block repairs it.

Happening = Callable[[World], AbstractContextManager[None]]


def ends(role: str, how: Callable[[psutil.Process], None], sign: str = "") -> Happening:
    """A worker or the agent is killed, or hangs until the supervisor notices, and is replaced."""

    @contextmanager
    def happen(world: World) -> Iterator[None]:
        server = world.members[0].server
        with server.expecting(f"{role}.ready", limit=2 * LIMIT):
            with server.expecting(sign, limit=2 * LIMIT) if sign else nullcontext():
                how((server.workers() if role == "worker" else server.agents())[0])
            yield

    return happen


@contextmanager
def server_killed(world: World) -> Iterator[None]:
    """Kill all processes of a server with kill -9; restart it later."""
    world.members[0].server.kill()
    yield
    world.members[0].start()


@contextmanager
def host_frozen(world: World) -> Iterator[None]:
    """Stop all processes of a server, as on a paused virtual machine; continue them later."""
    with stopped(*world.members[0].server.processes()):
        _wait_for_balancer(world, "DOWN")
        yield


@contextmanager
def host_gone(world: World) -> Iterator[None]:
    """Lose all packets from and to a server: a machine without power, a dead switch."""
    host = world.members[0].host
    others = [world.front_host, *world.redis_hosts]
    with world.network.cut(*both_ways(host, *others)):
        _wait_for_balancer(world, "DOWN")
        yield


def _wait_for_balancer(world: World, state: str) -> None:
    until(lambda: world.front.states()["gs1"] == state, f"HAProxy sees the server {state}")


@contextmanager
def rolling_reload(world: World) -> Iterator[None]:
    """SIGHUP to one server after another."""
    for member in world.members:
        with member.server.expecting("server.reloaded"):
            member.server.send_signal(signal.SIGHUP)
    yield


@contextmanager
def rolling_upgrade(world: World) -> Iterator[None]:
    """Install another version, and send SIGHUP to one server after another."""
    world.installed.set_version(f"1.0.{time.time_ns()}")
    for member in world.members:
        with member.server.expecting("server.upgraded"), member.server.expecting("server.reloaded"):
            member.server.send_signal(signal.SIGHUP)
    yield


@contextmanager
def rolling_restart(world: World) -> Iterator[None]:
    """Restart the servers one after another, each once HAProxy uses the previous one again.

    Before it stops, each is a lame duck, and its clients are closed one by one.
    """
    for member in world.members:
        assert member.server.stop(signal.SIGUSR2) == 0
        member.start()
        until(lambda: {*world.front.states().values()} == {"UP"}, "all servers are up")
    yield


def promotes(
    fault: Callable[[World, Redis], None], mend: Callable[[Redis], None] = lambda _: None
) -> Happening:
    """The fault makes another Redis primary; the old one is repaired and becomes its replica."""

    @contextmanager
    def happen(world: World) -> Iterator[None]:
        with world.redis.replacing(partial(fault, world)) as old:
            yield
        mend(old)

    return happen


@contextmanager
def wiped(world: World) -> Iterator[None]:
    """FLUSHALL."""
    world.redis.primary().wipe()
    yield


def of_one(
    fault: Callable[[Redis], None], mend: Callable[[Redis], None] = lambda _: None
) -> Happening:
    """The first of two Redis has a fault, and is repaired after some seconds."""

    @contextmanager
    def happen(world: World) -> Iterator[None]:
        fault(world.first_redis)
        yield
        time.sleep(LASTING_SECONDS)
        mend(world.first_redis)

    return happen


@contextmanager
def one_gone(world: World) -> Iterator[None]:
    """No server reaches the first of two Redis."""
    hosts = [member.host for member in world.members]
    with world.network.cut(*both_ways(world.first_redis.host, *hosts)):
        yield
        time.sleep(LASTING_SECONDS)


def cut_off(count: int) -> Happening:
    """`count` servers reach neither Redis nor Sentinels; clients still reach them."""

    @contextmanager
    def happen(world: World) -> Iterator[None]:
        cut_off = [both_ways(each.host, *world.redis_hosts) for each in world.members[:count]]
        with world.network.cut(*itertools.chain(*cut_off)):
            yield
            time.sleep(LASTING_SECONDS)

    return happen


class Fault(NamedTuple):
    """A fault, timed from its start, or from its end if it `lasts`.

    `is_unreachable`: clients cannot reach the first server. `is_judged_after_repair`: replies are
    judged after it, too.
    """

    name: str
    happen: Happening
    is_of_who: bool = True
    lasts: bool = False
    is_unreachable: bool = False
    is_judged_after_repair: bool = False


FAULTS = (
    Fault("worker killed", ends("worker", psutil.Process.kill)),
    Fault("worker hung", ends("worker", psutil.Process.suspend, "worker.hung"), is_of_who=False),
    Fault("agent killed", ends("agent", psutil.Process.kill)),
    Fault("agent hung", ends("agent", psutil.Process.suspend)),
    Fault("server killed", server_killed, is_unreachable=True),
    Fault("host frozen", host_frozen, is_of_who=False),
    Fault("host gone", host_gone, is_unreachable=True),
    Fault("rolling reload", rolling_reload, is_of_who=False),
    Fault("rolling upgrade", rolling_upgrade, is_of_who=False),
    Fault("rolling restart", rolling_restart, is_of_who=False),
    Fault("Redis primary killed", promotes(lambda _, old: old.kill(), lambda old: old.start())),
    Fault("Redis primary hung", promotes(lambda _, old: old.freeze(), lambda old: old.thaw())),
    Fault("planned failover", promotes(lambda world, _: world.redis.order_failover())),
    Fault("Redis wiped", wiped),
    Fault("Redis gone", cut_off(3), lasts=True),
    Fault("server cut off from Redis", cut_off(1), lasts=True),
)
#: The faults that cost WHO something, and are not of Redis.
OF_SERVERS = "worker killed", "agent killed", "agent hung", "server killed", "host gone"
#: With two Redis, which are independent. Replies do not depend on them.
FAULTS_OF_TWO = (
    *(fault for fault in FAULTS if fault.name in OF_SERVERS),
    Fault("one Redis killed", of_one(Redis.kill, Redis.start), is_judged_after_repair=True),
    Fault("one Redis hung", of_one(Redis.freeze, Redis.thaw), is_judged_after_repair=True),
    Fault(
        "one Redis restarted",
        of_one(partial(Redis.restart, keep_data=False)),
        is_judged_after_repair=True,
    ),
    Fault("one Redis wiped", of_one(Redis.wipe), is_judged_after_repair=True),
    Fault("one Redis gone", one_gone, is_judged_after_repair=True),
    Fault("both Redis gone", cut_off(3), lasts=True),
    Fault("server cut off from both", cut_off(1), lasts=True),
)


# Replies


@contextmanager
def probing(world: World) -> Iterator[list[tuple[float, int]]]:
    """Send requests through HAProxy during the body.

    Afterwards the list has, for each request, when it was due and how many tries it took.
    """
    found: list[tuple[float, int]] = []
    child = Child("proof.probes", "127.0.0.1", world.front.port, host=world.front_host)
    try:
        yield found
        found += [(at, tries) for at, tries in child.result()]
    finally:
        child.kill()


def of_replies(world: World, fault: Fault) -> Outage:
    """One trial: the outage of replies, as seen by clients of the balancer."""
    with probing(world) as probes:
        time.sleep(1)
        began = time.monotonic()
        with fault.happen(world):
            time.sleep(CALM_SECONDS)
        _wait_for_balancer(world, "UP")
        ended = time.monotonic()
        time.sleep(CALM_SECONDS)
        count = (time.monotonic() - began) / PERIOD_SECONDS
    assert len(probes) > 0.9 * count, "requests are missing"
    for at, tries in probes:
        assert tries == 1 or began - LIMIT_SECONDS < at < ended + CALM_SECONDS / 2, (
            "failures before or after the fault"
        )
    return outage(probes, began)


def outage(probes: list[tuple[float, int]], began: float) -> Outage:
    """The outage that requests show for a fault that began at this time."""
    failed = [at for at, tries in probes if tries != 1]
    if not failed:
        return Outage(0.0, 0.0)
    seconds = max(failed) - min([began, *failed]) + PERIOD_SECONDS
    count = seconds / PERIOD_SECONDS
    return Outage(seconds, len(failed) / count, sum(tries == 0 for _, tries in probes) / count)


# WHO


class Census(ExitStack[None]):
    """A known number of clients of each server, and a watcher."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.clients: dict[str, list[Client]] = {member.name: [] for member in world.members}
        self.watchers = {
            member.name: Watcher(member.client, is_back=True) for member in world.members
        }
        for member in world.members:
            self.callback(self.watchers[member.name].close)
            for _ in range(SHARE):
                self.come(member)

    def come(self, member: Member) -> None:
        """Connect one more client."""
        client = self.enter_context(member.client())
        client.ask(b"WHY")
        self.clients[member.name].append(client)

    def total(self, without: str = "") -> int:
        """The number of clients of all servers, except one."""
        names = [name for name in self.clients if name != without]
        return len(names) + sum(_is_open(client) for name in names for client in self.clients[name])

    def all_report(self, without: str = "") -> bool:
        """Whether all servers report the total, except one."""
        total = self.total(without)
        return all(
            watcher.says(total) for name, watcher in self.watchers.items() if name != without
        )


def _is_open(client: Client) -> bool:
    with suppress(OSError):
        return (
            not select.select([client.sock], [], [], 0)[0]
            or client.sock.recv(1, socket.MSG_PEEK) != b""
        )
    return False


def of_who(world: World, fault: Fault) -> Outage:
    """One trial: a client connects right after the fault.

    The outage lasts until no reachable server reports a wrong number.
    """
    first, _, third = world.members
    without = first.name if fault.is_unreachable else ""
    with Census(world) as census:
        until(census.all_report, "all servers are exact")
        began = time.monotonic()
        with fault.happen(world):
            census.come(third)
            if not fault.lasts:
                until(
                    lambda: census.all_report(without),
                    "all servers are exact again",
                    FAILOVER_LIMIT,
                )
                ended, total = time.monotonic() + CALM_SECONDS, census.total(without)
                time.sleep(CALM_SECONDS)
        if fault.lasts:
            began = time.monotonic()
        if fault.lasts or fault.is_judged_after_repair:
            until(lambda: census.all_report(without), "all servers are exact again", FAILOVER_LIMIT)
            time.sleep(CALM_SECONDS)
            ended, total = time.monotonic(), census.total(without)
        observed = [w.answers for name, w in census.watchers.items() if name != without]
        replies = [(each.asked, each.clients) for answers in observed for each in answers]
        return wrong([each for each in replies if began <= each[0] <= ended], began, total)


def wrong(answers: list[tuple[float, int]], began: float, total: int) -> Outage:
    """How long replies were wrong, and their share until then."""
    bad = [at for at, count in answers if count != total]
    if not bad:
        return Outage(0.0, 0.0)
    return Outage(max(bad) - began, len(bad) / sum(at <= max(bad) for at, _ in answers))


#: Where the report tells on which machine the faults were measured, by the number of Redis.
MACHINES = {1: "machine", 2: "machine_of_two"}
#: A fault, its part of the report, and what measures it.
Trial = tuple[Fault, str, Callable[[World, Fault], Outage]]


def measure(
    engines: int, rounds: int, say: Callable[[str], None], only: str = ""
) -> dict[str, Any]:
    """Measure every fault `rounds` times with so many Redis; return their part of the report."""
    if engines == 1:
        trials: list[Trial] = [(fault, "replies", of_replies) for fault in FAULTS]
        trials += [(fault, "who", of_who) for fault in FAULTS if fault.is_of_who]
    else:
        trials = [(fault, "who_of_two", of_who) for fault in FAULTS_OF_TWO]
    chosen = [trial for trial in trials if only in trial[0].name]
    name = MACHINES[engines]
    with undisturbed():
        return {name: machine(), **_measure(engines, chosen, rounds, say)}


def _measure(
    engines: int, trials: list[Trial], rounds: int, say: Callable[[str], None]
) -> dict[str, dict[str, list[list[float]]]]:
    found: dict[str, dict[str, list[list[float]]]] = {sort: {} for _, sort, _ in trials}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        world = stack.enter_context(World(folder, engines=engines))
        for number in range(rounds):
            for fault, sort, trial in trials:
                until(world.store.is_whole, "Redis is whole again", FAILOVER_LIMIT)
                outage = trial(world, fault)
                figures = [round(figure, 4) for figure in outage]
                found[sort].setdefault(fault.name, []).append(figures)
                text = f"{outage.seconds:.2f} s, {outage.share:.1%} of all"
                say(f"{number + 1}/{rounds} {fault.name}, {sort}: {text}")
    return found
