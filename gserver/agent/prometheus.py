"""Metrics for Prometheus, read from the scoreboard for each scrape.

The catalogue in `gserver.metrics` has their names, which follow
https://prometheus.io/docs/practices/naming/. Counters are those of the whole server, so they do not
restart when a worker is replaced.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.core import Metric as Family

from gserver import __version__
from gserver.agent import processes
from gserver.agent.status import figures
from gserver.config import Config
from gserver.metrics import DURATION_BOUNDS_NS, METRICS, Kind, Metric, in_seconds, members_of
from gserver.scoreboard import Scoreboard


class ScoreboardCollector:
    """A `prometheus_client` collector for one server."""

    def __init__(
        self,
        config: Config,
        scoreboard: Scoreboard,
        members: Callable[[], Mapping[str, Any] | None] = lambda: None,
    ) -> None:
        """`members` returns the servers of the cluster, as /status.json has them."""
        self._config = config
        self._scoreboard = scoreboard
        self._members = members

    def collect(self) -> Iterator[Family]:
        """Yield every metric that is known now."""
        labels = {"version": __version__, "server_id": self._config.server_id}
        yield InfoMetricFamily("gserver", "Version and id of the server.", labels)  # gserver_info
        values = figures(self._config, self._scoreboard, self._members())
        for metric in METRICS:
            is_wanted = bool(self._config.redis_url) or not metric.needs_cluster
            if metric.prometheus and is_wanted and (metric.label or metric.name in values):
                yield _family(metric, values)
        yield from processes.families(self._scoreboard)


def _family(metric: Metric, values: Mapping[str, int]) -> Family:
    if metric.buckets:
        return _histograms(metric, values)
    family = GaugeMetricFamily if metric.kind is Kind.GAUGE else CounterMetricFamily
    if metric.label:
        labelled = family(metric.prometheus, metric.help, labels=[metric.label])
        for member, count in members_of(metric.name, values).items():
            labelled.add_metric([member], in_seconds(metric, count))
        return labelled
    return family(metric.prometheus, metric.help, in_seconds(metric, values[metric.name]))


def _histograms(metric: Metric, values: Mapping[str, int]) -> Family:
    """Return a histogram for each member of a timing; each bucket includes those before it."""
    bounds = [*(f"{bound / 1e9:g}" for bound in DURATION_BOUNDS_NS), "+Inf"]
    family = HistogramMetricFamily(metric.prometheus, metric.help, labels=[metric.label])
    for member, timed in members_of(metric.name, values).items():
        counts = members_of(f"{metric.buckets}.{member}", values).values()
        buckets = [
            (bound, float(count)) for bound, count in zip(bounds, accumulate(counts), strict=True)
        ]
        family.add_metric([member], buckets, in_seconds(metric, timed))
    return family
