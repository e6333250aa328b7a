"""The limits of clients, in total and per address, across all workers."""

import os
import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from gserver.addresses import TCP
from gserver.config import Config
from gserver.protocol import TOO_MANY_CLIENTS, TOO_MANY_FROM_ADDRESS
from gserver.scoreboard import Scoreboard
from gserver.serve.limits import AddressCounts, Limits, network
from gserver.serve.silent import LINGER_SECONDS
from lab.admin import status
from lab.running import PATIENCE, Client, Running, argv, extended, stopped, until
from lab.tls_client import certified, trust
from lab.ways import WAYS, Way

MANY, OTHER = "127.0.0.2", "127.0.0.3"
LIMIT = 6
REJECTED = b"ERR too many clients from your address\n"
COMMANDS = """
import time
from pathlib import Path
from gserver.commands import command
from lab.commands import end_greenlet, fail, nap, pid

@command("STAY")
def stay(request):
    while not Path("done").exists():
        time.sleep(0.01)
    return "done"
"""

Connect = Callable[..., Client]


def limited(folder: Path, *more: str, limit: int = LIMIT) -> Running:
    """A server with the commands above and a limit for each address."""
    return extended(folder, COMMANDS, "--max-clients-per-address", str(limit), *more)


def fill(stack: ExitStack, connect: Connect, source: str = MANY) -> list[Client]:
    """Connect as many clients as an address may have; check that further ones are rejected."""
    clients = []
    while (client := stack.enter_context(connect(source=source))) and is_admitted(client):
        clients.append(client)
    assert stack.enter_context(connect(source=source)).rest() == REJECTED
    return clients


def is_admitted(client: Client) -> bool:
    with suppress(ConnectionError):
        client.send(b"WHY\n")
    reply = client.line()
    assert reply in (b"42\n", REJECTED)
    return reply == b"42\n"


def wait_until_alone(server: Running, connect: Connect) -> None:
    def is_alone() -> bool:
        with connect() as client:
            return client.who() == 1

    def has_connections() -> bool:
        """Whether a closed client still lingers: it counts for its address."""
        return any(
            item.raddr for worker in server.workers() for item in worker.net_connections("tcp")
        )

    until(is_alone, "all clients have left")
    until(lambda: not has_connections(), "no closed client lingers")


@pytest.mark.outer
@pytest.mark.parametrize("has_tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("workers", [1, 3])
def test_the_limit_of_one_address_does_not_affect_other_addresses(
    tmp_path: Path, pems: Path, workers: int, has_tls: bool
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")  # noqa: T201 (pytest shows it if the test fails)
    chance = random.Random(seed)
    more = ["--workers", str(workers), "--line-timeout", "0.2", "--max-clients", "14"]
    if has_tls:
        more += [*certified(pems), "--tls-handshake-timeout", str(PATIENCE)]
    with limited(tmp_path, *more) as server:

        def connect(source: str = "") -> Client:
            return server.client(source, trust(pems)) if has_tls else server.client(source)

        def go(way: Way) -> None:
            source = chance.choice([MANY, OTHER])
            connection = (
                server.client if has_tls and chance.random() < 0.2 else connect
            )  # Plain text clients of a TLS port are included.
            with suppress(OSError), connection(source=source) as client:
                way.go(client)

        server.wait_for("worker.ready", workers)
        with ExitStack() as stack:
            clients = fill(stack, connect)
            assert len(clients) == LIMIT
            assert stack.enter_context(connect(source=OTHER)).who() == LIMIT + 1
            assert clients[0].who() == LIMIT + 1
            clients[1].sock.close()
            until(lambda: clients[0].who() == LIMIT, "one client has left")

            def admits_one_more() -> bool:
                return is_admitted(stack.enter_context(connect(source=MANY)))

            until(admits_one_more, "its address has a free place a moment later")
            assert not fill(stack, connect)
        event = server.wait_for("client.rejected")
        assert (event["client.address"], event["gserver.reason"]) == (MANY, "too_many_from_address")
        wait_until_alone(server, connect)
        with ExitStack() as stack:  # A client beyond --max-clients counts for no address.
            assert all(
                is_admitted(stack.enter_context(connect(source=f"127.0.0.{host}")))
                for host in range(10, 24)
            )
            beyond = [stack.enter_context(connect(source=MANY)) for _ in range(LIMIT + 1)]
            assert {client.rest() for client in beyond} == {b"ERR too many clients\n"}
        with ThreadPoolExecutor(30) as pool:
            list(pool.map(go, chance.choices(WAYS, k=100)))
        wait_until_alone(server, connect)
        with ExitStack() as stack:
            assert [len(fill(stack, connect, source)) for source in (MANY, OTHER)] == [LIMIT] * 2


def test_a_crowd_of_rejected_clients_gets_the_reason_and_a_clean_close() -> None:
    """They have sent something, and most of them do not linger."""
    with Running("--max-clients", "1") as server, server.client() as first, ExitStack() as stack:
        assert first.who() == 1
        with stopped(*server.workers()):
            crowd = [stack.enter_context(server.client()) for _ in range(100)]
            for client in crowd:
                client.send(b"WHO\n")
        assert {client.rest() for client in crowd} == {b"ERR too many clients\n"}


@pytest.mark.outer
def test_a_closed_client_counts_for_its_address_while_it_has_a_descriptor(tmp_path: Path) -> None:
    with limited(tmp_path) as server, ExitStack() as stack:
        other = stack.enter_context(server.client(OTHER))
        clients = fill(stack, server.client)
        began = time.monotonic()
        for client in clients:
            client.send(b"x" * 2000)
        until(lambda: other.who() == 1, "all clients have been closed")
        more = is_admitted(stack.enter_context(server.client(MANY)))
        assert not more or time.monotonic() - began > LINGER_SECONDS
        other.sock.close()
        wait_until_alone(server, server.client)
        assert len(fill(stack, server.client)) == LIMIT


@pytest.mark.outer
def test_a_handshake_counts_from_the_accept_until_it_fails(tmp_path: Path, pems: Path) -> None:
    more = [*certified(pems), "--tls-handshake-timeout", str(3 * PATIENCE), "--admin-port", "0"]
    with limited(tmp_path, *more) as server, ExitStack() as stack:
        silent = [stack.enter_context(server.client(MANY)) for _ in range(LIMIT)]
        assert stack.enter_context(server.client(MANY, trust(pems))).rest() == REJECTED
        assert stack.enter_context(server.client(OTHER, trust(pems))).who() == 1
        assert {client.rest() for client in silent} == {b""}
        assert stack.enter_context(server.client(MANY, trust(pems))).who() == 2
        assert status(server)["error_replies"]["too_many_from_address"] == 1


@pytest.mark.outer
def test_workers_share_the_address_limit_and_a_dead_worker_frees_its_part(tmp_path: Path) -> None:
    with limited(tmp_path, "--workers", "3", limit=30) as server, ExitStack() as stack:
        with stopped(*server.workers()):
            crowd = [stack.enter_context(server.client(MANY)) for _ in range(90)]
        clients = [client for client in crowd if is_admitted(client)]
        assert len(clients) <= 30
        clients += fill(stack, server.client)
        assert len(clients) == 30
        os.kill(int(clients[0].ask(b"PID")), signal.SIGKILL)
        lost = server.wait_for("worker.died")["gserver.lost"]
        assert len(fill(stack, server.client)) == lost > 0


@pytest.mark.outer
def test_during_a_reload_clients_of_old_and_new_workers_count_together(tmp_path: Path) -> None:
    with limited(tmp_path, "--drain-timeout", "60") as server, ExitStack() as stack:
        stay = [stack.enter_context(server.client(MANY)) for _ in range(LIMIT - 2)]
        for client in stay:
            client.send(b"STAY\n")
        with server.client(MANY) as idle:
            until(lambda: idle.who() == LIMIT - 1, "the clients are counted")
            server.send_signal(signal.SIGHUP)
            server.wait_for("worker.handed_over")
            assert idle.who() == LIMIT - 1
        until(lambda: server.who() == LIMIT - 1, "one of them has left")
        new = fill(stack, server.client)
        assert len(new) == 2
        (tmp_path / "done").touch()
        assert {client.line() for client in stay} == {b"done\n"}
        server.wait_for("server.reloaded")
        assert {client.who() for client in (*stay, *new)} == {LIMIT}
        assert not fill(stack, server.client)


@pytest.mark.outer
def test_a_lame_duck_keeps_to_the_address_limit_too(tmp_path: Path) -> None:
    more = ("--workers", "2", "--drain-timeout", "600")
    with limited(tmp_path, *more, limit=70) as server, ExitStack() as stack:
        with stopped(
            *server.workers()
        ):  # Each accepts 16 when it continues; then it takes over the others.
            clients = [stack.enter_context(server.client(MANY)) for _ in range(80)]
            other = stack.enter_context(server.client(OTHER))
            server.send_signal(signal.SIGUSR2)
            server.wait_for("server.retiring")
        let_in = sum(is_admitted(client) for client in clients)
        assert 68 <= let_in <= 70
        assert other.who() == let_in + 1
        for client in (*clients, other):
            client.sock.close()
        assert server.exit_code() == 0


def test_an_ipv4_client_is_one_address_on_an_ipv6_socket_too(tmp_path: Path) -> None:
    with limited(tmp_path, "--host", "::", limit=1) as server, ExitStack() as stack:
        assert len(fill(stack, server.client)) == 1
        assert len(fill(stack, server.client, OTHER)) == 1


def test_an_address_is_a_full_ipv4_address_or_an_ipv6_64_prefix() -> None:
    hosts = argv("10.0.0.1 10.0.0.2 2001:db8::1 2001:db8::ffff:0:0:1 2001:db8:0:1::1 ::1")
    expected = [1, 2, 3, 3, 4, 5]
    assert [len({network(host) for host in hosts[:number]}) for number in range(1, 7)] == expected
    assert network("::ffff:10.0.0.1") == network("10.0.0.1")


def test_colliding_addresses_are_rejected_too_early_never_too_late() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")  # noqa: T201 (pytest shows it if the test fails)
    there: list[tuple[AddressCounts, int, str]] = []
    chance, scoreboard = (
        random.Random(seed),
        Scoreboard.create(3, 2 * 8),
    )  # So few cells that addresses collide all the time.
    workers = [AddressCounts(scoreboard, slot, 5) for slot in range(3)]
    counts = dict.fromkeys((f"10.0.0.{number}" for number in range(10)), 0)
    for fd in range(2000):
        if there and chance.random() < 0.5:
            worker, left, host = there.pop(chance.randrange(len(there)))
            worker.remove(left)
            counts[host] -= 1
        worker, host = chance.choice(workers), chance.choice(list(counts))
        worker.add(fd, host)
        if fd in worker:
            there.append((worker, fd, host))
            counts[host] += 1
        assert max(counts.values()) <= 5
    for worker, fd, _ in there:
        worker.remove(fd)
        worker.remove(fd)
    assert not any(scoreboard.addresses)


def test_an_address_that_collides_in_one_of_its_two_cells_is_admitted() -> None:
    scoreboard = Scoreboard.create(1, 2 * 1024)
    addresses = AddressCounts(scoreboard, 0, 1)
    for fd in range(256):
        addresses.add(fd, f"10.0.0.{fd}")
    refused = 0
    for number in range(4000):
        addresses.add(1000, f"10.1.{number // 256}.{number % 256}")
        refused += 1000 not in addresses
        addresses.remove(1000)
    assert 0.02 < refused / 4000 < 0.1  # (1 - exp(-1/4)) ** 2 = 0.05


def test_each_start_uses_a_different_hash() -> None:
    places = set()
    for _ in range(5):
        scoreboard = Scoreboard.create(1, 1 << 17)
        AddressCounts(scoreboard, 0, 1).add(3, MANY)
        places.add(tuple(at for at, count in enumerate(scoreboard.addresses) if count))
    assert len(places) == 5


@pytest.mark.parametrize("has_left", [False, True], ids=["rejected", "left"])
def test_a_connection_counts_for_its_address_until_it_ends(has_left: bool) -> None:
    config = Config(max_clients=1 if has_left else 0, max_clients_per_address=1)
    limits = Limits(config, Scoreboard.create(1, 2 * 1024), 0)
    limits.count_address(3, MANY)
    assert limits.admit(3, TCP) is (None if has_left else TOO_MANY_CLIENTS)
    if has_left:
        limits.count_address(4, MANY)
        assert limits.admit(4, TCP) is TOO_MANY_FROM_ADDRESS
        limits.uncount(TCP)
        limits.uncount_address(3)
    limits.count_address(5, MANY)
    assert limits.admit(5, TCP) is (None if has_left else TOO_MANY_CLIENTS)


def two_workers(max_clients: int) -> tuple[Scoreboard, Limits, Limits]:
    scoreboard = Scoreboard.create(2)
    config = Config(max_clients=max_clients)
    return scoreboard, Limits(config, scoreboard, 0), Limits(config, scoreboard, 1)


def test_an_admitted_client_is_counted_until_it_is_uncounted() -> None:
    scoreboard, one, other = two_workers(10)
    assert one.admit(3, TCP) is None
    assert other.admit(3, TCP) is None
    assert scoreboard.clients() == 2
    one.uncount(TCP)
    assert scoreboard.clients() == 1
    totals = scoreboard.totals()
    assert (totals["clients_accepted"], totals["clients_closed"], totals["clients"]) == (2, 1, 1)


def test_the_limit_is_over_all_workers_and_a_rejected_client_is_not_counted() -> None:
    scoreboard, one, other = two_workers(2)
    assert one.admit(3, TCP) is None
    assert other.admit(3, TCP) is None
    assert one.admit(4, TCP) is TOO_MANY_CLIENTS
    assert other.admit(4, TCP) is TOO_MANY_CLIENTS
    assert scoreboard.clients() == 2
    assert scoreboard.totals()["clients_accepted"] == 2
    other.uncount(TCP)
    assert one.admit(4, TCP) is None


def test_two_workers_never_give_the_last_place_to_two_clients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scoreboard = Scoreboard.create(2)
    counts = iter([4, 6])  # Another worker admits two clients between the two reads.
    monkeypatch.setattr(scoreboard, "settled_clients", lambda: next(counts))
    limits = Limits(Config(server_id="here", max_clients=5), scoreboard, 0)
    assert limits.admit(7, TCP) is TOO_MANY_CLIENTS
    assert (limits.clients, scoreboard.totals()["clients_accepted"]) == (0, 0)


def test_nobody_is_rejected_because_a_handover_counts_twice() -> None:
    scoreboard = Scoreboard.create(2)
    old, new = (Limits(Config(max_clients=10), scoreboard, slot) for slot in range(2))
    assert [old.admit(fd, TCP) for fd in range(8)] == [None] * 8
    new.take_over([TCP] * 5)
    assert scoreboard.clients() == 13
    assert [new.admit(fd, TCP) for fd in range(3)] == [None, None, TOO_MANY_CLIENTS]
    old.hand_over([TCP] * 5, 1)
    assert scoreboard.clients() == 10
    assert scoreboard.totals()["clients_peak"] == 10


def test_the_peak_is_the_largest_number_of_clients_at_once() -> None:
    scoreboard = Scoreboard.create(2)
    limits = Limits(Config(server_id="here"), scoreboard, 0)
    for fd in range(3):
        assert limits.admit(fd, TCP) is None
    limits.uncount(TCP)
    limits.uncount(TCP)
    limits.admit(9, TCP)
    totals = scoreboard.totals()
    names = ("clients", "clients_peak", "clients_accepted", "clients_closed")
    assert [totals[name] for name in names] == [2, 3, 4, 2]
