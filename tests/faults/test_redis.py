"""Faults of Redis, its Sentinels, its name and its clock; test_cluster_faults.py has more.

Three servers with clients go through each fault.
"""

import http.server
import os
import random
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import redis

from lab import redis_faults as faults
from lab.impostor import listener, named
from lab.redises import Redis, Sentinels, free_port
from lab.rows import PLAIN, Notes, Variant, row
from lab.running import GSERVER, program, unavailable, until
from lab.site import SEED
from lab.steady import Cluster, SteadyServer
from lab.world import World, lasting, survive

INTERVAL, TTL = 0.2, 2.0
STATE = "{gserver:gserver}:state"

Start = Callable[..., World]


@pytest.fixture
def start(variant: Variant, tmp_path: Path) -> Iterator[Start]:
    """Start three servers of the test's variant, and their Redis."""
    with ExitStack() as stack:

        def begin(interval: float = INTERVAL, ttl: float = TTL, **env: str) -> World:
            return stack.enter_context(
                World(tmp_path, interval, ttl, WEB_CONCURRENCY=str(variant.workers), **env)
            )

        yield begin


# Replies that the script cannot give.


def half(data: bytes) -> Iterator[bytes]:
    yield data[: len(data) // 2]
    raise ConnectionResetError


def half_and_no_more(data: bytes) -> Iterator[bytes]:
    yield data[: len(data) // 2]


def endless(data: bytes) -> Iterator[bytes]:
    yield b"$9000000000\r\n"
    while True:
        yield bytes(1_000_000)


def byte_by_byte(data: bytes) -> Iterator[bytes]:
    for byte in data:
        yield bytes([byte])
        time.sleep(0.1)


def slices(data: bytes) -> Iterator[bytes]:
    for at in range(0, len(data), 10):
        yield data[at : at + 10]
        time.sleep(0.001)


ANSWERS: dict[str, Callable[[bytes], Iterable[bytes]]] = {
    "half, then a reset": half,
    "half, then nothing": half_and_no_more,
    "garbage": lambda data: [random.randbytes(len(data))],
    "without end": endless,
    "byte by byte": byte_by_byte,
    "numbers of no sense": lambda _: [
        b"*8\r\n" + b":9223372036854775807\r\n" * 5 + b"$1\r\na\r\n:1\r\n:0\r\n"
    ],
    "nobody is there": lambda _: [b"*0\r\n"],
}


@row("Redis's replies are altered", *PLAIN, quick=None, values=ANSWERS)
def test_invalid_replies_of_redis(
    start: Start, notes: Notes, kind: Callable[[bytes], Iterable[bytes]]
) -> None:
    world = start()

    @contextmanager
    def altered() -> Iterator[None]:
        usual = world.proxy.alter
        with world.cluster.expecting("cluster.lost"):
            world.proxy.alter = kind
        world.cluster.watch(1.5 * TTL)
        yield
        world.proxy.alter = usual
        world.proxy.cut()

    survive(world.cluster, altered(), notes)
    notes.happened("every server noticed")


@row("Redis's replies arrive in pieces", *PLAIN, quick=None)
def test_replies_of_redis_in_pieces(start: Start, notes: Notes) -> None:
    world = start()
    world.proxy.alter = slices
    lost, before = world.cluster.events("cluster.lost"), world.proxy.bytes_to_client
    world.cluster.watch(1)
    survive(world.cluster, nullcontext(), notes)
    notes.happened(f"{world.proxy.bytes_to_client - before} bytes arrived in pieces")
    assert world.proxy.bytes_to_client > before
    assert world.cluster.events("cluster.lost") == lost


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(65536):
            self.request.sendall(data)


OTHERS: dict[str, type[socketserver.BaseRequestHandler]] = {
    "a web server": http.server.BaseHTTPRequestHandler,
    "an echo": Echo,
}


@row("Another kind of server in place of Redis", *PLAIN, quick=None, values=OTHERS)
def test_another_kind_of_server(
    start: Start, notes: Notes, kind: type[socketserver.BaseRequestHandler]
) -> None:
    world = start()

    @contextmanager
    def replaced() -> Iterator[None]:
        with socketserver.ThreadingTCPServer(("127.0.0.1", 0), kind) as other, ExitStack() as stack:
            other.daemon_threads = True
            threading.Thread(target=other.serve_forever, daemon=True).start()
            stack.callback(other.shutdown)
            with world.cluster.expecting("cluster.lost"):
                stack.enter_context(world.proxy.instead(other.server_address[1]))
            world.cluster.watch(TTL)
            yield

    survive(world.cluster, replaced(), notes)
    notes.happened("every server noticed")


# Errors from Redis.


@row("FLUSHALL 100 times, 1,000 clients", *PLAIN, quick=None)
def test_redis_is_wiped_again_and_again(variant: Variant, tmp_path: Path, notes: Notes) -> None:
    rng = random.Random(SEED)
    env = {"WEB_CONCURRENCY": str(variant.workers)}
    with (
        Redis(tmp_path) as server,
        Cluster(server.url, INTERVAL, TTL, env, shares=(400, 350, 250)) as cluster,
    ):

        @contextmanager
        def wiped() -> Iterator[None]:
            with cluster.expecting("cluster.reset"):
                for _ in range(100):
                    server.wipe()
                    cluster.watch(rng.uniform(0, 2 * INTERVAL))
            yield

        survive(cluster, wiped(), notes)
        noticed = cluster.events("cluster.reset")
        notes.happened(f"GSERVER_FAULT_SEED={SEED}: the servers noticed {noticed} of 100")


def set_password(server: Redis, password: str) -> None:
    server.command("CONFIG", "SET", "requirepass", password)
    server.password = password
    server.command("CLIENT", "KILL", "TYPE", "normal")


@contextmanager
def password_changed(world: World) -> Iterator[None]:
    with world.lost("auth"):
        set_password(world.redis, "hush-hush")
    yield
    set_password(world.redis, "")


@contextmanager
def user_without_rights(world: World) -> Iterator[None]:
    with world.lost("auth"):
        world.redis.command("ACL", "SETUSER", "default", "-eval", "-evalsha")
    yield
    world.redis.command("ACL", "SETUSER", "default", "+@all")


@contextmanager
def user_disabled(world: World) -> Iterator[None]:
    """The default user (for connections without a user name) cannot log in."""
    server = world.redis
    server.command("ACL", "SETUSER", "admin", "on", ">hush-hush", "~*", "&*", "+@all")
    with (
        world.lost("auth"),
        redis.Redis(port=server.port, username="admin", password="hush-hush") as admin,
    ):
        admin.acl_setuser("default", enabled=False)
        admin.client_kill_filter(_type="normal", skipme=True)
    yield
    with redis.Redis(port=server.port, username="admin", password="hush-hush") as admin:
        admin.acl_setuser("default", enabled=True, nopass=True, categories=["+@all"], keys=["*"])


cannot_save = lasting("cannot_save", "cannot_save", faults.cannot_save)
loading = lasting("loading", "loading", faults.loading)


@contextmanager
def maxclients_reached(world: World) -> Iterator[None]:
    with faults.full(world.redis):
        with world.lost("connection"):
            world.proxy.cut()
        world.cluster.watch(TTL)
        yield


@contextmanager
def connections_killed_all_the_time(world: World) -> Iterator[None]:
    killed = 0
    for _ in range(200):
        killed += world.redis.command("CLIENT", "KILL", "TYPE", "normal")
        world.cluster.watch(0.01)
    assert killed > 20
    yield


@contextmanager
def keys_of_other_types(world: World) -> Iterator[None]:
    """Another program writes to the keys again and again."""
    with world.reset():
        for _ in range(20):
            world.redis.command("SET", "{gserver:gserver}:members", "junk")
            world.redis.command("LPUSH", "{gserver:gserver}:other", "junk")
            world.redis.command("RENAME", "{gserver:gserver}:other", "{gserver:gserver}:leases")
            world.cluster.watch(INTERVAL / 2)
    yield


Fault = Callable[[World], Any]
FAULTS: dict[str, Fault] = {
    fault.__name__.replace("_", " "): fault
    for fault in (
        password_changed,
        user_without_rights,
        user_disabled,
        cannot_save,
        loading,
        maxclients_reached,
        connections_killed_all_the_time,
        keys_of_other_types,
    )
}


@row("Redis rejects the agent's commands", *PLAIN, quick=None, values=FAULTS)
def test_redis_refuses(start: Start, notes: Notes, kind: Fault) -> None:
    world = start()
    survive(world.cluster, kind(world), notes)
    notes.happened("seen in Redis, or by every server")


@row("Redis closes connections that are silent for a second", *PLAIN, quick=None)
def test_redis_closes_silent_connections(start: Start, notes: Notes) -> None:
    """Heartbeats are sent every two seconds, so each finds its connection closed."""
    world = start(2, 10)
    world.redis.command("CONFIG", "SET", "timeout", 1)

    def connections() -> set[str]:
        return {one["id"] for one in world.redis.command("CLIENT LIST")}

    before, lost = connections(), world.cluster.events("cluster.lost")
    world.cluster.watch(8)
    assert not before & connections()
    notes.happened("no earlier connection is left")
    survive(world.cluster, nullcontext(), notes)
    assert world.cluster.events("cluster.lost") == lost


# Clocks.


def with_clock(file: Path) -> dict[str, str]:
    """Return the environment of a process whose wall clock the file shifts, such as "+3600"."""
    program("faketime")
    (library,) = Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")
    env = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_NO_CACHE": "1",
    }
    return {**env, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}


#: Successive offsets from the correct time, in seconds: forward, back, and by more than the day
#: after which keys expire.
JUMPS = "+3600", "-7200", "+86000", "+400000", "-1000000000", "+0"


@row("Wall clock of Redis jumps", *PLAIN, quick=None)
def test_the_clock_of_redis_jumps(start: Start, notes: Notes) -> None:
    """The times that Redis has stored are moved, which looks the same as a clock that jumps.

    Redis itself does not start under libfaketime, which its allocator calls too early.
    """
    world = start()

    @contextmanager
    def jumping() -> Iterator[None]:
        for jump in map(int, JUMPS):
            stored, _ = [
                world.redis.command("HINCRBY", STATE, name, -jump * 1000)
                for name in ("heartbeat_at", "recount_at")
            ]

            def has_reported(stored: int = stored) -> bool:
                return str(world.redis.command("HGET", STATE, "heartbeat_at")) != str(stored)

            until(has_reported, "a heartbeat")
            notes.happened(
                f"the clock of Redis was {jump:+} s ahead of the time stored by the last heartbeat"
            )
            world.cluster.watch(5 * INTERVAL)
        yield

    survive(world.cluster, jumping(), notes)


@row("Wall clock of a server jumps", *PLAIN, quick=None)
def test_the_clock_of_a_server_jumps(variant: Variant, tmp_path: Path, notes: Notes) -> None:
    clock = tmp_path / "clock"
    clock.write_text("+0")
    env = {"WEB_CONCURRENCY": str(variant.workers)}
    with (
        Redis(tmp_path) as server,
        Cluster(server.url, INTERVAL, TTL, env | with_clock(clock)) as cluster,
    ):

        @contextmanager
        def jumping() -> Iterator[None]:
            for jump in JUMPS:
                clock.write_text(jump)
                with cluster.expecting("cluster.reset"):
                    server.wipe()
                said = [
                    one.server.events("cluster.reset")[-1]["@timestamp"] for one in cluster.members
                ]
                ahead = [datetime.fromisoformat(text).timestamp() - time.time() for text in said]
                assert all(abs(seconds - int(jump)) < 60 for seconds in ahead)
                shown = ", ".join(f"{seconds:.0f}" for seconds in ahead)
                notes.happened(f"the servers' logs are ahead by {shown} s")
                cluster.watch(5 * INTERVAL)
            yield

        survive(cluster, jumping(), notes)


# The address of Redis.


@pytest.mark.timeout(1500)
@row("Primary killed 50 times", *PLAIN, quick=None)
def test_the_primary_is_killed_again_and_again(
    variant: Variant, tmp_path: Path, notes: Notes
) -> None:
    env = {"WEB_CONCURRENCY": str(variant.workers)}
    killed = []
    with Sentinels(tmp_path) as sentinels, Cluster(sentinels.url, INTERVAL, TTL, env) as cluster:

        @contextmanager
        def kill() -> Iterator[None]:
            with cluster.expecting("cluster.lost"):
                killed.append(sentinels.kill_primary())
            yield

        for _ in range(50):
            survive(cluster, kill(), Notes([]))
            sentinels.rejoin(killed[-1])
        notes.happened(f"primaries killed: {[one.port for one in killed]}")
        notes.measured("right replies", cluster.answers, "")


@contextmanager
def replica(folder: Path, primary: Redis) -> Iterator[int]:
    with Redis(folder, replicaof=f"127.0.0.1 {primary.port}") as one:
        yield one.port


@contextmanager
def another_redis(folder: Path, _: Redis) -> Iterator[int]:
    with Redis(folder) as one:
        yield one.port


@contextmanager
def nobody(folder: Path, _: Redis) -> Iterator[int]:
    yield free_port()


@contextmanager
def silence(folder: Path, _: Redis) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as one:
        yield one.getsockname()[1]


@contextmanager
def no_redis(folder: Path, _: Redis) -> Iterator[int]:
    with listener(lambda sock: sock.sendall(b"hello\n")) as port:
        yield port


LIES = {
    lie.__name__.replace("_", " "): lie
    for lie in (replica, another_redis, nobody, silence, no_redis)
}


@row("All Sentinels lie", *PLAIN, quick=None, values=LIES)
def test_all_sentinels_name_a_wrong_address(
    variant: Variant, tmp_path: Path, notes: Notes, kind: Callable[..., Any]
) -> None:
    env = {"WEB_CONCURRENCY": str(variant.workers)}
    with ExitStack() as stack:
        right = stack.enter_context(Redis(tmp_path))
        said = right.port
        ports = [
            stack.enter_context(listener(lambda sock: sock.sendall(named(said)))) for _ in "123"
        ]
        url = f"redis+sentinel://{','.join(f'127.0.0.1:{port}' for port in ports)}/name"
        cluster = stack.enter_context(Cluster(url, INTERVAL, TTL, env))
        wrong = stack.enter_context(kind(tmp_path, right))

        @contextmanager
        def lying() -> Iterator[None]:
            nonlocal said
            with cluster.expecting("cluster.reset" if kind is another_redis else "cluster.lost"):
                said = wrong
            cluster.watch(1.5 * TTL)
            yield
            said = right.port

        survive(cluster, lying(), notes)
        notes.happened("every server noticed")


@row(
    "Redis's host name vanishes, then names another host",
    *PLAIN,
    quick=None,
    values={"nothing listens": 0, "silent": 1},
)
def test_the_name_of_redis_changes(
    variant: Variant, tmp_path: Path, notes: Notes, kind: int
) -> None:
    """The name server does not reply, or does not exist."""
    if os.geteuid() != 0:
        unavailable("a private hosts file needs root")
    hosts, resolver = tmp_path / "hosts", tmp_path / "resolv.conf"
    mount = (
        f'mount --bind {hosts} /etc/hosts && mount --bind {resolver} /etc/resolv.conf && exec "$@"'
    )
    own = [program("unshare"), "--mount", "sh", "-c", mount, "sh"]
    hosts.write_text("127.0.0.1 redis.test\n")
    resolver.write_text("nameserver 127.0.0.77\n")
    with ExitStack() as stack:
        if kind:
            stack.enter_context(socket.socket(type=socket.SOCK_DGRAM)).bind(("127.0.0.77", 53))
        server = stack.enter_context(Redis(tmp_path, bind="127.0.0.1 127.0.0.2"))
        cluster = stack.enter_context(
            Cluster(f"redis://redis.test:{server.port}", INTERVAL, TTL, shares=())
        )
        options = *cluster.options, "--workers", str(variant.workers)
        for share in (5, 3, 2):
            member = SteadyServer(share, *options, command=[*own, *GSERVER, "serve", "--port", "0"])
            cluster.members.append(stack.enter_context(member))

        def addresses() -> set[str]:
            return {
                one["laddr"].partition(":")[0]
                for one in server.command("CLIENT LIST")
                if one["cmd"] != "client|list"
            }

        @contextmanager
        def renamed() -> Iterator[None]:
            hosts.write_text("127.0.0.1 localhost\n")
            with cluster.expecting("cluster.lost", "timeout" if kind else "name"):
                server.command("CLIENT", "KILL", "TYPE", "normal")
            cluster.watch(2 * TTL)
            yield
            hosts.write_text("127.0.0.2 redis.test\n")
            until(
                lambda: cluster.all_report(cluster.total), "all servers have found the new address"
            )

        assert addresses() == {"127.0.0.1"}
        survive(cluster, renamed(), notes)
        assert addresses() == {"127.0.0.2"}
        notes.happened("all servers are connected to the new address")
