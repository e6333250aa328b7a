"""What signals ask of a server, one after another. No process is signalled here: times are made up."""

import logging
import math
import os
import pty
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from signal import SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2
from time import monotonic

import pytest

from gserver.supervise.phases import GIVE_UP_SECONDS, Orders


def orders(*numbers: signal.Signals, delay: float = 10.0, timeout: float = 40.0) -> Orders:
    """A server's orders after signals at 100, 101 …"""
    given = Orders(delay, timeout)
    for now, number in enumerate(numbers, 100):
        given.heed(number, now)
    return given


@pytest.mark.parametrize(
    ("numbers", "retire_at", "drain_at", "is_forced"),
    [
        ((), math.inf, math.inf, False),
        ((SIGHUP,), math.inf, math.inf, False),
        ((SIGTERM,), math.inf, 110, False),
        ((SIGINT,), math.inf, 110, False),
        ((SIGTERM, SIGTERM), math.inf, 110, True),
        ((SIGINT, SIGTERM), math.inf, 110, True),
        ((SIGUSR2,), 110, 150, False),
        ((SIGUSR2, SIGUSR2), 110, 150, False),
        ((SIGUSR2, SIGTERM), 110, 101, False),
        ((SIGUSR2, SIGINT, SIGTERM), 110, 101, True),
        ((SIGTERM, SIGUSR2), math.inf, 110, False),
    ],
    ids=lambda value: (
        "+".join(number.name for number in value) if isinstance(value, tuple) else None
    ),
)
def test_what_signals_add_up_to(
    numbers: tuple[signal.Signals, ...], retire_at: float, drain_at: float, is_forced: bool
) -> None:
    given = orders(*numbers)
    assert (given.retire_at, given.drain_at, given.is_forced) == (retire_at, drain_at, is_forced)
    assert given.is_stopping == (drain_at < math.inf)


@pytest.mark.parametrize(
    ("numbers", "reloads"),
    [
        ((SIGHUP, SIGHUP), 2),
        ((SIGUSR2, SIGHUP), 0),
        ((SIGTERM, SIGHUP), 0),
        ((SIGHUP, SIGTERM), 1),
        ((SIGUSR1,), 0),
    ],
)
def test_a_hangup_reloads_unless_the_server_is_stopping(
    numbers: tuple[signal.Signals, ...], reloads: int
) -> None:
    assert orders(*numbers).reloads == reloads


def test_a_stop_after_a_drain_that_nobody_signalled_forces_nothing() -> None:
    given = orders()
    given.drain(50.0)
    given.heed(SIGTERM, 100)
    assert (given.drain_at, given.is_forced) == (50.0, False)
    given.heed(SIGTERM, 101)
    assert given.is_forced


def test_a_drain_is_never_put_off() -> None:
    given = orders(SIGTERM)
    given.drain(500.0)
    assert given.drain_at == 110


def test_a_stop_is_over_some_time_after_its_deadline_whoever_is_left() -> None:
    given, began = Orders(0.0, 40.0), monotonic()
    assert given.over_at == math.inf
    given.heed(SIGTERM, began)
    over_at = given.over_at
    assert over_at == pytest.approx(began + 40 + GIVE_UP_SECONDS, abs=0.5)
    given.heed(SIGTERM, began + 1)
    given.drain(0.0)
    assert given.over_at == over_at
    retired = orders(SIGUSR2, delay=10.0, timeout=40.0)
    assert retired.over_at - monotonic() == pytest.approx(40 + GIVE_UP_SECONDS, abs=1)


@contextmanager
def terminal_as_stdin() -> Iterator[int]:
    """A terminal as descriptor 0; the body gets the other end of it, and may close it."""
    saved = os.dup(0)
    other, terminal = pty.openpty()
    os.dup2(terminal, 0)
    os.close(terminal)
    try:
        yield other
    finally:
        os.dup2(saved, 0)
        os.close(saved)


def test_a_hangup_of_a_terminal_that_is_there_reloads_and_of_one_that_has_gone_stops() -> None:
    with terminal_as_stdin() as other:
        given = Orders(10.0, 40.0)
        given.heed(SIGHUP, 100)
        assert (given.reloads, given.is_stopping) == (1, False)
        os.close(other)
        given.heed(SIGHUP, 101)
        given.heed(SIGHUP, 102)  # Closing sends more than one.
        assert (given.reloads, given.drain_at, given.is_forced) == (1, 111, False)


def test_what_follows_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        orders(SIGHUP, SIGUSR2, SIGHUP, SIGTERM, SIGINT)
    said = [message.partition(":")[0] for message in caplog.messages]
    assert said == ["SIGHUP", "SIGUSR2", "SIGTERM", "SIGINT again"]


def test_a_reload_ends_carried_out_or_given_up(caplog: pytest.LogCaptureFixture) -> None:
    orders = Orders(0.0, 4.0)
    assert not orders.is_reloading
    for _ in range(2):
        orders.heed(signal.SIGHUP, 1.0)
    orders.give_up_reload(1, "no such file")
    assert (orders.is_reloading, orders.reload_failure) == (True, "no such file")
    orders.end_reload()
    assert not orders.is_reloading
    assert "reload given up, the one before it goes on: no such file" in caplog.text
    orders.heed(signal.SIGHUP, 1.0)
    assert (orders.is_reloading, orders.reload_failure) == (True, "")
    orders.give_up_reload(1, "empty")
    assert (orders.is_reloading, orders.reload_failure) == (False, "empty")
    assert "reload given up, the old workers stay: empty" in caplog.text
