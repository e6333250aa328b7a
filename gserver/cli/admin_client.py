"""Asking admin ports how their servers are, for `gserver top` and `gserver status`.

Whatever answers there is somebody else's: it has two seconds for everything, a limit on what it
says, and is believed only if that has the shape of a status. Knows nothing else of a server.
"""

import base64
import json
import re
import socket
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Thread
from types import NoneType
from typing import Any
from urllib.parse import urlsplit

from gserver.errors import FatalError, UsageError

#: From the question to the end of the answer.
TIMEOUT_SECONDS = 2.0
#: A status with 200 servers of the longest ids has a twentieth of this.
MAX_BYTES = 1_000_000
#: Most items of a list, and characters of a text, in what is shown.
MAX_ITEMS, MAX_TEXT = 1000, 128
SLOW = f"no answer in {TIMEOUT_SECONDS:.0f} s"
STRANGE = "it answers, but not as an admin port of gserver does"
REASONS = {
    "401": "the admin token is missing or wrong",
    "403": "without an admin token, name it by its address",
}

Status = dict[str, Any]
MAYBE = (float, NoneType)
TOTALS = {str: float}
MEMBER = {"id": str, "clients": MAYBE, "silent_seconds": MAYBE, "is_late": bool}
ROSTER = {
    "servers": ([MEMBER], NoneType),
    "left_out": float,
    "age_seconds": MAYBE,
    "trouble": (str, NoneType),
}
CLUSTER = {
    "name": str,
    "servers": MAYBE,
    "clients": MAYBE,
    "age_seconds": MAYBE,
    "roster": (ROSTER, NoneType),
}
#: What is shown of a status, as `_fits` reads it; there may be more in it.
SHAPE = {
    "server": {"id": str, "state": str, "uptime_seconds": float, "tls_expires_at": MAYBE},
    "clients": {"now": float, "peak": float},
    "commands": TOTALS,
    "error_replies": TOTALS,
    "workers": {
        "each": [dict.fromkeys(("pid", "age_seconds", "clients", "silent_seconds"), float)]
    },
    "cluster": (CLUSTER, NoneType),
}


@dataclass
class Watched:
    """One server's admin port, HOST:PORT as alerts name it: what it said last, and before that."""

    address: str
    token: str = ""
    now: Status = field(default_factory=dict)
    before: Status = field(default_factory=dict)
    #: Why there is no answer; "" when there is.
    trouble: str = ""
    _asked_at: float = 0.0
    _answer: "Future[Status | str] | None" = None

    def ask(self) -> "Future[Status | str]":
        """Ask once more, unless an answer is awaited already."""
        if self._answer is None:
            self._asked_at, self._answer = time.monotonic(), Future()
            # A thread that ends with the program: nothing limits the time that it takes to look up
            # a name.
            Thread(
                target=_answer, args=(self._answer, self.address, self.token), daemon=True
            ).start()
        return self._answer

    def hear(self, seconds: float) -> None:
        """Take the answer if it comes within so many seconds. Until it does, or is late, the last one stands."""
        try:
            heard = self.ask().result(seconds)
        except TimeoutError:
            if time.monotonic() >= self._asked_at + TIMEOUT_SECONDS:
                self.trouble = SLOW
            return
        self._answer = None
        if isinstance(heard, str):
            self.trouble = heard
        else:
            self.before, self.now, self.trouble = self.now, heard, ""

    @property
    def state(self) -> str:
        """The server's state, or `away`."""
        return "away" if self.trouble else str(self.now["server"]["state"])

    def rate(self, *path: str) -> float | None:
        """How fast a counter, or a dict of them, has grown since the last look; None when that is not known."""
        if (
            self.trouble
            or not self.before
            or self.before["server"]["id"] != self.now["server"]["id"]
        ):
            return None
        seconds = self.now["server"]["uptime_seconds"] - self.before["server"]["uptime_seconds"]
        now, before = (_total(status, path) for status in (self.now, self.before))
        return (now - before) / seconds if seconds > 0 else None


def watch(urls: Sequence[str], token: str) -> list[Watched]:
    """Return a watch for each URL or HOST:PORT; raise `UsageError` for what is neither."""
    return [Watched(*_parse(url, token), trouble="no answer yet") for url in urls]


def look(watched: Sequence[Watched], seconds: float = 1.1 * TIMEOUT_SECONDS) -> None:
    """Ask all of them at once, and hear those who answer within so many seconds."""
    for each in watched:
        each.ask()
    deadline = time.monotonic() + seconds
    for each in watched:
        each.hear(max(0.0, deadline - time.monotonic()))


def look_twice(watched: Sequence[Watched], seconds: float) -> None:
    """Ask all of them, and those that answer again after so many seconds: rates are between two looks."""
    look(watched)
    there = [each for each in watched if not each.trouble]
    if there:
        time.sleep(seconds)
        look(there)


def told(watched: Sequence[Watched]) -> dict[str, Status]:
    """What each server said, or why it said nothing."""
    return {
        each.address: {"trouble": each.trouble} if each.trouble else each.now for each in watched
    }


def _parse(url: str, token: str) -> tuple[str, str]:
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        is_good = parts.scheme == "http" and bool(parts.hostname) and parts.port is not None
        is_good = is_good and not parts.path.strip("/") and not parts.query
    except ValueError:
        is_good = False
    if not is_good:
        raise UsageError(f"{url!r} is no admin port: name it as HOST:PORT or http://HOST:PORT")
    return parts.netloc.rpartition("@")[2], parts.password or token


def _answer(answer: "Future[Status | str]", address: str, token: str) -> None:
    """Give the status, or why there is none."""
    try:
        status = _plain(json.loads(_fetch(address, token)))
        answer.set_result(status if _fits(status, SHAPE) else STRANGE)
    except TimeoutError:
        answer.set_result(SLOW)
    except (OSError, UnicodeError) as error:  # UnicodeError: it is no name of a host.
        answer.set_result(getattr(error, "strerror", None) or str(error))
    except (ValueError, RecursionError):
        answer.set_result(STRANGE)
    except FatalError as error:
        answer.set_result(str(error))


def _fetch(address: str, token: str) -> str:
    """Return what `/status.json` holds. By HTTP 1.0: the answer is one piece, and ends with the connection."""
    parts, deadline, received = (
        urlsplit(f"//{address}"),
        time.monotonic() + TIMEOUT_SECONDS,
        bytearray(),
    )
    head = ["GET /status.json HTTP/1.0", f"Host: {address}", "Connection: close"]
    if token:
        head.append(f"Authorization: Basic {base64.b64encode(f':{token}'.encode()).decode()}")
    with socket.create_connection((str(parts.hostname), parts.port or 0), TIMEOUT_SECONDS) as sock:
        sock.sendall("".join(f"{line}\r\n" for line in [*head, ""]).encode())
        while data := sock.recv(65536):
            received += data
            if time.monotonic() >= deadline:
                raise TimeoutError
            if len(received) > MAX_BYTES:
                raise FatalError(STRANGE)
    found = re.match(rb"HTTP/1\.\d (\d{3})\b", received)
    if not found:
        raise FatalError(STRANGE if received else "it closed the connection without an answer")
    code = found[1].decode()
    if code != "200":
        raise FatalError(REASONS.get(code, f"HTTP {code}"))
    return received.partition(b"\r\n\r\n")[2].decode(errors="replace")


def _fits(value: Any, shape: Any) -> bool:
    """Whether a value has a shape: names with theirs, any names with one, items with one, any of several, a type."""
    if isinstance(shape, tuple):
        return any(_fits(value, one) for one in shape)
    if isinstance(shape, list):
        return (
            isinstance(value, list)
            and len(value) <= MAX_ITEMS
            and all(_fits(item, shape[0]) for item in value)
        )
    if shape is TOTALS:
        return (
            isinstance(value, dict) and _fits([*value], [str]) and _fits([*value.values()], [float])
        )
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(
            name in value and _fits(value[name], shape[name]) for name in shape
        )
    if shape is float:  # There are no counts beyond 64 bits; infinity and NaN are none either.
        return isinstance(value, int | float) and abs(value) < 2**63
    return isinstance(value, shape) and (shape is not str or len(value) <= MAX_TEXT)


def _plain(value: Any) -> Any:
    """The same with nothing but printable ASCII in its texts: a terminal would obey what is not."""
    if isinstance(value, str):
        return re.sub(r"[^ -~]", lambda found: ascii(found[0])[1:-1], value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return (
        {_plain(name): _plain(item) for name, item in value.items()}
        if isinstance(value, dict)
        else value
    )


def _total(status: Status, path: Sequence[str]) -> float:
    value: Any = status
    for name in path:
        value = value.get(name, 0)
    return float(sum(value.values()) if isinstance(value, dict) else value)
