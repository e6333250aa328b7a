"""Says which servers have come to the cluster, and which have left or were lost.

A heartbeat returns only their number. When that changes, the list of the servers is read from
Redis, in a greenlet of its own, so heartbeats are not delayed.
"""

import logging
from typing import Any

import gevent

from gserver import logs
from gserver.cluster.members import LEFT, LOST, Members
from gserver.config import Config

#: Servers that are named in an event, at most.
MAX_NAMED = 5


class Changes:
    """The servers that were known, and what has changed since."""

    def __init__(self, config: Config) -> None:
        self._members = Members(config)
        #: Pause before the list is read: until all Redis have it, if there are several.
        several = len(config.engines) > 1
        self._delay_seconds = 2 * config.heartbeat_interval_seconds if several else 0.0
        #: The ids at the last change; None if they are not known.
        self._known: set[str] | None = None
        #: Changes that were not announced yet: the number of servers before and then, and
        #: of the clients of the others.
        self._pending: list[tuple[int, int, int]] = []
        self._greenlet: gevent.Greenlet[[], None] | None = None

    def begin(self) -> None:
        """Read which servers there are, soon. Changes are told from there."""
        self._greenlet = gevent.spawn(self._begin)

    def _begin(self) -> None:
        self._known = self._read()
        self._run()

    def note(self, before: int, now: int, remote_clients: int) -> None:
        """Log soon that the number of servers has changed, with their names if they can be read."""
        self._pending.append((before, now, remote_clients))
        if self._greenlet is None or self._greenlet.ready():
            self._greenlet = gevent.spawn(self._run)

    def _run(self) -> None:
        while self._pending:
            self._announce(*self._pending.pop(0))

    def _announce(self, before: int, now: int, remote_clients: int) -> None:
        gevent.sleep(self._delay_seconds)
        known, found = self._known, self._read()
        self._known = found or known  # If it cannot be read, the next change is told from here.
        message = f"servers in the cluster: {now} (before: {before})"
        fields: dict[str, Any] = {"gserver.servers": now, "gserver.remote_clients": remote_clients}
        if known is not None and found is not None:
            joined, gone = sorted(found - known), sorted(known - found)
            ends = self._members.gone
            lost = [name for name in gone if ends.get(name) == LOST]
            left = [name for name in gone if ends.get(name) == LEFT]
            # After a loss of data they have not reported yet.
            missing = [name for name in gone if name not in ends]
            ways = {"joined": joined, "left": left, "lost": lost, "missing": missing}
            for how, names in ways.items():
                if names:
                    fields[f"gserver.{how}"] = _named(names)
                    message += f"; {how}: {_named(names)}"
            for name in lost[:MAX_NAMED]:
                text = f"server {name} was lost: it did not say that it stops"
                logs.event(logging.WARNING, "cluster.server_lost", text, {"gserver.server": name})
        logs.event(logging.INFO, "cluster.servers", message, fields)

    def _read(self) -> set[str] | None:
        """Return the ids of all servers; None if they are not known, or too many to list."""
        listed = self._members.read()
        if listed["error_kind"] or listed["omitted_servers"]:
            return None
        return {server["id"] for server in listed["servers"] or ()}


def _named(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
