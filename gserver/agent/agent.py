"""The agent process: heartbeats to the cluster's Redis, StatsD, and the admin port.

Clients never wait for it. When it hangs or dies, the workers go on, and the supervisor starts
another, which continues from the scoreboard.
"""

import contextlib
import logging
import resource
import signal
import socket
from functools import partial
from math import inf
from time import monotonic, time
from typing import TYPE_CHECKING

import gevent
from gevent.event import Event

from gserver import logs
from gserver.agent.history import History
from gserver.agent.statsd import FLUSH_SECONDS, StatsdClient
from gserver.boot import READY, Instructions, keep_heartbeat
from gserver.config import Config
from gserver.errors import DuplicateIdError
from gserver.scoreboard import Scoreboard

if TYPE_CHECKING:
    from gevent.pywsgi import WSGIServer

#: What the admin port shows as recent events.
KEPT_EVENTS = (
    "cluster.joined",
    "cluster.servers",
    "cluster.server_lost",
    "cluster.lost",
    "cluster.regained",
    "cluster.expired",
    "cluster.reset",
    "cluster.moved",
    "server.duplicate_id",
    "log.dropped",
)
#: How long a stop waits until this server has left the cluster.
LEAVE_SECONDS = 1.5
#: Grace period for admin requests in progress; queued connections go to the next agent.
ANSWER_SECONDS = 0.5
#: Time between two events that say that log lines were dropped.
DROPPED_SECONDS = 60.0
#: Limit on the agent's memory, far more than it needs: a peer that poses as Redis may send an
#: endless reply.
MAX_DATA_BYTES = 400_000_000


def run(instructions: Instructions) -> None:
    """Run the agent until SIGTERM, then send the last figures.

    When the whole server stops, the workers have ended before that signal. Raises
    `DuplicateIdError` if another live server has the same id.
    """
    config, scoreboard = instructions.config, instructions.scoreboard()
    _limit_memory()
    should_stop = Event()
    gevent.signal_handler(signal.SIGTERM, should_stop.set)
    gevent.spawn_raw(keep_heartbeat, instructions, scoreboard)
    client = StatsdClient(config, scoreboard) if config.statsd_host else None
    server = _serve_admin_port(instructions, scoreboard) if config.admin_port >= 0 else None
    heartbeats = _Heartbeats(config, scoreboard) if config.redis_url else None
    watcher = _Watcher(scoreboard)
    is_ready = False
    while True:
        flush_at = monotonic() + FLUSH_SECONDS
        watcher.note()
        if heartbeats is not None:
            heartbeats.check_id()
        if not is_ready:
            instructions.report(READY)
            is_ready = True
        if client is not None:
            client.flush()
        if heartbeats is not None:
            heartbeats.check_greenlet()
        if should_stop.is_set():
            break
        should_stop.wait(max(0.0, flush_at - monotonic()))
    ending = [gevent.spawn(server.stop, ANSWER_SECONDS)] if server is not None else []
    if heartbeats is not None:
        heartbeats.leave()
    gevent.joinall(ending)


def _limit_memory() -> None:
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    with contextlib.suppress(ValueError):  # The hard limit is lower.
        resource.setrlimit(resource.RLIMIT_DATA, (MAX_DATA_BYTES, hard))


def _serve_admin_port(instructions: Instructions, scoreboard: Scoreboard) -> "WSGIServer":
    from gserver.agent import admin_port  # Loaded only if there is an admin port.

    listener = socket.socket(fileno=instructions.listener_fds[0])
    config, control_fd = instructions.config, instructions.control_fd
    return admin_port.serve(config, scoreboard, listener, control_fd)


class _Watcher:
    """Keeps what the admin port shows of the past: figures of each second, and recent events."""

    def __init__(self, scoreboard: Scoreboard) -> None:
        self._scoreboard = scoreboard
        self._history = History(scoreboard)
        self._keep = partial(scoreboard.keep_event, is_agent=True)
        self._dropped = scoreboard.totals()["log_lines_dropped"]
        self._told_dropped_at = -inf
        logs.keep_events(KEPT_EVENTS, self._keep)

    def note(self) -> None:
        """Do what is done once a second."""
        totals = self._scoreboard.totals()
        self._history.note(totals, time())
        dropped, now = totals["log_lines_dropped"], monotonic()
        # The workers log that, and keep no events. Not each second: other events would be lost.
        if dropped != self._dropped and now >= self._told_dropped_at + DROPPED_SECONDS:
            message = logs.dropped_message(dropped - self._dropped)
            self._keep(logs.as_kept(logging.WARNING, "log.dropped", message))
            self._dropped, self._told_dropped_at = dropped, now


class _Heartbeats:
    """The greenlet that sends this server's heartbeats."""

    def __init__(self, config: Config, scoreboard: Scoreboard) -> None:
        """Start it. Wait, for a limited time, until it is known whether the server's id is free."""
        from gserver.cluster.engines import Engines  # Loaded only if there is a cluster.

        self._config = config
        self._engines = Engines(config, scoreboard)
        self._greenlet = gevent.spawn(self._engines.run)
        self._engines.id_is_known.wait(config.settle_seconds)

    def check_id(self) -> None:
        """Raise `DuplicateIdError` if another live server has this server's id."""
        if self._engines.has_duplicate_id:
            raise DuplicateIdError(
                f"another live server of cluster {self._config.cluster_name} has the id"
                f" {self._config.server_id}: choose another --server-id"
            )

    def check_greenlet(self) -> None:
        """Raise the error that has ended the heartbeats, if one has."""
        if self._greenlet.ready():
            self._greenlet.get()

    def leave(self) -> None:
        """End the greenlet, which leaves the cluster if the whole server stops."""
        self._engines.stop()
        self._greenlet.join(LEAVE_SECONDS)
