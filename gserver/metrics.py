"""The catalogue of metrics: each figure that gserver keeps or shows is declared here, once.

The scoreboard takes its layout from it. StatsD, Prometheus and `/status.json` take their names from
it. Tests hold the page, the documents, the alert rules and the dashboard to it. Pure data.

A figure has one noun in every format. Only these conventions differ:

- Scoreboard cell: a unit is part of the name (`command_ns`), a label follows a dot
  (`error_replies.idle`).
- StatsD: figures of the cluster begin with `cluster.`, a label follows a dot. A mean time is in
  milliseconds and its name ends in `_time`.
- Prometheus: `gserver_` comes first, times are in seconds (`_seconds`), counters end in `_total`,
  which the client library adds, and a label is a label.
- JSON: the path is the name, split where a group begins (`clients.accepted`). The current value of
  a group is `now`. Times are in seconds. Figures of no other group are in `server`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from gserver.addresses import TRANSPORTS
from gserver.protocol import ERROR_REPLIES
from gserver.redis_errors import HEARTBEAT_ERRORS
from gserver.redis_url import MAX_URLS

#: Upper bounds of the histograms of durations. One more bucket holds what is longer.
DURATION_BOUNDS_NS = tuple(
    round(us * 1000)
    for us in (5, 10, 20, 50, 100, 200, 500, 1e3, 5e3, 2e4, 1e5, 5e5, 1e6, 2e6, 5e6, 1e7)
)


#: What can be wrong with a server that runs: see `gserver.agent.verdict`.
REASONS = (
    "full",
    "rejecting",
    "worker_silent",
    "workers_missing",
    "endpoint_lost",
    "supervisor_silent",
    "failing",
    "redis_away",
    "engine_away",
    "count_old",
    "server_late",
    "server_lost",
    "certificate",
    "reload_failed",
    "log_dropped",
)

#: The numbers of the Redis servers that a cluster may use at once.
ENGINES = tuple(str(number) for number in range(MAX_URLS))
#: A worker that has given no heartbeat for this long is slow, or hangs.
SILENT_SECONDS = 2.0
#: The same for the supervisor, whose loop runs once a second at least.
SUPERVISOR_SILENT_SECONDS = 3.0
#: A certificate that expires within this time needs a renewal.
EXPIRES_SOON_SECONDS = 14 * 86400


#: The cells of a row of the history. Counts are those of its second, or its ten seconds. -1 stands
#: for no figure. Mistakes are error replies, and closes without one, for which a client is to
#: blame; failures are those for which the service is, and some of these have rejected a client.
HISTORY_COLUMNS = (
    "at_ms",  # Unix time of its end
    "clients",
    "cluster_clients",
    "commands",
    "mistakes",
    "failures",
    "rejected",
    "p50_us",
    "p99_us",
    "age_ms",  # of the figures of the cluster
)


class Source(Enum):
    """Where a figure comes from."""

    WORKER = "a cell in the slot of each worker"
    SERVER = "a cell of the server, written by the supervisor or the agent"
    COMPUTED = "computed when it is read; `commands` has a cell for each name"


class Kind(Enum):
    """What a figure is. Figures of the last two kinds are not shown as they are."""

    COUNTER = "only grows, as long as the server lives"
    GAUGE = "a current value"
    TIMING = "a counter of time; divided by the counter named in `count` it gives a mean"
    MOMENT = "a moment, in monotonic nanoseconds"
    STATE = "what a process knows, for the others and for its successor"


class Combine(Enum):
    """How the cells of all workers become one figure."""

    SUM = "their sum"
    MAX = "the largest"
    MIN = "the smallest that is not 0; no figure if all are 0"


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure. An empty name means that the format does not have it.

    A figure with `label` is a family: one figure for each of `members`. Its names in the
    scoreboard and in StatsD are `NAME.MEMBER`, its JSON value is an object.
    """

    name: str
    source: Source
    kind: Kind
    help: str
    #: Of the stored value: "ns", "ms", "s", or "" for a count.
    unit: str = ""
    combine: Combine = Combine.SUM
    statsd: str = ""
    prometheus: str = ""
    json: str = ""
    #: Name in the items of `workers.each` in /status.json. Of a moment: the time since then.
    worker_json: str = ""
    #: Of a family: its label in Prometheus. Those of commands have members only at run time.
    label: str = ""
    members: tuple[str, ...] = ()
    #: Of a timing: the counter of what was timed, and the name of the buckets by duration.
    count: str = ""
    buckets: str = ""
    #: Known only to a server that belongs to a cluster.
    needs_cluster: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the single figures: those of the members of a family, else its own."""
        if self.label:
            return tuple(f"{self.name}.{member}" for member in self.members)
        return (self.name,)


# A table: the formatter would give each argument a line of its own.
# fmt: off
METRICS = (
    # The server as a whole.
    Metric("ready", Source.COMPUTED, Kind.GAUGE, "1 while /readyz answers 200.",
           prometheus="gserver_ready"),
    Metric("uptime_ns", Source.COMPUTED, Kind.GAUGE, "Time since the supervisor started.", "ns",
           json="server.uptime_seconds"),
    Metric("tls_expires_at", Source.WORKER, Kind.GAUGE,
           "Unix time at which the certificate that clients are shown expires.", "s", Combine.MIN,
           prometheus="gserver_tls_expires_timestamp_seconds", json="server.tls_expires_at"),
    Metric("worker_restarts", Source.SERVER, Kind.COUNTER,
           "Workers replaced because they died or hung.", statsd="worker_restarts",
           prometheus="gserver_worker_restarts", json="server.worker_restarts"),
    Metric("agent_starts", Source.SERVER, Kind.COUNTER, "Starts of the agent.",
           statsd="agent_starts", prometheus="gserver_agent_starts", json="server.agent_starts"),
    Metric("reloads", Source.SERVER, Kind.COUNTER, "Completed reloads.", statsd="reloads",
           prometheus="gserver_reloads", json="server.reloads"),
    Metric("reload_failures", Source.SERVER, Kind.COUNTER,
           "Failed reloads, after which the old workers stay.", statsd="reload_failures",
           prometheus="gserver_reload_failures", json="server.reload_failures"),

    Metric("healthy", Source.COMPUTED, Kind.GAUGE,
           "1 while the server is ready and nothing is wrong with it.",
           prometheus="gserver_healthy"),
    Metric("degraded", Source.COMPUTED, Kind.GAUGE, "1 for each thing that is wrong now.",
           prometheus="gserver_degraded", label="reason", members=REASONS),
    Metric("log_lines_dropped", Source.WORKER, Kind.COUNTER,
           "Log lines of workers that could not be written.", statsd="log_lines_dropped",
           prometheus="gserver_log_lines_dropped", json="server.log_lines_dropped"),

    # Clients.
    Metric("clients", Source.WORKER, Kind.GAUGE, "Connected clients.", statsd="clients",
           prometheus="gserver_clients", json="clients.now", worker_json="clients"),
    Metric("clients_by_transport", Source.WORKER, Kind.GAUGE,
           "Connected clients by transport; those of a handover count twice for a moment.",
           prometheus="gserver_clients_by_transport", json="clients.by_transport",
           label="transport", members=TRANSPORTS),
    Metric("clients_arriving", Source.WORKER, Kind.STATE,
           "Clients of a handover that two workers count for a moment."),
    Metric("is_transferring", Source.WORKER, Kind.STATE,
           "1 while the worker changes the counts of a handover."),
    Metric("clients_peak", Source.WORKER, Kind.GAUGE,
           "Most clients connected at once, over all workers.", combine=Combine.MAX,
           prometheus="gserver_clients_peak", json="clients.peak"),
    Metric("clients_limit", Source.COMPUTED, Kind.GAUGE, "Most clients accepted at once.",
           prometheus="gserver_clients_limit", json="clients.limit"),
    Metric("clients_accepted", Source.WORKER, Kind.COUNTER, "Accepted clients.",
           statsd="clients_accepted", prometheus="gserver_clients_accepted",
           json="clients.accepted"),
    Metric("clients_closed", Source.WORKER, Kind.COUNTER, "Clients that have disconnected.",
           statsd="clients_closed", prometheus="gserver_clients_closed", json="clients.closed"),
    Metric("clients_lost", Source.SERVER, Kind.COUNTER, "Clients of workers that died.",
           statsd="clients_lost", prometheus="gserver_clients_lost", json="clients.lost"),
    Metric("clients_handed_over", Source.WORKER, Kind.COUNTER,
           "Clients that a reload has handed over to a new worker.", statsd="clients_handed_over",
           prometheus="gserver_clients_handed_over", json="clients.handed_over"),
    Metric("clients_left_behind", Source.WORKER, Kind.COUNTER,
           "Clients that a reload could not hand over: closed after the drain timeout.",
           statsd="clients_left_behind", prometheus="gserver_clients_left_behind",
           json="clients.left_behind"),
    Metric("handovers", Source.WORKER, Kind.COUNTER,
           "Old workers that have handed over the clients that they could.",
           json="server.handovers"),
    Metric("handover_ns", Source.WORKER, Kind.TIMING, "Time that these handovers took.", "ns",
           statsd="handover_time", prometheus="gserver_handover_seconds",
           json="server.handover_seconds", count="handovers"),

    # Commands. Each gets its cells at run time: its count, its time, and the buckets of this time.
    Metric("commands", Source.COMPUTED, Kind.COUNTER, "Commands answered.", statsd="commands",
           prometheus="gserver_commands", json="commands", label="command"),
    Metric("command_ns", Source.COMPUTED, Kind.TIMING,
           "Time that commands took: from the read with which a command came until its reply was"
           " handed to the kernel, or in a handler that may block.", "ns",
           statsd="command_time", prometheus="gserver_command_seconds", json="command_seconds",
           label="command", count="commands", buckets="command_buckets"),
    Metric("error_replies", Source.WORKER, Kind.COUNTER,
           "ERR replies, and connections closed for a reason that has no reply.",
           statsd="error_replies", prometheus="gserver_error_replies", json="error_replies",
           label="reason", members=tuple(reply.name for reply in ERROR_REPLIES)),
    Metric("reads", Source.WORKER, Kind.COUNTER,
           "Reads from clients that have been answered; a long one counts in several parts.",
           json="reads", worker_json="reads"),

    # Workers.
    Metric("workers", Source.SERVER, Kind.GAUGE, "Workers that accept clients.", statsd="workers",
           prometheus="gserver_workers", json="workers.now"),
    Metric("workers_wanted", Source.COMPUTED, Kind.GAUGE, "Workers that should be running.",
           prometheus="gserver_workers_wanted", json="workers.wanted"),
    Metric("pid", Source.WORKER, Kind.STATE, "Process id of the worker; 0 = the slot is empty.",
           worker_json="pid"),
    Metric("started_at", Source.WORKER, Kind.MOMENT, "When the worker started.", "ns",
           worker_json="age_seconds"),
    Metric("heartbeat", Source.WORKER, Kind.MOMENT, "When the worker's loop last ran.", "ns",
           worker_json="silent_seconds"),

    # The cluster.
    Metric("cluster_servers", Source.SERVER, Kind.GAUGE, "Servers of the cluster, as last known.",
           statsd="cluster.servers", prometheus="gserver_cluster_servers", json="cluster.servers",
           needs_cluster=True),
    Metric("cluster_clients", Source.COMPUTED, Kind.GAUGE,
           "Clients of the whole cluster, as last known.", statsd="cluster.clients",
           prometheus="gserver_cluster_clients", json="cluster.clients", needs_cluster=True),
    Metric("cluster_age_ms", Source.COMPUTED, Kind.GAUGE,
           "Time since all counts of the other servers were confirmed.", "ms",
           statsd="cluster.age_ms", prometheus="gserver_cluster_age_seconds",
           json="cluster.age_seconds", needs_cluster=True),
    Metric("cluster_silent_ms", Source.COMPUTED, Kind.GAUGE, "Time since Redis answered.", "ms",
           prometheus="gserver_cluster_silent_seconds", json="cluster.silent_seconds",
           needs_cluster=True),
    Metric("engine_silent_ms", Source.COMPUTED, Kind.GAUGE,
           "Time since each Redis of the cluster answered.", "ms",
           prometheus="gserver_cluster_engine_silent_seconds", label="engine", members=ENGINES,
           needs_cluster=True),
    Metric("heartbeats", Source.SERVER, Kind.COUNTER, "Heartbeats answered by Redis.",
           statsd="cluster.heartbeats", prometheus="gserver_cluster_heartbeats",
           json="cluster.heartbeats", needs_cluster=True),
    Metric("heartbeat_ns", Source.SERVER, Kind.TIMING, "Time from heartbeats to their answers.",
           "ns", statsd="cluster.heartbeat_time", prometheus="gserver_cluster_heartbeat_seconds",
           json="cluster.heartbeat_seconds", count="heartbeats", needs_cluster=True),
    Metric("heartbeat_errors", Source.SERVER, Kind.COUNTER, "Heartbeats that failed.",
           statsd="cluster.heartbeat_errors", prometheus="gserver_cluster_heartbeat_errors",
           json="cluster.heartbeat_errors", label="kind", members=tuple(HEARTBEAT_ERRORS),
           needs_cluster=True),

    # What the supervisor and the agent keep for other processes and for their successors.
    Metric("agent_heartbeat", Source.SERVER, Kind.MOMENT, "When the agent's loop last ran.", "ns"),
    Metric("supervisor_heartbeat", Source.SERVER, Kind.MOMENT,
           "When the supervisor's loop last ran.", "ns"),
    Metric("server_started_at", Source.SERVER, Kind.MOMENT, "When the supervisor started.", "ns"),
    Metric("stopping", Source.SERVER, Kind.STATE, "1 from the signal on that ends the server."),
    Metric("port_closed", Source.SERVER, Kind.STATE, "1 once no client is accepted any more."),
    Metric("supervisor_events", Source.SERVER, Kind.STATE, "Events that the supervisor has kept."),
    Metric("agent_events", Source.SERVER, Kind.STATE, "Events that the agent has kept."),
    Metric("reload_failed_at", Source.SERVER, Kind.MOMENT,
           "When the last reload failed; 0 = it did not.", "ns"),
    Metric("debug_ends_at", Source.SERVER, Kind.MOMENT,
           "Until when events of the level debug are logged after SIGUSR1.", "ns"),
    Metric("drain_started_at", Source.SERVER, Kind.MOMENT,
           "When the drain of the whole server began; 0 = it has not.", "ns"),
    Metric("incarnation", Source.SERVER, Kind.STATE,
           "Random number that tells this run of the server from its others."),
    Metric("address_key", Source.SERVER, Kind.STATE, "Secret key of the hash of addresses."),
    Metric("endpoints_lost", Source.SERVER, Kind.STATE,
           "Endpoints by which no client can connect."),
    Metric("transfers", Source.SERVER, Kind.STATE,
           "Beginnings and ends of changes in handovers. The two workers write it in turn."),
    Metric("remote_clients", Source.SERVER, Kind.STATE,
           "Clients of the other servers, as last known."),
    Metric("cluster_updated_at", Source.SERVER, Kind.MOMENT,
           "When Redis last answered a heartbeat; 0 = never.", "ns"),
    Metric("cluster_confirmed_at", Source.SERVER, Kind.STATE,
           "When the oldest of the `remote_clients` was confirmed, on the monotonic clock.", "ms"),
    Metric("cluster_doubtful_at", Source.SERVER, Kind.STATE,
           "The same, with servers that were lost but may be alive.", "ms"),

    # What is known from each Redis, which is called an engine.
    Metric("engine_updated_at", Source.SERVER, Kind.MOMENT,
           "When it last answered a heartbeat; 0 = never.", "ns", label="engine", members=ENGINES),
    Metric("engine_clients", Source.SERVER, Kind.STATE,
           "Clients of the other servers, as last known.", label="engine", members=ENGINES),
    Metric("engine_servers", Source.SERVER, Kind.STATE,
           "Servers, as last known.", label="engine", members=ENGINES),
    Metric("engine_confirmed_at", Source.SERVER, Kind.STATE,
           "When the oldest of the clients was confirmed, on the monotonic clock.", "ms",
           label="engine", members=ENGINES),
    Metric("lease_clock", Source.SERVER, Kind.STATE, "The lease clock, as last known.", "ms",
           label="engine", members=ENGINES),
    Metric("lease_clock_at", Source.SERVER, Kind.STATE,
           "When the heartbeat was sent whose reply had it, on the monotonic clock.", "ms",
           label="engine", members=ENGINES),
    Metric("data_lost_at", Source.SERVER, Kind.STATE,
           "When it last lost its data, on the lease clock.", "ms",
           label="engine", members=ENGINES),
    Metric("data_known_from", Source.SERVER, Kind.STATE,
           "Heartbeats after this moment of the lease clock are not from a backup.", "ms",
           label="engine", members=ENGINES),
    Metric("acked_sequence", Source.SERVER, Kind.STATE,
           "Sequence number of the last heartbeat that it answered.",
           label="engine", members=ENGINES),
    Metric("hold_until", Source.SERVER, Kind.STATE,
           "When the hold of the clients ends, on the lease clock; 0 = there is none.", "ms",
           label="engine", members=ENGINES),
)
# fmt: on


def cell_names(source: Source) -> tuple[str, ...]:
    """Return the names of all scoreboard cells of a source, in their order."""
    return tuple(name for metric in METRICS if metric.source is source for name in metric.names)


def is_shown(metric: Metric) -> bool:
    """Return whether a figure is for people, and not internal to the processes."""
    return metric.kind not in (Kind.MOMENT, Kind.STATE)


def members_of(family: str, figures: Mapping[str, int]) -> dict[str, int]:
    """Return the figures of a family by member: `commands.WHO` of `commands` is under `WHO`."""
    prefix = f"{family}."
    return {
        name.removeprefix(prefix): figure
        for name, figure in figures.items()
        if name.startswith(prefix)
    }


def in_seconds(metric: Metric, value: float) -> float:
    """Convert a stored time to seconds; return a count as it is."""
    return value / {"ns": 1e9, "ms": 1e3}.get(metric.unit, 1)


def percentile(buckets: Sequence[int], percent: float) -> float | None:
    """Return the duration below which so many percent are, in seconds; None if all are 0.

    `buckets` counts durations by `DURATION_BOUNDS_NS`. Inside a bucket they are taken as evenly
    spread; of the last one, which has no end, its beginning is returned.
    """
    total = sum(buckets)
    if not total:
        return None
    rank, below = total * percent / 100, 0
    for number, count in enumerate(buckets[:-1]):
        if below + count >= rank and count:
            low = DURATION_BOUNDS_NS[number - 1] if number else 0
            inside = (rank - below) / count
            return (low + (DURATION_BOUNDS_NS[number] - low) * inside) / 1e9
        below += count
    return DURATION_BOUNDS_NS[-1] / 1e9
