"""The verdict on a server: what counts as wrong, and for how long."""

from typing import Any

import pytest

from gserver.agent.verdict import DEGRADED, HEALTHY, NOT_READY, Facts, judge
from gserver.config import Config
from gserver.metrics import REASONS

NOW = 1_800_000_000.0
DAY = 86_400
CONFIG = Config(server_id="here", redis_url="redis://x", heartbeat_interval_seconds=0.5)
FIGURES = {
    "clients": 5,
    "clients_limit": 10,
    "workers": 2,
    "workers_wanted": 2,
    "cluster_age_ms": 6000,
    "cluster_silent_ms": 1000,
    "tls_expires_at": int(NOW + 15 * DAY),
}
MINUTE = {"mistakes": 1000, "failures": 6, "rejected": 0}
WORKERS = [{"pid": 1, "silent_seconds": 0.2}, {"pid": 2, "silent_seconds": 2.0}]


def server(name: str, *, is_late: bool = False, is_this: bool = False) -> dict[str, Any]:
    return {"id": name, "silent_seconds": 1.25, "is_late": is_late, "is_this": is_this}


MEMBERS = {"error_kind": None, "servers": [server("here", is_this=True), server("other")]}


ENGINES = [{"url": "redis://a:6379", "is_away": False}]


def event(action: str, seconds_ago: float, message: str) -> dict[str, Any]:
    return {"action": action, "at": NOW - seconds_ago, "message": message, "level": "error"}


def facts(**changes: Any) -> Facts:
    """A healthy server, just inside every limit, but for these changes."""
    values: dict[str, Any] = {
        "state": "ready",
        "figures": FIGURES,
        "workers": WORKERS,
        "members": MEMBERS,
        "engines": ENGINES,
        "minute": MINUTE,
        "events": [
            event("log.dropped", 301, "old"),
            event("cluster.server_lost", 301, "x"),
            event("server.reload_failed", 1, "x"),
        ],
        "unix_seconds": NOW,
        "has_failed_reload": False,
        "supervisor_silence": 3.0,
        "endpoints_lost": 0,
    }
    return Facts(**values | changes)


def test_a_server_within_all_limits_is_healthy() -> None:
    assert judge(CONFIG, facts()).as_json() == {"verdict": HEALTHY, "reasons": []}


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "full": ({"figures": FIGURES | {"clients": 10}}, "full", "full: 10 of 10 clients"),
    "rejecting": (
        {"minute": MINUTE | {"rejected": 1}},
        "rejecting",
        "1 client rejected in the last minute",
    ),
    "failing": (
        {"minute": MINUTE | {"failures": 7}},
        "failing",
        "7 commands failed in the last minute",
    ),
    "a silent worker": (
        {"workers": [*WORKERS, {"pid": 3, "silent_seconds": 2.6}]},
        "worker_silent",
        "worker 3 does not answer: no heartbeat for 3 s",
    ),
    "a missing worker": (
        {"figures": FIGURES | {"workers": 1}},
        "workers_missing",
        "1 of 2 workers accept clients",
    ),
    "a socket file that was removed": (
        {"endpoints_lost": 1},
        "endpoint_lost",
        "no client can connect by 1 endpoint",
    ),
    "a supervisor that hangs": (
        {"supervisor_silence": 3.4},
        "supervisor_silent",
        "the supervisor does not answer: no heartbeat for 3 s; a worker that dies stays in WHO",
    ),
    "a silent Redis": (
        {
            "figures": FIGURES | {"cluster_silent_ms": 1001, "cluster_age_ms": 7000},
            "members": MEMBERS | {"error_kind": "busy"},
        },
        "redis_away",
        "Redis does not answer (busy): the count of the other servers is 7.0 s old",
    ),
    "one Redis of two": (
        {"engines": [*ENGINES, {"url": "redis://b:6379", "is_away": True}]},
        "engine_away",
        "Redis at redis://b:6379 does not answer; another one does",
    ),
    "an old count": (
        {"figures": FIGURES | {"cluster_age_ms": 6001}},
        "count_old",
        "the count of the other servers is 6.0 s old, though Redis answers",
    ),
    "Redis away since the start": (
        {
            "figures": {name: FIGURES[name] for name in FIGURES if "cluster" not in name},
            "members": {"error_kind": "auth", "servers": None},
        },
        "redis_away",
        "Redis has not answered since the start (auth)",
    ),
    "a late server": (
        {"members": MEMBERS | {"servers": [server("other", is_late=True)]}},
        "server_late",
        "server other is late: no heartbeat for 1.2 s",
    ),
    "a certificate that expires": (
        {"figures": FIGURES | {"tls_expires_at": int(NOW + 13.9 * DAY)}},
        "certificate",
        "the certificate expires in 13 days",
    ),
    "a certificate that expires today": (
        {"figures": FIGURES | {"tls_expires_at": int(NOW + 3601)}},
        "certificate",
        "the certificate expires in 1 hour",
    ),
    "a certificate that has expired": (
        {"figures": FIGURES | {"tls_expires_at": int(NOW)}},
        "certificate",
        "the certificate has expired",
    ),
    "a failed reload": ({"has_failed_reload": True}, "reload_failed", "x"),
    "a failed reload long ago": (
        {"has_failed_reload": True, "events": []},
        "reload_failed",
        "server.reload_failed",
    ),
    "a lost server": (
        {"events": [event("cluster.server_lost", 299, "server b was lost")]},
        "server_lost",
        "server b was lost",
    ),
    "dropped lines": (
        {"events": [event("log.dropped", 299, "dropped 3 log lines")]},
        "log_dropped",
        "dropped 3 log lines",
    ),
}


@pytest.mark.parametrize(("changes", "name", "text"), WRONG.values(), ids=WRONG)
def test_each_thing_that_is_wrong_is_a_reason(
    changes: dict[str, Any], name: str, text: str
) -> None:
    verdict = judge(CONFIG, facts(**changes))
    assert verdict.word == DEGRADED
    assert verdict.reasons == ((name, text),)


def test_every_reason_of_the_metrics_has_a_case() -> None:
    assert {name for _, name, _ in WRONG.values()} == set(REASONS)


def test_the_own_lateness_is_told_by_the_silence_of_redis() -> None:
    members = MEMBERS | {"servers": [server("here", is_late=True, is_this=True)]}
    assert judge(CONFIG, facts(members=members)).word == HEALTHY


def test_a_server_alone_has_no_reasons_of_a_cluster() -> None:
    figures = {name: FIGURES[name] for name in FIGURES if "cluster" not in name}
    assert judge(Config(server_id="x"), facts(members=None, figures=figures)).word == HEALTHY


@pytest.mark.parametrize("state", ["starting", "draining"])
def test_a_server_that_is_not_ready_says_so_first(state: str) -> None:
    figures = FIGURES | {"workers": 0, "clients": 10}
    verdict = judge(CONFIG, facts(state=state, figures=figures))
    assert verdict.word == NOT_READY
    assert [reason.name for reason in verdict.reasons] == [state, "full"]


def test_clients_that_are_rejected_are_not_commands_that_fail() -> None:
    verdict = judge(CONFIG, facts(minute=MINUTE | {"rejected": 500, "failures": 506}))
    assert [reason.name for reason in verdict.reasons] == ["rejecting"]
