"""The control plane: one process that tells the outside what the board says. StatsD is its first job.

Clients never wait for it: when it hangs or dies, the workers go on, and the supervisor starts another.
"""

import signal
from time import monotonic

import gevent
from gevent.event import Event

from gserver.process import Instructions, beat
from gserver.statsd import FLUSH_SECONDS, StatsdClient


def run(instructions: Instructions) -> None:
    """Be the agent until SIGTERM, which comes when the workers are gone: then send the last figures."""
    board = instructions.board()
    should_stop = Event()
    gevent.signal_handler(signal.SIGTERM, should_stop.set)
    gevent.spawn_raw(beat, instructions, board)
    client = StatsdClient(instructions.config, board)
    instructions.report("ready")
    while True:
        flush_at = monotonic() + FLUSH_SECONDS
        client.flush()
        if should_stop.is_set():
            break
        should_stop.wait(max(0.0, flush_at - monotonic()))
