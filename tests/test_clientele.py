"""The limits: who is counted in is counted out, and no two workers give away the last place."""

from gserver.config import Config
from gserver.protocol import TOO_MANY_CLIENTS
from gserver.scoreboard import Scoreboard
from gserver.serve.limits import Limits


def two_workers(max_clients: int) -> tuple[Scoreboard, Limits, Limits]:
    scoreboard = Scoreboard.create(2)
    config = Config(max_clients=max_clients)
    return scoreboard, Limits(config, scoreboard, 0, {}), Limits(config, scoreboard, 1, {})


def test_who_is_admitted_counts_until_released() -> None:
    scoreboard, one, other = two_workers(10)
    assert one.admit(3) is None
    assert other.admit(3) is None
    assert scoreboard.clients() == 2
    one.release()
    assert scoreboard.clients() == 1
    totals = scoreboard.totals()
    assert (totals["clients_accepted"], totals["clients_closed"], totals["clients"]) == (2, 1, 1)


def test_the_limit_is_over_all_workers_and_who_is_not_admitted_leaves_no_trace() -> None:
    scoreboard, one, other = two_workers(2)
    assert one.admit(3) is None
    assert other.admit(3) is None
    assert one.admit(4) is TOO_MANY_CLIENTS
    assert other.admit(4) is TOO_MANY_CLIENTS
    assert scoreboard.clients() == 2
    totals = scoreboard.totals()
    assert (totals["clients_accepted"], totals["error_replies.too_many_clients"]) == (2, 2)
    other.release()
    assert one.admit(4) is None


def test_a_refusal_is_counted_under_its_name() -> None:
    scoreboard, one, other = two_workers(1)
    one.refuse(TOO_MANY_CLIENTS)
    other.refuse(TOO_MANY_CLIENTS)
    totals = scoreboard.totals()
    assert {name: total for name, total in totals.items() if total} == {
        "error_replies.too_many_clients": 2
    }
