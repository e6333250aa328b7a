"""Crowds and floods: a good client still gets replies within twice the usual time.

The server and the good client run at a higher real-time priority than the attackers. Real attackers
have CPUs of their own, so theirs must not compete with the server's. This needs root.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from lab.admin import status
from lab.attackers import Attacker
from lab.pace import Pace, measured
from lab.rows import Notes, Variant, row
from lab.running import unavailable, until
from lab.site import Site

Start = Callable[..., Site]
CROWD = 50_000
#: Real-time priorities of the server and the good client, and of the attackers.
SERVER_PRIORITY, ATTACKER_PRIORITY = 50, 10
QUIET_SECONDS = 3.0
#: A percentile below this is noise: it is the time of a few context switches.
NOISE_SECONDS = 0.0005


@pytest.fixture(autouse=True)
def undisturbed() -> Iterator[None]:
    """This process, and the processes that it starts, have priority over all others."""
    if os.geteuid() != 0:
        unavailable("real-time priorities need root")
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(SERVER_PRIORITY))
    except OSError as error:
        unavailable(f"no real-time priorities: {error}")
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def attack(
    name: str, site: Site, seconds: float = 0, number: int = 0, source: str = "127.0.0.1"
) -> Attacker:
    """Start an attacker at the lower priority."""
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(ATTACKER_PRIORITY))
    try:
        return Attacker(name, site, seconds, number, source)
    finally:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(SERVER_PRIORITY))


@contextmanager
def compared(site: Site, notes: Notes) -> Iterator[None]:
    """Compare the good client's 99th percentile during the body with the one before it."""
    with measured(site) as before:
        time.sleep(QUIET_SECONDS)
    with measured(site) as during:
        yield
    assert_as_usual(notes, *before, *during)


def assert_as_usual(notes: Notes, usual: Pace, now: Pace) -> None:
    """Check that the 99th percentile is at most twice the usual one, or is noise."""
    assert min(usual.replies, now.replies) > 300
    notes.measured("usual p99", usual.p99 * 1000, "ms")
    notes.measured("p99 under attack", now.p99 * 1000, "ms")
    notes.measured("times the usual", now.p99 / usual.p99, "")
    assert now.p99 <= max(2 * usual.p99, NOISE_SECONDS), f"{now} under attack, usually {usual}"


@row("50,000 clients", Variant(4), quick=None)
def test_50000_clients_at_once(start: Start, notes: Notes) -> None:
    site = start("--max-clients", str(CROWD + 100), "--backlog", "1024")
    with measured(site) as usual_paces:
        time.sleep(QUIET_SECONDS)
    # An address has 28,000 ports, and a process may open 20,000 files.
    crowds = [attack("crowd", site, 0, CROWD // 5, f"127.0.1.{number}") for number in range(5)]
    with site.client() as one:
        assert one.who() == CROWD + 1
    each = site.clients()
    notes.happened(f"{sum(each)} clients; per worker: {each}")
    with measured(site) as paces:
        time.sleep(QUIET_SECONDS)
        assert sum(crowd.result() for crowd in crowds) == CROWD
    assert_as_usual(notes, *usual_paces, *paces)
    site.assert_as_before()


@row("Flood of connects", Variant(1), Variant(2), Variant(1, True), quick=None)
def test_a_flood_of_connects_beyond_the_limit(start: Start, notes: Notes) -> None:
    site = start("--max-clients", "10")
    with ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(site.client()).ask(b"WHY")
        with compared(site, notes), site.client() as last:
            assert last.who() == 10
            rejected = status(site.server)["error_replies"]["too_many_clients"]
            floods = [attack("connects", site, 5) for _ in range(2)]
            replies = sum(flood.result() for flood in floods)
            rejected = status(site.server)["error_replies"]["too_many_clients"] - rejected
            assert last.who() == 10
        notes.happened(f"{replies} clients got the error reply, {rejected} were counted")
        assert rejected >= replies > 1000
    site.assert_as_before()


@row("1,000 slowloris clients", Variant(1), Variant(2), Variant(1, True), quick=None)
def test_1000_clients_drip_bytes(start: Start, notes: Notes, variant: Variant) -> None:
    site = start("--line-timeout", "6", crowd=1000 // variant.workers)
    with measured(site) as usual:
        time.sleep(QUIET_SECONDS)
    flood = attack("dribblers", site, 8, 1000)
    until(lambda: sum(site.clients()) == 1000, "all clients are connected")
    with measured(site) as paces:
        time.sleep(QUIET_SECONDS)
        dribbling = status(site.server)["clients"]["now"]
    assert flood.result() == 1000
    until(
        lambda: status(site.server)["error_replies"]["too_slow"] == 1000, "all clients are closed"
    )
    notes.happened(f"{dribbling - 1} clients sent a byte every 0.5 s at once, and were closed")
    assert dribbling == 1001
    assert_as_usual(notes, *usual, *paces)
    site.assert_as_before()


@row("1,000 silent TLS peers", Variant(1, True), Variant(2, True), quick=None)
def test_1000_peers_never_begin_the_handshake(start: Start, notes: Notes) -> None:
    site = start("--tls-handshake-timeout", "2", "--max-clients", "20")
    with measured(site) as usual:
        time.sleep(QUIET_SECONDS)
    flood = attack("silent", site, 6, 1000)
    until(
        lambda: sum(worker.num_fds() for worker in site.server.workers()) > 1000,
        "all clients are connected",
    )
    with measured(site) as paces:
        time.sleep(QUIET_SECONDS)
        with site.client() as client:
            assert client.who() == 2
    count = flood.result()
    notes.happened(f"1,000 silent peers at once, which connected {count} times in total")
    assert count > 1000
    assert_as_usual(notes, *usual, *paces)
    site.assert_as_before()


@row(
    "A million bad lines",
    Variant(1),
    Variant(2),
    Variant(1, True),
    quick=None,
    values={"one": 1, "four": 4},
)
def test_a_million_bad_lines_from_one_or_four(start: Start, notes: Notes, kind: int) -> None:
    site = start()
    with compared(site, notes):
        floods = [attack("bad_lines", site, number=1_000_000 // kind) for _ in range(kind)]
        replies = sum(flood.result() for flood in floods)
        counted = status(site.server)["error_replies"]["unknown_command"]
    notes.happened(f"{replies} replies, {counted} counted as unknown")
    assert replies == 1_000_000
    until(
        lambda: status(site.server)["error_replies"]["unknown_command"] >= replies,
        "all lines are counted",
    )
    site.assert_as_before()
