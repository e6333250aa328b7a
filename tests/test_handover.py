"""Handovers: two workers' clients in this process, and reloads of real servers."""

import _socket
import gc
import io
import json
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import psutil
import pytest

from gserver.addresses import TCP
from gserver.commands import BUILT_IN, Command, command
from gserver.config import Config
from gserver.protocol import INTERNAL
from gserver.scoreboard import Scoreboard
from gserver.serve import handover
from gserver.serve.client import Rest
from gserver.serve.clients import Clients
from gserver.serve.conversation import Conversations
from gserver.serve.handover import (
    BATCH_CLIENTS,
    Greeting,
    HandoverError,
    Sender,
    SuccessorDiedError,
    receive,
)
from gserver.serve.limits import Limits
from gserver.serve.replies import Replies
from lab.running import LIMIT, argv, extended, until

GONE = command("GONE", may_block=False)(lambda _request: "gone")


@command("REST")
def rest(_request: object) -> str:
    gevent.sleep(0.1)
    return "rested"


@command("PAIR", may_block=False)
def pair_of(_request: object, first: str, second: int = 2) -> str:
    return f"{first} {second + 1}"


@command("LARGE", may_block=False)
def large(_request: object) -> str:
    return "x" * 2_000_000


@dataclass
class Pair:
    """The clients of an old worker, in slot 0, and of its successor, in slot 1."""

    scoreboard: Scoreboard
    old: Conversations
    new: Conversations
    ours: socket.socket
    theirs: socket.socket
    stack: ExitStack
    #: What was left of the conversations that were handed over.
    rests: list[Rest] = field(default_factory=list)

    def connect(self, host: str = "127.0.0.1", to: Conversations | None = None) -> socket.socket:
        """Connect a client to the old worker, or to the other one."""
        ours, theirs = socket.socketpair()
        bare = _socket.socket(ours.family, ours.type, 0, ours.detach())
        bare.setblocking(False)
        (to or self.old).admission.serve(bare, (host, 1))
        theirs.settimeout(LIMIT)
        return self.stack.enter_context(theirs)

    def hand_over(self) -> Sender:
        """Hand everything over that is ready."""
        receiver = gevent.spawn(receive, self.new, 1, self.theirs)
        sender = Sender(self.old, self.ours)
        try:
            if sender.greet():
                self.rests += sender._next_batch().values()
                sender.send_ready()
        finally:
            sender.close()
            receiver.join(LIMIT)
        return sender

    def is_busy(self) -> bool:
        """Whether a handler runs for the old worker's only client."""
        [client] = self.old.clients.by_fd.values()
        return client.stream is not None and client.stream.command != ""

    def are_blocked(self) -> bool:
        """Whether no client of the old worker reads its replies."""
        streams = [client.stream for client in self.old.clients.by_fd.values()]
        return all(stream is not None and stream.is_sending for stream in streams)

    def figures(self) -> tuple[int, int, int]:
        """Clients of the old worker, of the new one, and of the cluster's view."""
        clients = self.scoreboard.by_slot("clients")
        return clients[0], clients[1], self.scoreboard.settled_clients()


@contextmanager
def pair(commands: tuple[Command, ...] = (), **options: Any) -> Iterator[Pair]:
    config = Config(server_id="here", **options)
    scoreboard = Scoreboard.create(2, config.address_cells)

    def worker(slot: int, *commands: Command) -> Conversations:
        replies = Replies(config, scoreboard, slot, (*BUILT_IN, rest, large, pair_of, *commands))
        return Conversations(
            Clients(config, Limits(config, scoreboard, slot), replies, capacity=1000)
        )

    with ExitStack() as stack:
        ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours, theirs = (stack.enter_context(gevent_socket(end)) for end in ends)
        yield Pair(scoreboard, worker(0, *commands), worker(1), ours, theirs, stack)


def gevent_socket(sock: socket.socket) -> Any:
    """The same socket, as a worker has it: it makes only its greenlet wait."""
    return gevent.socket.socket(fileno=sock.detach())


def settle(condition: Callable[[], object] = lambda: False, seconds: float = LIMIT) -> None:
    """Let the loops run until the condition is true."""
    with gevent.Timeout(seconds):
        while not condition():
            gevent.sleep(0.005)


def ask(client: socket.socket, line: bytes = b"WHY\n") -> bytes:
    client.sendall(line)
    return read(client)


def read(client: socket.socket) -> bytes:
    """What the client receives next; the loops run meanwhile."""
    client.setblocking(False)
    received = b""

    def has_line() -> bool:
        nonlocal received
        with suppress(BlockingIOError):
            received += client.recv(100_000_000)
        return received.endswith(b"\n")

    settle(has_line)
    return received


# What a client was doing.


def test_idle_clients_are_served_by_the_new_worker() -> None:
    with pair() as both:
        clients = [both.connect() for _ in range(2 * BATCH_CLIENTS + 1)]
        assert ask(clients[0], b"WHO\n") == b"501\n"
        sender = both.hand_over()
        assert sender.clients == 501
        assert both.figures() == (0, 501, 501)
        assert not both.old.clients.connections
        for client in clients:
            client.sendall(b"WHO\n")
        settle(lambda: both.scoreboard.totals()["commands.WHO"] == 502)
        assert {client.recv(10) for client in clients} == {b"501\n"}
        totals = both.scoreboard.totals()
        assert totals["clients_handed_over"] == 501
        assert (totals["clients_accepted"], totals["clients_closed"]) == (501, 0)


def test_a_partial_line_moves_with_its_client_and_its_deadline() -> None:
    with pair(line_timeout_seconds=1000, unterminated_after_seconds=0) as both:
        client = both.connect()
        client.sendall(b"WHY\nWHE")
        assert read(client) == b"42\n"
        gevent.sleep(0.1)
        began = time.monotonic()
        both.hand_over()
        assert both.rests[0].line_ends < began + 1000
        assert ask(client, b"RE\nWHY\n") == b"here\n42\n"


def test_the_idle_time_goes_on() -> None:
    with pair(idle_timeout_seconds=1000) as both:
        both.connect()
        gevent.sleep(0.1)
        [before] = both.old.clients.by_fd.values()
        quiet_since = before.quiet_since
        both.hand_over()
        [after] = both.new.clients.by_fd.values()
        assert after.quiet_since == quiet_since < time.monotonic() - 0.05


@pytest.mark.parametrize(
    ("before", "after", "replies"),
    [
        (b"", b"GET / HTTP/1.1\n", b""),
        (b"WHY\n", b"GET / HTTP/1.1\n", b"42\nERR unknown command\n"),
        (b"\n", b"GET / HTTP/1.1\n", b""),
        (b"GET / HTTP", b"/1.1\n", b""),
    ],
)
def test_the_first_line_is_the_first_one_only_once(
    before: bytes, after: bytes, replies: bytes
) -> None:
    with pair() as both:
        client = both.connect()
        client.sendall(before)
        gevent.sleep(0.05)
        both.hand_over()
        client.sendall(after)
        client.shutdown(socket.SHUT_WR)
        settle(lambda: not both.new.clients.connections)
        received = b""
        with suppress(ConnectionResetError):
            while data := client.recv(1000):
                received += data
        assert received == replies


def test_a_client_in_a_handler_follows_when_the_handler_has_answered() -> None:
    with pair() as both:
        client = both.connect()
        client.sendall(b"REST\nREST\nWHO\nWHAT\nWHERE")
        settle(both.is_busy)
        receiver = gevent.spawn(receive, both.new, 1, both.theirs)
        sender = Sender(both.old, both.ours)
        assert sender.greet()
        sender.send_ready()
        assert both.figures() == (1, 0, 1), "the handler runs"
        settle(lambda: both.old.clients.parked)
        sender.send_ready()
        sender.close()
        receiver.join(LIMIT)
        assert both.figures() == (0, 1, 1), "the second handler runs in the new worker"
        client.sendall(b"\n")
        settle(lambda: both.scoreboard.totals()["commands.WHERE"])
        assert read(client) == b"rested\nrested\n1\nERR unknown command\nhere\n"
        [commands] = [both.scoreboard.totals()["commands.REST"]]
        assert commands == 2


def test_words_move_with_their_commands() -> None:
    with pair() as both:
        client = both.connect()
        client.sendall(b"REST\nPAIR a 4\nPAIR\nPAIR b\nPAIR c")
        settle(both.is_busy)
        both.old.clients.is_handing_over = True
        settle(lambda: both.old.clients.parked)
        both.hand_over()
        client.sendall(b" 5\n")
        settle(lambda: both.scoreboard.totals()["commands.PAIR"] == 3)
        expected = b"rested\na 5\nERR usage: PAIR first [second]\nb 3\nc 6\n"
        assert read(client) == expected


def test_a_command_that_the_new_worker_does_not_have_is_unknown() -> None:
    with pair((GONE,)) as both:
        client = both.connect()
        client.sendall(b"REST\nGONE\nWHY\n")
        settle(both.is_busy)
        both.old.clients.is_handing_over = True
        settle(lambda: both.old.clients.parked)
        both.hand_over()
        settle(lambda: both.scoreboard.totals()["commands.WHY"])
        assert read(client) == b"rested\nERR unknown command\n42\n"


def test_unsent_replies_move_with_their_clients_and_stay_in_order() -> None:
    with pair() as both:
        clients = [both.connect() for _ in range(3)]
        for number, client in enumerate(clients):
            client.sendall(b"WHY\n" * number + b"LARGE\nWHERE\n")
        settle(both.are_blocked)
        both.hand_over()
        assert both.figures() == (0, 3, 3)
        for number, client in enumerate(clients):
            received = b""
            while not received.endswith(b"here\n"):
                received += read(client)
            assert received == b"42\n" * number + b"x" * 2_000_000 + b"\nhere\n"


def test_the_time_to_read_goes_on_in_the_new_worker() -> None:
    with pair(write_timeout_seconds=1000) as both:
        client = both.connect()
        client.sendall(b"LARGE\n")
        settle(both.are_blocked)
        gevent.sleep(0.1)
        began = time.monotonic()
        both.hand_over()
        [rest] = both.rests
        assert rest.unsent
        assert rest.write_ends is not None
        assert rest.write_ends < began + 1000


def test_a_client_that_has_ended_its_input_gets_its_replies_and_the_end() -> None:
    with pair() as both:
        client = both.connect()
        client.sendall(b"REST\nWHY")
        client.shutdown(socket.SHUT_WR)
        settle(both.is_busy)
        both.old.clients.is_handing_over = True
        settle(lambda: both.old.clients.parked)
        both.hand_over()
        settle(lambda: not both.new.clients.connections)
        assert read(client) == b"rested\n42\n"
        assert client.recv(1) == b""


def test_a_client_over_its_address_limit_is_rejected_after_a_handover_too() -> None:
    with pair(max_clients_per_address=2) as both:
        first = [both.connect("10.0.0.1") for _ in range(2)]
        both.hand_over()
        assert read(both.connect("10.0.0.1")) == b"ERR too many clients from your address\n"
        for client in first:
            client.close()
        settle(lambda: not both.new.clients.connections)
        assert ask(both.connect("10.0.0.1")) == b"42\n"


def test_a_worker_that_drains_takes_no_clients() -> None:
    with pair() as both:
        client = both.connect()
        ask(client)
        both.new.silent.drain()
        with pytest.raises(SuccessorDiedError):
            both.hand_over()
        assert both.figures() == (1, 0, 1)
        assert ask(client) == b"42\n"


# What WHO says meanwhile.


def test_who_is_never_too_low_and_too_high_by_a_batch_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, int]] = []
    with pair() as both:
        for _ in range(1000):
            both.connect()

        def note(*_: object) -> None:
            seen.append((both.scoreboard.clients(), both.scoreboard.settled_clients()))

        for name in ("take_over", "hand_over", "end_arrival", "places", "take_over_address"):
            method = getattr(Limits, name)

            def watched(self: Limits, *values: Any, method: Any = method) -> Any:
                note()
                result = method(self, *values)
                note()
                return result

            monkeypatch.setattr(Limits, name, watched)
        both.hand_over()
    assert {settled for _, settled in seen} == {1000}
    clients = [clients for clients, _ in seen]
    assert (min(clients), max(clients)) == (1000, 1000 + BATCH_CLIENTS)


def test_who_is_not_too_low_if_its_worker_is_interrupted_while_it_adds_up() -> None:
    """It reads the new worker's cell, and then the old one's: a batch passes between the two."""
    scoreboard = Scoreboard.create(2)
    new, old = (Limits(Config(), scoreboard, slot) for slot in range(2))
    for fd in range(10):
        assert not old.admit(fd, TCP)
    reader = Scoreboard.attach(scoreboard.fd, 2)

    class Interrupted:
        """The cells of the clients. A batch passes when the first one has been read."""

        def __iter__(self) -> Iterator[int]:
            cells = scoreboard.by_slot("clients")
            yield cells[0]
            if old.clients == 10:
                new.take_over([TCP] * 10)
                old.hand_over([TCP] * 10, 0)
            yield scoreboard.by_slot("clients")[1]

    reader._clients = Interrupted()  # type: ignore[assignment]
    assert reader.clients() == 10


# Failures.


def test_a_successor_of_another_format_gets_no_clients() -> None:
    with pair() as both:
        client = both.connect()
        greeting = {"format": handover.FORMAT + 1, "anything": "else"}
        both.theirs.send(json.dumps(greeting).encode())
        sender = Sender(both.old, both.ours)
        assert not sender.greet()
        sender.close()
        assert ask(client) == b"42\n"
        assert both.figures() == (1, 0, 1)


def test_a_successor_that_says_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "GREETING_SECONDS", 0.1)
    with pair() as both, pytest.raises(HandoverError, match="the new worker does not begin"):
        Sender(both.old, both.ours).greet()


def test_a_successor_that_cannot_read_a_batch_leaves_it_to_the_old_worker() -> None:
    with pair() as both:
        client = both.connect()
        receiver = gevent.spawn(receive, both.new, 1, both.theirs)
        sender = Sender(both.old, both.ours)
        assert sender.greet()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(handover, "describe", lambda *_: {"of": "another shape"})
            with pytest.raises(SuccessorDiedError):
                sender.send_ready()
        sender.close()
        receiver.join(LIMIT)
        assert isinstance(receiver.exception, KeyError), "which ends the worker"
        assert both.figures() == (1, 0, 1)
        assert ask(client) == b"42\n"


def test_an_error_reply_with_another_name_is_an_internal_error() -> None:
    with pair() as both:
        both.connect()
        [client] = both.old.clients.by_fd.values()
        fields = handover.describe(client, Rest(error=INTERNAL), both.old.clients)
        fields["error"] = "renamed"
        fd = os.dup(client.sock.fileno())
        restored = handover.restore(both.new.clients, fd, fields, io.BytesIO())
        assert both.new.clients.parked.pop(restored).error is INTERNAL
        restored.sock.close()


def test_a_handover_is_given_up_although_another_process_has_the_successors_end() -> None:
    with pair() as both:
        client = both.connect()
        both.theirs.send(Greeting(1, 100).encode())
        sender = Sender(both.old, both.ours)
        assert sender.greet()
        sending = gevent.spawn(sender.send_ready)
        gevent.sleep(0.05)
        sender.give_up()
        sending.join(LIMIT)
        assert isinstance(sending.exception, SuccessorDiedError)
        sender.close()
        assert ask(client) == b"42\n"


def test_a_successor_without_enough_descriptors_is_an_error() -> None:
    with pair() as both:
        for _ in range(3):
            both.connect()
        both.theirs.send(Greeting(1, 2).encode())
        with pytest.raises(HandoverError, match="descriptors for 2 clients, and 3 are connected"):
            Sender(both.old, both.ours).greet()


def test_a_batch_that_finds_no_descriptors_stays_with_the_old_worker() -> None:
    with pair() as both:
        clients = [both.connect() for _ in range(5)]
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        for _ in range(3):  # What earlier tests have left would free descriptors later.
            gc.collect()
            gevent.sleep(0.02)
        with open("/dev/null") as probe:  # The next two descriptors are free.
            limit = probe.fileno() + 2
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        try:
            assert both.hand_over().clients == 0
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert both.figures() == (5, 0, 5)
        assert {ask(client, b"WHO\n") for client in clients} == {b"5\n"}


def test_if_the_successor_dies_before_its_answer_the_batch_is_served_as_before() -> None:
    with pair() as both:
        clients = [both.connect() for _ in range(5)]
        clients[1].sendall(b"WH")
        gevent.sleep(0.05)
        sender = Sender(both.old, both.ours)
        both.theirs.send(Greeting(1, 100).encode())
        assert sender.greet()

        def die() -> None:
            _, fds, *_ = socket.recv_fds(both.theirs, 100_000, 10)
            for fd in fds:
                _socket.close(fd)
            both.theirs.close()

        successor = gevent.spawn(die)
        for client in clients[2:]:
            client.sendall(b"WHO\n")
        with pytest.raises(SuccessorDiedError):
            sender.send_ready()
        successor.join(LIMIT)
        sender.close()
        assert [read(client) for client in clients[2:]] == [b"5\n"] * 3
        assert ask(clients[1], b"Y\n") == b"42\n"
        assert ask(clients[0]) == b"42\n"
        assert both.figures() == (5, 0, 5)


def test_if_the_old_worker_dies_the_successor_keeps_what_it_has_received() -> None:
    with pair() as both:
        client = both.connect()
        receiver = gevent.spawn(receive, both.new, 1, both.theirs)
        sender = Sender(both.old, both.ours)
        assert sender.greet()
        [(moving, rest)] = sender._next_batch().items()
        text = json.dumps(handover.describe(moving, rest, both.old.clients))
        with handover._bytes_of([rest]) as file:
            fds = [moving.sock.fileno(), file.fileno()]
            socket.send_fds(both.ours, [f"[{text}]".encode()], fds)
        both.ours.close()
        receiver.join(LIMIT)
        both.scoreboard.clear_dead_worker(0)
        assert both.figures() == (0, 1, 1)
        assert ask(client, b"WHO\n") == b"1\n"
        assert accounts(both.scoreboard) == 1


def accounts(scoreboard: Scoreboard) -> int:
    """The clients that are connected by the counters."""
    totals = scoreboard.totals()
    return totals["clients_accepted"] - totals["clients_closed"] - totals["clients_lost"]


def test_if_the_successor_dies_before_its_answer_is_read_its_clients_are_closed() -> None:
    scoreboard = Scoreboard.create(2)
    limits = [Limits(Config(), scoreboard, slot) for slot in range(2)]
    for number in range(30):
        assert not limits[0].admit(number, TCP)
    limits[1].take_over([TCP] * 20)
    # The supervisor takes them for those of the old worker, which reads now that they are not.
    assert scoreboard.clear_dead_worker(1) == 0
    limits[0].hand_over([TCP] * 20, 1)
    assert scoreboard.clients() == accounts(scoreboard) == 10


def test_clients_that_were_arriving_are_not_lost_with_the_successor() -> None:
    scoreboard = Scoreboard.create(2)
    limits = [Limits(Config(), scoreboard, slot) for slot in range(2)]
    for number in range(30):
        assert not limits[0].admit(number, TCP)
    limits[1].take_over([TCP] * 20)
    limits[0].hand_over([TCP] * 20, 1)
    limits[1].take_over([TCP] * 10)
    assert scoreboard.clear_dead_worker(1) == 20
    assert scoreboard.clients() == scoreboard.settled_clients() == 10


def test_a_worker_that_dies_in_a_transfer_ends_it_and_another_worker_does_not() -> None:
    scoreboard = Scoreboard.create(3)
    flags = scoreboard.by_slot("is_transferring")
    with scoreboard.transfer(1):
        scoreboard.clear_dead_worker(2)
        assert list(flags) == [0, 1, 0]
        scoreboard.clear_dead_worker(1)
        assert list(flags) == [0, 0, 0]


# Reloads of a server.

MODULE = """
import time
from gserver.commands import command
from lab.commands import napping, pid, replying

nap = napping("NAP", 0.4)
large = replying("LARGE", 20_000_000)
"""


def test_a_reload_keeps_every_client_whatever_it_does(tmp_path: Path) -> None:
    # Half a line must not be too slow, even if the machine is.
    options = argv("--workers 2 --admin-port 0 --line-timeout 0 --write-timeout 0")
    with extended(tmp_path, MODULE, *options) as server, ExitStack() as stack:
        idle, partial, busy, slow, asking = clients = [
            stack.enter_context(server.client()) for _ in range(5)
        ]
        until(lambda: asking.who() == 5, "the clients are counted")
        partial.send(b"WHY\nWH")
        assert partial.line() == b"42\n"
        busy.send(b"NAP\nWHY\nNAP\nWHERE\n")
        slow.send(b"LARGE\nWHY\n")
        server.send_signal(signal.SIGHUP)
        while not server.events("server.reloaded"):
            assert 5 <= asking.who() <= 10  # A batch counts twice for a moment.
            assert asking.ask(b"WHY") == b"42"
        partial.send(b"Y\n")
        assert partial.line() == b"42\n"
        assert [busy.line() for _ in range(3)] == [b"rested\n", b"42\n", b"rested\n"]
        assert len(slow.line()) == 20_000_001
        assert slow.line() == b"42\n"
        assert {client.who() for client in (idle, asking)} == {5}
        assert not server.events("worker.cut_off")
        handed_over = server.events("worker.handed_over")
        assert len(handed_over) == 2
        assert len(clients) == 5


def test_after_a_handover_that_fails_the_old_worker_serves_and_accepts(tmp_path: Path) -> None:
    with extended(tmp_path, MODULE) as server, ExitStack() as stack:
        clients = [stack.enter_context(server.client()) for _ in range(10)]
        until(lambda: clients[0].who() == 10, "the clients are counted")
        [old] = server.workers()
        # The new worker has room for five clients.
        psutil.Process(server.pid).rlimit(psutil.RLIMIT_NOFILE, (69, 69))
        server.send_signal(signal.SIGHUP)
        assert "descriptors for 5 clients" in server.wait_for("server.reload_failed")["message"]
        until(lambda: server.workers() == [old], "the new worker has ended")
        with server.client() as new:
            assert new.who() == 11
        assert {client.who() for client in clients} <= {10, 11}


def test_clients_that_the_successor_has_rejected_take_no_places() -> None:
    with pair(max_clients=1) as both:
        clients = [both.connect(to=both.new) for _ in range(3)]
        assert (len(clients), len(both.new.clients.rejected)) == (3, 2)
        receiver = gevent.spawn(receive, both.new, 1, both.theirs)
        assert Greeting.parse(both.ours.recv(1000)) == Greeting(1, 999)
        receiver.kill()
