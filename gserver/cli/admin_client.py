"""The client of the admin port, for `gserver top`, `status`, `clients` and `kick`.

It does not trust the server: there is one deadline for a whole response and a limit on its size, a
status is used only if it has the expected shape, and its texts are made safe for a terminal.
"""

import base64
import json
import re
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, RemoteDisconnected
from math import inf
from threading import Thread, Timer
from types import NoneType
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from gserver.errors import FatalError, UsageError
from gserver.metrics import DURATION_BOUNDS_NS, percentile

#: Time limit of a request, from the look-up of the name to the end of the response.
TIMEOUT_SECONDS = 2.0
#: A status with 200 servers of the longest ids has a twentieth of this.
MAX_BYTES = 1_000_000
#: The same for a list of clients: of 30,000 with names of a usual length.
MAX_LIST_BYTES, MAX_CLIENTS = 10_000_000, 100_000
LIST_SECONDS = 6.0
STATUS = "/status.json"
#: Most items of a list, and characters of a text, in the part of a status that is shown.
MAX_ITEMS, MAX_TEXT = 1000, 128
SLOW = f"no answer in {TIMEOUT_SECONDS:.0f} s"
STRANGE = "the answer is not that of a gserver admin port"
CLOSED = "it closed the connection without an answer"
REASONS = {
    401: "the admin token is missing or wrong",
    403: "the server has no admin token: use 127.0.0.1 or localhost",
}

Status = dict[str, Any]


class Long(NamedTuple):
    """A text of at most so many characters, more than MAX_TEXT."""

    length: int


class EachOf(NamedTuple):
    """A dict with values of one shape, under any names."""

    shape: Any


# The shape of a status, as `_fits` reads it. A status may hold more; this is what is shown.
MAYBE = (float, NoneType)
TOTALS = EachOf(float)
MEMBER = {"id": str, "clients": MAYBE, "silent_seconds": MAYBE, "is_late": bool}
MEMBERS = {
    "servers": ([MEMBER], NoneType),
    "omitted_servers": float,
    "age_seconds": MAYBE,
    "error_kind": (str, NoneType),
}
CLUSTER = {
    "name": str,
    "servers": MAYBE,
    "clients": MAYBE,
    "age_seconds": MAYBE,
    "silent_seconds": MAYBE,
    "members": (MEMBERS, NoneType),
}
CLIENT = {
    **dict.fromkeys(("id", "transport", "address", "state"), str),
    "tls_name": Long(3000),
    **dict.fromkeys(("port", "worker", "age_seconds", "idle_seconds"), float),
    **dict.fromkeys(("uid", "pid"), MAYBE),
    "command": (str, NoneType),
}
CLIENTS = {
    "clients": [CLIENT],
    "total": float,
    "is_complete": bool,
    "by_address": [{"address": str, "clients": float}],
    "recent": [{"at": float, "address": str, "port": float, "reason": str}],
}
KICKED = {"closed": float, "is_complete": bool}
REASON = {"name": str, "text": Long(1000)}
DURATION = {"count": float, "seconds": float, "buckets": [float]}
SHAPE = {
    "verdict": str,
    "reasons": [REASON],
    "last_minute": dict.fromkeys(("mistakes", "failures"), float),
    "command_seconds": EachOf(DURATION),
    "server": {
        "id": str,
        "state": str,
        "endpoints": [Long(300)],
        "tls_expires_at": MAYBE,
        **dict.fromkeys(("uptime_seconds", "handovers", "handover_seconds"), float),
    },
    "clients": dict.fromkeys(("now", "peak", "handed_over", "left_behind"), float),
    "commands": TOTALS,
    "error_replies": TOTALS,
    "workers": {
        "each": [dict.fromkeys(("pid", "age_seconds", "clients", "silent_seconds"), float)]
    },
    "cluster": (CLUSTER, NoneType),
}


@dataclass
class Target:
    """The admin port of one server, with its last two statuses. `address` is HOST:PORT."""

    address: str
    token: str = ""
    #: The last status, and the one before it; empty until there is one.
    now: Status = field(default_factory=dict)
    before: Status = field(default_factory=dict)
    #: Why there is no status; "" if there is one.
    error: str = ""
    _asked_at: float = 0.0
    _answer: "Future[Status | str] | None" = None

    def ask(self) -> "Future[Status | str]":
        """Send a request, unless one is already in progress; return the future of its result."""
        if self._answer is None:
            self._asked_at, self._answer = time.monotonic(), Future()
            # A daemon thread ends with the program. A name look-up has no time limit, so a pool,
            # which waits for its threads, could hang at the exit.
            Thread(
                target=_request, args=(self._answer, self.address, self.token), daemon=True
            ).start()
        return self._answer

    def wait(self, seconds: float) -> None:
        """Take the result if it arrives within `seconds`; otherwise keep the last one.

        A request that is later than `TIMEOUT_SECONDS` is an error. It stays in progress.
        """
        try:
            result = self.ask().result(seconds)
        except TimeoutError:
            if time.monotonic() >= self._asked_at + TIMEOUT_SECONDS:
                self.error = SLOW
            return
        self._answer = None
        if isinstance(result, str):
            self.error = result
        else:
            self.before, self.now, self.error = self.now, result, ""

    @property
    def verdict(self) -> str:
        """The server's verdict on itself, or `unreachable` if it has not answered."""
        return "unreachable" if self.error else str(self.now["verdict"])

    def percentile(self, percent: float, command: str = "") -> float | None:
        """Return the duration of a command, or of all, since the last status but one, in seconds.

        If none has run since then, that since the start; None if none has run at all.
        """
        if self.error:
            return None
        now = _buckets(self.now, command)
        if self.rate("commands") is not None:
            before = _buckets(self.before, command)
            recent = [max(0, late - early) for late, early in zip(now, before, strict=False)]
            now = recent if sum(recent) else now
        return percentile(now, percent)

    def rate(self, *path: str) -> float | None:
        """Return the growth per second of a counter, or of the sum of a dict of counters.

        None if it is not known: there are no two statuses of the same run of the server.
        """
        if self.error or not self.before:
            return None
        now, before = self.now["server"], self.before["server"]
        seconds = float(now["uptime_seconds"] - before["uptime_seconds"])
        if now["id"] != before["id"] or seconds <= 0:
            return None
        growth = _total(self.now, path) - _total(self.before, path)
        # Less than before: the server has started again, with the same id.
        return growth / seconds if 0 <= growth / seconds < inf else None


def parse_targets(urls: Sequence[str], token: str) -> list[Target]:
    """Return a target for each URL or HOST:PORT; raise `UsageError` for any other text.

    A password in a URL is used in place of `token`.
    """
    return [Target(*_parse(url, token), error="no answer yet") for url in urls]


def poll(targets: Sequence[Target], seconds: float = 1.1 * TIMEOUT_SECONDS) -> None:
    """Ask all targets at the same time, and take the results that arrive within `seconds`."""
    for target in targets:
        target.ask()
    deadline = time.monotonic() + seconds
    for target in targets:
        target.wait(max(0.0, deadline - time.monotonic()))


def poll_twice(targets: Sequence[Target], seconds: float) -> None:
    """Ask all targets, and after `seconds` those that answered again: rates need two results."""
    poll(targets)
    present = [target for target in targets if not target.error]
    if present:
        time.sleep(seconds)
        poll(present)


def as_json(targets: Sequence[Target]) -> str:
    """Return one line of JSON: by address, the status of each target or its error."""
    return json.dumps(
        {
            target.address: {"error": target.error} if target.error else target.now
            for target in targets
        }
    )


def _parse(url: str, token: str) -> tuple[str, str]:
    """Return the address as HOST:PORT and the token."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        is_good = parts.scheme == "http" and bool(parts.hostname) and parts.port is not None
        is_good = is_good and not parts.path.strip("/") and not parts.query
        is_good = is_good and not re.search(r"[\0- \x7f]", parts.netloc)
    except ValueError:
        is_good = False
    if not is_good:
        shown = url.rpartition("@")[2]  # Before that, there may be a token.
        raise UsageError(f"{shown!r} is not an admin port: write HOST:PORT or http://HOST:PORT")
    return parts.netloc.rpartition("@")[2], unquote(parts.password or "") or token


def ask_once(target: Target, path: str, shape: Any, *, method: str = "GET") -> dict[str, Any]:
    """Send one request, and return the JSON of the answer, if it has this shape.

    Raises `FatalError` with the reason if it has not.
    """
    try:
        found = _printable(json.loads(_fetch_in_time(target, path, method)))
    except FAILURES as error:
        raise FatalError(f"{target.address}: {_explain(error)}") from error
    if not _fits(found, shape):
        raise FatalError(f"{target.address}: {STRANGE}")
    document: dict[str, Any] = found
    return document


def _fetch_in_time(target: Target, path: str, method: str) -> str:
    """Return the body of an answer of all workers, as `_fetch` does, also if a look-up hangs."""
    answer: Future[str] = Future()

    def fetch() -> None:
        try:
            answer.set_result(_fetch(target.address, target.token, path, method))
        except Exception as error:  # noqa: BLE001 - `result` raises it
            answer.set_exception(error)

    Thread(target=fetch, daemon=True).start()
    try:
        return answer.result(LIST_SECONDS + 0.1)  # Once connected, it has its own limit.
    except TimeoutError as error:
        raise TimeoutError(str(error) or f"no answer in {LIST_SECONDS:g} s") from error


def _request(answer: "Future[Status | str]", address: str, token: str) -> None:
    """Set the result to the status, or to a text that says why there is none."""
    try:
        status = _printable(json.loads(_fetch(address, token)))
        answer.set_result(status if _fits(status, SHAPE) else STRANGE)
    except FAILURES as error:
        answer.set_result(_explain(error))


#: What may go wrong in a request.
FAILURES = OSError, ValueError, RecursionError, HTTPException, FatalError


def _explain(error: Exception) -> str:
    """Return why a request has no answer."""
    match error:
        case TimeoutError():
            return str(error) or SLOW
        case RemoteDisconnected():
            return CLOSED
        case FatalError():
            return str(error)
        case OSError() | UnicodeError():  # The latter: the host name cannot be encoded.
            return getattr(error, "strerror", None) or str(error)
    return STRANGE


def _fetch(address: str, token: str, path: str = STATUS, method: str = "GET") -> str:
    """Return the body of an answer. Raises `FatalError` for an error response."""
    seconds, most = TIMEOUT_SECONDS, MAX_BYTES
    if path != STATUS:  # All workers are asked for it.
        seconds, most = LIST_SECONDS, MAX_LIST_BYTES
    parts, deadline = urlsplit(f"//{address}"), time.monotonic() + seconds
    headers = {"Connection": "close", "X-Gserver": "1"}
    if token:
        credentials = base64.b64encode(f":{token}".encode()).decode()
        headers["Authorization"] = f"Basic {credentials}"
    connection = HTTPConnection(str(parts.hostname), parts.port, timeout=seconds)
    try:
        connection.connect()
        with _cut_off_at(deadline, connection.sock):
            connection.request(method, path, headers=headers)
            with connection.getresponse() as response:
                body = response.read(most + 1) if response.status == 200 else b""
    except (OSError, HTTPException) as error:
        if time.monotonic() >= deadline:  # The connection was cut off.
            raise TimeoutError(f"no answer in {seconds:g} s") from error
        raise
    finally:
        connection.close()
    if time.monotonic() >= deadline:
        raise TimeoutError(f"no answer in {seconds:g} s")
    if response.status != 200:
        raise FatalError(REASONS.get(response.status, f"HTTP {response.status}"))
    if len(body) > most:
        raise FatalError(STRANGE if path == STATUS else f"the list has more than {most:,} bytes")
    return body.decode(errors="replace")


@contextmanager
def _cut_off_at(deadline: float, sock: socket.socket) -> Iterator[None]:
    """End the connection at the deadline: a socket's timeout holds for each read, not for all."""
    timer = Timer(deadline - time.monotonic(), _shut_down, [sock])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _shut_down(sock: socket.socket) -> None:
    with suppress(OSError):  # The connection has ended.
        sock.shutdown(socket.SHUT_RDWR)


def _fits(value: Any, shape: Any) -> bool:
    """Whether a value has a shape.

    A shape is a type; a tuple of shapes, of which one must fit; a list with the shape of every
    item; `EachOf`; `Long`; or a dict with the shapes of some names.
    """
    if isinstance(shape, Long):
        return isinstance(value, str) and len(value) <= shape.length
    if isinstance(shape, EachOf):
        is_dict = isinstance(value, dict)
        return is_dict and _is_list([*value], str) and _is_list([*value.values()], shape.shape)
    if isinstance(shape, tuple):
        return any(_fits(value, one) for one in shape)
    if isinstance(shape, list):
        return _is_list(value, shape[0])
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(
            name in value and _fits(value[name], shape[name]) for name in shape
        )
    return _is_scalar(value, shape)


def _is_list(value: Any, shape: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= (MAX_CLIENTS if shape is CLIENT else MAX_ITEMS)
        and all(_fits(item, shape) for item in value)
    )


def _is_scalar(value: Any, kind: Any) -> bool:
    if kind is float:  # No count has more than 64 bits. This excludes infinity and NaN, too.
        return isinstance(value, int | float) and abs(value) < 2**63
    if kind is str:
        return isinstance(value, str) and len(value) <= MAX_TEXT
    return isinstance(value, kind)


def _printable(value: Any) -> Any:
    """Return the value with escapes for all but printable ASCII, which a terminal might obey."""
    if isinstance(value, str):
        return re.sub(r"[^ -~]", lambda found: ascii(found[0])[1:-1], value)
    if isinstance(value, list):
        return [_printable(item) for item in value]
    if isinstance(value, dict):
        return {_printable(name): _printable(item) for name, item in value.items()}
    return value


def _buckets(status: Status, command: str) -> list[int]:
    """Return the buckets of a command, or of all commands together."""
    commands = status["command_seconds"]
    chosen = [commands[command]] if command in commands else list(commands.values())
    sums = [0] * (len(DURATION_BOUNDS_NS) + 1)
    for each in chosen:
        for number, count in enumerate(each["buckets"][: len(sums)]):
            sums[number] += int(count)
    return sums


def _total(status: Status, path: Sequence[str]) -> float:
    value: Any = status
    for name in path:
        value = value.get(name, 0)
    return float(sum(value.values()) if isinstance(value, dict) else value)
