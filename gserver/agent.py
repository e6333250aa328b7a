"""The control plane: one process that tells the outside what the board says. StatsD is its first job.

Clients never wait for it: when it hangs or dies, the workers go on, and the supervisor starts another.
"""

import signal
from time import monotonic, monotonic_ns

import gevent
from gevent.event import Event

from gserver import logs
from gserver.board import Board
from gserver.process import Instructions, leave_if_orphaned
from gserver.statsd import FLUSH_SECONDS, StatsdClient

HEARTBEAT_SECONDS = 0.25


def run(instructions: Instructions) -> None:
    """Be the agent until SIGTERM, which comes when the workers are gone: then send the last figures."""
    board = instructions.board()
    should_stop = Event()
    gevent.signal_handler(signal.SIGTERM, should_stop.set)
    gevent.spawn_raw(_beat, instructions, board)
    # One that follows another goes on where that one ended.
    client = StatsdClient(instructions.config, board.totals, board.read_note() or {})
    instructions.report("ready")
    while True:
        flush_at = monotonic() + FLUSH_SECONDS
        client.flush()
        board.leave_note(client.sent)
        if should_stop.is_set():
            break
        should_stop.wait(max(0.0, flush_at - monotonic()))


def _beat(instructions: Instructions, board: Board) -> None:
    while True:
        leave_if_orphaned(instructions)
        board.cells[board.single["agent_heartbeat"]] = monotonic_ns()
        logs.report_left_out()
        gevent.sleep(HEARTBEAT_SECONDS)
