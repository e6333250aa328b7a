"""The scenarios: a scenario is a function and the cases that it is called with.

The cases of a scenario take turns, round by round.
"""

import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import admin, heartbeats, tls
from bench.measure import (
    CLIENTS,
    CORES,
    PATIENCE_SECONDS,
    SERVER_CORE,
    Failed,
    Sample,
    cpu_ns,
    in_role,
    load,
    memory,
    own_memory,
    tree,
    work,
)
from bench.peers import CHECKOUT, PEERS, SPELLING_PEERS, running
from gserver.cluster.engines import MAX_LISTED
from lab.child import Child
from lab.redises import Redis, free_port
from lab.running import Client, Running, environment, until

HELD_BY_ONE = 12500
#: The order of commands, and the load generator's name for it.
MODES = {"in turn": "pipeline", "shuffled": "shuffled"}
ORDERS = tuple(MODES)
#: Servers of the cluster of `propagation`: a client connects to one, and the others are watched.
MEMBERS, EVENTS = 4, 12
#: Reloads in a round of `handover`.
HANDOVERS = 3


#: Commands in a batch that is longer than 4,096 bytes.
LONG = 1280


@dataclass(frozen=True)
class Shape:
    """Lines that the clients of the scenario `spellings` send, and the server to compare with."""

    name: str
    lines: str = "WHO\nWHERE\nWHY\n"
    order: str = ORDERS[0]
    depths: tuple[int, ...] = (1, 32)
    options: tuple[str, ...] = ()
    peer: str = "any-spelling"


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("WHO", "WHO\n", depths=(1, 32, LONG)),
        Shape("who", "who\n"),
        Shape("Who", "Who\n"),
        Shape("WHO, CRLF", "WHO\r\n"),
        Shape("WHO, blanks around", " WHO \n"),
        Shape("unknown", "NOPE\n"),
        Shape("WHO and unknown", "WHO\nNOPE\n"),
        Shape("own command", "PING\n", options=("--commands", "ping"), peer="functions"),
        Shape(
            "own command that may block",
            "PING\n",
            options=("--commands", "blocking"),
            peer="functions",
        ),
        Shape("built-in, in turn", depths=(1, 32, LONG)),
        Shape("built-in, shuffled", order=ORDERS[1], depths=(1, 32, LONG)),
        Shape("who, CRLF, shuffled", "who\r\nwhere\r\nwhy\r\n", order=ORDERS[1]),
    )
}


OWN_COMMANDS = "own command", "own command that may block"


@dataclass(frozen=True)
class Scenario:
    """A measurement: `run(seconds, **case)` yields a sample for each variant."""

    name: str
    run: Callable[..., Iterator[Sample]]
    cases: tuple[dict[str, Any], ...]
    rounds: int
    seconds: float = 0.0


def speed(seconds: float, server: str) -> Iterator[Sample]:
    """Answer WHO, WHERE and WHY, in turn and shuffled, with 1 and 32 in flight on a connection."""
    with running(server, cores=SERVER_CORE) as peer:
        for number, order in ((1, ORDERS[0]), (32, ORDERS[0]), (32, ORDERS[1])):
            yield {
                "depth": number,
                "order": order,
                **work(peer, MODES[order], CLIENTS, number, seconds),
            }


def spellings(seconds: float, shape: str) -> Iterator[Sample]:
    """Answer commands in one spelling, with gserver and uvloop in turn, on the same core."""
    sent = SHAPES[shape]
    peer = SPELLING_PEERS[sent.peer].name
    with (
        running("gserver", cores=SERVER_CORE, options=sent.options) as gserver,
        running(peer, cores=SERVER_CORE) as uvloop,
    ):
        for number in sent.depths:
            arguments = (MODES[sent.order], CLIENTS, number, seconds)
            own = work(gserver, *arguments, lines=sent.lines)
            other = work(uvloop, *arguments, lines=sent.lines)
            yield {
                "depth": number,
                "uvloop_cpu_us": other["cpu_us"],
                "cpu_in_uvloops": own["cpu_us"] / other["cpu_us"],
                **own,
            }


def depth(seconds: float, server: str) -> Iterator[Sample]:
    """Answer commands, with increasing numbers in flight on each connection."""
    with running(server, cores=SERVER_CORE) as peer:
        for number in (1, 2, 4, 8, 16, 32, 64, 128, 512, 1024):
            yield {"depth": number, **work(peer, "shuffled", CLIENTS, number, seconds)}


def connect(seconds: float, server: str) -> Iterator[Sample]:
    """Accept clients that send one command and leave."""
    with running(server, cores=SERVER_CORE) as peer:
        yield work(peer, "connect", CLIENTS, seconds)


def idle(seconds: float, server: str) -> Iterator[Sample]:
    """Hold 1,000 silent clients, then 10,000."""
    with running(server, cores=SERVER_CORE) as peer, ExitStack() as stack:
        with load(
            "hold", peer, 10
        ) as first:  # The setup for the first clients is not part of their cost.
            first.expect("held 10")
        pids, held = tree(peer), 0
        before = own_memory(pids)
        for clients in (1000, 10000):
            process = stack.enter_context(
                load("hold", peer, clients - held, limit=PATIENCE_SECONDS + seconds)
            )
            process.expect(f"held {clients - held}")
            held = clients
            time.sleep(0.5)
            started, cpu = time.monotonic(), cpu_ns(pids)
            time.sleep(seconds if clients == 10000 else 1)
            used = (cpu_ns(pids) - cpu) / 1e9 / (time.monotonic() - started)
            yield {
                "clients": clients,
                "client_bytes": (own_memory(pids) - before) / clients,
                "cpu_percent": 100 * used,
            }


def conversations(seconds: float, clients: int) -> Iterator[Sample]:
    """Hold clients with half a line each, while one more asks WHO. Then they leave."""
    options = ("--line-timeout", "0")
    with running("gserver", cores=SERVER_CORE, options=options) as server, ExitStack() as stack:
        asking, pids = stack.enter_context(Client(server.port)), tree(server)
        with _half_lines(server.port, 10), _half_lines(server.port, 10):
            asking.who()  # The setup for the first clients is not part of their cost.
        before = own_memory(pids)
        with _half_lines(server.port, clients):
            until(lambda: asking.who() == clients + 1, "all clients are counted")
            time.sleep(0.5)
            held = own_memory(pids)
            times, ends = [], time.monotonic() + seconds
            while (started := time.monotonic()) < ends:
                asking.who()
                times.append(time.monotonic() - started)
        until(lambda: asking.who() == 1, "the clients have left")
        time.sleep(0.5)
        yield {
            "conversation_bytes": (held - before) / clients,
            "left_bytes": (own_memory(pids) - before) / clients,
            "asking_p99_us": 1e6 * sorted(times)[len(times) * 99 // 100],
        }


@contextmanager
def _half_lines(port: int, clients: int) -> Iterator[None]:
    """Connect clients that send half a line each."""
    with ExitStack() as stack:
        for _ in range(clients):
            stack.enter_context(Client(port)).send(b"WH")
        yield


def connections(seconds: float, server: str, clients: int) -> Iterator[Sample]:
    """Answer commands of many clients, all of them active."""
    with running(server, cores=SERVER_CORE) as peer:
        pids = tree(peer)
        yield work(
            peer, "pipeline", clients, 1, seconds, during=lambda: {"memory_mb": memory(pids) / 1e6}
        )


def workers(seconds: float, workers: int, clients: int) -> Iterator[Sample]:
    """Answer commands with several processes; measure how evenly clients spread over them."""
    with running("gserver", cores=set(CORES), options=("--workers", str(workers))) as server:
        time.sleep(1)  # One worker answers; by now the others do too.
        own = in_role(server, "worker")
        if len(own) != workers:
            raise Failed(f"{len(own)} workers, not {workers}")

        def spread() -> Sample:
            taken = [_sockets(pid) - 1 for pid in own]  # without the listening socket
            if sum(taken) != clients:
                raise Failed(f"the workers hold {taken}, not {clients} clients")
            return {
                "busiest_percent": 100 * max(taken) / clients,
                "idlest_percent": 100 * min(taken) / clients,
            }

        yield work(server, "pipeline", clients, 1, seconds, during=spread)


def _sockets(pid: int) -> int:
    return sum(
        os.readlink(entry.path).startswith("socket:") for entry in os.scandir(f"/proc/{pid}/fd")
    )


def hold(_seconds: float, processes: int) -> Iterator[Sample]:
    """Hold more clients than one address has ports; each sends WHO when all are connected."""
    clients = processes * HELD_BY_ONE
    options = ("--workers", "4", "--max-clients", "60000")
    with running("gserver", cores=set(CORES), options=options) as server, ExitStack() as stack:
        pids = tree(server)
        before, started = own_memory(pids), time.monotonic()
        loads = [
            stack.enter_context(
                load("hold", server, HELD_BY_ONE, f"127.0.0.{number + 1}", limit=120)
            )
            for number in range(processes)
        ]
        for process in loads:
            process.expect(f"held {HELD_BY_ONE}")
        taken = time.monotonic() - started
        answers = [process.ask("ask").split() for process in loads]
        if any(words[:2] != ["answered", str(HELD_BY_ONE)] for words in answers):
            raise Failed(f"not all clients got a reply: {answers}")
        lowest, highest = (
            min(int(words[2]) for words in answers),
            max(int(words[3]) for words in answers),
        )
        yield {
            "clients": clients,
            "lowest": lowest,
            "highest": highest,
            "taken_s": taken,
            "client_bytes": (own_memory(pids) - before) / clients,
        }


def start(_seconds: float, workers: int) -> Iterator[Sample]:
    """The time from the start of bin/gserver, already set up, to its first reply."""
    port = free_port()
    env = environment()
    if sys.prefix not in (sys.base_prefix, str(CHECKOUT / ".venv")):
        env["VIRTUAL_ENV"] = sys.prefix
    subprocess.run([CHECKOUT / "bin/setup"], env=env, check=True, stdout=subprocess.DEVNULL)
    words = ["taskset", "-c", ",".join(map(str, CORES)), str(CHECKOUT / "bin/gserver")]
    words += ["--port", str(port), "--workers", str(workers)]
    begun = time.monotonic()
    with subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env
    ) as process:
        try:
            yield {"start_s": _first_answer(process, port) - begun}
        finally:
            process.terminate()


def _first_answer(process: "subprocess.Popen[bytes]", port: int) -> float:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with Client(port) as client:
                if client.ask(b"WHY") == b"42":
                    return time.monotonic()
        except ConnectionError:
            time.sleep(0.001)
    raise Failed("bin/gserver did not answer")


def handover(_seconds: float, clients: int) -> Iterator[Sample]:
    """Reloads with idle clients, some of which ask now and then. One more asks WHO all the time."""
    options = ("--server-id", "here", "--max-clients", str(clients + 100))
    with Running(*options) as server:
        for number in range(1, HANDOVERS + 1):
            load = Child("lab.reload_load", server.port, "here", f"idle={clients}", "watcher=1")
            server.send_signal(signal.SIGHUP)
            server.wait_for("server.reloaded", number)
            found = load.result()
            handed_over = server.events("worker.handed_over")[-1]
            yield {
                "handover_s": handed_over["gserver.seconds"],
                "p99_ms": found["p99_ms"],
                "longest_ms": found["longest_ms"],
                "over": found["who_most"] - found["clients"],
                "failed": found["lost"] + found["wrong"] + found["missing"],
            }
            until(lambda: server.who() == 1, "the clients have left")


def heartbeat_script(_seconds: float, heartbeats_a_round: int) -> Iterator[Sample]:
    """The cost of a heartbeat inside Redis."""
    for size, times in heartbeats.script_times(heartbeats=heartbeats_a_round).items():
        yield from ({"servers": size, "script_us": microseconds} for microseconds in times)


def heartbeat_load(seconds: float, servers: int) -> Iterator[Sample]:
    """One Redis under the heartbeats of many servers."""
    yield heartbeats.under_heartbeats(servers, seconds)


def heartbeat_lists(seconds: float, listed: int) -> Iterator[Sample]:
    """One Redis under the heartbeats of servers that use several: replies list the others."""
    found = heartbeats.under_heartbeats(listed, seconds, listed)
    yield {
        "list_us": found["CPU a heartbeat, us"],
        "list_bytes": found["received a heartbeat, bytes"],
    }


def propagation(_seconds: float, interval: float) -> Iterator[Sample]:
    """The time until a client of one server is in the WHO of another."""
    pace = ("--heartbeat-interval", f"{interval:g}", "--member-ttl", f"{max(5, 5 * interval):g}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        options = ("--redis-url", stack.enter_context(Redis(folder)).url, *pace)
        entered = [running("gserver", cores=set(CORES), options=options) for _ in range(MEMBERS)]
        first, *others = [stack.enter_context(server) for server in entered]
        watchers = [stack.enter_context(Client(server.port)) for server in others]
        _moments(watchers, len(watchers))
        for _ in range(EVENTS):
            time.sleep(random.uniform(0, interval))
            begun = time.monotonic()
            with Client(first.port):
                yield from (
                    {"delay_ms": 1e3 * (at - begun)} for at in _moments(watchers, len(watchers) + 1)
                )
            _moments(watchers, len(watchers))


def _moments(watchers: list[Client], wanted: int) -> list[float]:
    """The time of each watcher's first reply with this number of clients."""
    moments: dict[Client, float] = {}
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(moments) < len(watchers):
        for watcher in watchers:
            if watcher not in moments and watcher.who() == wanted:
                moments[watcher] = time.monotonic()
        if time.monotonic() > deadline:
            raise Failed(f"not all servers have reported {wanted} clients")
        time.sleep(0.001)
    return list(moments.values())


def _cases(**values: Iterable[Any]) -> tuple[dict[str, Any], ...]:
    """Every combination of the values."""
    return tuple(
        dict(zip(values, combination, strict=True))
        for combination in itertools.product(*values.values())
    )


FULL = (
    Scenario("speed", speed, _cases(server=PEERS), rounds=5, seconds=1),
    Scenario("spellings", spellings, _cases(shape=SHAPES), rounds=5, seconds=0.5),
    Scenario(
        "connect", connect, _cases(server=[name for name in PEERS if "streams" not in name]), 5, 1.5
    ),
    Scenario("idle", idle, _cases(server=("gserver", "epoll", "go", "uvloop", "gevent")), 3, 10),
    Scenario("conversations", conversations, _cases(clients=(5000,)), rounds=3, seconds=3),
    Scenario(
        "connections",
        connections,
        _cases(
            clients=(1, 8, 64, 500, 1000, 4000, 10000, 15000),
            server=("gserver", "epoll", "uvloop", "go"),
        ),
        rounds=3,
        seconds=1.5,
    ),
    Scenario(
        "depth", depth, _cases(server=("gserver", "epoll", "go", "uvloop")), rounds=3, seconds=0.8
    ),
    Scenario(
        "workers", workers, _cases(clients=(64, 1000), workers=(1, 2, 4)), rounds=5, seconds=1.5
    ),
    Scenario("tls", tls.tls, _cases(service=tls.SERVICES), rounds=5, seconds=1.5),
    Scenario(
        "admin", admin.admin, _cases(admin_port=(admin.OFF, admin.SCRAPED)), rounds=7, seconds=5
    ),
    Scenario("hold", hold, _cases(processes=(4,)), rounds=2),
    Scenario("start", start, _cases(workers=(1, 4)), rounds=11),
    Scenario("handover", handover, _cases(clients=(1000, 10000)), rounds=3),
    Scenario("propagation", propagation, _cases(interval=(0.1, 0.2, 0.5, 1.0, 2.0)), rounds=1),
    Scenario(
        "heartbeats",
        heartbeat_script,
        _cases(heartbeats_a_round=(heartbeats.HEARTBEATS,)),
        rounds=1,
    ),
    Scenario(
        "heartbeats",
        heartbeat_load,
        _cases(servers=heartbeats.SIZES),
        rounds=1,
        seconds=heartbeats.SECONDS,
    ),
    Scenario(
        "heartbeats",
        heartbeat_lists,
        _cases(listed=(MAX_LISTED,)),
        rounds=1,
        seconds=heartbeats.SECONDS,
    ),
)
#: Most of the goals, in less than four minutes.
QUICK = (
    Scenario(
        "speed", speed, _cases(server=("gserver", "uvloop", "go", "gevent")), rounds=5, seconds=0.6
    ),
    Scenario(
        "spellings",
        spellings,
        _cases(shape=("who", "WHO, CRLF", "unknown", *OWN_COMMANDS, "built-in, shuffled")),
        rounds=2,
        seconds=0.4,
    ),
    Scenario("connect", connect, _cases(server=("gserver", "uvloop")), rounds=5, seconds=0.6),
    Scenario(
        "connections",
        connections,
        _cases(clients=(64, 1000, 10000), server=("gserver",)),
        rounds=2,
        seconds=0.6,
    ),
    Scenario("idle", idle, _cases(server=("gserver", "go")), rounds=1, seconds=3),
    Scenario("conversations", conversations, _cases(clients=(5000,)), rounds=1, seconds=2),
    Scenario("start", start, _cases(workers=(1,)), rounds=5),
)
