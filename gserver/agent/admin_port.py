"""The admin port: health, metrics and status over HTTP, for load balancers, Prometheus and people.

The agent serves it, so it cannot slow a client; only a list of the clients, once a second at most,
asks the workers. Each connection carries one request, with a size limit and a deadline.
"""

import base64
import contextlib
import hmac
import io
import json
import logging
import re
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from urllib.parse import parse_qsl

import gevent
from gevent.pool import Pool
from gevent.pywsgi import WSGIHandler, WSGIServer
from prometheus_client import CollectorRegistry, generate_latest

from gserver import logs
from gserver.addresses import is_loopback
from gserver.agent.history import History
from gserver.agent.prometheus import ScoreboardCollector
from gserver.agent.roster import SORTS, Roster
from gserver.agent.status import state, status, supervisor_silence
from gserver.boot import FATAL_ACCEPT_ERRORS
from gserver.config import Config
from gserver.metrics import SUPERVISOR_SILENT_SECONDS
from gserver.scoreboard import Scoreboard

#: Connections that may be waiting on their peer; one more evicts the oldest. As many again may be
#: in a handler.
MAX_WAITING = 32
MAX_REQUEST_BYTES = 16_384
REQUEST_SECONDS = 5.0
TEXT = "text/plain; charset=utf-8"
JSON = "application/json"
HTML = "text/html; charset=utf-8"
METRICS = "text/plain; version=0.0.4; charset=utf-8"
METHODS = ("GET", "HEAD")
#: The one path that changes something. A web page cannot send the header to another server.
KICK, KICK_HEADER = "/kick", "HTTP_X_GSERVER"
PAGE = Path(__file__).with_name("page.html")
#: Paths that need no token: load balancers cannot carry one, and the answers tell little.
OPEN_PATHS = ("/livez", "/readyz")
#: The page is one file, and requests only this port.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

StartResponse = Callable[[str, list[tuple[str, str]]], object]


class Answer(NamedTuple):
    """An HTTP response. `headers` are those that other responses do not have."""

    status: str
    content_type: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


def serve(
    config: Config, scoreboard: Scoreboard, listener: socket.socket, control_fd: int
) -> WSGIServer:
    """Answer requests on a listening socket until the returned server is stopped."""
    admin = _Admin(config, scoreboard, Roster(scoreboard, control_fd))
    respond, pool = admin.respond, Pool(2 * MAX_WAITING)
    # Without SERVER_NAME, pywsgi would look it up at start and wait for name servers.
    environ = {"SERVER_NAME": config.admin_host}
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


def _json(document: Any, indent: int | None = None) -> Answer:
    return Answer("200 OK", JSON, json.dumps(document, indent=indent).encode() + b"\n")


class _Admin:
    """The WSGI application."""

    def __init__(self, config: Config, scoreboard: Scoreboard, roster: Roster) -> None:
        self._config = config
        self._scoreboard = scoreboard
        self._roster = roster
        self._members = None
        if config.redis_url:
            from gserver.cluster.members import Members  # Loaded only if there is a cluster.

            self._members = Members(config)
        self._registry = CollectorRegistry()
        self._registry.register(ScoreboardCollector(config, scoreboard, self._list_members))
        self._routes: dict[str, Callable[[Mapping[str, str]], Answer]] = {
            "/": self._page,
            "/status.json": self._status,
            "/history.json": self._history,
            "/clients.json": self._list_clients,
            KICK: self._kick,
            "/metrics": self._metrics,
            "/livez": self._live,
            "/readyz": self._ready,
        }

    def respond(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        answer = self._answer(environ)
        headers = [
            ("Content-Type", answer.content_type),
            ("Content-Length", str(len(answer.body))),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("Content-Security-Policy", POLICY),
            ("Connection", "close"),
            *answer.headers,
        ]
        start_response(answer.status, headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [answer.body]

    def _answer(self, environ: dict[str, Any]) -> Answer:
        path = environ["PATH_INFO"]
        methods = ("POST",) if path == KICK else METHODS
        if environ["REQUEST_METHOD"] not in methods:
            return Answer(
                "405 Method Not Allowed",
                TEXT,
                f"supported methods: {', '.join(methods)}\n".encode(),
                (("Allow", ", ".join(methods)),),
            )
        if path not in self._routes:
            available = ", ".join(self._routes)
            return Answer("404 Not Found", TEXT, f"available: {available}\n".encode())
        if path not in OPEN_PATHS:
            access_error = self._access_error(environ)
            if access_error is not None:
                return access_error
        if path == KICK and KICK_HEADER not in environ:
            return Answer("403 Forbidden", TEXT, b"the header X-Gserver is required\n")
        return self._routes[path](dict(parse_qsl(environ.get("QUERY_STRING", ""))))

    def _list_clients(self, query: Mapping[str, str]) -> Answer:
        sort, limit = query.get("sort", "age"), query.get("limit", "0")
        if sort not in SORTS or not re.fullmatch(r"[0-9]{1,7}", limit):
            problem = f"sort is one of {', '.join(SORTS)}; limit is a number, 0 for none\n"
            return Answer("400 Bad Request", TEXT, problem.encode())
        return _json(self._roster.document(sort, int(limit)))

    def _kick(self, query: Mapping[str, str]) -> Answer:
        text = query.get("client", "")
        if not re.fullmatch(r"[!-~]{1,64}", text):
            return Answer("400 Bad Request", TEXT, b"client must be an id or an address\n")
        return _json(self._roster.close(text))

    def _access_error(self, environ: dict[str, Any]) -> Answer | None:
        """Return the error response for a client without access to this page; None if it has."""
        if self._config.admin_token:
            if self._has_token(environ):
                return None
            return Answer(
                "401 Unauthorized",
                TEXT,
                b"the admin token is required, as Bearer or as the password of Basic\n",
                (("WWW-Authenticate", 'Basic realm="gserver", charset="UTF-8"'),),
            )
        # Without this, a web page could make its own host name resolve to this machine and read
        # the answers (DNS rebinding).
        if _is_local(environ.get("HTTP_HOST", "")):
            return None
        return Answer(
            "403 Forbidden",
            TEXT,
            b"without --admin-token, the Host must be localhost or a loopback address\n",
        )

    def _has_token(self, environ: dict[str, Any]) -> bool:
        kind, _, value = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        if kind.lower() == "basic":
            try:
                value = base64.b64decode(value, validate=True).decode().partition(":")[2]
            except ValueError:  # Not base64, or not UTF-8 in it.
                return False
        is_token = hmac.compare_digest(value.strip().encode(), self._config.admin_token.encode())
        return is_token and kind.lower() in ("basic", "bearer")

    def _page(self, _query: Mapping[str, str]) -> Answer:
        return Answer("200 OK", HTML, PAGE.read_bytes())

    def _status(self, _query: Mapping[str, str]) -> Answer:
        return _json(status(self._config, self._scoreboard, self._list_members()), indent=1)

    def _history(self, _query: Mapping[str, str]) -> Answer:
        return _json(History(self._scoreboard).document(time.time()))

    def _list_members(self) -> dict[str, Any] | None:
        """Return the servers of the cluster. Waits for Redis a moment at most."""
        return None if self._members is None else self._members.payload()

    def _metrics(self, _query: Mapping[str, str]) -> Answer:
        return Answer("200 OK", METRICS, generate_latest(self._registry))

    def _live(self, _query: Mapping[str, str]) -> Answer:
        limit = self._config.hang_seconds(is_agent=False)
        if limit and supervisor_silence(self._scoreboard) > max(limit, SUPERVISOR_SILENT_SECONDS):
            return Answer("503 Service Unavailable", TEXT, b"the supervisor hangs\n")
        return Answer("200 OK", TEXT, b"alive\n")

    def _ready(self, _query: Mapping[str, str]) -> Answer:
        word = state(self._scoreboard)
        code = "200 OK" if word == "ready" else "503 Service Unavailable"
        return Answer(code, TEXT, f"{word}\n".encode())


def _is_local(header: str) -> bool:
    """Return whether a Host header is localhost or a loopback address, not any other name."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]*)\]|([^][:]*))(?::\d*)?", header)
    if found is None:
        return False
    in_brackets, plain = found.groups()
    return is_loopback(plain if in_brackets is None else in_brackets)


class _Handler(WSGIHandler):
    """A connection that carries one request, with a deadline and a size limit."""

    #: Sockets that wait for their peer to send its request or to take its answer, oldest first.
    _waiting: ClassVar[dict[socket.socket, None]] = {}

    def __init__(self, sock: Any, address: Any, server: Any) -> None:
        super().__init__(sock, address, server)
        self._sock = sock
        self.rfile.close()
        self._limited = _Limited(sock)
        self.rfile = io.BufferedReader(self._limited)

    def handle(self) -> None:
        # The socket is shut down rather than the greenlet interrupted: pywsgi then sees an end of
        # the connection, wherever it waits.
        deadline = gevent.spawn_later(REQUEST_SECONDS, _shut_down, self._sock)
        self._wait()
        try:
            with contextlib.suppress(OSError):  # The peer has disconnected.
                super().handle()
        finally:
            deadline.kill()
            self._waiting.pop(self._sock, None)

    def read_request(self, raw_requestline: Any) -> Any:
        try:
            super().read_request(raw_requestline)
        except Exception as error:  # For all but a ValueError, pywsgi would print a traceback.
            raise ValueError(str(error)) from error
        if self._limited.has_ended:  # http.client takes that for the end of the headers.
            raise ValueError("the request is too large, or not complete")
        # No request here needs a body, and pywsgi fails at some malformed chunks.
        return "transfer-encoding" not in self.headers

    def get_environ(self) -> dict[str, Any]:
        self._waiting.pop(self._sock, None)  # The request has been read.
        return dict(super().get_environ())

    def process_result(self) -> None:
        self._wait()
        super().process_result()

    def _wait(self) -> None:
        self._waiting[self._sock] = None
        if len(self._waiting) > MAX_WAITING:
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            _shut_down(oldest)


def _shut_down(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


class _Limited(io.RawIOBase):
    """The bytes that a socket receives, up to a limit; beyond it, an end of the stream."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._left = MAX_REQUEST_BYTES
        #: Whether a read came after the last byte: of the peer, or of the limit.
        self.has_ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._sock.recv_into(buffer, min(len(buffer), self._left)) if self._left else 0
        self._left -= count
        self.has_ended = not count
        return count


class _Log:
    """The stream that pywsgi writes errors to: each becomes an event, not a traceback."""

    def write(self, text: str) -> None:
        if text.strip():
            logs.event(logging.DEBUG, "admin.error", " ".join(text.split())[:500])

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        """Do nothing: no text is buffered."""
