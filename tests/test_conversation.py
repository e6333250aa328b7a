"""Silent clients and conversations: order, turns, deadlines, and which clients have a greenlet."""

import _socket
import gc
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import gevent
import pytest
from greenlet import greenlet

from gserver.commands import BUILT_IN, command
from gserver.config import Config
from gserver.metrics import members_of
from gserver.scoreboard import Scoreboard
from gserver.serve.clients import DRAIN_GRACE_SECONDS, Clients
from gserver.serve.conversation import Conversations
from gserver.serve.limits import Limits
from gserver.serve.replies import Replies
from gserver.serve.silent import TURN_CLIENTS
from gserver.serve.stream import READ_BYTES
from lab.running import LIMIT, PATIENCE, Client, Running, extended, stopped, until
from lab.tls_client import certified, trust

MODULE = """
import os
import time
from pathlib import Path
from gevent.monkey import get_original
from gserver.commands import command
from lab.commands import count_greenlets, napping

nap = napping("NAP", 1)
rest = napping("REST", 5)

@command("GREENLETS")
def greenlets(request):
    return count_greenlets()

@command("SPIN", may_block=False)
def spin(request):
    Path("spinning").touch()
    while not Path("released").exists():
        pass
    return "released"

@command("AFTER-SPIN")
def after_spin(request):
    while not Path("spinning").exists():
        time.sleep(0.01)  # It ends in the turn after SPIN's, before the events of clients.
    Path("held").touch()
    while Path("held").exists():
        pass
    return "held"

@command("QUICK", may_block=False)
def quick(request):
    return "quick"

@command("CLOSE-LAST")
def close_last(request):
    links = {int(fd): os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
    get_original("os", "close")(max(fd for fd, link in links.items() if "socket:" in link))
"""
CROWD = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the commands above."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "greenlets.py").write_text(MODULE)
    return folder


@pytest.fixture(scope="module")
def here(folder: Path) -> Iterator[Running]:
    """A server that the tests do not change."""
    with Running("--commands", "greenlets", "--server-id", "here", cwd=folder) as running:
        yield running


@pytest.fixture
def watcher(here: Running) -> Iterator[Client]:
    """A client that counts greenlets, including its own."""
    with here.client() as client:
        until(lambda: client.who() == 1, "the watcher is the only client")
        yield client


def greenlets(client: Client) -> int:
    return int(client.ask(b"GREENLETS"))


@pytest.mark.outer
def test_clients_with_only_built_in_commands_have_no_greenlet(
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
    until(lambda: watcher.who() == 1, "the clients are uncounted")
    assert greenlets(watcher) == before


@pytest.mark.outer
@pytest.mark.parametrize(
    ("sent", "more"),
    [
        *((line, 0) for line in (b"NOPE\n", b"WHO\nNOPE\n", b" why\n", b"\xff\n", b"quick\n")),
        (b"WHO\nWH", 1),
    ],
)
def test_only_a_client_that_must_wait_has_a_greenlet(
    here: Running, watcher: Client, sent: bytes, more: int
) -> None:
    before = greenlets(watcher)
    with here.client() as client:
        client.send(sent)
        until(lambda: watcher.who() == 2, "the client is counted")
        time.sleep(0.05)
        assert greenlets(watcher) == before + more
        client.send(b"\nNAP\n")
        until(lambda: greenlets(watcher) == before + 1, "the handler has a greenlet")
        while client.line() != b"rested\n":
            pass
        assert greenlets(watcher) == before


def test_a_command_counts_as_the_first_line_and_a_blank_line_does_not(here: Running) -> None:
    for sent, received in (
        (b"\n", b""),
        (b"NOPE\n", b"ERR unknown command\nERR unknown command\n"),
        (b"WHY\n", b"42\nERR unknown command\n"),
    ):
        with here.client() as client:
            client.send(sent)
            time.sleep(0.1)
            client.send(b"GET / HTTP/1.1\n")
            assert client.end() == received


@pytest.mark.outer
def test_a_blocking_command_within_a_batch_keeps_the_order_of_replies(here: Running) -> None:
    with here.client() as client:
        client.send(b"WHY\nNAP\nWHERE\nnope\nNAP\nwhy\nWHY")
        expected = [b"42", b"rested", b"here", b"ERR unknown command", b"rested", b"42", b"42"]
        assert [client.line()[:-1] for _ in expected] == expected


def test_a_batch_larger_than_one_read_is_answered_in_order(here: Running, watcher: Client) -> None:
    for count in (1, 409, 410, 682, 683, 1023, 1024, 1025, 5000):
        with here.client() as client:
            client.send(b"WHERE\n" * count + b"WHY\n" * count)
            assert client.end() == b"here\n" * count + b"42\n" * count
    assert watcher.who() == 1


def test_unread_replies_are_kept_in_order(here: Running) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.settimeout(0.3)
        sock.connect(("127.0.0.1", here.port))
        sent, block = 0, b"WHY\n" * (READ_BYTES // 4)
        try:
            while True:
                sent += sock.send(block[sent % READ_BYTES :])
        except TimeoutError:
            pass
        sock.settimeout(LIMIT)
        sock.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: sock.recv(65536), b""))
    lines = sent // 4
    assert lines > 128
    assert received[: 3 * lines] == b"42\n" * lines
    assert received[3 * lines :] in (b"", b"42\n", b"ERR unknown command\n")


@pytest.mark.parametrize("crowd", [0, TURN_CLIENTS + 50], ids=["few", "more than in one turn"])
def test_who_counts_every_client_that_connected_before_it_was_sent(
    folder: Path, crowd: int
) -> None:
    """Both arrive during a turn: the worker is stalled between two polls."""
    with Running("--commands", "greenlets", cwd=folder) as server, ExitStack() as stack:
        spinning, holding, asking, *others = [
            stack.enter_context(server.client()) for _ in range(3 + crowd)
        ]
        until(lambda: asking.who() == 3 + crowd, "all clients are counted")
        holding.send(b"AFTER-SPIN\n")
        spinning.send(b"SPIN\n")
        until((folder / "spinning").exists, "the worker is in a turn")
        asking.send(b"W")  # Its event precedes the listener's.
        for client in others:
            client.send(b"WHY\n")
        time.sleep(0.05)
        (folder / "released").touch()
        until((folder / "held").exists, "the worker is in the next turn")
        stack.enter_context(server.client())
        asking.send(b"HO\n")
        for name in ("spinning", "released", "held"):
            (folder / name).unlink()
        assert asking.line() == b"%d\n" % (4 + crowd)
        assert {client.line() for client in others} <= {b"42\n"}
        assert (spinning.line(), holding.line()) == (b"released\n", b"held\n")


def test_a_drain_answers_the_received_lines_of_an_idle_client_and_closes_it(folder: Path) -> None:
    options = ("--commands", "greenlets", "--drain-timeout", "600")
    with Running(*options, cwd=folder) as server, ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for _ in range(CROWD)]
        assert [client.ask(b"WHY") for client in clients] == [b"42"] * CROWD
        [worker] = server.workers()
        with stopped(worker):
            for client in clients[:10]:
                client.send(b"WHY\nNOPE\n")
            worker.send_signal(signal.SIGTERM)
        assert {client.rest() for client in clients[:10]} == {b"42\nERR unknown command\n"}
        assert {client.rest() for client in clients[10:]} == {b""}


@pytest.mark.outer
@pytest.mark.parametrize(
    "said", [b"\n", b"W", b"WHY\nW", b"WHY\n" * 1000], ids=["blanks", "line", "lines", "flood"]
)
def test_a_client_that_keeps_sending_does_not_delay_a_drain(said: bytes) -> None:
    with Running("--drain-timeout", "600") as server, server.client() as client:
        talks = threading.Event()

        def talk() -> None:
            with suppress(OSError):  # The server resets it.
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


#: What a client sends first, and then for each reply. Whenever the server looks, there is more.
ENDLESS = {"lines": (b"NAP\nNAP\nNAP\n", b"NAP\n"), "parts": (b"NAP\nNAP\nNAP\nN", b"AP\nN")}


@pytest.mark.outer
@pytest.mark.parametrize("has_tls", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize(("first", "next_"), ENDLESS.values(), ids=ENDLESS)
def test_a_client_whose_next_command_has_always_arrived_does_not_delay_a_drain(
    pems: Path, tmp_path: Path, first: bytes, next_: bytes, has_tls: bool
) -> None:
    module = 'from lab.commands import napping\nnap = napping("NAP", 0.05)\n'
    options = ("--drain-timeout", "600", *(certified(pems) if has_tls else ()))
    with (
        extended(tmp_path, module, *options) as server,
        server.client(context=trust(pems) if has_tls else None) as client,
    ):
        client.send(first)
        assert client.line() == b"rested\n"
        server.send_signal(signal.SIGTERM)
        replies = 0
        while line := client.line():
            assert line == b"rested\n"
            replies += 1
            assert replies < 100, "it is served for as long as it likes"
            with suppress(OSError):  # The server may have closed it by now.
                client.send(next_)
        assert server.exit_code() == 0
        assert not server.events("worker.cut_off")


@pytest.mark.outer
def test_idle_clients_use_almost_no_cpu(here: Running, watcher: Client) -> None:
    [worker] = here.workers()
    with ExitStack() as stack:
        clients = [stack.enter_context(here.client()) for _ in range(500)]
        assert [client.ask(b"WHY") for client in clients] == [b"42"] * 500
        until(lambda: watcher.who() == 501, "all clients are counted")
        used = sum(worker.cpu_times()[:2])
        time.sleep(3)
        assert sum(worker.cpu_times()[:2]) - used < 0.1  # A spinning loop uses 3 s.
        # A client that was active leaves nothing behind that keeps the loop awake.
        assert clients[0].ask(b"NOPE") == b"ERR unknown command"
        time.sleep(3)
        used = sum(worker.cpu_times()[:2])
        clients[0].send(b"WHY\n")
        assert clients[0].line() == b"42\n"
        time.sleep(1)
        assert sum(worker.cpu_times()[:2]) - used < 0.1


@pytest.mark.outer
def test_a_client_that_resets_during_its_handler_uses_no_cpu(
    here: Running, watcher: Client
) -> None:
    [worker] = here.workers()
    with here.client() as client:
        client.send(b"REST\nWHY\n")
        until(lambda: watcher.who() == 2, "the client is counted")
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    used = sum(worker.cpu_times()[:2])
    time.sleep(1.5)
    assert watcher.who() == 2, "the handler runs"
    assert sum(worker.cpu_times()[:2]) - used < 0.3  # A spinning loop uses 1.5 s.
    until(lambda: watcher.who() == 1, "the client has left")


@contextmanager
def loop(**options: Any) -> Iterator[tuple[Scoreboard, Conversations, socket.socket]]:
    """The clients of a worker in this process: there is one."""
    scoreboard = Scoreboard.create(1)
    config = Config(server_id="here", **options)
    replies = Replies(config, scoreboard, 0, (*BUILT_IN, rest, slow))
    clients = Clients(config, Limits(config, scoreboard, 0), replies, capacity=1000)
    conversations = Conversations(clients)
    with one_more(conversations) as client:
        yield scoreboard, conversations, client


@command("REST")
def rest(_request: object) -> str:
    gevent.sleep(0.1)
    return "rested"


@contextmanager
def one_more(ours: Conversations) -> Iterator[socket.socket]:
    pair, theirs = socket.socketpair()
    sock = _socket.socket(pair.family, pair.type, 0, pair.detach())
    sock.setblocking(False)
    theirs.settimeout(LIMIT)
    with closing(theirs):
        ours.admission.serve(sock, ("127.0.0.1", 1))
        yield theirs


def test_data_that_waits_for_a_second_handler_takes_no_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with loop() as (_, ours, client):
        client.sendall(b"REST\nREST\n")
        gevent.sleep(0.03)
        client.sendall(b"WHY\n")
        with counted_turns(ours, monkeypatch) as turns:
            gevent.sleep(0.4)
        assert client.recv(100) == b"rested\nrested\n42\n"
        assert len(turns) < 20  # A spinning loop has thousands.


@contextmanager
def counted_turns(ours: Conversations, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A list that grows with each turn of the loop."""
    turns: list[int] = []
    poll = ours.silent._poll

    def counted_poll() -> list[tuple[int, int]] | None:
        turns.append(len(turns))
        return poll()

    with monkeypatch.context() as patch:
        patch.setattr(ours.silent, "_poll", counted_poll)
        yield turns


def test_a_client_that_has_read_its_replies_takes_no_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    with loop() as (_, ours, client):
        client.setblocking(False)
        lines = 100_000
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * lines)
        client.sendall(b"WHY\n" * lines)
        until_idle(lambda: is_blocked(ours))
        received = 0

        def has_all() -> bool:
            nonlocal received
            with suppress(BlockingIOError):
                received += len(client.recv(1 << 20))
            return received == 3 * lines

        until_idle(has_all)
        with counted_turns(ours, monkeypatch) as turns:
            gevent.sleep(0.2)
        assert len(turns) < 20  # A spinning loop has thousands.


def is_blocked(ours: Conversations) -> bool:
    [client] = ours.clients.by_fd.values()
    return client.stream is not None and client.stream.is_sending


def test_a_drain_closes_a_client_that_has_never_sent_anything() -> None:
    with loop() as (scoreboard, ours, client):
        ours.silent.drain()
        until_idle(lambda: not scoreboard.clients())
        assert client.recv(1) == b""


def drained_since(ours: Conversations, seconds: float) -> None:
    """Begin a drain as if that had been so many seconds ago."""
    ours.silent.drain()
    ours.clients.drain_started_at -= seconds


@pytest.mark.parametrize(("first", "second"), [(b"WH", b"Y\n"), (b"\r\n", b"WHY\n")])
def test_a_client_that_is_admitted_late_in_a_drain_has_its_half_second(
    first: bytes, second: bytes
) -> None:
    """As after a handshake that took most of the half second."""
    with loop() as (_, ours, client):
        drained_since(ours, DRAIN_GRACE_SECONDS + 0.1)
        client.sendall(first)
        gevent.sleep(0.05)
        client.sendall(second)
        gevent.sleep(0.05)
        assert client.recv(100) == b"42\n"


def test_a_line_that_arrives_in_pieces_in_a_drain_is_one_line() -> None:
    with loop(unterminated_after_seconds=5) as (_, ours, client):
        client.sendall(b"WHY\nW")
        gevent.sleep(0.05)
        assert client.recv(100) == b"42\n"
        [ours_of_it] = ours.clients.by_fd.values()
        ours_of_it.quiet_since -= 6
        ours.silent.drain()
        client.sendall(b"HO")
        gevent.sleep(0.05)
        client.sendall(b"AMI\n")
        gevent.sleep(0.05)
        assert client.recv(100) == b"ERR unknown command\n"


def test_a_drain_closes_clients_evenly_over_the_spread_and_serves_them_until_then() -> None:
    with (
        loop(drain_spread_seconds=2, drain_timeout_seconds=8) as (scoreboard, ours, _),
        ExitStack() as stack,
    ):
        clients = [stack.enter_context(one_more(ours)) for _ in range(99)]
        for client in clients:
            client.sendall(b"WHY\n")
        gevent.sleep(0.1)
        ours.silent.drain()
        began = time.monotonic()
        left = {}
        while scoreboard.clients():
            for client in clients:
                with suppress(OSError):
                    client.sendall(b"\n")
            gevent.sleep(0.1)
            left[round(time.monotonic() - began, 1)] = scoreboard.clients()
        for after, count in left.items():
            assert abs(count - 100 * (1 - after / 2)) < 30 * PATIENCE, left
        assert 1.5 < time.monotonic() - began < 2 + PATIENCE


def until_idle(condition: Callable[[], object]) -> None:
    """Let the loop run until this is true."""
    with gevent.Timeout(LIMIT):
        while not condition():
            gevent.sleep(0.01)


def test_time_while_replies_are_unread_is_not_idle_time() -> None:
    with loop(idle_timeout_seconds=0.5) as (scoreboard, _, client):
        client.setblocking(False)
        sent = received = blocked = 0
        while blocked < 20:  # Until the buffers are full, since nothing is read.
            try:
                sent += client.send(b"WHY\n" * (READ_BYTES // 4))
                blocked = 0
            except BlockingIOError:
                blocked += 1
                gevent.sleep(0.005)
        gevent.sleep(0.6)
        assert scoreboard.totals()["clients"] == 1
        while received < sent // 4 * 3:
            with suppress(BlockingIOError):
                received += len(client.recv(1 << 20))
            gevent.sleep(0.001)
        gevent.sleep(0.05)
        assert scoreboard.totals()["error_replies.idle"] == 0
        assert scoreboard.totals()["clients"] == 1


def test_an_internal_error_closes_only_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    with loop() as (scoreboard, ours, client):
        with monkeypatch.context() as patch, one_more(ours) as other:
            patch.setattr(ours.silent, "answer", fail)
            other.sendall(b"WHO\n")
            gevent.sleep(0.05)
            assert other.recv(10) == b""
        client.sendall(b"WHO\n")
        gevent.sleep(0.05)
        assert client.recv(10) == b"1\n"
        totals = scoreboard.totals()
        assert (totals["clients"], totals["clients_closed"], ours.clients.connections) == (1, 1, 1)


def test_the_idle_time_begins_again_with_what_a_client_sends() -> None:
    with loop(idle_timeout_seconds=1000) as (_, ours, client):
        [ours_of_it] = ours.clients.by_fd.values()
        for sent in (b"WHO\n", b"WHY\nwhere\n", b"nope\n", b"\n"):
            ours_of_it.quiet_since -= 2000
            client.sendall(sent)
            gevent.sleep(0.05)
            assert time.monotonic() - ours_of_it.quiet_since < 1000


def test_each_line_has_the_line_timeout_even_if_reads_cut_the_lines() -> None:
    with loop(line_timeout_seconds=0.3, unterminated_after_seconds=0) as (_, _ours, client):
        client.sendall(b"WH")
        for _ in range(4):
            gevent.sleep(0.2)
            client.sendall(b"O\nWH")
            gevent.sleep(0.05)
            assert client.recv(100) == b"1\n"


def fail(_data: bytes, _has_spoken: bool, _client: object) -> bytes:
    raise MemoryError


def spent_ns(scoreboard: Scoreboard) -> int:
    """The time that all commands took."""
    return sum(members_of("command_ns", scoreboard.totals()).values())


def test_each_read_is_counted_and_timed_on_the_fast_path_and_in_the_parser() -> None:
    with loop() as (scoreboard, ours, client):
        reads = ((b"WHO\n", b"1\n"), (b"WHY\nWHERE\n", b"42\nhere\n"), (b"Who\nwhy", b"1\n42\n"))
        for count, (sent, received) in enumerate(reads, 1):
            before = spent_ns(scoreboard)
            client.sendall(sent)
            gevent.sleep(0.05)
            if count == 3:
                client.sendall(b"\n")
                gevent.sleep(0.05)
            assert client.recv(100) == received
            assert scoreboard.totals()["reads"] == count + (count == 3)
            assert 0 < spent_ns(scoreboard) - before < 10**9
    gevent.sleep(0.05)
    totals = scoreboard.totals()
    assert (totals["clients"], totals["clients_closed"], ours.clients.connections) == (0, 1, 0)
    expected = {"WHO": 2, "WHERE": 1, "WHY": 2}
    assert {name: totals[f"commands.{name}"] for name in ("WHO", "WHERE", "WHY")} == expected


@pytest.mark.outer
def test_a_line_that_continues_during_a_stall_is_not_too_slow() -> None:
    with Running("--line-timeout", "1") as server, server.client() as client:
        client.send(b"WH")
        until(lambda: server.who() == 2, "the client is counted")
        with stopped(server.workers()[0]):
            client.send(b"E")
            time.sleep(2.5)
        assert not select.select([client.sock], [], [], 0.3)[0]
        client.send(b"RE\n")
        assert client.line() != b"ERR too slow\n"


@pytest.mark.outer
def test_a_handler_that_exits_its_greenlet_during_a_drain_has_failed(tmp_path: Path) -> None:
    module = """
import time
from greenlet import GreenletExit
from gserver.commands import command

@command("EXIT")
def exit(request):
    time.sleep(0.5)
    raise GreenletExit
"""
    with extended(tmp_path, module, "--drain-timeout", "60") as server, server.client() as client:
        client.send(b"WHY\nEXIT\n")
        assert client.line() == b"42\n"
        server.send_signal(signal.SIGTERM)
        assert client.rest() == b"ERR internal\n"
        assert server.exit_code() == 0


@pytest.mark.outer
def test_a_drain_gives_idle_clients_no_greenlet() -> None:
    with loop() as (_, ours, _client), ExitStack() as stack:
        others = [stack.enter_context(one_more(ours)) for _ in range(500)]
        gc.collect()
        before = alive_greenlets()
        ours.silent.drain()
        while ours.clients.connections:
            gevent.sleep(0.001)
            assert alive_greenlets() <= before
            for other in others:
                other.close()


def alive_greenlets() -> int:
    return sum(isinstance(item, greenlet) and not item.dead for item in gc.get_objects())


@pytest.mark.outer
@pytest.mark.parametrize("said", [b"x" * 2000, b""], ids=["a line too long", "rejected"])
def test_a_worker_whose_lingering_descriptor_is_closed_is_replaced(
    folder: Path, said: bytes
) -> None:
    """It must not continue: the descriptor's number may already belong to another client."""
    options = "--commands", "greenlets", "--max-clients", "9" if said else "1"
    with Running(*options, cwd=folder) as server, server.client() as client:
        client.who()
        with server.client() as last:
            last.send(said)
            assert last.rest().startswith(b"ERR ")
            client.send(b"CLOSE-LAST\n")
            server.wait_for("worker.died")


def test_the_time_of_a_slow_command_is_not_counted_for_another() -> None:
    with loop() as (scoreboard, ours, client), one_more(ours) as other:
        client.sendall(b"SL")
        gevent.sleep(0.05)
        client.sendall(b"OW\n")
        other.sendall(b"WHY\n")
        while scoreboard.totals()["reads"] < 2:
            gevent.sleep(0.01)
        seconds = float(client.recv(100))
        assert other.recv(100) == b"42\n"
        totals = scoreboard.totals()
        assert seconds <= totals["command_ns.SLOW"] / 1e9 < 1.5 * seconds
        assert 0 < totals["command_ns.WHY"] / 1e9 < 0.5 * seconds


@command("SLOW", may_block=False)
def slow(_request: object) -> str:
    """Take some time; return the seconds."""
    started = time.monotonic()
    while time.monotonic() - started < 0.2:
        pass
    return str(time.monotonic() - started)
