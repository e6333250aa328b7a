"""What is wrong with a server now: one verdict, for the page, `status`, `top` and the metrics.

It looks at the present and the last minutes; only a failed reload stays until a later one succeeds.
This module is pure.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gserver.cluster.membership import LATE_AFTER_INTERVALS
from gserver.config import Config
from gserver.metrics import EXPIRES_SOON_SECONDS, SILENT_SECONDS, SUPERVISOR_SILENT_SECONDS

HEALTHY, DEGRADED, NOT_READY = "healthy", "degraded", "not ready"
#: More failures than this in the last minute are too many.
MAX_FAILURES = 6
#: How long a server that was lost, and lines that were dropped from the log, are mentioned.
RECENT_SECONDS = 300


class Reason(NamedTuple):
    """What is wrong, and a text for people.

    The name is one of `gserver.metrics.REASONS`, or the state of a server that is not ready.
    """

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What the verdict is made from. Times are seconds."""

    #: `ready`, `starting` or `draining`.
    state: str
    figures: Mapping[str, int]
    #: The workers of /status.json.
    workers: Sequence[Mapping[str, Any]]
    #: The servers of the cluster, as /status.json has them; None without a cluster.
    members: Mapping[str, Any] | None
    #: Each Redis of the cluster, as /status.json has them.
    engines: Sequence[Mapping[str, Any]]
    #: Errors of the last minute: `failures`, `rejected`.
    minute: Mapping[str, int]
    #: Recent events.
    events: Sequence[Mapping[str, Any]]
    unix_seconds: float
    has_failed_reload: bool
    #: Seconds since the last heartbeat of the supervisor.
    supervisor_silence: float
    #: Endpoints by which no client can connect.
    endpoints_lost: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """The state of the server in one word, and why."""

    word: str
    reasons: tuple[Reason, ...]

    def as_json(self) -> dict[str, Any]:
        """Return it for /status.json."""
        reasons = [reason._asdict() for reason in self.reasons]
        return {"verdict": self.word, "reasons": reasons}


def judge(config: Config, facts: Facts) -> Verdict:
    """Return the verdict."""
    reasons = tuple(
        reason for find in (_clients, _workers, _cluster, _others) for reason in find(config, facts)
    )
    if facts.state != "ready":
        return Verdict(NOT_READY, (Reason(facts.state, _NOT_READY[facts.state]), *reasons))
    return Verdict(DEGRADED if reasons else HEALTHY, reasons)


_NOT_READY = {
    "starting": "no worker is ready",
    "draining": "the server is stopping: it accepts no new clients",
}


def _clients(_config: Config, facts: Facts) -> Iterator[Reason]:
    clients, limit = facts.figures["clients"], facts.figures["clients_limit"]
    if clients >= limit:
        yield Reason("full", f"full: {clients:,} of {limit:,} clients")
    if rejected := facts.minute["rejected"]:
        yield Reason("rejecting", f"{_count(rejected, 'client')} rejected in the last minute")
    failures = facts.minute["failures"] - rejected
    if failures > MAX_FAILURES:
        yield Reason("failing", f"{_count(failures, 'command')} failed in the last minute")


def _workers(_config: Config, facts: Facts) -> Iterator[Reason]:
    for worker in facts.workers:
        if worker["silent_seconds"] > SILENT_SECONDS:
            silence = f"no heartbeat for {worker['silent_seconds']:.0f} s"
            yield Reason("worker_silent", f"worker {worker['pid']} does not answer: {silence}")
    if facts.supervisor_silence > SUPERVISOR_SILENT_SECONDS:
        silence = f"no heartbeat for {facts.supervisor_silence:.0f} s"
        text = f"the supervisor does not answer: {silence}; a worker that dies stays in WHO"
        yield Reason("supervisor_silent", text)
    accepting, wanted = facts.figures["workers"], facts.figures["workers_wanted"]
    if 0 < accepting < wanted:
        yield Reason("workers_missing", f"{accepting} of {_count(wanted, 'worker')} accept clients")
    if lost := facts.endpoints_lost:
        yield Reason("endpoint_lost", f"no client can connect by {_count(lost, 'endpoint')}")


def _cluster(config: Config, facts: Facts) -> Iterator[Reason]:
    if facts.members is None:
        return
    kind = facts.members["error_kind"]
    why = f" ({kind})" if kind else ""
    age_ms, silent_ms = (facts.figures.get(f"cluster_{name}_ms") for name in ("age", "silent"))
    if age_ms is None or silent_ms is None:
        yield Reason("redis_away", f"Redis has not answered since the start{why}")
        return
    late_ms = LATE_AFTER_INTERVALS * config.heartbeat_interval_seconds * 1000
    age = f"the count of the other servers is {age_ms / 1000:.1f} s old"
    if silent_ms > late_ms:
        yield Reason("redis_away", f"Redis does not answer{why}: {age}")
    else:
        yield from _engines(facts)
        if age_ms > config.member_ttl_seconds * 1000 + late_ms:
            yield Reason("count_old", f"{age}, though Redis answers")
    for server in facts.members["servers"] or []:
        if server["is_late"] and not server["is_this"]:
            silence = f"no heartbeat for {server['silent_seconds']:.1f} s"
            yield Reason("server_late", f"server {server['id']} is late: {silence}")


def _engines(facts: Facts) -> Iterator[Reason]:
    """Yield each Redis that is away while another one answers."""
    for engine in facts.engines:
        if engine["is_away"]:
            text = f"Redis at {engine['url']} does not answer; another one does"
            yield Reason("engine_away", text)


def _others(_config: Config, facts: Facts) -> Iterator[Reason]:
    yield from _recent("cluster.server_lost", "server_lost", facts)
    expires_at = facts.figures.get("tls_expires_at", 0)
    left = expires_at - facts.unix_seconds
    if expires_at and left <= 0:
        yield Reason("certificate", "the certificate has expired")
    elif expires_at and left < EXPIRES_SOON_SECONDS:
        yield Reason("certificate", f"the certificate expires in {_days(left)}")
    if facts.has_failed_reload:
        yield Reason("reload_failed", _last_message("server.reload_failed", facts))
    yield from _recent("log.dropped", "log_dropped", facts)


def _recent(action: str, name: str, facts: Facts) -> Iterator[Reason]:
    """Yield a reason if there was such an event a short time ago."""
    since = facts.unix_seconds - RECENT_SECONDS
    if any(event["action"] == action and event["at"] > since for event in facts.events):
        yield Reason(name, _last_message(action, facts))


def _last_message(action: str, facts: Facts) -> str:
    """Return what the last event of this action says; the action itself if it was not kept."""
    found = [event for event in facts.events if event["action"] == action]
    return str(max(found, key=lambda event: event["at"])["message"]) if found else action


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _days(seconds: float) -> str:
    days = int(seconds // 86400)
    return _count(days, "day") if days else _count(int(seconds // 3600), "hour")
