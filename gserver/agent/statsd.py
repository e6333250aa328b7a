"""StatsD: what is sent of the scoreboard, once a second, by the `statsd` package.

Aggregated: counters as their increase since the last flush, gauges as they are. Nothing here can
touch a client: it runs in the agent, and UDP does not wait.
"""

from collections.abc import Iterator
from time import monotonic

import gevent
import statsd

from gserver import logs
from gserver.config import Config, show_address
from gserver.protocol import ERROR_REPLIES
from gserver.redis_errors import HEARTBEAT_ERRORS
from gserver.scoreboard import Scoreboard

FLUSH_SECONDS = 1.0
#: How often the daemon's name is looked up anew: it may move, or not have been there yet.
RESOLVE_SECONDS = 30.0
RETRY_SECONDS = 5.0
#: How long a flush waits for that.
WAIT_SECONDS = 0.25
#: Datagrams that fit any path unfragmented.
MAX_DATAGRAM_BYTES = 512

#: Metric: the scoreboard's total that it is, for gauges and for counters.
GAUGES = {"connections": "clients", "workers": "workers"}
#: As far as there is a cluster: all clients and servers, and how old that knowledge is, in
#: milliseconds.
GAUGES |= {
    "cluster.clients": "everybody",
    "cluster.servers": "servers",
    "cluster.view_age": "view_age_ms",
}
COUNTERS = {
    **{
        name: name
        for name in ("accepted", "closed", "lost", "agent_starts", "reloads", "reload_failures")
    },
    "restarts": "worker_restarts",
    "cluster.beats": "beats",
    **{f"cluster.beat_errors.{kind}": f"beat_errors.{kind}" for kind in HEARTBEAT_ERRORS},
    **{
        f"{'rejected' if refusal.closes else 'errors'}.{refusal.name}": f"refused.{refusal.name}"
        for refusal in ERROR_REPLIES
    },
}
#: Mean times since the last flush, in milliseconds: from bytes read to replies handed to the
#: kernel, and from a beat to its answer. Their number and their sum, in nanoseconds.
TIMINGS = {"service_time": ("bursts", "service_ns"), "cluster.beat_time": ("beats", "beat_ns")}

Metric = tuple[str, str, float]
Totals = dict[str, int]


def changes(before: Totals, now: Totals) -> Iterator[Metric]:
    """Yield what to send, as (kind, name, value): `gauge`, `incr` or `timing`. Counters that stand still are not."""
    for name, total in GAUGES.items():
        if total in now:
            yield "gauge", name, now[total]
    commands = {
        f"commands.{key.partition('.')[2].lower()}": key
        for key in now
        if key.startswith("commands.")
    }
    for name, total in {**COUNTERS, **commands}.items():
        if increase := now[total] - before.get(total, 0):
            yield "incr", name, increase
    for name, (number, sum_ns) in TIMINGS.items():
        if increase := now[number] - before.get(number, 0):
            yield "timing", name, (now[sum_ns] - before.get(sum_ns, 0)) / increase / 1e6


class StatsdClient:
    """Sends to the daemon; until its name resolves, and again and again later, looks it up."""

    def __init__(self, config: Config, scoreboard: Scoreboard) -> None:
        self._config = config
        self._scoreboard = scoreboard
        self._client: statsd.StatsClient | None = None
        self._resolve_at = 0.0
        self._lookup: gevent.Greenlet[[], None] | None = None

    def flush(self) -> None:
        """Send what has changed. While the daemon's name does not resolve, it is kept for a later
        flush.

        A look-up may take as long as all name servers together let it: it is waited for a moment
        only.
        """
        if (
            not self._lookup and monotonic() >= self._resolve_at
        ):  # A greenlet that has ended is false.
            self._lookup = gevent.spawn(self._resolve)
        if self._lookup:
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
            address = show_address(host, port)
            message = f"StatsD at {address} cannot be found, trying again: {error}"
            logs.warn_ratelimited(
                "statsd.unresolved",
                message,
                {"error.type": type(error).__name__, "server.address": host},
            )
            return
        if self._client is not None:
            self._client.close()
        self._client = client
        self._resolve_at = monotonic() + RESOLVE_SECONDS
