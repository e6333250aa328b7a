"""The servers of the cluster, one by one, for the admin port.

They are read from Redis only on request, over a connection of its own, so heartbeats are not
affected. A request waits for Redis for a moment at most. When Redis is slow or away, the last known
servers are returned with their age.
"""

import math
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import gevent

from gserver.cluster.membership import GONE, LATE_AFTER_INTERVALS, base_of
from gserver.cluster.redis_link import RedisLink, kind_of
from gserver.config import Config, parse_admin_url

SCRIPT = Path(__file__).with_name("members.lua").read_text()
#: A longer list is of no use on a page.
MAX_SERVERS = 200
#: Redis is read at most once in this time, however many requests there are.
READ_INTERVAL_SECONDS = 1.0
#: Limit on the wait of a request for Redis.
REQUEST_WAIT_SECONDS = 0.25
#: Limit on one reading.
READ_TIMEOUT_SECONDS = 2.0

Servers = list[dict[str, Any]]
LEFT, LOST = "left", "lost"


class Departure(NamedTuple):
    """How a server has gone last, as one Redis says: LEFT or LOST."""

    how: str
    #: Its incarnation, which is the same at every Redis.
    run: str
    ago_ms: int


#: By the ids of the servers.
Gone = dict[str, Departure]


class Listed(NamedTuple):
    """What one Redis lists."""

    servers: Servers
    #: How many servers are not listed.
    omitted: int
    gone: Gone


class Members:
    """The last known servers of the cluster."""

    def __init__(self, config: Config) -> None:
        self._own_id = config.server_id
        self._interval_ms = round(config.heartbeat_interval_seconds * 1000)
        self._ttl_ms = round(config.member_ttl_seconds * 1000)
        self._links = [RedisLink(each) for each in config.engines]
        self._reader: gevent.Greenlet[[], None] | None = None
        self._read_started_at = self._servers_read_at = -math.inf
        self._servers: Servers | None = None
        self._omitted_servers = 0
        #: How the last servers that are gone have gone: LEFT or LOST, by their ids.
        self.gone: dict[str, str] = {}
        self._error_kind: str | None = None

    def payload(self) -> dict[str, Any]:
        """Return the servers as JSON values, after reading Redis if that is due.

        `servers`: the late ones first; None if Redis has never been read. Each has `id`, `clients`,
        `silent_seconds` until now, `is_late`, `is_this` and `admin_url`; what Redis does not hold
        is None. `omitted_servers`: how many servers are not listed. `age_seconds`: age of the list.
        `error_kind`: a key of HEARTBEAT_ERRORS if the last reading failed, else None.
        """
        is_reading = self._reader is not None and not self._reader.ready()
        if not is_reading and monotonic() >= self._read_started_at + READ_INTERVAL_SECONDS:
            self._read_started_at = monotonic()
            self._reader = gevent.spawn(self._read)
        if self._reader is not None:
            wait_end = self._read_started_at + REQUEST_WAIT_SECONDS
            self._reader.join(max(0.0, wait_end - monotonic()))
        return self._last()

    def read(self) -> dict[str, Any]:
        """Read Redis now, for up to READ_TIMEOUT_SECONDS, and return the same."""
        self._read()
        return self._last()

    def _last(self) -> dict[str, Any]:
        result: dict[str, Any] = {
            "servers": None,
            "age_seconds": None,
            "omitted_servers": self._omitted_servers,
            "error_kind": self._error_kind,
        }
        if self._servers is not None:
            age_seconds = round(monotonic() - self._servers_read_at, 3)
            result["servers"] = [_aged(server, age_seconds) for server in self._servers]
            result["age_seconds"] = age_seconds
        return result

    def _read(self) -> None:
        """Read all Redis at once. Those that fail are left out if there is another one."""
        started_at = monotonic()
        readers = [gevent.spawn(self._read_one, link) for link in self._links]
        gevent.joinall(readers)
        lists = [reader.value for reader in readers if isinstance(reader.value, Listed)]
        self._error_kind = None if lists else str(readers[0].value)
        if lists:
            self._servers_read_at = started_at
            self._servers = _merge(each.servers for each in lists)
            self._omitted_servers = max(each.omitted for each in lists)
            self.gone = _merge_gone([each.gone for each in lists])

    def _read_one(self, link: RedisLink) -> "Listed | str":
        """Return what one Redis lists, or the kind of its error."""
        try:
            with gevent.Timeout(READ_TIMEOUT_SECONDS):
                return link.run(SCRIPT, self._parse, self._own_id, self._interval_ms, MAX_SERVERS)
        except (Exception, gevent.Timeout) as error:  # noqa: BLE001 - its kind is reported
            return kind_of(error)
        finally:
            link.drop()

    def _parse(self, raw: Any) -> "Listed":
        """Return what a reply of members.lua lists.

        Raises an error if the reply has another form. The keys may hold values of other programs:
        an invalid id is not listed, and an invalid number is None.
        """
        size, clock, gone, *rest = raw
        if not isinstance(size, int) or len(rest) % 3:
            raise ValueError("the reply does not have the script's form")
        servers = []
        for server_id, lease_end, entry in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
            if re.fullmatch(rb"[!-~]{1,128}", server_id):
                lease_end_ms = _number(rb"(\d{1,15})", lease_end)
                servers.append(self._server(server_id.decode(), lease_end_ms, entry, clock))
        return Listed(servers, max(0, size - len(servers)), _parse_gone(gone, clock))

    def _server(
        self, server_id: str, lease_end_ms: int | None, entry: bytes, clock_ms: int
    ) -> dict[str, Any]:
        silent_ms = None
        if lease_end_ms is not None and clock_ms >= 0:
            silent_ms = max(0, clock_ms - (lease_end_ms - self._ttl_ms))
        late_after_ms = LATE_AFTER_INTERVALS * self._interval_ms
        return {
            "id": server_id,
            "clients": _number(rb"(\d{1,15}) \d+ \S+( \S+)?", entry),
            "silent_seconds": None if silent_ms is None else silent_ms / 1000,
            "is_late": silent_ms is not None and silent_ms > late_after_ms,
            "is_this": server_id == self._own_id,
            "admin_url": _admin_url(entry),
        }


def _merge(lists: Iterable[Servers]) -> Servers:
    """Return each server once: as the Redis lists it to which it has reported last."""
    found: dict[str, dict[str, Any]] = {}
    for server in (server for servers in lists for server in servers):
        other = found.get(server["id"])
        if other is None or _silence(server) < _silence(other):
            found[server["id"]] = server
    return sorted(found.values(), key=_listing_order)


def _silence(server: dict[str, Any]) -> float:
    return math.inf if server["silent_seconds"] is None else float(server["silent_seconds"])


def _parse_gone(text: bytes, clock_ms: int) -> Gone:
    """Return how each server has gone last. Lines of another form are left out."""
    found = [GONE.fullmatch(line) for line in text.split(b"\n")]
    return {
        each[1].decode(): Departure(
            each[2].decode(), base_of(each[5].decode()), clock_ms - int(each[3])
        )
        for each in reversed(found)
        if each
    }


def _merge_gone(found: Sequence[Gone]) -> dict[str, str]:
    """Return how each server has gone in its last run.

    If one Redis says that the server left, it did: it could not tell the other Redis.
    """
    merged = {}
    for server_id in {key for gone in found for key in gone}:
        departures = [gone[server_id] for gone in found if server_id in gone]
        last = min(departures, key=lambda each: each.ago_ms)
        ways = {each.how for each in departures if each.run == last.run}
        merged[server_id] = LEFT if LEFT in ways else LOST
    return merged


def _admin_url(entry: bytes) -> str | None:
    """Return the fourth word of an entry if it is a URL of http: a page makes it a link."""
    found = re.fullmatch(rb"\d+ \d+ \S+ ([!-~]+)", entry)
    with suppress(ValueError):
        return parse_admin_url(found[1].decode()) if found else None
    return None


def _number(pattern: bytes, text: bytes) -> int | None:
    found = re.fullmatch(pattern, text)
    return int(found[1]) if found else None


def _listing_order(server: dict[str, Any]) -> tuple[float, str]:
    """Late servers first, those silent for longest at the top; then all others by id."""
    return -server["silent_seconds"] if server["is_late"] else 0.0, server["id"]


def _aged(server: dict[str, Any], age_seconds: float) -> dict[str, Any]:
    """Return a server with its silence until now, not until Redis was read."""
    silent_seconds = server["silent_seconds"]
    if silent_seconds is None:
        return server
    return server | {"silent_seconds": round(silent_seconds + age_seconds, 3)}
