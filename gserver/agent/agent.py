"""The control plane: one process that beats to the cluster's Redis, and tells StatsD what the
scoreboard says.

Clients never wait for it: when it hangs or dies, the workers go on, and the supervisor starts
another.
"""

import contextlib
import resource
import signal
import socket
from time import monotonic

import gevent
from gevent.event import Event

from gserver.agent.statsd import FLUSH_SECONDS, StatsdClient
from gserver.boot import Instructions, keep_heartbeat
from gserver.errors import DuplicateIdError

#: How long a stop waits for the cluster to be told.
LEAVE_SECONDS = 1.5
#: How long those are waited for whom the admin port has begun to answer: others are the next
#: agent's.
ANSWER_SECONDS = 0.5
#: More than it ever needs: an answer of whoever speaks for Redis may be without end.
MAX_DATA_BYTES = 400_000_000


def run(instructions: Instructions) -> None:
    """Be the agent until SIGTERM, which at a stop comes when the workers are gone: then tell the
    last figures.

    Raises `DuplicateIdError` when another live server has this one's id.
    """
    config, scoreboard = instructions.config, instructions.scoreboard()
    with contextlib.suppress(ValueError):  # The hard limit is lower still.
        resource.setrlimit(
            resource.RLIMIT_DATA, (MAX_DATA_BYTES, resource.getrlimit(resource.RLIMIT_DATA)[1])
        )
    should_stop = Event()
    gevent.signal_handler(signal.SIGTERM, should_stop.set)
    gevent.spawn_raw(keep_heartbeat, instructions, scoreboard)
    client = StatsdClient(config, scoreboard) if config.statsd_host else None
    server = None
    if config.admin_port >= 0:
        from gserver.agent import admin_port  # Loaded only where it is wanted.

        server = admin_port.serve(
            config, scoreboard, socket.socket(fileno=instructions.listener_fd)
        )
    member = beats = None
    if config.redis_url:
        # Loaded only where there is a cluster.
        from gserver.cluster.heartbeat import HeartbeatSender

        member = HeartbeatSender(config, scoreboard)
        beats = gevent.spawn(member.run)
        member.id_is_known.wait(config.settle_seconds)
    is_ready = False
    while True:
        flush_at = monotonic() + FLUSH_SECONDS
        if member is not None and member.has_duplicate_id:
            where = f"cluster {config.cluster_name}"
            raise DuplicateIdError(
                f"another live server of {where} has the id {config.server_id}: choose another --server-id"
            )
        if not is_ready:
            instructions.report("ready")
            is_ready = True
        if client:
            client.flush()
        if beats is not None and beats.ready():  # A greenlet that has ended is false.
            beats.get()  # Raises what has ended it.
        if should_stop.is_set():
            break
        should_stop.wait(max(0.0, flush_at - monotonic()))
    ending = [gevent.spawn(server.stop, ANSWER_SECONDS)] if server else []
    if member is not None and beats is not None:
        member.should_stop.set()
        beats.join(LEAVE_SECONDS)
    gevent.joinall(ending)
