"""What there is to tell of a server, as plain values made from the scoreboard: for the admin port, `top` and the page."""

import time
from typing import Any

from gserver import __version__
from gserver.config import Config
from gserver.protocol import ERROR_REPLIES
from gserver.scoreboard import Scoreboard


def state(scoreboard: Scoreboard) -> str:
    """Whether the server is `ready`: it takes new clients; and what it is if not. Redis has no part in it."""
    if scoreboard.get("stopping") or scoreboard.get("draining"):
        return "draining"
    return "ready" if scoreboard.get("workers") else "starting"


def certificate_expires_at(scoreboard: Scoreboard) -> int | None:
    """When the first of the certificates that clients are shown expires, in Unix seconds; None when there is none."""
    return min((moment for moment in scoreboard.column("tls_expires_at") if moment), default=None)


def status(
    config: Config, scoreboard: Scoreboard, roster: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return all of it. Counters grow for as long as the server lives; times are seconds.

    The scoreboard knows nothing of the other servers one by one: that is the `roster`, of
    `Members.payload`.
    """
    totals, now = scoreboard.totals(), time.monotonic_ns()
    return {
        "server": {
            "id": config.server_id,
            "version": __version__,
            "host": config.host,
            "port": config.port,
            "state": state(scoreboard),
            "tls_expires_at": certificate_expires_at(scoreboard),
            "uptime_seconds": _seconds(now - scoreboard.get("begun_at")),
        },
        "clients": {
            "now": totals["clients"],
            "peak": max(scoreboard.column("peak")),
            "limit": config.max_clients,
            **{name: totals[name] for name in ("accepted", "closed", "lost")},
        },
        "commands": scoreboard.under(totals, "commands"),
        "errors": {
            item.name: totals[f"refused.{item.name}"] for item in ERROR_REPLIES if not item.closes
        },
        "rejected": {
            item.name: totals[f"refused.{item.name}"] for item in ERROR_REPLIES if item.closes
        },
        "service": {"bursts": totals["bursts"], "seconds": _seconds(totals["service_ns"])},
        "workers": {
            "wanted": config.workers,
            "accepting": scoreboard.get("workers"),
            "restarts": totals["worker_restarts"],
            "reloads": totals["reloads"],
            "reload_failures": totals["reload_failures"],
            "each": _workers(scoreboard, now),
        },
        "cluster": _cluster(config, scoreboard, totals) | {"roster": roster}
        if config.redis_url
        else None,
    }


def _workers(scoreboard: Scoreboard, now: int) -> list[dict[str, Any]]:
    names = ("pid", "begun", "heartbeat", "clients", "bursts")
    rows = enumerate(zip(*(scoreboard.column(name) for name in names), strict=True))
    return [
        {
            "slot": slot,
            "pid": pid,
            "age_seconds": _seconds(now - begun),
            "silent_seconds": _seconds(now - max(begun, heartbeat)),
            "clients": clients,
            "bursts": bursts,  # of all that have had this slot
        }
        for slot, (pid, begun, heartbeat, clients, bursts) in rows
        if pid
    ]


def _cluster(config: Config, scoreboard: Scoreboard, totals: dict[str, int]) -> dict[str, Any]:
    is_known = "view_age_ms" in totals
    return {
        "name": config.cluster_name,
        "servers": totals["servers"] if is_known else None,
        "clients": totals["everybody"] if is_known else None,
        "view_age_seconds": totals["view_age_ms"] / 1000 if is_known else None,
        "is_held": bool(scoreboard.get("hold_until")),
        "beats": totals["beats"],
        "beat_errors": {
            kind: total for kind, total in scoreboard.under(totals, "beat_errors").items() if total
        },
    }


def _seconds(nanoseconds: int) -> float:
    return round(nanoseconds / 1e9, 6)
