"""The scoreboard: a table of integers that all processes of a server share."""

import os
import subprocess
import sys
import time

import pytest

from gserver.errors import EXIT_USAGE, UsageError
from gserver.metrics import METRICS, Kind
from gserver.protocol import MAX_NAME_BYTES
from gserver.scoreboard import COMMAND_CELLS, MAX_COMMANDS, SERVER_CELLS, WORKER_CELLS, Scoreboard
from lab.running import environment

SLOTS = 3


def attached(scoreboard: Scoreboard) -> Scoreboard:
    """Map the same table a second time, as another process would."""
    return Scoreboard.attach(scoreboard.fd, scoreboard.slots)


def emptied(scoreboard: Scoreboard) -> Scoreboard:
    """Set the cells to 0 that a new scoreboard has filled."""
    for name in ("incarnation", "address_key", "server_started_at", "supervisor_heartbeat"):
        assert scoreboard.get(name) > 0
        scoreboard.put(name, 0)
    return scoreboard


def test_a_new_scoreboard_is_all_zero() -> None:
    scoreboard = emptied(Scoreboard.create(SLOTS))
    # The first cell holds the fingerprint.
    assert list(scoreboard.cells[1:]) == [0] * (len(scoreboard.cells) - 1)
    assert set(scoreboard.totals().values()) == {0}
    assert not any(name.startswith("commands.") for name in scoreboard.totals())


def test_two_mappings_share_their_writes() -> None:
    one = Scoreboard.create(SLOTS)
    two = attached(one)
    one.cells[one.cell("clients", 1)] = 5
    two.cells[two.cell("clients", 2)] = 7
    two.cells[two.server_cell("workers")] = 3
    assert one.clients() == two.clients() == 12
    assert one.totals() == two.totals()
    assert one.totals()["workers"] == 3


def test_two_scoreboards_are_two_tables() -> None:
    one, two = Scoreboard.create(SLOTS), Scoreboard.create(SLOTS)
    one.cells[one.cell("clients", 0)] = 1
    assert two.clients() == 0


def test_a_second_process_reads_and_writes() -> None:
    scoreboard = Scoreboard.create(SLOTS)
    scoreboard.cells[scoreboard.cell("clients_accepted", 0)] = 2**62
    script = (
        "from gserver.scoreboard import Scoreboard\n"
        f"scoreboard = Scoreboard.attach({scoreboard.fd}, {SLOTS})\n"
        "scoreboard.cells[scoreboard.cell('clients', 2)] = 9\n"
        "scoreboard.cells[scoreboard.command_cell('NAP', 2)] += 4\n"
        "print(scoreboard.totals()['clients_accepted'])\n"
    )
    output = subprocess.check_output(
        [sys.executable, "-P", "-c", script], pass_fds=[scoreboard.fd], env=environment(), text=True
    )
    assert int(output) == 2**62
    assert scoreboard.clients() == 9
    assert scoreboard.totals()["commands.NAP"] == 4


def test_every_cell_has_a_unique_name() -> None:
    names = [*WORKER_CELLS, *SERVER_CELLS]
    assert sorted(set(names)) == sorted(names)


def test_no_two_names_share_a_cell() -> None:
    scoreboard = Scoreboard.create(SLOTS)
    cells = [scoreboard.cell(name, slot) for name in WORKER_CELLS for slot in range(SLOTS)]
    cells += [
        scoreboard.command_cell(f"C{number}", slot)
        for slot in range(SLOTS)
        for number in range(MAX_COMMANDS)
    ]
    cells += [scoreboard.server_cell(name) for name in SERVER_CELLS]
    assert len(set(cells)) == len(cells)
    # The first cell holds the fingerprint.
    assert all(1 <= cell < len(scoreboard.cells) for cell in cells)


def test_command_names_do_not_overlap_the_cells() -> None:
    scoreboard = Scoreboard.create(SLOTS)
    for slot in range(SLOTS):
        for number in range(MAX_COMMANDS):
            scoreboard.command_cell(f"C{number}".ljust(MAX_NAME_BYTES, "X"), slot)
    emptied(scoreboard)
    assert list(scoreboard.cells[1:]) == [0] * (len(scoreboard.cells) - 1)
    assert (
        len([name for name in scoreboard.totals() if name.startswith("commands.")]) == MAX_COMMANDS
    )


def test_a_command_keeps_its_cell_when_others_are_added() -> None:
    scoreboard = Scoreboard.create(SLOTS)
    first, second = scoreboard.command_cell("WHO", 1), scoreboard.command_cell("NAP", 1)
    # The next worker in that slot has the commands in another order.
    follower = attached(scoreboard)
    assert follower.command_cell("NEW", 1) not in (first, second)
    assert follower.command_cell("NAP", 1) == second
    assert follower.command_cell("WHO", 1) == first
    assert scoreboard.command_cell("NEW", 1) == follower.command_cell("NEW", 1)


def test_each_slot_has_its_own_list_of_commands() -> None:
    scoreboard = Scoreboard.create(SLOTS)
    cells = {scoreboard.command_cell("NAP", slot) for slot in range(SLOTS)}
    assert len(cells) == SLOTS
    scoreboard.command_cell("ONLY-HERE", 0)
    assert scoreboard.command_cell("ELSE", 1) == scoreboard.command_cell("NAP", 1) + COMMAND_CELLS


def test_the_sixty_fifth_command_is_refused() -> None:
    scoreboard = Scoreboard.create(SLOTS)
    cells = [scoreboard.command_cell(f"C{number}", 0) for number in range(64)]
    with pytest.raises(UsageError, match=r"more than 64 command names.*restart gserver"):
        scoreboard.command_cell("ONE-MORE", 0)
    assert [scoreboard.command_cell(f"C{number}", 0) for number in range(64)] == cells
    scoreboard.command_cell("ONE-MORE", 1)  # Another slot has room.


def test_totals_sum_over_the_slots_and_merge_commands_by_name() -> None:
    scoreboard = Scoreboard.create(SLOTS)
    for slot, order in enumerate((("WHO", "NAP"), ("NAP", "WHO"), ("WHO",))):
        for name in order:
            scoreboard.cells[scoreboard.command_cell(name, slot)] += 10**slot
        scoreboard.cells[scoreboard.cell("clients_accepted", slot)] = 10**slot
        scoreboard.cells[scoreboard.cell("error_replies.idle", slot)] = 2 * 10**slot
    scoreboard.cells[scoreboard.server_cell("clients_lost")] = 8
    totals = scoreboard.totals()
    assert totals["clients_accepted"] == 111
    assert totals["error_replies.idle"] == 222
    assert totals["clients_lost"] == 8
    assert (totals["commands.WHO"], totals["commands.NAP"]) == (111, 11)


def test_timestamps_are_not_in_the_totals() -> None:
    scoreboard = Scoreboard.create(SLOTS)
    scoreboard.cells[scoreboard.cell("heartbeat", 1)] = 11
    scoreboard.cells[scoreboard.server_cell("agent_heartbeat")] = 12
    assert tuple(scoreboard.cells[scoreboard.heartbeat_cell(slot)] for slot in (0, 1, -1)) == (
        0,
        11,
        12,
    )
    moments = {metric.name for metric in METRICS if metric.kind is Kind.MOMENT}
    assert {"heartbeat", "agent_heartbeat", "started_at"} <= moments
    assert moments & scoreboard.totals().keys() == set()


def test_totals_have_the_largest_peak_and_the_earliest_expiry() -> None:
    scoreboard = Scoreboard.create(SLOTS)
    assert "tls_expires_at" not in scoreboard.totals()
    for slot, (peak, expires_at) in enumerate(((7, 0), (9, 2_000), (8, 1_000))):
        scoreboard.cells[scoreboard.cell("clients_peak", slot)] = peak
        scoreboard.cells[scoreboard.cell("tls_expires_at", slot)] = expires_at
    totals = scoreboard.totals()
    assert (totals["clients_peak"], totals["tls_expires_at"]) == (9, 1_000)


def test_cluster_figures_are_in_the_totals_once_known() -> None:
    scoreboard = Scoreboard.create(SLOTS)
    scoreboard.put("remote_clients", 7)
    assert not {"cluster_servers", "cluster_clients", "cluster_age_ms"} & scoreboard.totals().keys()
    scoreboard.put("cluster_servers", 3)
    scoreboard.put("cluster_updated_at", time.monotonic_ns() - 1_000_000_000)
    scoreboard.put("cluster_doubtful_at", time.monotonic_ns() // 1_000_000 - 5000)
    scoreboard.cells[scoreboard.cell("clients", 1)] = 4
    totals = scoreboard.totals()
    assert scoreboard.cluster_clients() == totals["cluster_clients"] == 11
    assert totals["cluster_servers"] == 3
    assert totals["cluster_age_ms"] >= 5000
    assert 1000 <= totals["cluster_silent_ms"] < totals["cluster_age_ms"]


def test_clearing_a_dead_worker_zeroes_its_gauge_and_keeps_its_counters() -> None:
    scoreboard = Scoreboard.create(SLOTS)
    for slot in range(SLOTS):
        scoreboard.cells[scoreboard.cell("clients", slot)] = 3 + slot
        scoreboard.cells[scoreboard.cell("clients_accepted", slot)] = 100
    scoreboard.cells[scoreboard.command_cell("WHO", 1)] = 6
    assert scoreboard.clear_dead_worker(1) == 4
    assert scoreboard.clients() == 3 + 5
    assert scoreboard.totals()["clients_accepted"] == 300
    assert scoreboard.totals()["clients_lost"] == 4
    assert scoreboard.totals()["commands.WHO"] == 6
    assert scoreboard.clear_dead_worker(1) == 0


@pytest.mark.parametrize("difference", [1, -1, 2**40], ids=["above", "below", "far"])
def test_a_scoreboard_of_another_version_is_refused(difference: int) -> None:
    scoreboard = Scoreboard.create(SLOTS)
    scoreboard.cells[0] += difference
    with pytest.raises(
        UsageError, match="another version than the installed code: restart the server"
    ) as caught:
        attached(scoreboard)
    assert caught.value.exit_code == EXIT_USAGE


def test_a_file_that_is_not_a_scoreboard_is_refused() -> None:
    fd = os.memfd_create("empty")
    with pytest.raises(UsageError, match="another version"):
        Scoreboard.attach(fd, SLOTS)
    os.close(fd)
