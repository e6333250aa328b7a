"""Logs: each event is one line, and a slow reader of stdout blocks no client."""

import contextlib
import fcntl
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, cast

import psutil
import pytest

from gserver import __version__
from gserver.logs import (
    MAX_QUEUED_LINES,
    MAX_WINDOWS,
    OTHER_KEYS,
    WINDOW_SECONDS,
    LineWriter,
    Outage,
    RateLimiter,
)
from lab.redises import free_port
from lab.running import GSERVER, LIMIT, Client, Event, Running, argv, environment, program, until

MAX_LINE = 4096
DRAIN_TIMEOUT = 30.0

COMMANDS = """
import logging, threading
import gevent
from gserver.commands import command
from lab.commands import napping

nap = napping("NAP", 60)

def fail():
    raise LookupError("no\\nentry")

class Fails:
    def __del__(self):
        fail()

class NoText(Exception):
    def __str__(self):
        fail()

@command("FAIL")
def _(request):
    fail()

ERRORS = iter([KeyError("one"), OSError("other")])

@command("FAIL-IN-TURN")
def _fail_in_turn(request):
    raise next(ERRORS)

@command("NO-TEXT")
def _no_text(request):
    raise NoText

@command("GREENLET")
def _greenlet(request):
    gevent.spawn(fail)
    return "done"

@command("THREAD")
def _thread(request):
    threading.Thread(target=fail).start()
    return "done"

@command("POOL")
def _pool(request):
    gevent.get_hub().threadpool.spawn(fail)
    return "done"

@command("FINALIZER")
def _finalizer(request):
    Fails()
    return "done"

@command("LOG")
def _log(request):
    logging.getLogger("my.module").warning("taken %d of %s", 3, "five", extra={"order.id": 7})
    return "done"

@command("CAUGHT")
def _caught(request):
    try:
        fail()
    except LookupError:
        logging.exception("caught it")
    return "done"

@command("FLOOD")
def _flood(request):
    for number in range(20_000):
        logging.getLogger("flood").info("%d", number)
    return "done"
"""
FLOOD = 20_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the command module `noisy`."""
    made = tmp_path_factory.mktemp("commands")
    (made / "noisy.py").write_text(COMMANDS)
    return made


@pytest.fixture(scope="module")
def noisy(folder: Path) -> Iterator[Running]:
    """A server at log level debug, with commands that fail and log."""
    with Running("--commands", "noisy", "--log-level", "debug", cwd=folder) as running:
        yield running


def written(statements: str, log_format: str = "json") -> list[bytes]:
    """The lines that these statements log in a new process."""
    script = (
        "import logging, sys\nfrom gserver import logs\n"
        f"logs.LAST_LINES_SECONDS = {LIMIT}\n"  # On a busy machine, all of them take longer.
        f"logs.start('debug', {log_format!r}, 'some-id')\n{statements}\n"
    )
    ended = subprocess.run(
        [sys.executable, "-P", "-c", script],
        check=False,
        capture_output=True,
        env=environment(),
        timeout=LIMIT,
    )
    assert (ended.returncode, ended.stderr) == (0, b"")
    return ended.stdout.splitlines(keepends=True)


@contextlib.contextmanager
def piped(
    *options: str, cwd: Path, blocking: bool = True
) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes], int]]:
    """The program with a small pipe as stdout, which is read only up to the port.

    Yields the process, the read end and the port.
    """
    read_fd, write_fd = os.pipe()
    fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(write_fd, blocking)
    process = subprocess.Popen(
        [
            *GSERVER,
            "serve",
            "--port",
            "0",
            "--commands",
            "noisy",
            "--hang-timeout",
            "60",
            "--drain-timeout",
            str(DRAIN_TIMEOUT),
            *options,
        ],
        stdout=write_fd,
        stderr=subprocess.PIPE,
        env=environment(),
        cwd=cwd,
    )
    os.close(write_fd)
    with os.fdopen(read_fd, "rb", buffering=0) as reader:
        try:
            port = 0
            while not port:
                port = json.loads(reader.readline()).get("server.port", 0)
            yield process, reader, port
        finally:
            process.kill()  # Its children end with it.
            process.communicate()


def read_all(fd: int, into: bytearray) -> threading.Thread:
    """Start to read to the end, like a stalled reader that continues."""

    def read() -> None:
        while data := os.read(fd, 65536):
            into.extend(data)

    reader = threading.Thread(target=read)
    reader.start()
    return reader


def whole_lines(data: bytearray) -> list[Event]:
    """The events so far. The last line may be incomplete."""
    return [json.loads(line) for line in bytes(data).split(b"\n")[:-1]]


def stderr_of(process: subprocess.Popen[bytes]) -> bytes:
    return cast(IO[bytes], process.stderr).read()


# One event.


def test_start_and_stop_are_logged_at_info_with_the_fields_of_ecs() -> None:
    with Running("--server-id", "here") as server:
        with server.client() as client:
            assert client.ask(b"WHERE") == b"here"
            worker = server.workers()[0].pid
        assert server.stop() == 0
        assert server.stderr == ""
        events = server.events()
        actions = [event["event.action"] for event in events]
        assert sorted(actions[:2]) == ["server.listening", "worker.ready"]
        assert actions[2:] == ["server.draining", "server.stopped"]
        for event, line in zip(events, server.lines, strict=True):
            assert event["log.level"] == "info"
            assert event["service.name"] == "gserver"
            assert event["service.instance.id"] == "here"
            assert event["service.version"] == __version__
            assert event["host.name"] == socket.gethostname()
            assert event["ecs.version"].startswith("8.")
            assert event["process.pid"] == server.pid
            assert event["message"]
            assert re.fullmatch(
                r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", event["@timestamp"]
            )
            moment = datetime.fromisoformat(event["@timestamp"])
            assert abs(datetime.now(UTC) - moment) < timedelta(minutes=1)
            assert line.startswith('{"@timestamp": ')
            assert line.endswith("}\n")
        assert server.events("worker.ready")[0]["gserver.child_pid"] == worker


def test_a_client_is_logged_at_debug_with_its_address(noisy: Running) -> None:
    with noisy.client(source="127.0.0.5") as client:
        port = client.sock.getsockname()[1]
        assert (
            client.ask(b"WHERE").decode() == noisy.wait_for("worker.ready")["service.instance.id"]
        )
    for action in ("client.accepted", "client.closed"):

        def found(action: str = action) -> list[Event]:
            return [event for event in noisy.events(action) if event["client.port"] == port]

        event = until(found, f"{action} of port {port}")[0]
        assert event["client.address"] == "127.0.0.5"
        assert event["log.level"] == "debug"
        assert event["process.pid"] == noisy.workers()[0].pid
        assert "gserver.reason" not in event
    assert 0 < event["event.duration"] < LIMIT * 1e9
    assert event["gserver.replies"] == 1


def test_the_replies_to_a_client_are_counted_in_the_loop_and_in_the_parser(noisy: Running) -> None:
    with noisy.client() as client:
        port = client.sock.getsockname()[1]
        client.send(b"WHY\nWHY\n")
        assert client.line() == client.line() == b"42\n"
        client.send(b"WHY\nLOG\nnope\nWH")
        assert [client.line() for _ in range(3)] == [b"42\n", b"done\n", b"ERR unknown command\n"]
        assert client.ask(b"Y") == b"42"

    def found() -> list[Event]:
        return [event for event in noisy.events("client.closed") if event["client.port"] == port]

    [event] = until(found, "its end")
    assert event["gserver.replies"] == 6


def test_sigusr1_makes_all_processes_log_at_debug_level() -> None:
    with Running("--workers", "2", "--admin-port", "0") as server:
        server.wait_for("worker.ready", 2)
        with server.client() as client:
            client.who()
        assert not server.events("client.accepted")
        server.send_signal(signal.SIGUSR1)
        server.wait_for("server.debug_logging")

        def has_logged() -> bool:
            with server.client() as client:
                client.who()
            pids = {event["process.pid"] for event in server.events("client.closed")}
            return pids == {worker.pid for worker in server.workers()}

        until(has_logged, "both workers log their clients")
        assert server.stop() == 0


def test_the_reason_for_closing_a_client_is_logged_with_its_end(noisy: Running) -> None:
    with noisy.client() as client:
        client.send(b"x" * 2000)
        assert client.line() == b"ERR line too long\n"
    until(
        lambda: [event for event in noisy.events("client.closed") if "gserver.reason" in event],
        "a reason",
    )
    reasons = [
        event["gserver.reason"]
        for event in noisy.events("client.closed")
        if "gserver.reason" in event
    ]
    assert reasons == ["line_too_long"]


def test_bytes_from_clients_are_not_logged(noisy: Running) -> None:
    with noisy.client() as client:
        assert client.ask(b'\x1b[31m"peer\r') == b"ERR unknown command"
        assert client.ask(b"peer\xff") == b"ERR not ASCII"
        port = client.sock.getsockname()[1]
    until(
        lambda: [event for event in noisy.events("client.closed") if event["client.port"] == port],
        "its end",
    )
    assert not [line for line in noisy.lines if "peer" in line]


def test_a_failed_handler_is_logged_with_its_error(noisy: Running) -> None:
    with noisy.client() as client:
        assert client.ask(b"FAIL") == b"ERR internal"

    def found() -> list[Event]:
        return [
            event for event in noisy.events("command.failed") if event["gserver.command"] == "FAIL"
        ]

    (event,) = until(found, "the failure")
    assert event["log.level"] == "warning"
    assert event["error.type"] == "LookupError"
    assert event["error.message"] == "no\nentry"
    assert event["error.stack_trace"].startswith("Traceback (most recent call last):\n")
    assert 'raise LookupError("no\\nentry")' in event["error.stack_trace"]
    assert event["process.pid"] == noisy.workers()[0].pid


def test_an_error_whose_text_cannot_be_shown_is_logged_with_its_type(noisy: Running) -> None:
    count = len(noisy.events("command.failed"))
    with noisy.client() as client:
        client.send(b"NO-TEXT\nWHY\n")
        assert [client.line(), client.line()] == [b"ERR internal\n", b"42\n"]
        assert noisy.wait_for("command.failed", count + 1)["error.type"] == "NoText"


@pytest.mark.parametrize("where", ["GREENLET", "POOL", "THREAD", "FINALIZER"])
def test_an_uncaught_error_is_one_event_and_not_on_stderr(noisy: Running, where: str) -> None:
    count, errors = len(noisy.events("process.error")), len(noisy.errors)
    with noisy.client() as client:
        assert client.ask(where.encode()) == b"done"
        until(
            lambda: len(noisy.events("process.error")) > count or len(noisy.errors) > errors,
            "a trace of the error",
        )
        assert client.ask(b"WHY") == b"42"
    assert noisy.errors[errors:] == []
    event = noisy.events("process.error")[-1]
    assert event["error.type"] == "LookupError"
    assert event["error.message"] == "no\nentry"
    assert "in fail\n" in event["error.stack_trace"]
    assert event["log.level"] == "warning"


def test_a_log_call_of_a_command_module_has_the_same_format(noisy: Running) -> None:
    with noisy.client() as client:
        assert client.ask(b"LOG") == b"done"
        assert client.ask(b"CAUGHT") == b"done"

    def found(message: str) -> Event | None:
        return next((event for event in noisy.events() if event["message"] == message), None)

    logged = until(lambda: found("taken 3 of five"), "the line that was logged")
    assert logged["log.level"] == "warning"
    assert logged["order.id"] == 7
    assert "event.action" not in logged
    assert logged["service.name"] == "gserver"
    assert logged["process.pid"] == noisy.workers()[0].pid
    caught = until(lambda: found("caught it"), "the exception that was logged")
    assert caught["log.level"] == "error"
    assert caught["error.stack_trace"].endswith("LookupError: no\nentry")


HOSTILE = {
    "newlines": "one\ntwo\r\nthree\n",
    "escapes": "\x1b[2J\x1b]0;title\x07\x9b31mred",
    "quotes": '"it\'s" \\"here\\\\", {"a": 1}',
    "zero": "a\x00b",
    "bytes of a peer": b"\xff\xfe caf\xe9".decode("utf-8", "surrogateescape"),
    "other line ends": "a\u2028b\u2029c\x85d\x0be\x0cf",
    "non-Latin letters": "\u0416\u6c34\U0001f600",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_stays_one_line_of_json(text: str) -> None:
    lines = written(
        f"text = {text!r}\n"
        "logs.event(logging.INFO, 'a', text, {'client.address': text})\n"
        "logging.getLogger('x').info('%s', text)\n"
    )
    assert len(lines) == 2
    assert all(line.isascii() and line.endswith(b"}\n") for line in lines)
    assert [json.loads(line)["message"] for line in lines] == [text, text]
    assert json.loads(lines[0])["client.address"] == text


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_stays_one_text_line_without_control_characters(text: str) -> None:
    lines = written(f"logs.event(logging.INFO, 'a', 'begun ' + {text!r})", "text")
    assert len(lines) == 1
    shown = lines[0].decode("ascii").removesuffix("\n")
    assert shown.isprintable()
    assert "INFO    begun " in shown


LONG = {
    "newlines": "'line\\n' * 20_000",
    "escapes": "'\\x1b' * 100_000",
    "quotes": "'\"' * 100_000",
    "letters": "'x' * 100_000",
    "non-Latin letters": "'\\U0001f600' * 100_000",
    "bytes of a peer": "'\\udcff' * 100_000",
}
PREPARED = """
class Odd:
    def __repr__(self):
        return text
try:
    raise ValueError(text)
except ValueError as caught:
    error = caught
"""
#: Ways to log a text, in this package and in a command module. Each gives one event.
WAYS = {
    "event": "logs.event(logging.INFO, 'a', text, {'client.address': text})",
    "warning": "logs.warn_ratelimited('b', text, {'x': text, **logs.error_fields(error)})",
    "unhandled": "logs.unhandled(text, type(error), error, error.__traceback__)",
    "exception": "logging.error(text, exc_info=error, stack_info=True)",
    "extra": "logging.info('%s', text, extra={'one': text, 'two': text})",
    "nested": "logging.info('nested', extra={'list': [text], 'one': {'two': {'three': text}}})",
    "many": "logging.info('many', extra={f'field-{number}': text for number in range(1000)})",
    "named": "logging.info('named', extra={text: 1})",
    "object": "logging.info('object', extra={'odd': Odd()})",
    "dictionary": "logging.info({'message': 'a dictionary', 'text': text})",
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_no_event_is_longer_than_a_pipe_writes_atomically(text: str) -> None:
    lines = dict(
        zip(WAYS, written("\n".join([f"text = {text}{PREPARED}", *WAYS.values()])), strict=True)
    )
    assert {way: len(line) for way, line in lines.items() if len(line) > MAX_LINE} == {}
    events = {way: json.loads(line) for way, line in lines.items()}
    assert all(
        event["log.level"] and event["@timestamp"] and event["process.pid"]
        for event in events.values()
    )
    # The text is cut, not the fields that identify the event.
    actions = {
        way: event["event.action"] for way, event in events.items() if "event.action" in event
    }
    assert actions == {"event": "a", "warning": "b", "unhandled": "process.error"}
    assert [events[way]["error.type"] for way in ("warning", "unhandled")] == [
        "ValueError",
        "ValueError",
    ]


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_no_text_line_is_longer_than_a_pipe_writes_atomically(text: str) -> None:
    lines = written("\n".join([f"text = {text}{PREPARED}", *WAYS.values()]), "text")
    assert [len(line) for line in lines if len(line) > MAX_LINE] == []
    assert len([line for line in lines if not line.startswith(b"    ")]) == len(WAYS)


UNFIT = {
    "arguments": "logging.warning('%d of them', 'many')",
    "too few": "logging.warning('%s of %s', 1)",
    "object": "logging.warning(NoText())",
    "argument": "logging.warning('%s', NoText())",
    "extra": "logging.warning('here', extra={'odd': NoText()})",
    "extra with a name of gserver": "logging.warning('here', extra={'fields': 5})",
    "extra with the name of a field": (
        "logging.warning('here', extra={'log.level': 5, 'event.action': None, '@timestamp': 1})"
    ),
    "number": "logging.warning('here', extra={'number': 10**5000})",
    "nan": "logging.warning('here', extra={'number': float('nan'), 'other': float('inf')})",
    "keys": "logging.warning('here', extra={1: 2, (3, 4): 5})",
    "itself": "logging.warning('here', extra={'loop': loop})",
    "dictionary": "logging.warning({'message': 1, 'log.level': 2, 3: NoText()})",
    "bytes": "logging.warning(b'\\xff', extra={'raw': b'\\xff'})",
}
NO_TEXT = """
class NoText:
    def __repr__(self):
        raise LookupError
loop = []
loop.append(loop)
"""


def not_a_number(text: str) -> None:
    raise AssertionError(f"{text} is not valid JSON")


@pytest.mark.outer
@pytest.mark.parametrize("log_format", ["json", "text"])
@pytest.mark.parametrize("statement", UNFIT.values(), ids=UNFIT)
def test_a_bad_log_call_raises_nothing_and_is_one_line(statement: str, log_format: str) -> None:
    lines = written(f"{NO_TEXT}{statement}\nlogging.warning('next')", log_format)
    assert len(lines) == 2
    assert b"next" in lines[1]
    if log_format == "json":
        events = [json.loads(line, parse_constant=not_a_number) for line in lines]
        assert [event["log.level"] for event in events] == ["warning", "warning"]
        assert all(datetime.fromisoformat(event["@timestamp"]) for event in events)


def test_the_end_of_a_long_stack_trace_is_kept() -> None:
    (line,) = written(
        "def one(left):\n    two(left)\n"
        "def two(left):\n    one(left - 1) if left else int('at the bottom')\n"
        "try:\n    one(100)\n"
        "except ValueError as error:\n    logs.unhandled('here', type(error), error, None)\n"
    )
    assert len(line) <= MAX_LINE
    trace = json.loads(line)["error.stack_trace"]
    assert "in two\n" in trace
    assert trace.endswith("ValueError: invalid literal for int() with base 10: 'at the bottom'")


# Rate limits.


def test_a_rate_limited_warning_is_logged_5_times_and_the_rest_is_counted() -> None:
    limiter = RateLimiter()
    assert [limiter.allows("a", "", 0.0) for _ in range(8)] == [True] * 5 + [False] * 3
    assert limiter.end_windows(WINDOW_SECONDS - 0.1) == []
    assert limiter.end_windows(WINDOW_SECONDS) == [("a", "", 3)]
    assert limiter.end_windows(2 * WINDOW_SECONDS) == []
    assert limiter.allows("a", "", 2 * WINDOW_SECONDS)


def test_each_key_of_a_warning_has_its_own_limit() -> None:
    limiter = RateLimiter()
    for key in ("x", "y", ""):
        assert [limiter.allows("a", key, 0.0) for _ in range(7)] == [True] * 5 + [False] * 2
    assert limiter.allows("b", "x", 0.0)
    assert set(limiter.end_windows(WINDOW_SECONDS)) == {("a", "x", 2), ("a", "y", 2), ("a", "", 2)}


def test_the_number_of_keys_is_bounded() -> None:
    limiter = RateLimiter()
    allowed = [limiter.allows("a", f"key {number}", 0.0) for number in range(10_000)]
    assert allowed == [True] * (MAX_WINDOWS + 5) + [False] * (10_000 - MAX_WINDOWS - 5)
    # Warnings without a key, and keys that are known, keep their own limits.
    assert limiter.allows("b", "", 0.0)
    assert limiter.allows("a", "key 1", 0.0)
    # Another event is not suppressed by the keys of the first one.
    assert limiter.allows("c", "key", 0.0)
    rest = 10_000 - MAX_WINDOWS - 5
    assert limiter.end_windows(WINDOW_SECONDS) == [("a", OTHER_KEYS, rest)]


def test_an_outage_is_logged_at_its_start_and_then_rarely() -> None:
    outage = Outage()
    assert outage.note_success(0.0) is None
    failures = range(100, 400, 5)
    assert [now for now in failures if outage.note_failure(now)] == [100, 160, 220, 280, 340]
    assert outage.note_success(400.0) == 300.0
    assert outage.note_success(401.0) is None
    assert [now for now in range(405, 470, 5) if outage.note_failure(now)] == [405, 465]


@pytest.mark.outer
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_suppressed_warnings_are_reported_before_a_worker_ends(number: signal.Signals) -> None:
    with Running("--max-clients", "1") as server, server.client() as client:
        client.who()
        for _ in range(30):
            with server.client() as rejected:
                assert rejected.line() == b"ERR too many clients\n"
        server.send_signal(number)
        event = server.wait_for("log.suppressed", limit=WINDOW_SECONDS / 2)
        assert (event["gserver.suppressed"], event["gserver.suppressed_action"]) == (
            25,
            "client.rejected",
        )


@pytest.mark.outer
def test_the_number_of_suppressed_warnings_is_logged(folder: Path) -> None:
    with Running("--commands", "noisy", "--workers", "2", cwd=folder) as server:
        with server.client() as client:
            client.send(b"FAIL\n" * 1000)
            assert {client.line() for _ in range(1000)} == {b"ERR internal\n"}
            failing = server.wait_for("command.failed", 5)["process.pid"]
            # The supervisor has a warning too, once a second: it cannot start a process.
            psutil.Process(server.pid).rlimit(
                resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
            )
            next(worker for worker in server.workers() if worker.pid != failing).kill()
            server.wait_for("process.not_started", 5)

            def suppressed(action: str) -> list[Event]:
                found = server.events("log.suppressed")
                return [event for event in found if event["gserver.suppressed_action"] == action]

            event = until(
                lambda: suppressed("command.failed"),
                "the number of suppressed failures",
                WINDOW_SECONDS + LIMIT,
            )[0]
            assert len(server.events("command.failed")) == 5
            assert (event["gserver.suppressed"], event["process.pid"]) == (995, failing)
            assert event["gserver.suppressed_key"] == "FAIL LookupError"
            assert (
                event["message"] == "suppressed 995 more events: command.failed (FAIL LookupError)"
            )
            assert event["log.level"] == "warning"
            client.ask(b"FAIL")
            server.wait_for("command.failed", 6)
        of_supervisor = until(
            lambda: suppressed("process.not_started"), "the number of suppressed warnings"
        )[0]
        assert of_supervisor["process.pid"] == server.pid
        assert of_supervisor["gserver.suppressed"] >= 1
        assert "gserver.suppressed_key" not in of_supervisor
        assert server.stderr == ""


def test_a_command_that_often_fails_does_not_hide_other_failures(folder: Path) -> None:
    with Running("--commands", "noisy", cwd=folder) as server, server.client() as client:
        client.send(b"FAIL\n" * 100)
        assert {client.line() for _ in range(100)} == {b"ERR internal\n"}
        for command in (b"NO-TEXT", b"FAIL-IN-TURN", b"FAIL-IN-TURN"):
            assert client.ask(command) == b"ERR internal"

        def failures() -> list[tuple[str, str]]:
            events = server.events("command.failed")
            return [(event["gserver.command"], event["error.type"]) for event in events]

        expected = [("FAIL", "LookupError")] * 5
        expected += [("NO-TEXT", "NoText")]
        expected += [("FAIL-IN-TURN", "KeyError"), ("FAIL-IN-TURN", "OSError")]
        until(lambda: failures() == expected, "all kinds of failures")


# Terminals and the journal.


def test_on_a_terminal_the_level_of_warnings_and_errors_has_a_colour() -> None:
    def shown(**env: str) -> bytes:
        lines = (
            "logs.event(30, 'a', 'one'); logs.event(40, 'a', '\\x1b[2J'); logs.event(20, 'a', 'x')"
        )
        code = f"from gserver import logs\nlogs.start('info', 'text', 'some-id')\n{lines}"
        script = "import pty, sys; pty.spawn(sys.argv[1:])"
        command = [sys.executable, "-c", script, sys.executable, "-P", "-c", code]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=environment(**env),
            timeout=LIMIT,
            check=True,
        )
        return done.stdout

    coloured = shown(NO_COLOR="")
    assert b" \x1b[33mWARNING\x1b[0m one" in coloured
    assert b" \x1b[31mERROR  \x1b[0m \\x1b[2J" in coloured
    assert b" INFO    x" in coloured
    assert b"\x1b" not in shown(NO_COLOR="1")


def test_lines_for_the_journal_begin_with_their_priority(tmp_path: Path) -> None:
    with (tmp_path / "journal").open("w+b") as stream:
        found = os.fstat(stream.fileno())
        for name, is_prefixed in ((f"{found.st_dev}:{found.st_ino}", True), ("1:1", False)):
            stream.truncate(0)
            subprocess.run(
                [
                    sys.executable,
                    "-P",
                    "-c",
                    "import logging\nfrom gserver import logs\n"
                    "logs.start('debug', 'json', 'some-id')\n"
                    "for level in (10, 20, 30, 40): logs.event(level, 'a', 'text')",
                ],
                stdout=stream,
                env=environment(JOURNAL_STREAM=name),
                timeout=LIMIT,
                check=True,
            )
            lines = (tmp_path / "journal").read_bytes().lstrip(b"\0").splitlines()
            starts = [line.partition(b"{")[0] for line in lines]
            assert starts == ([b"<7>", b"<6>", b"<4>", b"<3>"] if is_prefixed else [b""] * 4)


@pytest.mark.outer
def test_on_a_terminal_the_log_shows_how_to_send_a_command_and_stop() -> None:
    nc = program("nc")
    script = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    command = [sys.executable, "-c", script, *GSERVER, "--port", "0"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    ) as terminal:
        screen = bytearray()
        reader = read_all(cast(IO[bytes], terminal.stdout).fileno(), screen)
        try:
            until(lambda: b"Ctrl-C stops it" in screen, "how to stop it")
            found = re.search(rb": nc (\S+) (\d+), then WHO", screen)
            assert found
            asked = [word.decode() for word in found.groups()]
            with subprocess.Popen(
                [nc, *asked], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            ) as talking:
                cast(IO[bytes], talking.stdin).write(b"WHY\n")
                cast(IO[bytes], talking.stdin).flush()
                assert cast(IO[bytes], talking.stdout).readline() == b"42\n"
                talking.kill()
            cast(IO[bytes], terminal.stdin).write(b"\x03")
            cast(IO[bytes], terminal.stdin).flush()
            assert terminal.wait(LIMIT) == 0
        finally:
            terminal.kill()
            reader.join(LIMIT)
    shown = bytes(screen).decode()
    assert "SIGINT: draining\r\n" in shown
    assert "stopped\r\n" in shown
    assert "{" not in shown  # no JSON


def test_on_a_terminal_a_stack_trace_is_indented_under_its_line() -> None:
    lines = written(
        "logs.unhandled('here', ValueError, ValueError('no\\nsuch \\x1b'), None)", "text"
    )
    assert lines[0].endswith(b"WARNING ValueError in 'here'\n")
    assert len(lines) > 1
    assert all(line.startswith(b"    ") for line in lines[1:])
    assert b"\x1b" not in b"".join(lines)


def test_json_and_text_can_be_chosen_for_any_stdout() -> None:
    (text,) = written("logs.event(logging.INFO, 'a', 'here')", "text")
    (line,) = written("logs.event(logging.INFO, 'a', 'here')", "json")
    assert text.decode().split(maxsplit=1)[1] == "INFO    here\n"
    assert json.loads(line)["message"] == "here"


# Readers of stdout.


def dropped_lines(admin_port: int) -> int:
    with urllib.request.urlopen(
        f"http://127.0.0.1:{admin_port}/status.json", timeout=LIMIT
    ) as answer:
        return int(json.load(answer)["server"]["log_lines_dropped"])


@pytest.mark.outer
def test_lines_that_a_worker_cannot_write_before_it_ends_are_counted(folder: Path) -> None:
    admin_port = free_port()
    options = argv(f"--log-level debug --slow-command 0 --admin-port {admin_port}")
    with piped(*options, cwd=folder) as (process, _stdout, port), Client(port) as client:
        assert client.ask(b"FLOOD") == b"done"
        most = FLOOD - MAX_QUEUED_LINES
        until(lambda: dropped_lines(admin_port) > most - 100, "the queue is full")
        assert dropped_lines(admin_port) < most + 100
        process.send_signal(signal.SIGHUP)
        until(lambda: dropped_lines(admin_port) > FLOOD - 200, "those in the queue are counted")
        assert client.ask(b"WHY") == b"42"


@pytest.mark.outer
def test_a_stalled_reader_blocks_no_client_and_dropped_lines_are_counted(folder: Path) -> None:
    clients, admin_port = 1000, free_port()
    options = argv(f"--log-level debug --slow-command 0 --admin-port {admin_port}")
    with piped(*options, cwd=folder) as (process, stdout, port):
        began = time.monotonic()
        for _ in range(clients):
            with Client(port) as client:
                assert client.ask(b"WHY") == b"42"
        assert time.monotonic() - began < LIMIT  # It takes half a second.
        with Client(port) as client:
            assert client.ask(b"FLOOD") == b"done"
            assert client.ask(b"WHY") == b"42"
        until(
            lambda: dropped_lines(admin_port) > FLOOD - MAX_QUEUED_LINES - 100, "they are counted"
        )
        data = bytearray()
        reader = read_all(stdout.fileno(), data)
        until(lambda: b"log.dropped" in data, "the number of dropped lines is logged")
        # The worker looks four times a second for dropped lines. It reports these once.
        time.sleep(0.6)
        process.terminate()
        assert process.wait(LIMIT) == 0
        reader.join(LIMIT)
        assert stderr_of(process) == b""
    events = whole_lines(data)
    assert data.endswith(b"}\n")
    assert len(data) > 20 * 65536
    dropped = [event for event in events if event.get("event.action") == "log.dropped"]
    missed = sum(event["gserver.suppressed"] for event in dropped)
    assert missed > FLOOD - MAX_QUEUED_LINES - 100
    assert dropped[0]["log.level"] == "warning"
    (worker,) = {event["process.pid"] for event in dropped}
    arrived = [event for event in events if event["process.pid"] == worker and event not in dropped]
    # Two for each client.
    assert len(arrived) + missed == 2 * (clients + 1) + FLOOD
    numbers = [int(event["message"]) for event in arrived if event["message"].isdigit()]
    assert numbers == sorted(set(numbers))


@pytest.mark.outer
def test_a_non_blocking_pipe_gets_every_line_whole(folder: Path) -> None:
    # O_NONBLOCK belongs to the pipe, not to the process: another process may have set it.
    count = 400
    with piped("--log-level", "debug", cwd=folder, blocking=False) as (process, stdout, port):
        with Client(port) as client:
            for _ in range(count):
                assert client.ask(b"LOG") == b"done"
        data = bytearray()
        reader = read_all(stdout.fileno(), data)
        until(lambda: b"client.closed" in data, "the last queued line")
        process.terminate()
        assert process.wait(LIMIT) == 0
        reader.join(LIMIT)
    messages = [event["message"] for event in whole_lines(data)]
    assert messages.count("taken 3 of five") == count
    assert messages[-1] == "stopped"


def test_a_closed_reader_blocks_nothing(folder: Path) -> None:
    with piped("--log-level", "debug", cwd=folder) as (process, stdout, port):
        stdout.close()
        for _ in range(200):
            with Client(port) as client:
                assert client.ask(b"WHY") == b"42"
        began = time.monotonic()
        process.terminate()
        assert process.wait(LIMIT) == 0
        assert time.monotonic() - began < DRAIN_TIMEOUT
        assert stderr_of(process) == b""


@pytest.mark.outer
@pytest.mark.parametrize(
    ("commands", "options"),
    [([b"WHY\n"], []), ([b"WHY\n", b"NAP\n"], ["--statsd-host", "127.0.0.1"])],
    ids=["idle", "busy and with an agent"],
)
def test_a_stalled_reader_does_not_delay_the_stop(
    folder: Path, commands: list[bytes], options: list[str]
) -> None:
    with (
        piped("--log-level", "debug", *options, cwd=folder) as (process, _, port),
        Client(port) as client,
    ):
        for _ in range(50):
            assert client.ask(b"LOG") == b"done"
        for line in commands:
            client.send(line)
        assert client.line() == b"42\n"
        began = time.monotonic()
        process.terminate()
        assert process.wait(LIMIT) == 0
        assert time.monotonic() - began < DRAIN_TIMEOUT
        assert stderr_of(process) == b""


# The writer alone.


def test_a_writer_queues_a_limited_number_of_lines_and_counts_the_rest() -> None:
    read_fd, write_fd = os.pipe()
    writer = LineWriter(write_fd)
    count = MAX_QUEUED_LINES + 5000
    for number in range(count):
        writer.put(b"%d %s\n" % (number, b"x" * 90))
    assert 4000 < writer.dropped <= 5000  # The pipe itself holds some lines.
    assert not writer.has_room
    data = bytearray()
    reader = read_all(read_fd, data)
    writer.close(LIMIT)
    assert writer.has_room
    os.close(write_fd)
    reader.join(LIMIT)
    os.close(read_fd)
    numbers = [int(line.split()[0]) for line in bytes(data).splitlines()]
    assert len(numbers) == count - writer.dropped
    assert numbers == sorted(set(numbers))
    # The first lines are kept.
    assert numbers[:MAX_QUEUED_LINES] == list(range(MAX_QUEUED_LINES))


def test_a_writer_waits_no_longer_than_the_timeout_for_a_reader() -> None:
    read_fd, write_fd = os.pipe()
    writer = LineWriter(write_fd)
    for _ in range(2000):
        writer.put(b"x" * 90 + b"\n")
    closing = threading.Thread(target=writer.close, args=(0.2,))
    closing.start()
    closing.join(LIMIT)
    has_given_up = not closing.is_alive()
    os.close(read_fd)  # From now on, its thread drops the lines.
    assert has_given_up
    writer.close(LIMIT)
    os.close(write_fd)
    assert 0 < writer.dropped < 2000


def test_a_writer_without_a_reader_counts_the_dropped_lines() -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    writer = LineWriter(write_fd)
    for _ in range(100):
        writer.put(b"x\n")
    writer.close(LIMIT)
    assert writer.dropped == 100
    os.close(write_fd)


def test_lines_of_several_writers_do_not_mix_in_one_pipe() -> None:
    read_fd, write_fd = os.pipe()
    writers = [LineWriter(write_fd) for _ in range(4)]
    data = bytearray()
    reader = read_all(read_fd, data)
    for _ in range(500):
        for number, writer in enumerate(writers):
            writer.put(b"%d" % number * (MAX_LINE - 1) + b"\n")
    for writer in writers:
        writer.close(LIMIT)
    os.close(write_fd)
    reader.join(LIMIT)
    os.close(read_fd)
    lines = bytes(data).splitlines()
    assert len(lines) == 2000
    assert {len(set(line)) for line in lines} == {1}
