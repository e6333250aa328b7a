"""The admin port: health, metrics and status over HTTP, for balancers, Prometheus and people.

Served by the agent, so that nothing here can slow a client. `GET` alone; each connection has one
request, a limit on what it may send, and a deadline.
"""

import base64
import contextlib
import hmac
import io
import json
import logging
import re
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import gevent
from gevent.pool import Pool
from gevent.pywsgi import WSGIHandler, WSGIServer
from prometheus_client import CollectorRegistry, generate_latest

from gserver import logs
from gserver.agent.prometheus import ScoreboardCollector
from gserver.agent.status import state, status
from gserver.boot import FATAL_ACCEPT_ERRORS
from gserver.config import Config, is_loopback
from gserver.scoreboard import Scoreboard

#: That wait for their client at a time; for one more, the oldest is cut off. As many may be having
#: their answer made.
MAX_WAITING = 32
MAX_REQUEST_BYTES = 16_384
REQUEST_SECONDS = 5.0
TEXT, JSON = "text/plain; charset=utf-8", "application/json"
HTML, PAGE = "text/html; charset=utf-8", Path(__file__).with_name("page.html")
#: The page is one file, and talks to nobody but this port.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
METRICS = "text/plain; version=0.0.4; charset=utf-8"

Answer = tuple[str, str, bytes]
StartResponse = Callable[[str, list[tuple[str, str]]], object]


def serve(config: Config, scoreboard: Scoreboard, listener: socket.socket) -> WSGIServer:
    """Answer on a listening socket until the server that is returned is stopped."""
    respond, pool = _Admin(config, scoreboard).respond, Pool(2 * MAX_WAITING)
    environ = {"SERVER_NAME": config.admin_host}  # Else its start waits for what name servers say.
    more: dict[str, Any] = {
        "spawn": pool,
        "handler_class": _Handler,
        "log": None,
        "error_log": _Log(),
    }
    server = WSGIServer(listener, respond, environ=environ, **more)
    server.fatal_errors = FATAL_ACCEPT_ERRORS
    server.start()
    return server


class _Admin:
    """What is answered."""

    def __init__(self, config: Config, scoreboard: Scoreboard) -> None:
        self._config = config
        self._scoreboard = scoreboard
        self._roster = None
        if config.redis_url:
            from gserver.cluster.members import Members  # Loaded only where there is a cluster.

            self._roster = Members(config)
        self._registry = CollectorRegistry()
        self._registry.register(ScoreboardCollector(config, scoreboard))
        self._routes = {
            "/": lambda: ("200 OK", HTML, PAGE.read_bytes()),
            "/status.json": self._status,
            "/metrics": lambda: ("200 OK", METRICS, generate_latest(self._registry)),
            "/livez": lambda: ("200 OK", TEXT, b"alive\n"),
            "/readyz": self._ready,
        }

    def respond(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        status_line, kind, body = self._answer(environ)
        headers = [
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("Content-Security-Policy", POLICY),
            ("Connection", "close"),
        ]
        if status_line.startswith("401"):
            headers.append(("WWW-Authenticate", 'Basic realm="gserver", charset="UTF-8"'))
        start_response(status_line, headers)
        return [body]

    def _answer(self, environ: dict[str, Any]) -> Answer:
        path = environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] != "GET":
            return "405 Method Not Allowed", TEXT, b"GET is all there is\n"
        if path not in self._routes:
            return "404 Not Found", TEXT, b"there is: " + ", ".join(self._routes).encode() + b"\n"
        if path not in (
            "/livez",
            "/readyz",
        ):  # Balancers cannot carry secrets, and a word tells little.
            if self._config.admin_token and not self._may_read(environ):
                return (
                    "401 Unauthorized",
                    TEXT,
                    b"the --admin-token is wanted, as Bearer or as a password\n",
                )
            if not self._config.admin_token and not _is_local(environ.get("HTTP_HOST", "")):
                # A page somewhere could have its own name resolve to this machine, and read what is
                # here.
                return (
                    "403 Forbidden",
                    TEXT,
                    b"without an --admin-token, ask by address or as localhost\n",
                )
        return self._routes[path]()

    def _may_read(self, environ: dict[str, Any]) -> bool:
        kind, _, value = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        if kind.lower() == "basic":
            try:
                value = base64.b64decode(value, validate=True).decode().partition(":")[2]
            except ValueError:  # No base64, or no UTF-8 in it.
                return False
        is_token = hmac.compare_digest(value.strip().encode(), self._config.admin_token.encode())
        return is_token and kind.lower() in ("basic", "bearer")

    def _ready(self) -> Answer:
        word = state(self._scoreboard)
        return (
            "200 OK" if word == "ready" else "503 Service Unavailable",
            TEXT,
            f"{word}\n".encode(),
        )

    def _status(self) -> Answer:
        roster = (
            self._roster.payload() if self._roster else None
        )  # Waits for Redis, but a moment only.
        return (
            "200 OK",
            JSON,
            json.dumps(status(self._config, self._scoreboard, roster), indent=1).encode() + b"\n",
        )


def _is_local(host: str) -> bool:
    """Whether a Host header holds an address or localhost: no name that a stranger may define."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]*)\]|([^][:]*))(?::\d*)?", host)
    return found is not None and is_loopback(found[1] or found[2] or "")


class _Handler(WSGIHandler):
    """A connection of one request, all of which has a deadline and a limit."""

    #: The sockets of those that wait for their client, to say or to take in what it may; the oldest
    #: first.
    _waiting: ClassVar[dict[socket.socket, None]] = {}

    def __init__(self, sock: Any, address: Any, server: Any) -> None:
        super().__init__(sock, address, server)
        self._sock = sock
        self.rfile.close()
        self.rfile = io.BufferedReader(_Limited(sock))

    def handle(self) -> None:
        # Cut off, rather than interrupted: whatever it waits for, it finds that the client has
        # ended.
        cut = gevent.spawn_later(REQUEST_SECONDS, _cut_off, self._sock)
        self._wait()
        try:
            with contextlib.suppress(OSError):  # It has gone.
                super().handle()
        finally:
            cut.kill()
            self._waiting.pop(self._sock, None)

    def read_request(self, raw_requestline: Any) -> Any:
        try:
            super().read_request(raw_requestline)
        except Exception as error:  # Of anything but a ValueError, pywsgi would print a traceback.
            raise ValueError(str(error)) from error
        return (
            "transfer-encoding" not in self.headers
        )  # Nobody needs a body, and pywsgi fails at some chunks.

    def get_environ(self) -> dict[str, Any]:
        self._waiting.pop(self._sock, None)  # The request is there.
        return dict(super().get_environ())

    def process_result(self) -> None:
        self._wait()
        super().process_result()

    def _wait(self) -> None:
        self._waiting[self._sock] = None
        if len(self._waiting) > MAX_WAITING:
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            _cut_off(oldest)


def _cut_off(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


class _Limited(io.RawIOBase):
    """What a socket receives, up to a limit: beyond it, as if the client had ended."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._left = MAX_REQUEST_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._sock.recv_into(buffer, min(len(buffer), self._left)) if self._left else 0
        self._left -= count
        return count


class _Log:
    """Where pywsgi tells of errors: an event each, never a traceback on a terminal."""

    def write(self, text: str) -> None:
        if text.strip():
            logs.event(logging.DEBUG, "admin.error", " ".join(text.split())[:500])

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        """Nothing is kept back."""
