"""Three servers with permanent clients: whatever happens to Redis, each WHO gets a correct reply.

The reply is immediate. Each fault happens to servers that went through the earlier faults.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from shutil import copytree
from typing import Any, Final

import pytest

from lab import redis_faults as faults
from lab.redises import FAILOVER_LIMIT, Sentinels
from lab.rows import Notes
from lab.running import LIMIT, PATIENCE, ROOT, Running, stopped, until
from lab.steady import Cluster
from lab.world import KEYS, Fault, World, lasting, survive

# Each starts a fault, yields when all servers have noticed it, and ends it with its `with` block.

frozen_for_a_second = lasting("frozen_for_a_second", "timeout", faults.frozen, 1)
frozen_longer_than_the_ttl = lasting(
    "frozen_longer_than_the_ttl", "timeout", faults.frozen, ttls=1.2
)
read_only = lasting("read_only", "read_only", faults.read_only)
out_of_memory = lasting("out_of_memory", "out_of_memory", faults.out_of_memory)
too_few_replicas = lasting("too_few_replicas", "no_replicas", faults.too_few_replicas)
busy_with_a_foreign_script = lasting("busy_with_a_foreign_script", "busy", faults.busy, 1)
paused = lasting("paused", "timeout", faults.paused)


@contextmanager
def killed_and_restarted_empty(world: World) -> Iterator[None]:
    with world.lost("connection"):
        world.redis.kill()
    yield
    with world.reset():
        world.redis.restart(keep_data=False)


@contextmanager
def killed_and_restarted_with_its_data(world: World) -> Iterator[None]:
    world.redis.command("SAVE")
    with world.lost("connection"):
        world.redis.kill()
    yield
    world.redis.restart(keep_data=True)
    assert world.redis.command("INFO", "persistence")["rdb_last_load_keys_loaded"] == len(KEYS)


@contextmanager
def restarted_with_old_data_of_more_clients(world: World) -> Iterator[None]:
    """The data are older than the TTL, like most backups."""
    with world.cluster.settled_guests():
        world.redis.command("SAVE")
    world.cluster.watch(world.ttl)
    with world.lost("connection"):
        world.redis.kill()
    with world.reset():
        world.redis.restart(keep_data=True)
    yield


@contextmanager
def restarted_with_old_data_of_fewer_clients(world: World) -> Iterator[None]:
    world.redis.command("SAVE")
    with world.cluster.settled_guests():
        with world.lost("connection"):
            world.redis.kill()
        with world.reset():
            world.redis.restart(keep_data=True)
    yield


@contextmanager
def restored_to_a_state_of_fewer_clients(world: World) -> Iterator[None]:
    old = world.dump()
    with world.cluster.settled_guests(), world.reset():
        world.restore(old)
    yield


@contextmanager
def restored_to_a_state_of_more_clients(world: World) -> Iterator[None]:
    with world.cluster.settled_guests():
        old = world.dump()
    with world.reset():
        world.restore(old)
    yield


@contextmanager
def wiped_then_restored_from_a_backup(world: World) -> Iterator[None]:
    """An operator restores a backup after a mistake; its lease clock is ahead of the new one."""
    world.cluster.watch(4 * world.cluster.interval)
    old = world.dump()
    with world.reset():
        world.redis.wipe()
    with world.cluster.settled_guests():
        world.restore(old)
    yield


@contextmanager
def wiped(world: World) -> Iterator[None]:
    with world.reset():
        world.redis.wipe()
    yield


@contextmanager
def wiped_ten_times(world: World) -> Iterator[None]:
    with world.reset():
        for number in range(10):
            world.redis.wipe()
            world.cluster.watch(world.cluster.interval * (0.1 + number / 8))
    yield


@contextmanager
def wiped_while_one_server_sends_no_heartbeat(world: World) -> Iterator[None]:
    """The others must wait for it, although the two of them have returned."""
    with stopped(*world.cluster.members[0].server.agents()):
        world.redis.wipe()
        until(lambda: len(world.redis.members()) == 2, "two servers have returned")
        world.cluster.watch(1.5 * world.cluster.interval)
        assert len(world.redis.members()) == 2
    yield


@contextmanager
def one_key_after_another_deleted(world: World) -> Iterator[None]:
    for key in KEYS:
        with world.reset():
            assert world.redis.command("DEL", key) == 1
        world.cluster.settle()
    yield


@contextmanager
def entries_deleted(world: World) -> Iterator[None]:
    (first, *_), total = world.redis.members(), "total"
    for command in (["HDEL", KEYS[0], first], ["ZREM", KEYS[1], first], ["HDEL", KEYS[2], total]):
        with world.reset():
            assert world.redis.command(*command) == 1
        world.cluster.settle()
    yield


@contextmanager
def junk_in_the_keys(world: World) -> Iterator[None]:
    for key in KEYS:
        with world.reset():
            world.redis.command("SET", key, "junk")
        world.cluster.settle()
    yield


@contextmanager
def scripts_forgotten(world: World) -> Iterator[None]:
    def script_runs_in_full() -> int:
        return int(world.redis.command("INFO", "commandstats")["cmdstat_eval"]["calls"])

    before = script_runs_in_full()
    world.redis.forget_scripts()
    until(lambda: script_runs_in_full() > before, "a server sends the script again")
    yield


@contextmanager
def all_connections_killed(world: World) -> Iterator[None]:
    assert world.redis.command("CLIENT", "KILL", "TYPE", "normal") >= 3
    yield


@contextmanager
def slow_but_in_time(world: World) -> Iterator[None]:
    """A round trip takes 60 % of the timeout, which is half a second or a tenth of the TTL."""
    world.proxy.delay_seconds = 0.3 * min(0.5, world.ttl / 10)
    before = world.proxy.bytes_to_client
    world.cluster.watch(4 * world.cluster.interval)
    assert world.proxy.bytes_to_client > before
    yield
    world.proxy.delay_seconds = 0


@contextmanager
def slower_than_the_timeout(world: World) -> Iterator[None]:
    """The heartbeats arrive, but each after its timeout."""
    before = world.proxy.bytes_to_server
    with world.lost("timeout"):
        world.proxy.delay_seconds = 0.3
    world.cluster.watch(1)
    assert world.proxy.bytes_to_server > before
    yield
    world.proxy.delay_seconds = 0


@contextmanager
def connections_cut_all_the_time(world: World) -> Iterator[None]:
    is_over = threading.Event()

    def cut() -> None:
        while not is_over.wait(0.003):
            world.proxy.cut()

    cutter = threading.Thread(target=cut)
    try:
        with world.lost("connection"):
            cutter.start()
        world.cluster.watch(2)
        yield
    finally:
        is_over.set()
        cutter.join(LIMIT)


@contextmanager
def all_cut_off_twice_as_long_as_the_ttl(world: World) -> Iterator[None]:
    with world.lost("connection"):
        world.proxy.refuse()
    world.cluster.watch(world.ttl * 2)
    yield
    world.proxy.accept()


@contextmanager
def replies_lost(world: World) -> Iterator[None]:
    with world.lost("timeout"):
        world.proxy.drop_replies = True
    yield
    world.proxy.drop_replies = False
    world.proxy.cut()


QUICK: list[Fault] = [
    wiped,
    killed_and_restarted_empty,
    killed_and_restarted_with_its_data,
    restarted_with_old_data_of_more_clients,
    restored_to_a_state_of_fewer_clients,
    frozen_longer_than_the_ttl,
    wiped_while_one_server_sends_no_heartbeat,
    one_key_after_another_deleted,
    junk_in_the_keys,
    read_only,
    out_of_memory,
    scripts_forgotten,
    busy_with_a_foreign_script,
    slow_but_in_time,
    slower_than_the_timeout,
    all_cut_off_twice_as_long_as_the_ttl,
    replies_lost,
]
SLOWER: list[Fault] = [
    restarted_with_old_data_of_fewer_clients,
    restored_to_a_state_of_more_clients,
    wiped_then_restored_from_a_backup,
    frozen_for_a_second,
    wiped_ten_times,
    entries_deleted,
    too_few_replicas,
    all_connections_killed,
    paused,
    connections_cut_all_the_time,
]
AS_BY_DEFAULT: list[Fault] = [
    wiped,
    frozen_longer_than_the_ttl,
    killed_and_restarted_empty,
    slow_but_in_time,
]


@pytest.fixture(scope="module")
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """One cluster for all faults of a kind."""
    interval, ttl, workers = request.param
    with World(
        tmp_path_factory.mktemp("faults"), interval, ttl, WEB_CONCURRENCY=str(workers)
    ) as running:
        yield running


quick = pytest.mark.parametrize(
    "world",
    [
        pytest.param((0.2, 2, 1), id="1 worker"),
        pytest.param((0.2, 2, 3), id="3 workers", marks=pytest.mark.long),
    ],
    indirect=True,
)
as_by_default = pytest.mark.parametrize(
    "world", [(0.5, 5, 1)], ids=["as_by_default"], indirect=True
)


#: Rows whose titles are not "Redis" and the fault's name in words.
ROWS: Final = {
    "frozen_longer_than_the_ttl": "Redis frozen for longer than the TTL",
    "one_key_after_another_deleted": "Redis's keys deleted one by one",
    "entries_deleted": "Entries deleted in Redis",
    "junk_in_the_keys": "Junk in Redis's keys",
    "read_only": "Redis read-only",
    "too_few_replicas": "Redis with too few replicas",
    "scripts_forgotten": "Redis forgets its scripts",
    "busy_with_a_foreign_script": "Redis busy with a script of another program",
    "slower_than_the_timeout": "Redis slower than the heartbeat timeout",
    "slow_but_in_time": "Redis slow, but within the timeout",
    "all_connections_killed": "Redis closes all connections",
    "connections_cut_all_the_time": "Connections to Redis cut all the time",
    "all_cut_off_twice_as_long_as_the_ttl": "No server reaches Redis for twice the TTL",
    "replies_lost": "Redis's replies lost",
}


def in_words(fault: Callable[..., object]) -> str:
    """Return a fault's name in words."""
    return fault.__name__.replace("_", " ")


def each(
    chosen: Sequence[Callable[..., object]], *more: pytest.MarkDecorator, prefix: str = "Redis"
) -> list[Any]:
    """Return a test parameter for each fault, as a row of the matrix."""
    rows = [ROWS.get(fault.__name__, f"{prefix} {in_words(fault)}") for fault in chosen]
    return [
        pytest.param(fault, id=fault.__name__, marks=[pytest.mark.fault(row), *more])
        for fault, row in zip(chosen, rows, strict=True)
    ]


@quick
@pytest.mark.parametrize("fault", [*each(QUICK), *each(SLOWER, pytest.mark.long)])
def test_no_reply_is_wrong_late_or_missing_when_redis_is(
    world: World, fault: Fault, notes: Notes
) -> None:
    survive(world.cluster, fault(world), notes)
    notes.happened(f"{in_words(fault)}: seen in Redis or by every server")


def be_stopped(server: Running) -> None:
    assert server.stop() == 0
    assert server.events("cluster.not_left")


@quick
@pytest.mark.parametrize(
    "end",
    [Running.kill, pytest.param(be_stopped, marks=pytest.mark.long)],
    ids=["killed", "stopped"],
)
@pytest.mark.parametrize(
    "fault",
    [killed_and_restarted_empty, killed_and_restarted_with_its_data],
    ids=lambda f: f.__name__,
)
def test_a_server_that_ends_while_redis_is_away_expires_a_ttl_after_the_outage(
    world: World, fault: Fault, end: Callable[[Running], None]
) -> None:
    cluster, total = world.cluster, world.cluster.total
    cluster.start_over()
    with cluster.one_more(4) as member:
        with fault(world):
            cluster.end(member, end)
            assert cluster.all_report(total + 4)
            cluster.allow(total + 4, total)
        cluster.settle((world.ttl + 1) * PATIENCE)
    cluster.check()


@pytest.mark.long
@as_by_default
@pytest.mark.parametrize("fault", each(AS_BY_DEFAULT))
def test_no_reply_is_wrong_with_the_default_times_when_redis_is(
    world: World, fault: Fault, notes: Notes
) -> None:
    survive(world.cluster, fault(world), notes)
    notes.happened(f"{in_words(fault)}: seen in Redis or by every server")


class Watched(ExitStack[None]):
    """A cluster whose Redis is watched by Sentinels."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        with ExitStack() as stack:
            self.sentinels = stack.enter_context(Sentinels(folder))
            self.cluster = stack.enter_context(Cluster(self.sentinels.url, 0.2, 2))
            self.push(stack.pop_all())


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """One cluster for all faults of primaries."""
    with Watched(tmp_path_factory.mktemp("watched")) as running:
        yield running


@contextmanager
def replaced_by_command(watched: Watched) -> Iterator[None]:
    """For a while two Redis servers accept writes, and all servers report to the old one.

    New clients connect meanwhile. When the servers move, the data of the new one are as old as the
    failover.
    """
    sentinels, cluster = watched.sentinels, watched.cluster
    before = sentinels.primary()
    with ExitStack() as change_over:
        change_over.enter_context(cluster.expecting("cluster.reset"))
        sentinels.sentinels[0].command("SENTINEL", "FAILOVER", sentinels.name)
        until(
            lambda: [one.role() for one in sentinels.redises].count("master") == 2,
            "there are two primaries",
            FAILOVER_LIMIT,
        )
        with cluster.settled_guests():
            change_over.close()
    assert sentinels.primary() is not before
    yield


@contextmanager
def frozen(watched: Watched) -> Iterator[None]:
    with watched.cluster.expecting("cluster.lost"):
        before = watched.sentinels.freeze_primary()
    yield
    before.thaw()


@contextmanager
def killed(watched: Watched) -> Iterator[None]:
    with watched.cluster.expecting("cluster.lost"):
        watched.sentinels.kill_primary()
    yield


@pytest.mark.parametrize(
    "fault",
    [
        *each([replaced_by_command, killed], prefix="Primary"),
        *each([frozen], pytest.mark.long, prefix="Primary"),
    ],
)
def test_no_reply_is_wrong_when_the_primary_is(
    watched: Watched, fault: Callable[[Watched], AbstractContextManager[None]], notes: Notes
) -> None:
    before = watched.sentinels.primary()
    survive(watched.cluster, fault(watched), notes)
    notes.happened(f"the primary was {before.port}, and is {watched.sentinels.primary().port}")
    assert watched.sentinels.primary() is not before


#: Deliberate bugs: a file, a text in it, its replacement, and the fault that reveals the bug.
BUGS: dict[str, tuple[str, str, str, Fault]] = {
    "no_hold": (
        "cluster/membership.py",
        "self.remote_clients = max(self._held_clients, remote_clients)",
        "self.remote_clients = remote_clients",
        wiped,
    )
}


@pytest.mark.parametrize(("name", "text", "instead", "fault"), BUGS.values(), ids=BUGS)
def test_these_tests_find_a_deliberate_bug(
    name: str, text: str, instead: str, fault: Fault, tmp_path: Path, notes: Notes
) -> None:
    copytree(ROOT / "gserver", tmp_path / "gserver")
    file = tmp_path / "gserver" / name
    assert file.read_text().count(text) == 1
    file.write_text(file.read_text().replace(text, instead))
    with (
        World(tmp_path, 0.2, 1, PYTHONPATH=str(tmp_path)) as world,
        pytest.raises(AssertionError, match="WRONG"),
    ):
        survive(world.cluster, fault(world), notes)
