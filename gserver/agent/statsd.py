"""StatsD: sends the figures of the scoreboard once a second, with the `statsd` package.

Counters are sent as their increase since the last flush, gauges as they are. This runs in the
agent, and UDP does not wait, so no client can be slowed by it.
"""

import logging
from collections.abc import Iterator
from time import monotonic

import gevent
import statsd

from gserver import logs
from gserver.addresses import show_address
from gserver.config import Config
from gserver.metrics import METRICS, Kind, members_of
from gserver.scoreboard import Scoreboard

FLUSH_SECONDS = 1.0
#: The daemon's name is looked up again after this time: its address may have changed.
RESOLVE_SECONDS = 30.0
#: The same after a look-up that failed.
RETRY_SECONDS = 5.0
#: A flush waits this long for a look-up.
WAIT_SECONDS = 0.25
#: Such a datagram fits any path without fragmentation.
MAX_DATAGRAM_BYTES = 512

#: The name of a metric in StatsD: the figure that it shows. Figures of the cluster are sent once
#: they are known.
GAUGES = {
    metric.statsd: metric.name for metric in METRICS if metric.statsd and metric.kind is Kind.GAUGE
}
#: The same for counters. Those of commands are added at run time.
COUNTERS = {
    name.replace(metric.name, metric.statsd, 1): name
    for metric in METRICS
    if metric.statsd and metric.kind is Kind.COUNTER
    for name in metric.names
}
#: Mean times since the last flush, in milliseconds: their number, and their sum in nanoseconds.
#: Those of commands are added at run time.
TIMINGS = {
    metric.statsd: (metric.count, metric.name)
    for metric in METRICS
    if metric.statsd and metric.kind is Kind.TIMING and not metric.label
}

Sample = tuple[str, str, float]
Totals = dict[str, int]


def changes(before: Totals, now: Totals) -> Iterator[Sample]:
    """Yield what to send, as (kind, name, value); the kind is `gauge`, `incr` or `timing`.

    Counters and timings that have not changed are not sent.
    """
    for name, total in GAUGES.items():
        if total in now:
            yield "gauge", name, now[total]
    commands = members_of("commands", now)
    counters = {f"commands.{name.lower()}": f"commands.{name}" for name in commands}
    for name, total in {**COUNTERS, **counters}.items():
        increase = now[total] - before.get(total, 0)
        if increase:
            yield "incr", name, increase
    for name, (count, sum_ns) in TIMINGS.items():
        yield from _mean(name, now[count] - before.get(count, 0), sum_ns, before, now)
    for command in commands:
        runs = _runs(command, now) - _runs(command, before)
        yield from _mean(
            f"command_time.{command.lower()}", runs, f"command_ns.{command}", before, now
        )


def _mean(name: str, increase: int, sum_ns: str, before: Totals, now: Totals) -> Iterator[Sample]:
    if increase:
        yield "timing", name, (now[sum_ns] - before.get(sum_ns, 0)) / increase / 1e6


def _runs(command: str, totals: Totals) -> int:
    """Return how many runs of a command were timed: failed ones too, which its count leaves out."""
    return sum(members_of(f"command_buckets.{command}", totals).values())


class StatsdClient:
    """Sends to the daemon, and looks its name up from time to time."""

    def __init__(self, config: Config, scoreboard: Scoreboard) -> None:
        self._config = config
        self._scoreboard = scoreboard
        self._client: statsd.StatsClient | None = None
        self._resolve_at = 0.0
        self._lookup: gevent.Greenlet[[], None] | None = None
        self._outage = logs.Outage()

    def flush(self) -> None:
        """Send what has changed since the last flush.

        Until the daemon's name has resolved for the first time, changes are kept. A look-up can
        take very long, so a flush waits for it only for a moment.
        """
        is_looking_up = self._lookup is not None and not self._lookup.ready()
        if not is_looking_up and monotonic() >= self._resolve_at:
            self._lookup = gevent.spawn(self._resolve)
        if self._lookup is not None:
            self._lookup.join(WAIT_SECONDS)
        if self._client is None:
            return
        scoreboard = self._scoreboard
        now = memoryview(bytes(scoreboard.cells)).cast("q")
        with self._client.pipeline() as pipe:
            for kind, name, value in changes(
                scoreboard.totals(scoreboard.sent), scoreboard.totals(now)
            ):
                getattr(pipe, kind)(name, value)
        scoreboard.sent[:] = now

    def _resolve(self) -> None:
        host, port = self._config.statsd_host, self._config.statsd_port
        try:
            client = statsd.StatsClient(
                host, port, self._config.statsd_prefix, MAX_DATAGRAM_BYTES, ipv6=":" in host
            )
        except (OSError, UnicodeError) as error:
            self._resolve_at = monotonic() + RETRY_SECONDS
            if self._outage.note_failure(monotonic()):
                self._log_unresolved(error)
            return
        outage_seconds = self._outage.note_success(monotonic())
        if outage_seconds is not None:
            message = f"StatsD host {host} resolves again after {outage_seconds:.0f} s"
            logs.event(logging.INFO, "statsd.resolved", message, {"server.address": host})
        if self._client is not None:
            self._client.close()
        self._client = client
        self._resolve_at = monotonic() + RESOLVE_SECONDS

    def _log_unresolved(self, error: Exception) -> None:
        address = show_address(self._config.statsd_host, self._config.statsd_port)
        if self._client is None:
            consequence = "metrics are kept until it does"
        else:
            consequence = "metrics go to its last known address"
        logs.event(
            logging.WARNING,
            "statsd.unresolved",
            f"StatsD host of {address} does not resolve: {consequence}; retrying every"
            f" {RETRY_SECONDS:.0f} s: {error}",
            {"error.type": type(error).__name__, "server.address": self._config.statsd_host},
        )
