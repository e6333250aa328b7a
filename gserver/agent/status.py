"""The state and the figures of a server as plain values, and `/status.json` made from them.

The names and the places of the figures are those of `gserver.metrics`.
"""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from gserver import __version__
from gserver.agent import processes
from gserver.agent.history import History
from gserver.agent.verdict import HEALTHY, Facts, judge
from gserver.cluster.membership import LATE_AFTER_INTERVALS
from gserver.config import Config
from gserver.metrics import (
    DURATION_BOUNDS_NS,
    METRICS,
    REASONS,
    Kind,
    Metric,
    in_seconds,
    members_of,
    percentile,
)
from gserver.scoreboard import Scoreboard

#: Errors of this time are shown, and count for the verdict.
MINUTE_SECONDS = 60.0


def state(scoreboard: Scoreboard) -> str:
    """Return `ready` if the server accepts new clients, else `starting` or `draining`.

    It does not depend on Redis.
    """
    if scoreboard.get("stopping"):
        return "draining"
    return "ready" if scoreboard.get("workers") else "starting"


def figures(
    config: Config, scoreboard: Scoreboard, members: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """Return every figure that is known now, by its name in the catalogue, in its stored unit.

    Those of the scoreboard, and those computed from the configuration, the clock, and the list of
    the cluster's servers. A server without a cluster has no figures of one.
    """
    values = _figures(config, scoreboard)
    found = judge(config, _facts(config, scoreboard, values, members))
    values["healthy"] = int(found.word == HEALTHY)
    for name in REASONS:
        values[f"degraded.{name}"] = int(name in {reason.name for reason in found.reasons})
    return values


def _facts(
    config: Config,
    scoreboard: Scoreboard,
    values: Mapping[str, int],
    members: Mapping[str, Any] | None,
) -> Facts:
    unix_seconds = time.time()
    return Facts(
        state=state(scoreboard),
        figures=values,
        workers=_workers(scoreboard),
        members=members if config.redis_url else None,
        engines=_engines(config, scoreboard, values),
        minute=History(scoreboard).sums(MINUTE_SECONDS, unix_seconds),
        events=_events(scoreboard),
        unix_seconds=unix_seconds,
        has_failed_reload=bool(scoreboard.get("reload_failed_at")),
        supervisor_silence=supervisor_silence(scoreboard),
        endpoints_lost=scoreboard.get("endpoints_lost"),
    )


def supervisor_silence(scoreboard: Scoreboard) -> float:
    """Return the seconds since the last heartbeat of the supervisor."""
    return (time.monotonic_ns() - scoreboard.get("supervisor_heartbeat")) / 1e9


def _events(scoreboard: Scoreboard) -> list[dict[str, Any]]:
    """Return the recent events, the latest first. One that is being replaced is left out."""
    events = []
    for text in scoreboard.events():
        with suppress(ValueError):
            events.append(json.loads(text))
    return sorted(events, key=lambda event: -event["at"])


def _figures(config: Config, scoreboard: Scoreboard) -> dict[str, int]:
    values = scoreboard.totals()
    values["ready"] = int(state(scoreboard) == "ready")
    values["uptime_ns"] = time.monotonic_ns() - scoreboard.get("server_started_at")
    values["clients_limit"] = config.max_clients
    values["workers_wanted"] = config.workers
    for number in range(len(config.engines)):
        since = scoreboard.get(f"engine_updated_at.{number}") or scoreboard.get("server_started_at")
        values[f"engine_silent_ms.{number}"] = (time.monotonic_ns() - since) // 1_000_000
    if not config.redis_url:
        for metric in METRICS:
            if metric.needs_cluster:
                for name in metric.names:
                    values.pop(name, None)
    return values


def status(
    config: Config, scoreboard: Scoreboard, members: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the document of `/status.json`.

    Counters grow for as long as the server lives. Times are seconds. A figure that is not known is
    None. `members` lists the servers of the cluster, which the scoreboard does not know one by one.
    """
    values = _figures(config, scoreboard)
    facts = _facts(config, scoreboard, values, members)
    document: dict[str, Any] = {
        **judge(config, facts).as_json(),
        "last_minute": facts.minute,
        "last_second": History(scoreboard).last(facts.unix_seconds),
        "events": facts.events,
        "server": {
            "id": config.server_id,
            "version": __version__,
            "endpoints": [str(endpoint) for endpoint in config.endpoints],
            "state": state(scoreboard),
            "now": round(facts.unix_seconds, 3),
        },
    }
    for metric in METRICS:
        if metric.json and (config.redis_url or not metric.needs_cluster):
            _put(document, metric.json.split("."), _json_value(metric, values))
    document["latency_bounds_seconds"] = [bound / 1e9 for bound in DURATION_BOUNDS_NS]
    document["workers"]["each"] = facts.workers
    document["processes"] = processes.described(scoreboard)
    document["cluster"] = document.get("cluster")
    if config.redis_url:
        document["cluster"]["name"] = config.cluster_name
        engines = document["cluster"]["engines"] = facts.engines
        # WHO is exact while one Redis answers and has all its data.
        document["cluster"]["is_held"] = any(each["is_held"] for each in engines) and all(
            each["is_held"] or each["is_away"] for each in engines
        )
        document["cluster"]["members"] = members
    return document


def _engines(
    config: Config, scoreboard: Scoreboard, values: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Return each Redis of the cluster: its URL without secrets, and what it last said."""
    return [_engine(scoreboard, number, each, values) for number, each in enumerate(config.engines)]


def _engine(
    scoreboard: Scoreboard, number: int, config: Config, values: Mapping[str, int]
) -> dict[str, Any]:
    has_answered = scoreboard.get(f"engine_updated_at.{number}")
    silence = values[f"engine_silent_ms.{number}"] / 1e3 if has_answered else None
    late_seconds = LATE_AFTER_INTERVALS * config.heartbeat_interval_seconds
    return {
        "url": config.for_worker().redis_url,
        "silent_seconds": silence,
        "is_away": silence is None or silence > late_seconds,
        "servers": scoreboard.get(f"engine_servers.{number}") or None,
        "is_held": bool(scoreboard.get(f"hold_until.{number}")),
    }


def _put(document: dict[str, Any], path: list[str], value: Any) -> None:
    *groups, name = path
    for group in groups:
        document = document.setdefault(group, {})
    document[name] = value


def _json_value(metric: Metric, values: Mapping[str, int]) -> Any:
    if metric.buckets:
        return {
            member: _duration(metric, timed, members_of(f"{metric.buckets}.{member}", values))
            for member, timed in members_of(metric.name, values).items()
        }
    if metric.label:
        return members_of(metric.name, values)
    if metric.name not in values:
        return None
    value = values[metric.name]
    is_converted = metric.unit in ("ns", "ms")
    return round(in_seconds(metric, value), 6) if is_converted else value


def _duration(metric: Metric, timed: int, buckets: Mapping[str, int]) -> dict[str, Any]:
    """Return what is known of the durations of a command."""
    counts = list(buckets.values())
    return {
        "count": sum(counts),
        "seconds": round(in_seconds(metric, timed), 6),
        "p50_seconds": percentile(counts, 50),
        "p99_seconds": percentile(counts, 99),
        "buckets": counts,
    }


def _workers(scoreboard: Scoreboard) -> list[dict[str, Any]]:
    """Return one object for each running worker; `reads` counts for all workers of the slot."""
    metrics = [metric for metric in METRICS if metric.worker_json]
    now_ns = time.monotonic_ns()
    workers = []
    for slot in range(scoreboard.slots):
        cells = {
            metric.name: scoreboard.cells[scoreboard.cell(metric.name, slot)] for metric in metrics
        }
        if cells["pid"]:
            values = {
                metric.worker_json: _worker_value(metric, cells, now_ns) for metric in metrics
            }
            workers.append({"slot": slot, **values})
    return workers


def _worker_value(metric: Metric, cells: Mapping[str, int], now_ns: int) -> float:
    """Return a value of one worker. Of a moment, that is the time since, in seconds."""
    value = cells[metric.name]
    if metric.kind is not Kind.MOMENT:
        return value
    # The heartbeat of a worker that has just started is that of the one before it.
    # One that has just come is later than `now_ns`.
    return round(in_seconds(metric, max(0, now_ns - max(value, cells["started_at"]))), 6)
