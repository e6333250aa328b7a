"""What one worker replies: it runs handlers, guards against their errors, and counts.

Shared by all clients of a worker. A handler is other people's code: an exception ends its command
and nothing else.
"""

import os
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from time import monotonic_ns

import gevent

from gserver import logs
from gserver.commands import Command, Handler, Service, encode_reply
from gserver.config import Config
from gserver.errors import EXIT_RUNTIME, ClusterUnavailable
from gserver.metrics import SERVICE_BOUNDS_NS
from gserver.protocol import CLUSTER_UNAVAILABLE, ERROR_REPLIES, INTERNAL, ErrorReply, Grammar
from gserver.scoreboard import Scoreboard

#: Longest reply that is remembered, and how many are.
MAX_SHORT_REPLY, MAX_SHORT_REPLIES = 64, 1024
_short_line = lru_cache(maxsize=MAX_SHORT_REPLIES)(encode_reply)

#: A handler, the cell of the scoreboard that counts its replies, and the command's name.
Call = tuple[Handler, int, str]


class Replies:
    """The commands of one worker, their handlers, and the counters of what was replied."""

    def __init__(
        self, config: Config, scoreboard: Scoreboard, slot: int, commands: Iterable[Command]
    ) -> None:
        self.service = Service(config.server_id, _client_counter(config, scoreboard))
        table = {
            command.name.encode(): replace(
                command, cell=scoreboard.command_cell(command.name, slot)
            )
            for command in commands
        }
        self.grammar = Grammar(table, config.max_line_bytes)
        self.cells = scoreboard.cells
        self.error_cells = {
            error: scoreboard.cell(f"error_replies.{error.name}", slot) for error in ERROR_REPLIES
        }
        #: The worker exits, so handlers that still run are killed.
        self.is_exiting = False
        self._reads = scoreboard.cell("reads", slot)
        self._service_ns = scoreboard.cell("service_ns", slot)
        self._buckets = [
            scoreboard.cell(f"service_bucket.{number}", slot)
            for number in range(len(SERVICE_BOUNDS_NS) + 1)
        ]

    def reply_to(self, item: Command | ErrorReply) -> bytes:
        """Return the reply line to a command or an error, and count it. Runs the handler."""
        if isinstance(item, ErrorReply):
            self.count_error(item)
            return item.reply
        return self.reply_to_calls([self.call_for(item)])

    def call_for(self, item: Command | ErrorReply) -> Call:
        """Return what `reply_to_calls` needs for a command or an error."""
        if isinstance(item, Command):
            return item.handler, item.cell, item.name
        text = item.reply.decode().removesuffix("\n")
        return lambda _: text, self.error_cells[item], item.name

    def reply_to_calls(self, calls: Iterable[Call]) -> bytes:
        """Return the reply lines to several in order, and count them. Runs the handlers."""
        replies, service, cells = [], self.service, self.cells
        for handler, cell, name in calls:
            try:
                replies.append(encode(handler(service)))
            except BaseException as error:  # noqa: BLE001 (a handler ends its command, no more)
                replies.append(self._reply_failure(name, error))
            else:
                if _was_forked:
                    _exit()
                cells[cell] += 1
        return b"".join(replies)

    def count_error(self, error: ErrorReply) -> None:
        """Count an error reply, or a close without one."""
        self.cells[self.error_cells[error]] += 1

    def count_reads(self, reads: int, nanoseconds: int) -> None:
        """Count reads that were answered within this time together."""
        self.cells[self._reads] += reads
        self.cells[self._service_ns] += nanoseconds
        bucket = bisect_left(SERVICE_BOUNDS_NS, nanoseconds // reads)
        self.cells[self._buckets[bucket]] += reads

    def _reply_failure(self, name: str, error: BaseException) -> bytes:
        if _was_forked:
            _exit()
        if isinstance(error, gevent.GreenletExit) and self.is_exiting:
            raise error
        reply = CLUSTER_UNAVAILABLE
        if not isinstance(error, ClusterUnavailable):
            reply = INTERNAL
            message = f"the handler of {name} raised {type(error).__name__}"
            fields = {"gserver.command": name, **logs.error_fields(error)}
            logs.warn_ratelimited(
                "command.failed", message, fields, key=f"{name} {type(error).__name__}"
            )
        self.count_error(reply)
        return reply.reply


def encode(reply: str | int) -> bytes:
    """Return what `encode_reply` does. The same few short replies recur: 0.2 us less for each."""
    if type(reply) is int or (type(reply) is str and len(reply) <= MAX_SHORT_REPLY):
        return _short_line(reply)
    return encode_reply(reply)


def _note_fork() -> None:
    global _was_forked  # noqa: PLW0603 (a process is forked or it is not)
    _was_forked = True


def _exit() -> None:
    """End a child that a handler has forked: it would serve, and count, this worker's clients."""
    os._exit(EXIT_RUNTIME)


#: Set in a child that a handler forks.
_was_forked = False
os.register_at_fork(after_in_child=_note_fork)


def _client_counter(config: Config, scoreboard: Scoreboard) -> Callable[[], int]:
    """Return the function that WHO calls: clients of this server, or of the whole cluster."""
    if not config.redis_url:
        return scoreboard.clients
    if config.on_cluster_loss == "last-known":
        return scoreboard.cluster_clients
    updated_at, cells = scoreboard.server_cell("cluster_updated_at"), scoreboard.cells
    max_age_ns = round(config.cluster_max_age_seconds * 1e9)

    def count() -> int:
        if cells[updated_at] and monotonic_ns() - cells[updated_at] <= max_age_ns:
            return scoreboard.cluster_clients()
        if config.on_cluster_loss == "error":
            raise ClusterUnavailable
        return scoreboard.clients()

    return count
