"""The faults of a soak.

Each causes its fault and returns the evidence; `World.heal` ends it.
"""

import array
import fcntl
import signal
import socket
import termios
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import NamedTuple

import psutil

from lab.admin import get
from lab.redises import Redis, Sentinels, Server
from lab.running import LIMIT, Client, Running, stopped
from proof.soak_world import MAX_CLIENTS, NAMES, SoakedMember, World, settle

Act = Callable[[World, SoakedMember], str]
CROWD = 2 * MAX_CLIENTS  # the clients of a server and of its predecessor
#: The server that may be restarted, and those whose processes may die. The third one's processes
#: survive, so that their memory can be judged.
FIRST, MORTAL = NAMES[:1], NAMES[:2]


class Fault(NamedTuple):
    """A kind of fault, its possible targets, and the effects that their clients may see."""

    act: Act
    victims: tuple[str, ...] = NAMES
    excuse: str = ""  #: see `load.Target`
    crowd: int = 0  #: by how much WHO may be higher


def _logged(action: str, do: Callable[[], object], *members: SoakedMember) -> str:
    """The action makes each member log this event."""
    before = [member.log.actions[action] for member in members]
    do()

    def have() -> list[int]:
        return [
            member.log.actions[action] - count
            for member, count in zip(members, before, strict=True)
        ]

    settle(
        lambda: all(have()),
        lambda: f"{action} by all of {[member.name for member in members]}: {have()}",
    )
    return f"logged {action}"


# A server's processes.


def _process(
    role: str, do: Callable[[psutil.Process], None], action: str, world: World, member: SoakedMember
) -> str:
    process = world.random.choice(
        [each for name, each in member.server.named_processes().items() if name.startswith(role)]
    )
    event = _logged(action, lambda: do(process), member)
    member.deaths += 1
    return event


def _pause_worker(world: World, member: SoakedMember) -> str:
    with stopped(worker := world.random.choice(member.server.workers())):
        time.sleep(1)
    assert worker.is_running()
    return "it was stopped, and not replaced"


def _reload(_world: World, member: SoakedMember) -> str:
    before = member.server.named_processes().keys()
    _logged("server.reloaded", lambda: member.server.send_signal(signal.SIGHUP), member)
    settle(
        lambda: len(member.server.named_processes().keys() & before) == 1,
        "all but the supervisor are new",
    )
    return "all processes but the supervisor are new"


def _ended(number: signal.Signals, code: int, _world: World, member: SoakedMember) -> str:
    member.server.send_signal(number)
    assert member.server.exit_code() == code, member.server.stderr
    assert not (problems := member.problems()), problems
    member.start()
    return f"exit code {code}, started again"


def _same_id(world: World, member: SoakedMember) -> str:
    with Running(
        "--server-id", member.name, "--redis-url", world.redises.url, wait=False
    ) as second:
        assert second.exit_code(4 * LIMIT) == 2, second.lines
    return "the second server was refused"


# Redis and its Sentinels.


def _noticed(
    action: str, seconds: float, do: Callable[[World], object], world: World, _member: SoakedMember
) -> str:
    noticed = _logged(action, lambda: do(world), *world.members)
    time.sleep(seconds)
    return f"all servers {noticed}"


def _replaced(do: Callable[[Sentinels], Redis], world: World, _member: SoakedMember) -> str:
    before = do(world.redises)
    return f"the Redis at port {world.primary.port} took over from {before.port}"


def _away(which: Callable[[World], Sequence[Server]], world: World, _member: SoakedMember) -> str:
    world.random.choice(which(world)).kill()
    time.sleep(2)
    return "it was killed, and unavailable for 2 s"


def _freeze_all(world: World) -> None:
    for each in world.redises.redises:
        each.freeze()


def _scripts_forgotten(world: World, _member: SoakedMember) -> str:
    primary = world.primary
    primary.forget_scripts()
    settle(
        lambda: primary.command("INFO", "memory")["number_of_cached_scripts"] > 0,
        "the script is loaded again",
    )
    return "the script was loaded again"


def _cut(world: World, _member: SoakedMember) -> str:
    count = world.primary.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    assert count >= len(NAMES), count
    return "the connections of all servers were cut"


# Clients and other peers of a server.


def _refused(
    name: str,
    count: int,
    least: int,
    attack: Callable[[list[Client]], int],
    _world: World,
    member: SoakedMember,
) -> str:
    """Connect `count` attackers; at least `least` must get the error reply and be counted."""

    def counted() -> int:
        return int(settle(member.status, "the admin port answers")["error_replies"][name])

    before = counted()
    with ExitStack() as stack:
        rejected = attack([stack.enter_context(member.client()) for _ in range(count)])
        assert rejected >= least, f"{rejected} got the error reply"
        settle(lambda: counted() - before >= rejected, "the rejected clients are counted")
    return f"at least {least} were closed, and counted as {name}"


def _flood(crowd: list[Client]) -> int:
    rejected = 0
    for client in crowd:
        with suppress(OSError):
            client.send(b"WHY\n")
            rejected += client.line() == b"ERR too many clients\n"
    return rejected


def _slowloris(crowd: list[Client]) -> int:
    for _ in range(3):
        for client in crowd:
            client.send(b"x")
        time.sleep(0.5)
    return sum(client.rest() == b"ERR too slow\n" for client in crowd)


def _never_read(crowd: list[Client]) -> int:
    for client in crowd:
        client.sock.settimeout(4)  # A merely slow server would continue to read before this.
        with suppress(OSError):
            while True:
                client.send(b"WHERE\n" * 10_000)
    return len(crowd)


def _silent(_world: World, member: SoakedMember) -> str:
    with ExitStack() as stack:
        crowd = [
            stack.enter_context(socket.create_connection(("127.0.0.1", member.port), LIMIT))
            for _ in range(200)
        ]
        ends = [sock.recv(100) for sock in crowd]
    assert not any(ends), ends
    return "200 connections were closed"


def _sink_closed(world: World, _member: SoakedMember) -> str:
    world.sink.close()
    time.sleep(5)
    world.open_sink()
    silent = {*NAMES}
    while silent:
        silent.discard(world.sink.recv(1000).partition(b".")[0].decode())
    return "no listener for 5 s; then all servers sent again"


def _reader_stalled(_world: World, member: SoakedMember) -> str:
    assert member.server.process.stdout
    pipe, waiting = member.server.process.stdout.fileno(), array.array("i", [0])
    size = fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 4096)
    member.log.may_read.clear()
    try:
        settle(
            lambda: fcntl.ioctl(pipe, termios.FIONREAD, waiting) or waiting[0] > size - 1000,
            "the pipe is full",
        )
        time.sleep(3)
    finally:
        member.log.may_read.set()
    return "the pipe was full for 3 s"


def _garbage(world: World, member: SoakedMember) -> str:
    answers, address = 0, ("127.0.0.1", member.server.admin_port())
    for number in range(60):
        with socket.create_connection(address, LIMIT) as sock, suppress(OSError):
            if number % 3:
                sock.sendall(
                    world.random.randbytes(3000) + b"\n\n"
                    if number % 2
                    else b"GET /" + b"x" * 100_000
                )
                answers += sock.recv(100).startswith(b"HTTP/1.1 4")
    assert get(member.server, "/livez")[0] == 200
    assert answers
    return "many of 60 connections were answered with 4xx"


_kill, _suspend = psutil.Process.kill, psutil.Process.suspend
FAULTS = {
    "worker killed": Fault(partial(_process, "worker", _kill, "worker.died"), MORTAL, "lost"),
    "worker hung": Fault(partial(_process, "worker", _suspend, "worker.hung"), MORTAL, "lost"),
    "worker held up for a second": Fault(_pause_worker),
    "agent killed": Fault(partial(_process, "agent", _kill, "agent.died"), MORTAL),
    "agent hung": Fault(partial(_process, "agent", _suspend, "agent.hung"), MORTAL),
    "reload (SIGHUP)": Fault(_reload, FIRST, "lost"),
    "stop and start (SIGTERM)": Fault(partial(_ended, signal.SIGTERM, 0), FIRST, "away", CROWD),
    "retire and start (SIGUSR2)": Fault(partial(_ended, signal.SIGUSR2, 0), FIRST, "away", CROWD),
    "kill -9 and start": Fault(partial(_ended, signal.SIGKILL, -9), FIRST, "away", CROWD),
    "a second server by the same id": Fault(_same_id, FIRST),
    "primary killed": Fault(partial(_replaced, Sentinels.kill_primary)),
    "primary hung": Fault(
        partial(_noticed, "cluster.lost", 0, lambda world: world.redises.freeze_primary())
    ),
    "failover by Sentinel": Fault(partial(_replaced, Sentinels.failover)),
    "all Redis hung for 3 s": Fault(partial(_noticed, "cluster.lost", 3, _freeze_all)),
    "primary out of memory": Fault(
        partial(_noticed, "cluster.lost", 0, lambda world: world.primary.out_of_memory())
    ),
    "FLUSHALL": Fault(partial(_noticed, "cluster.reset", 0, lambda world: world.primary.wipe())),
    "SCRIPT FLUSH": Fault(_scripts_forgotten),
    "connections to Redis cut (CLIENT KILL)": Fault(_cut),
    "replica killed": Fault(partial(_away, lambda world: world.replicas)),
    "a Sentinel killed": Fault(partial(_away, lambda world: world.redises.sentinels)),
    "flood beyond --max-clients": Fault(
        partial(_refused, "too_many_clients", MAX_CLIENTS + 50, 50, _flood),
        excuse="lost",
        crowd=CROWD,
    ),
    "slowloris": Fault(partial(_refused, "too_slow", 150, 150, _slowloris), crowd=CROWD),
    "slow readers": Fault(partial(_refused, "slow_reader", 3, 3, _never_read), crowd=CROWD),
    "silent peers before a handshake": Fault(_silent, NAMES[-1:], crowd=CROWD),
    "StatsD daemon gone for 5 s": Fault(_sink_closed),
    "reader of the log stalled": Fault(_reader_stalled),
    "garbage at the admin port": Fault(_garbage),
}
