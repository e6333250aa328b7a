"""The servers of the cluster, one by one, for whoever asks on the admin port: read from Redis then,
and only then.

Beats have no part in it: it has a connection of its own, made for each reading. Who asks waits a
moment for it at most; when Redis is slow or away, the last known servers are told, with the age of
that knowledge.
"""

import math
import re
from pathlib import Path
from time import monotonic
from typing import Any

import gevent

from gserver.cluster.membership import STILL_INTERVALS
from gserver.cluster.redis_link import RedisLink, kind_of
from gserver.config import Config

SCRIPT = Path(__file__).with_name("members.lua").read_text()
#: A page with more is of no use to anybody.
MAX_SERVERS = 200
#: However many ask, and however often.
READ_SECONDS = 1.0
#: How long who asks waits for Redis.
WAIT_SECONDS = 0.25
#: How long one reading may take in all.
TRY_SECONDS = 2.0

Servers = list[dict[str, Any]]


class Roster:
    """What is known of the servers of the cluster."""

    def __init__(self, config: Config) -> None:
        self._own = config.server_id
        self._interval_ms = round(config.heartbeat_interval_seconds * 1000)
        self._ttl_ms = round(config.member_ttl_seconds * 1000)
        self._link = RedisLink(config)
        self._reading: gevent.Greenlet[[], None] | None = None
        self._began_at = self._known_at = -math.inf
        self._servers: Servers | None = None
        self._left_out = 0
        self._trouble: str | None = None

    def told(self) -> dict[str, Any]:
        """Return `servers` (None: not known), those that are late first; how many are `left_out`;
        `age_seconds` of it.

        `trouble` is the kind of the error when Redis could not be read, of HEARTBEAT_ERRORS. Each server
        has an `id`, `clients` and `silent_seconds`, until now (None where Redis holds no such
        number), `is_this`, and `is_late`: it was when Redis was read.
        """
        if not self._reading and monotonic() >= self._began_at + READ_SECONDS:
            self._began_at = monotonic()
            self._reading = gevent.spawn(self._read)
        if self._reading:
            self._reading.join(max(0.0, self._began_at + WAIT_SECONDS - monotonic()))
        known = {"left_out": self._left_out, "trouble": self._trouble}
        if self._servers is None:
            return {"servers": None, "age_seconds": None, **known}
        age = round(monotonic() - self._known_at, 3)
        servers = [
            one | {"silent_seconds": _later(one["silent_seconds"], age)} for one in self._servers
        ]
        return {"servers": servers, "age_seconds": age, **known}

    def _read(self) -> None:
        began = monotonic()
        try:
            with gevent.Timeout(TRY_SECONDS):
                found = self._link.run(
                    SCRIPT, self._parse, self._own, self._interval_ms, MAX_SERVERS
                )
        except (Exception, gevent.Timeout) as error:
            self._trouble = kind_of(error)
        else:
            self._servers, self._left_out = found
            self._known_at, self._trouble = began, None
        finally:
            self._link.drop()

    def _parse(self, answer: Any) -> tuple[Servers, int]:
        """Return the servers of the script's answer, and how many it leaves out; ValueError if it
        is no such answer.

        What Redis holds may be anybody's: an id that is none is left out, a number that is none is
        not known.
        """
        size, clock, *rest = answer
        if not isinstance(size, int) or len(rest) % 3:
            raise ValueError("the answer is not of the script's form")
        servers = [
            self._server(
                id_.decode(),
                _number(rb"(\d{1,15})", lease),
                _number(rb"(\d{1,15}) \d+ \S+", entry),
                clock,
            )
            for id_, lease, entry in zip(*[iter(rest)] * 3, strict=True)
            if re.fullmatch(rb"[!-~]{1,128}", id_)
        ]
        servers.sort(
            key=lambda server: (-server["silent_seconds"] if server["is_late"] else 0, server["id"])
        )
        return servers, max(0, size - len(servers))

    def _server(
        self, server_id: str, lease: int | None, clients: int | None, clock: int
    ) -> dict[str, Any]:
        silent_ms = None if lease is None or clock < 0 else max(0, clock - lease + self._ttl_ms)
        return {
            "id": server_id,
            "clients": clients,
            "silent_seconds": None if silent_ms is None else silent_ms / 1000,
            "is_late": silent_ms is not None and silent_ms > STILL_INTERVALS * self._interval_ms,
            "is_this": server_id == self._own,
        }


def _number(pattern: bytes, text: bytes) -> int | None:
    found = re.fullmatch(pattern, text)
    return int(found[1]) if found else None


def _later(seconds: float | None, more: float) -> float | None:
    return None if seconds is None else round(seconds + more, 3)
