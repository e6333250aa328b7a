"""What one worker replies: it runs handlers, guards against their errors, and counts.

Shared by all clients of a worker. A handler is other people's code: an exception ends its command
and nothing else.
"""

import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from math import inf
from time import monotonic, monotonic_ns
from typing import Any, cast

import gevent

from gserver import logs
from gserver.commands import BUILT_IN, Command, Peer, Request, encode_reply
from gserver.config import Config
from gserver.errors import EXIT_RUNTIME, ClusterUnavailable
from gserver.metrics import DURATION_BOUNDS_NS
from gserver.protocol import (
    CLUSTER_UNAVAILABLE,
    ERROR_REPLIES,
    INTERNAL,
    TIMEOUT,
    ErrorReply,
    Grammar,
)
from gserver.scoreboard import BUCKETS_OFFSET, TIME_OFFSET, Scoreboard

#: Longest reply that is remembered, and how many are.
MAX_SHORT_REPLY, MAX_SHORT_REPLIES = 64, 1024
_BUILT_IN_NAMES = frozenset(command.name for command in BUILT_IN)
_short_line = lru_cache(maxsize=MAX_SHORT_REPLIES)(encode_reply)


#: What makes a reply, the cell of the scoreboard that counts it, and the command's name.
Call = tuple[Callable[[Request], str | int], int, str]


class Replies:
    """The commands of one worker, their handlers, and the counters of what was replied."""

    def __init__(
        self, config: Config, scoreboard: Scoreboard, slot: int, commands: Iterable[Command]
    ) -> None:
        self._config = config
        #: What WHO replies. It may raise `ClusterUnavailable`.
        self.count_clients = _client_counter(config, scoreboard)
        table = {command.name.encode(): _with_limits(command, config) for command in commands}
        with_words = {
            name: command.bind for name, command in table.items() if command.parameters.takes_words
        }
        self.grammar = Grammar(table, config.max_line_bytes, with_words)
        self.cells = scoreboard.cells
        #: The cell that counts each command.
        self.command_cells = {
            command.name: scoreboard.command_cell(command.name, slot) for command in table.values()
        }
        self.error_cells = {
            error.name: scoreboard.cell(f"error_replies.{error.name}", slot)
            for error in ERROR_REPLIES
        }
        #: The worker exits, so handlers that still run are killed.
        self.is_exiting = False
        #: How many handlers that may block run, by command.
        self._running: Counter[str] = Counter()
        self._reads = scoreboard.cell("reads", slot)
        #: Commands whose time is that of the read which they came with, and their counts so far.
        self._quick = [
            self.command_cells[command.name] for command in table.values() if not command.may_block
        ]
        self._timed = [self.cells[cell] for cell in self._quick]
        #: Whether there are own commands that do not block.
        self.has_quick_own = len(self._quick) > len(BUILT_IN)

    def request(self, sock: Peer | None, deadline: float = inf) -> Request:
        """Return what the handler of a command from this connection is given."""
        return Request(self._config.server_id, self.count_clients, sock, deadline)

    # Commands that cannot block

    def reply_to(self, item: Command | ErrorReply, sock: Peer | None) -> bytes:
        """Return the reply line to a command or an error, and count it. Runs the handler."""
        if isinstance(item, ErrorReply):
            self.count_error(item)
            return item.reply
        calls, request = [self.call_for(item)], self.request(sock)
        hub, current = cast(Any, gevent.get_hub()), cast(Any, gevent.getcurrent())
        if current is hub or item.name in _BUILT_IN_NAMES:
            return self.reply_to_calls(calls, request)
        # An own command must not block: in the hub, gevent raises an error if it does.
        hub.loop.run_callback(lambda: current.switch(self.reply_to_calls(calls, request)))
        reply: bytes = hub.switch()
        return reply

    def call_for(self, item: Command | ErrorReply) -> Call:
        """Return what `reply_to_calls` needs for a command or an error."""
        if isinstance(item, ErrorReply):
            text = item.reply.decode().removesuffix("\n")
            return lambda _: text, self.error_cells[item.name], item.name
        cell = self.command_cells[item.name]
        return item.run if item.arguments else item.handler, cell, item.name

    def reply_to_calls(
        self, calls: Iterable[Call], request: Request, timer: gevent.Timeout | None = None
    ) -> bytes:
        """Return the reply lines to several in order, and count them. Runs the handlers.

        `timer` may interrupt them.
        """
        replies, cells = [], self.cells
        for handler, cell, name in calls:
            try:
                replies.append(encode(handler(request)))
            except BaseException as error:  # noqa: BLE001 (a handler ends its command, no more)
                replies.append(self._reply_failure(name, error, timer))
            else:
                if _was_forked:
                    _exit()
                cells[cell] += 1
        return b"".join(replies)

    # Commands that may block

    def begin(self, command: Command) -> bool:
        """Note that a handler which may block is about to run; return False if too many do."""
        if command.at_once and self._running[command.name] >= command.at_once:
            return False
        self._running[command.name] += 1
        return True

    def run(self, command: Command, sock: Peer) -> bytes:
        """Run a handler that may block, and that has begun; return its reply line.

        It runs in the greenlet of the caller, which is interrupted at the command's timeout.
        """
        seconds = command.timeout
        request = self.request(sock, monotonic() + seconds if seconds else inf)
        request.remember_client()
        started_at = monotonic_ns()
        timer = gevent.Timeout.start_new(seconds or None)
        try:
            return self.reply_to_calls([self.call_for(command)], request, timer)
        finally:
            timer.close()
            self._running[command.name] -= 1
            self._note_run(command.name, request, monotonic_ns() - started_at)

    def _note_run(self, name: str, request: Request, nanoseconds: int) -> None:
        self._count_runs(self.command_cells[name], 1, nanoseconds)
        limit, seconds = self._config.slow_command_seconds, nanoseconds / 1e9
        if limit and seconds >= limit:
            fields = {
                "gserver.command": name,
                "gserver.seconds": round(seconds, 3),
                "client.address": request.address,
                "client.port": request.port,
            }
            message = f"{name} took {seconds:.1f} s for {request.address}"
            logs.warn_ratelimited("command.slow", message, fields, key=name)

    # Counting

    def count_error(self, error: ErrorReply) -> None:
        """Count an error reply, or a close without one."""
        self.cells[self.error_cells[error.name]] += 1

    def count_reads(self, reads: int, nanoseconds: int) -> None:
        """Count reads that were answered within this time together.

        A quick command takes as long as the read with which it came. To time each would cost more
        than to answer it. So the commands that were counted since the last call get the mean.
        """
        cells, timed = self.cells, self._timed
        cells[self._reads] += reads
        for number, cell in enumerate(self._quick):
            count = cells[cell]
            if count != timed[number]:
                self._count_runs(cell, count - timed[number], nanoseconds // reads)
                timed[number] = count

    def _count_runs(self, cell: int, runs: int, nanoseconds: int) -> None:
        """Count runs that took this long each, of the command that is counted in a cell."""
        cells = self.cells
        cells[cell + TIME_OFFSET] += runs * nanoseconds
        bucket = bisect_left(DURATION_BOUNDS_NS, nanoseconds)
        cells[cell + BUCKETS_OFFSET + bucket] += runs

    def _reply_failure(
        self, name: str, error: BaseException, timer: gevent.Timeout | None
    ) -> bytes:
        if _was_forked:
            _exit()
        if isinstance(error, gevent.GreenletExit) and self.is_exiting:
            raise error
        if isinstance(error, ClusterUnavailable):
            reply = CLUSTER_UNAVAILABLE
        elif timer and error is timer:
            reply = TIMEOUT
            self._log_failure(name, f"was interrupted after {timer.seconds:g} s", error)
        else:
            reply = INTERNAL
            self._log_failure(name, f"raised {type(error).__name__}", error)
        self.count_error(reply)
        return reply.reply

    def _log_failure(self, name: str, failure: str, error: BaseException) -> None:
        fields = {"gserver.command": name, **logs.error_fields(error)}
        message = f"the handler of {name} {failure}"
        key = f"{name} {type(error).__name__}"
        logs.warn_ratelimited("command.failed", message, fields, key=key)


def encode(reply: str | int) -> bytes:
    """Return what `encode_reply` does. The same few short replies recur: 0.2 us less for each."""
    if type(reply) is int or (type(reply) is str and len(reply) <= MAX_SHORT_REPLY):
        return _short_line(reply)
    return encode_reply(reply)


def _with_limits(command: Command, config: Config) -> Command:
    """Return a command whose own limits, where it has none, are those of the options."""
    timeout, at_once = command.timeout, command.at_once
    return replace(
        command,
        timeout=config.command_timeout_seconds if timeout is None else timeout,
        at_once=config.command_at_once if at_once is None else at_once,
    )


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
    confirmed_at, cells = scoreboard.server_cell("cluster_confirmed_at"), scoreboard.cells
    max_age_ms = round(config.cluster_max_age_seconds * 1e3)

    def count() -> int:
        known_at = cells[confirmed_at]
        if known_at and monotonic_ns() // 1_000_000 - known_at <= max_age_ms:
            return scoreboard.cluster_clients()
        if config.on_cluster_loss == "error":
            raise ClusterUnavailable
        return scoreboard.clients()

    return count
