"""How a connection waits for bytes, with real socket pairs under gevent's loop, in this process,
unpatched.
"""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, cast

import gevent
import pytest

from gserver.serve.receiver import BURST_BYTES, PIECE_BYTES, Receiver
from tests.running import LIMIT, PATIENCE

#: A timeout that is over soon, and one that a test never waits out.
SHORT = 0.05
LONG = LIMIT


@contextmanager
def pair() -> Iterator[tuple[Receiver, socket.socket]]:
    """A receiver, and the socket of its peer."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with closing(ours), closing(theirs), closing(Receiver(ours)) as receiver:
        yield receiver, theirs


def started(
    receiver: Receiver, timeout_seconds: float | None
) -> "gevent.Greenlet[..., bytes | None]":
    """A greenlet that waits in `receive` already."""
    greenlet = gevent.spawn(receiver.receive, timeout_seconds)
    gevent.sleep(0)
    assert receiver.is_waiting
    return greenlet


def loop_turns() -> int:
    """How often the event loop has looked for events."""
    return cast(int, cast(Any, gevent.get_hub().loop).iteration)


@pytest.mark.parametrize("timeout", [None, LONG, 0, -1])
def test_bytes_that_are_there_are_received_at_once(timeout: float | None) -> None:
    with pair() as (receiver, peer):
        peer.sendall(b"WHO\n")
        assert receiver.receive(timeout) == b"WHO\n"
        peer.sendall(b"WHY\n")
        assert receiver.receive(timeout) == b"WHY\n"


@pytest.mark.parametrize("timeout", [None, LONG])
def test_bytes_that_come_later_end_the_wait(timeout: float | None) -> None:
    with pair() as (receiver, peer):
        waiting = started(receiver, timeout)
        gevent.sleep(SHORT)
        assert receiver.is_waiting
        peer.sendall(b"WHO\n")
        assert waiting.get(timeout=LIMIT) == b"WHO\n"
        assert not receiver.is_waiting


def test_no_more_than_a_piece_is_taken_at_once_and_nothing_is_lost() -> None:
    sent = bytes(range(256)) * 40
    assert len(sent) > 2 * BURST_BYTES
    with pair() as (receiver, peer):
        peer.sendall(sent)
        peer.shutdown(socket.SHUT_WR)
        pieces = []
        for timeout in (None, 0, LONG) * len(sent):
            pieces.append(receiver.receive(timeout) or b"")
            if not pieces[-1]:
                break
        assert b"".join(pieces) == sent
        assert {len(piece) for piece in pieces} == {PIECE_BYTES, 0}


def test_between_two_pieces_the_loop_looks_who_has_spoken_however_many_have_more() -> None:
    order: list[str] = []

    def receive_all(name: str, receiver: Receiver) -> None:
        while receiver.receive(None):
            order.append(name)

    with pair() as (one, one_peer), pair() as (other, other_peer), pair() as (modest, modest_peer):
        for peer in (one_peer, other_peer):
            peer.sendall(b"a" * BURST_BYTES)
            peer.shutdown(socket.SHUT_WR)

        def speak() -> None:
            modest_peer.sendall(b"b")
            modest_peer.shutdown(socket.SHUT_WR)
            order.append("spoke")

        waiting = started(modest, None)
        greedy = [
            gevent.spawn(receive_all, name, receiver)
            for name, receiver in (("one", one), ("other", other))
        ]
        # While both have pieces left: what it says is heard before each has had another turn.
        gevent.get_hub().loop.run_callback(lambda: until_both(order, speak))
        waiting.link(lambda _: order.append("heard"))
        gevent.joinall(greedy, timeout=LIMIT)
        assert waiting.get(timeout=LIMIT) == b"b"
    assert order.count("one") == order.count("other") == BURST_BYTES // PIECE_BYTES
    assert len(order[order.index("spoke") : order.index("heard")]) <= 3, order
    assert order.index("heard") < len(order) - 3


def until_both(order: list[str], act: Callable[[], None]) -> None:
    """Act once both have begun."""
    if {"one", "other"} <= set(order):
        act()
    else:
        gevent.get_hub().loop.run_callback(lambda: until_both(order, act))


def test_the_others_have_their_turn_between_two_bursts() -> None:
    order = []

    def receive(name: str, receiver: Receiver, count: int) -> None:
        for _ in range(count):
            receiver.receive(None)
            order.append(name)

    with pair() as (greedy, greedy_peer), pair() as (modest, modest_peer):
        greedy_peer.sendall(b"a" * BURST_BYTES * 2)
        modest_peer.sendall(b"b")
        greenlets = [
            gevent.spawn(receive, "greedy", greedy, 10),
            gevent.spawn(receive, "modest", modest, 1),
        ]
        gevent.joinall(greenlets, timeout=LIMIT)
    assert order.index("modest") <= 1
    assert order.count("greedy") == 10


def test_a_timeout_ends_the_wait_with_none_and_not_too_early() -> None:
    with pair() as (receiver, peer):
        began = time.monotonic()
        assert receiver.receive(SHORT) is None
        assert SHORT * 0.9 <= time.monotonic() - began < SHORT + PATIENCE
        assert not receiver.is_waiting
        # And it leaves nothing behind: the next wait has its own time, and the bytes are there.
        waiting = started(receiver, LONG)
        gevent.sleep(SHORT * 2)
        assert receiver.is_waiting
        peer.sendall(b"WHO\n")
        assert waiting.get(timeout=LIMIT) == b"WHO\n"


def test_the_timer_of_a_wait_that_had_bytes_does_not_end_the_next_one() -> None:
    with pair() as (receiver, peer):
        peer.sendall(b"WHO\n")
        assert receiver.receive(SHORT) == b"WHO\n"
        waiting = started(receiver, None)
        gevent.sleep(SHORT * 2)
        assert receiver.is_waiting
        peer.sendall(b"WHY\n")
        assert waiting.get(timeout=LIMIT) == b"WHY\n"


@pytest.mark.parametrize("timeout", [0, -1])
def test_a_timeout_of_nothing_does_not_wait_but_gives_the_others_their_turn(timeout: float) -> None:
    turns: list[int] = []
    with pair() as (receiver, _):
        other = gevent.spawn(turns.append, 1)
        before = loop_turns()
        assert receiver.receive(timeout) is None
        assert turns == [1]
        assert loop_turns() - before <= 1
        other.join(LIMIT)


def test_bytes_that_came_before_the_timeout_count_although_the_loop_was_late() -> None:
    # Both are due when a loop that was held up looks again, and the bytes came first.
    with pair() as (receiver, peer):
        waiting = started(receiver, SHORT)
        peer.sendall(b"WHO\n")
        time.sleep(SHORT * 2)  # holds up the whole loop
        assert waiting.get(timeout=LIMIT) == b"WHO\n"


@pytest.mark.parametrize("timeout", [None, LONG])
def test_an_interrupt_ends_the_wait_with_none(timeout: float | None) -> None:
    with pair() as (receiver, peer):
        waiting = started(receiver, timeout)
        receiver.interrupt()
        assert waiting.get(timeout=LIMIT) is None
        peer.sendall(b"WHO\n")
        assert receiver.receive(timeout) == b"WHO\n"


def test_two_interrupts_end_one_wait() -> None:
    with pair() as (receiver, peer):
        waiting = gevent.spawn(lambda: [receiver.receive(None), receiver.receive(None)])
        gevent.sleep(0)
        receiver.interrupt()
        receiver.interrupt()
        gevent.sleep(SHORT)
        assert receiver.is_waiting
        peer.sendall(b"WHO\n")
        assert waiting.get(timeout=LIMIT) == [None, b"WHO\n"]


def test_bytes_that_come_with_an_interrupt_are_not_lost() -> None:
    with pair() as (receiver, peer):
        waiting = started(receiver, None)
        peer.sendall(b"WHO\n")
        receiver.interrupt()
        received = waiting.get(timeout=LIMIT) or receiver.receive(LONG)
        assert received == b"WHO\n"


def test_an_interrupt_that_comes_with_the_timeout_ends_one_wait_only() -> None:
    with pair() as (receiver, peer):
        waiting = started(receiver, SHORT)
        time.sleep(SHORT * 2)  # The timer is due, and has not been heard yet.
        receiver.interrupt()
        assert waiting.get(timeout=LIMIT) is None
        waiting = started(receiver, None)
        gevent.sleep(SHORT)
        assert receiver.is_waiting
        peer.sendall(b"WHO\n")
        assert waiting.get(timeout=LIMIT) == b"WHO\n"


def test_an_interrupt_without_a_wait_does_nothing() -> None:
    with pair() as (receiver, peer):
        assert not receiver.is_waiting
        receiver.interrupt()
        waiting = started(receiver, None)
        gevent.sleep(SHORT)
        assert receiver.is_waiting
        peer.sendall(b"WHO\n")
        assert waiting.get(timeout=LIMIT) == b"WHO\n"


@pytest.mark.parametrize("timeout", [None, LONG, 0])
def test_the_end_of_input_is_empty_bytes_after_all_others(timeout: float | None) -> None:
    with pair() as (receiver, peer):
        peer.sendall(b"WHO")
        peer.shutdown(socket.SHUT_WR)
        assert receiver.receive(timeout) == b"WHO"
        assert receiver.receive(timeout) == b""
        assert receiver.receive(timeout) == b""  # and stays so


def test_the_end_of_input_ends_a_wait() -> None:
    with pair() as (receiver, peer):
        waiting = started(receiver, None)
        peer.shutdown(socket.SHUT_WR)
        assert waiting.get(timeout=LIMIT) == b""


@pytest.mark.parametrize("timeout", [None, LONG, 0])
def test_a_broken_connection_raises(timeout: float | None) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with closing(ours), closing(Receiver(ours)) as receiver:
        ours.sendall(b"unread, so that closing is a reset")
        theirs.close()
        with pytest.raises(ConnectionResetError):
            receiver.receive(timeout)
        assert not receiver.is_waiting


@pytest.mark.parametrize("is_at_end", [False, True], ids=["bytes", "end of input"])
def test_what_comes_while_the_greenlet_is_busy_does_not_make_the_loop_spin(is_at_end: bool) -> None:
    with pair() as (receiver, peer):
        peer.sendall(b"NAP\n")
        assert receiver.receive(None) == b"NAP\n"  # The watcher is started now, and stays so.
        peer.sendall(b"WHO\n")
        if is_at_end:
            peer.shutdown(socket.SHUT_WR)
        before = loop_turns()
        gevent.sleep(SHORT)
        assert loop_turns() - before < 10  # A loop that spins makes thousands.
        # And it is started again for the next wait, also for bytes that come during that.
        assert receiver.receive(None) == b"WHO\n"
        waiting = started(receiver, LONG)
        peer.shutdown(socket.SHUT_WR) if is_at_end else peer.sendall(b"WHY\n")
        assert waiting.get(timeout=LIMIT) == (b"" if is_at_end else b"WHY\n")


def test_each_receiver_is_woken_by_its_own_bytes_alone() -> None:
    with pair() as (one, one_peer), pair() as (two, two_peer):
        waiting_one, waiting_two = started(one, None), started(two, None)
        two_peer.sendall(b"2")
        assert waiting_two.get(timeout=LIMIT) == b"2"
        assert one.is_waiting
        one_peer.sendall(b"1")
        assert waiting_one.get(timeout=LIMIT) == b"1"


def test_a_receiver_that_is_closed_leaves_nothing_in_the_loop_and_its_socket_open() -> None:
    loop = cast(Any, gevent.get_hub().loop)
    before = loop.activecnt
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with closing(ours), closing(theirs):
        receiver = Receiver(ours)
        theirs.sendall(b"WHO\n")
        receiver.receive(LONG)
        assert loop.activecnt == before + 1
        receiver.close()
        assert loop.activecnt == before
        theirs.sendall(b"WHY\n")
        assert ours.recv(10) == b"WHY\n"
