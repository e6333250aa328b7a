"""Metrics for Prometheus, read off the scoreboard whenever they are asked for.

Named by its conventions: https://prometheus.io/docs/practices/naming/. Counters are those of the
whole server, so a worker that is replaced changes nothing about them.
"""

from collections.abc import Iterator

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from gserver import __version__
from gserver.agent.status import certificate_expires_at, state
from gserver.config import Config
from gserver.scoreboard import SERVICE_BOUNDS_NS, Scoreboard

#: Each with the total of the scoreboard that it tells, and its help.
COUNTERS = {
    "gserver_clients_accepted": ("accepted", "Clients taken in."),
    "gserver_clients_closed": ("closed", "Clients that have gone."),
    "gserver_clients_lost": ("lost", "Clients of workers that died."),
    "gserver_worker_restarts": ("worker_restarts", "Workers replaced because they died or hung."),
    "gserver_agent_starts": ("agent_starts", "Starts of the agent."),
    "gserver_reloads": ("reloads", "SIGHUPs carried out."),
    "gserver_reload_failures": ("reload_failures", "SIGHUPs given up: the old workers stay."),
}


class ScoreboardCollector:
    """A collector for one server."""

    def __init__(self, config: Config, scoreboard: Scoreboard) -> None:
        self._config = config
        self._scoreboard = scoreboard

    def collect(self) -> Iterator[Metric]:
        """Yield every metric as it is now."""
        scoreboard, config, totals = self._scoreboard, self._config, self._scoreboard.totals()
        yield InfoMetricFamily(
            "gserver", "The server.", {"version": __version__, "server_id": config.server_id}
        )
        yield GaugeMetricFamily(
            "gserver_ready", "1 while it takes new clients.", float(state(scoreboard) == "ready")
        )
        yield GaugeMetricFamily("gserver_workers", "Workers that accept.", totals["workers"])
        yield GaugeMetricFamily(
            "gserver_workers_wanted", "Workers that there should be.", config.workers
        )
        yield GaugeMetricFamily("gserver_clients", "Clients connected now.", totals["clients"])
        yield GaugeMetricFamily(
            "gserver_clients_peak", "Most clients at once.", max(scoreboard.column("peak"))
        )
        yield GaugeMetricFamily(
            "gserver_clients_limit", "Most clients that it takes.", config.max_clients
        )
        if (expires_at := certificate_expires_at(scoreboard)) is not None:
            text = "When the certificate that clients are shown expires, in Unix time."
            yield GaugeMetricFamily(
                "gserver_tls_certificate_expiry_timestamp_seconds", text, expires_at
            )
        for name, (total, text) in COUNTERS.items():
            yield CounterMetricFamily(name, text, totals[total])
        yield _labelled(
            "gserver_commands",
            "Commands answered.",
            "command",
            scoreboard.under(totals, "commands"),
        )
        refusals = scoreboard.under(totals, "refused")
        yield _labelled(
            "gserver_refusals", "ERR lines, and clients turned out.", "reason", refusals
        )
        yield self._service_time(totals)
        if config.redis_url:
            yield from self._cluster(totals)

    def _service_time(self, totals: dict[str, int]) -> Metric:
        text = "Time from bytes read to replies handed to the kernel, a burst of commands each."
        family = HistogramMetricFamily("gserver_service_seconds", text)
        bounds, buckets, count = (
            [*(bound / 1e9 for bound in SERVICE_BOUNDS_NS), float("inf")],
            [],
            0,
        )
        for number, bound in enumerate(bounds):
            count += totals[f"service.{number}"]
            buckets.append(("+Inf" if bound == float("inf") else f"{bound:g}", float(count)))
        family.add_metric([], buckets, totals["service_ns"] / 1e9)
        return family

    def _cluster(self, totals: dict[str, int]) -> Iterator[Metric]:
        if "view_age_ms" in totals:
            yield GaugeMetricFamily(
                "gserver_cluster_servers", "Servers, as last known.", totals["servers"]
            )
            yield GaugeMetricFamily(
                "gserver_cluster_clients", "Clients of all, as last known.", totals["everybody"]
            )
            age = totals["view_age_ms"] / 1000
            yield GaugeMetricFamily(
                "gserver_cluster_view_age_seconds", "Age of that knowledge.", age
            )
        yield CounterMetricFamily(
            "gserver_cluster_beats", "Beats answered by Redis.", totals["beats"]
        )
        text = "Time from a beat to its answer, over all beats."
        yield CounterMetricFamily("gserver_cluster_beat_seconds", text, totals["beat_ns"] / 1e9)
        errors = self._scoreboard.under(totals, "beat_errors")
        yield _labelled("gserver_cluster_beat_errors", "Beats that failed.", "kind", errors)


def _labelled(name: str, text: str, label: str, values: dict[str, int]) -> Metric:
    """A counter for each value of a label."""
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family
