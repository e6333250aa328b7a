"""The dispatcher: who has a greenlet and who has none, and that a client cannot tell."""

import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import gevent
import pytest

from gserver.commands import BUILT_IN
from gserver.config import Config
from gserver.scoreboard import Scoreboard
from gserver.serve.dispatcher import TURN_CLIENTS, Dispatcher
from gserver.serve.limits import Limits
from gserver.serve.receiver import BURST_BYTES
from tests.running import CLIENT_GREENLETS, LIMIT, PATIENCE, Client, Running, stopped, until

MODULE = """
import gc
import os
import time
from gevent.monkey import get_original
from greenlet import greenlet
from gserver.commands import command

@command("GREENLETS")
def greenlets(service):
    gc.collect()
    return sum(isinstance(item, greenlet) and not item.dead for item in gc.get_objects())

@command("NAP")
def nap(service):
    time.sleep(2.5)
    return "rested"

@command("CLOSE-LAST")
def close_last(service):
    links = {int(fd): os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
    get_original("os", "close")(max(fd for fd, link in links.items() if "socket:" in link))
"""
CROWD = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the command above."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "greenlets.py").write_text(MODULE)
    return folder


@pytest.fixture(scope="module")
def here(folder: Path) -> Iterator[Running]:
    """A server that is left as it was."""
    with Running("--commands", "greenlets", "--server-id", "here", cwd=folder) as running:
        yield running


@pytest.fixture
def watcher(here: Running) -> Iterator[Client]:
    """A client that counts greenlets. It has one itself."""
    with here.client() as client:
        until(lambda: client.who() == 1, "it is alone")
        yield client


def greenlets(client: Client) -> int:
    return int(client.ask(b"GREENLETS"))


def test_clients_that_say_nothing_but_built_in_commands_have_no_greenlet(
    here: Running, watcher: Client
) -> None:
    before = greenlets(watcher)
    with ExitStack() as stack:
        clients = [stack.enter_context(here.client()) for _ in range(CROWD)]
        assert watcher.who() == CROWD + 1
        assert greenlets(watcher) == before
        for client in clients:
            client.send(b"WHY\n")
            assert client.line() == b"42\n"
            client.send(b"where\r\n")
            assert client.line() == b"here\n"
            client.send(b"WHO\nWHERE\nWHY\n" * 10)
            assert (
                b"".join(client.line() for _ in range(30)) == b"%d\nhere\n42\n" % (CROWD + 1) * 10
            )
        assert greenlets(watcher) == before
    until(lambda: watcher.who() == 1, "they are counted out")
    assert greenlets(watcher) == before


def test_a_greenlet_each_is_what_an_option_gives(folder: Path) -> None:
    options = ("--client-greenlets", "always", "--commands", "greenlets")
    with Running(*options, cwd=folder) as server, server.client() as watcher, ExitStack() as stack:
        before = greenlets(watcher)
        clients = [stack.enter_context(server.client()) for _ in range(CROWD)]
        assert [client.ask(b"WHY") for client in clients] == [b"42"] * CROWD
        time.sleep(2.5)  # Time to rest, if they would.
        assert greenlets(watcher) == before + CROWD


@pytest.mark.parametrize(
    "said", [b"NOPE\n", b"WHO\nWHY\nNOPE\n", b" why\n", b"\xff\n", b"\n", b"WHO\nWH"]
)
def test_all_else_wakes_a_client_which_rests_again_when_it_has_been_quiet(
    here: Running, watcher: Client, said: bytes
) -> None:
    before = greenlets(watcher)
    with here.client() as client:
        client.send(said)
        until(lambda: greenlets(watcher) == before + 1, "it has a greenlet", 1.0 * PATIENCE)
        client.send(b"\nWHERE\n")  # After the line that has only begun; else a blank one.
        assert b"here\n" in iter(client.line, b"")
        until(lambda: greenlets(watcher) == before, "it rests again")
        assert client.ask(b"WHERE") == b"here"
        assert greenlets(watcher) == before


def test_who_is_not_quiet_does_not_rest(here: Running, watcher: Client) -> None:
    before = greenlets(watcher)
    with here.client() as client:
        assert client.ask(b"NOPE") == b"ERR unknown command"
        for _ in range(15):
            time.sleep(0.2)
            assert client.ask(b"WHY") == b"42"
            assert greenlets(watcher) == before + 1


def test_a_line_that_has_begun_keeps_its_client_awake(here: Running, watcher: Client) -> None:
    before = greenlets(watcher)
    with here.client() as client:
        client.send(b"WHERE is")
        time.sleep(3)
        assert greenlets(watcher) == before + 1
        client.send(b" it\n")
        assert client.line() == b"ERR unknown command\n"


def test_a_blank_line_before_a_rest_is_no_first_line_and_a_command_is_one(
    here: Running, watcher: Client
) -> None:
    before = greenlets(watcher)
    for said, told in (
        (b"\n", b""),
        (b"NOPE\n", b"ERR unknown command\nERR unknown command\n"),
        (b"WHY\n", b"42\nERR unknown command\n"),
    ):
        with here.client() as client:
            client.send(said)
            time.sleep(0.1)
            until(lambda: greenlets(watcher) == before, "it rests")
            client.send(b"GET / HTTP/1.1\n")
            assert client.end() == told


def test_a_burst_that_is_larger_than_what_is_taken_at_once_is_answered_in_order(
    here: Running, watcher: Client
) -> None:
    for count in (1, 409, 410, 682, 683, 1023, 1024, 1025, 5000):
        with here.client() as client:
            client.send(b"WHERE\n" * count + b"WHY\n" * count)
            assert client.end() == b"here\n" * count + b"42\n" * count
    assert watcher.who() == 1


def test_replies_that_are_not_read_are_kept_in_order(here: Running) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.settimeout(0.3)
        sock.connect(("127.0.0.1", here.port))
        sent, block = 0, b"WHY\n" * (BURST_BYTES // 4)
        try:
            while True:
                sent += sock.send(block[sent % BURST_BYTES :])
        except TimeoutError:
            pass
        sock.settimeout(LIMIT)
        sock.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: sock.recv(65536), b""))
    lines = sent // 4
    assert lines > 128
    assert received[: 3 * lines] == b"42\n" * lines
    assert received[3 * lines :] in (b"", b"42\n", b"ERR unknown command\n")


def test_who_has_connected_before_a_who_is_sent_is_in_its_answer_whoever_else_speaks(
    here: Running,
) -> None:
    with ExitStack() as stack:
        count = TURN_CLIENTS + 50  # More than have their turn at once.
        clients = [stack.enter_context(here.client()) for _ in range(count)]
        until(lambda: clients[0].who() == count, "all are there")
        with stopped(here.workers()[0]):
            for client in clients:
                client.send(b"WHY\n")
            more = [stack.enter_context(here.client()) for _ in range(5)]
            for client in clients:
                client.send(b"WHO\n")
        assert [client.line() for client in clients] == [b"42\n"] * count
        assert [client.line() for client in clients] == [b"%d\n" % (count + 5)] * count
        assert more[0].who() == count + 5


def test_a_drain_answers_what_a_client_at_rest_has_sent_and_then_ends_it(folder: Path) -> None:
    with Running("--commands", "greenlets", cwd=folder) as server, ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for _ in range(CROWD)]
        assert [client.ask(b"WHY") for client in clients] == [b"42"] * CROWD
        [worker] = server.workers()
        with stopped(worker):
            for client in clients[:10]:
                client.send(b"WHY\nNOPE\n")
            worker.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert {client.rest() for client in clients[:10]} == {b"42\nERR unknown command\n"}
        assert {client.rest() for client in clients[10:]} == {b""}
        assert time.monotonic() - began < PATIENCE


@pytest.mark.parametrize(
    "said", [b"\n", b"W", b"WHY\nW", b"WHY\n" * 1000], ids=["blanks", "line", "lines", "flood"]
)
def test_a_client_that_goes_on_and_on_holds_up_no_drain(said: bytes) -> None:
    with Running("--drain-timeout", "600") as server, server.client() as client:
        talks = threading.Event()

        def talk() -> None:
            with suppress(OSError):  # Until it is reset.
                while True:
                    client.send(said)
                    talks.set()
                    if select.select([client.sock], [], [], 0.05 if len(said) < 10 else 0)[0]:
                        client.sock.recv(65536)

        talker = threading.Thread(target=talk)
        talker.start()
        assert talks.wait(LIMIT)
        server.send_signal(signal.SIGTERM)
        assert server.exit_code() == 0
        assert not server.events("worker.cut_off")
        talker.join()


def test_idle_clients_cost_next_to_nothing(here: Running, watcher: Client) -> None:
    [worker] = here.workers()
    with ExitStack() as stack:
        clients = [stack.enter_context(here.client()) for _ in range(500)]
        assert [client.ask(b"WHY") for client in clients] == [b"42"] * 500
        until(lambda: watcher.who() == 501, "all are there")
        used = sum(worker.cpu_times()[:2])
        time.sleep(3)
        assert sum(worker.cpu_times()[:2]) - used < 0.1  # A loop that spins takes 3.
        # Nor does one that has been awake leave something behind that keeps the loop awake.
        assert clients[0].ask(b"NOPE") == b"ERR unknown command"
        time.sleep(3)
        used = sum(worker.cpu_times()[:2])
        clients[0].send(b"WHY\n")
        assert clients[0].line() == b"42\n"
        time.sleep(1)
        assert sum(worker.cpu_times()[:2]) - used < 0.1


def test_time_in_a_handler_is_not_idle_time_however_often_it_is_looked_at(folder: Path) -> None:
    options = ("--idle-timeout", "2", "--commands", "greenlets")
    with Running(*options, cwd=folder) as server, server.client() as client:
        for said in (b"NAP\n", b"NAP"):  # The second is ended by a silence.
            client.send(said)
            assert client.line() == b"rested\n"
            assert not select.select([client.sock], [], [], 1.6)[0]
            assert client.ask(b"WHY") == b"42"


@contextmanager
def dispatcher(**options: Any) -> Iterator[tuple[Scoreboard, Dispatcher, socket.socket]]:
    """A dispatcher in this process, and one client of it."""
    scoreboard = Scoreboard.create(1)
    limits = Limits(Config(server_id="here", **options), scoreboard, 0, BUILT_IN)
    dispatcher = Dispatcher(limits, lambda: None)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with closing(theirs):
        assert limits.admit(ours.fileno()) is None
        dispatcher.take_in(ours, None)
        yield scoreboard, dispatcher, theirs


@pytest.mark.parametrize("greenlets", CLIENT_GREENLETS)
def test_time_in_which_replies_wait_to_be_read_is_not_idle_time(greenlets: str) -> None:
    with dispatcher(idle_timeout_seconds=0.5, client_greenlets=greenlets) as (
        scoreboard,
        ours,
        client,
    ):
        client.setblocking(False)
        sent = received = 0
        blocked = 0
        while blocked < 20:  # Until nothing is taken any more, since nothing is read.
            try:
                sent += client.send(b"WHY\n" * (BURST_BYTES // 4))
                blocked = 0
            except BlockingIOError:
                blocked += 1
                gevent.sleep(0.005)
        gevent.sleep(0.6)
        ours.sweep()
        assert scoreboard.totals()["clients"] == 1
        while received < sent // 4 * 3:
            with suppress(BlockingIOError):
                received += len(client.recv(1 << 20))
            gevent.sleep(0.001)
        ours.sweep()
        gevent.sleep(0.05)
        assert scoreboard.totals()["error_replies.idle"] == 0
        assert scoreboard.totals()["clients"] == 1


def test_a_failure_of_our_own_costs_its_client_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with dispatcher() as (scoreboard, ours, client):
        other, theirs = socket.socketpair()
        other.setblocking(False)
        assert ours._limits.admit(other.fileno()) is None
        ours.take_in(other, None)
        with monkeypatch.context() as patch, closing(theirs):
            patch.setattr(ours._fastpath, "answer", fail)
            theirs.sendall(b"WHO\n")
            gevent.sleep(0.05)
            assert theirs.recv(10) == b""
        client.sendall(b"WHO\n")
        gevent.sleep(0.05)
        assert client.recv(10) == b"1\n"
        totals = scoreboard.totals()
        assert (totals["clients"], totals["clients_closed"], ours.open) == (1, 1, 1)


def fail(_data: bytes) -> bytes:
    raise MemoryError


def test_each_burst_is_counted_and_timed_whichever_way_it_is_answered() -> None:
    with dispatcher() as (scoreboard, ours, client):
        bursts = ((b"WHO\n", b"1\n"), (b"WHY\nWHERE\n", b"42\nhere\n"), (b"Who\nwhy\n", b"1\n42\n"))
        for count, (said, told) in enumerate(bursts, 1):
            before = scoreboard.totals()["service_ns"]
            client.sendall(said)
            gevent.sleep(0.05)
            assert client.recv(100) == told
            assert scoreboard.totals()["reads"] == count
            assert 0 < scoreboard.totals()["service_ns"] - before < 10**9
    gevent.sleep(0.05)
    totals = scoreboard.totals()
    assert (totals["clients"], totals["clients_closed"], ours.open) == (0, 1, 0)
    assert {name: totals[f"commands.{name}"] for name in ("WHO", "WHERE", "WHY")} == {
        "WHO": 2,
        "WHERE": 1,
        "WHY": 2,
    }


@pytest.mark.parametrize("said", [b"x" * 2000, b""], ids=["a line too long", "turned away"])
def test_a_worker_whose_descriptor_somebody_closes_while_it_waits_for_a_last_end_is_replaced(
    folder: Path, said: bytes
) -> None:
    """It was not to stay half deaf: such a descriptor may be another client's by then."""
    options = "--commands", "greenlets", "--max-clients", "9" if said else "1"
    with Running(*options, cwd=folder) as server, server.client() as client:
        client.who()
        with server.client() as last:
            last.send(said)
            assert last.rest().startswith(b"ERR ")
            client.send(b"CLOSE-LAST\n")
            server.wait_for("worker.died")
