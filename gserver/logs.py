"""Logs: one JSON event per line on stdout, or text on a terminal, written by a native thread.

A reader of stdout that stalls or disappears never blocks the service. Lines wait in a bounded
queue; lines that do not fit are dropped and counted. Field names are those of ECS and
OpenTelemetry. Lines are shorter than 4,096 bytes, so that lines of several processes do not mix in
one pipe (PIPE_BUF, pipe(7)).
"""

import atexit
import importlib
import json
import logging
import math
import os
import signal
import socket
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from pythonjsonlogger.json import JsonFormatter

from gserver import __version__
from gserver.errors import FatalError

MAX_QUEUED_LINES = 10_000
MAX_LINE_BYTES = 4000  # PIPE_BUF, less the JSON around the fields and the newline
#: Longest field, as JSON.
MAX_FIELD_BYTES = 300
STACK = "error.stack_trace"
#: Fields that may be longer.
MAX_LONG_FIELD_BYTES = {"message": 800, STACK: 1800}
#: A rate-limited warning is logged this often in a window. The rest is counted, and the count is
#: logged when the window ends.
WARNINGS_PER_WINDOW = 5
WINDOW_SECONDS = 10.0
#: Windows that may be open at a time. Further keys of an event share one window.
MAX_WINDOWS = 100
OTHER_KEYS = "other"
#: While a failure lasts, it is logged again after this time.
REMINDER_SECONDS = 60.0
#: How often to try again if stdout is full and must not block (O_NONBLOCK).
RETRY_SECONDS = 0.05
#: The names of fields are those of this version of the Elastic Common Schema.
ECS_VERSION = "8.11.0"
#: Priorities of the journal (syslog(3)).
PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}
#: How a terminal shows the level of a line: yellow, red; and how that ends (ECMA-48, SGR).
COLOURS = {logging.WARNING: "\x1b[33m", logging.ERROR: "\x1b[31m"}
PLAIN = "\x1b[0m"
#: How long an ending process waits until its last lines are written.
LAST_LINES_SECONDS = 0.2


def unpatched(module_name: str, name: str) -> Any:
    """Return a member of a standard module, without gevent's patch if there is one.

    This module does not import gevent, because the supervisor runs without it.
    """
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None:
        return monkey.get_original(module_name, name)
    return getattr(importlib.import_module(module_name), name)


class LineWriter:
    """Writes lines to a descriptor in a native thread, so that `put` never blocks.

    A patched thread would be a greenlet: a full pipe would block it, and with it the event loop.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._sleep = unpatched("time", "sleep")
        native_queue = unpatched("queue", "SimpleQueue")
        self._queue: SimpleQueue[tuple[bytes, int] | None] = native_queue()
        self._done: SimpleQueue[None] = native_queue()
        #: Events that were lost since the last report, and since the start.
        self.dropped = self.dropped_in_all = 0
        #: Of the latter, those that `newly_dropped_lines` has returned.
        self.counted = 0
        # The thread inherits the mask, and takes no signal that the main thread blocks.
        mask = signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
        try:
            unpatched("_thread", "start_new_thread")(self._run, ())
        except RuntimeError as error:
            raise FatalError(
                "cannot start the log thread: raise the limit on processes (ulimit -u)"
            ) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def put(self, line: bytes, weight: int = 1) -> None:
        """Queue a line, or drop it if the queue is full. It counts as `weight` dropped events."""
        if self._queue.qsize() < MAX_QUEUED_LINES:
            self._queue.put((line, weight))
        else:
            self._drop(weight)

    def _drop(self, weight: int) -> None:
        self.dropped += weight
        self.dropped_in_all += weight

    @property
    def queued(self) -> int:
        """How many lines wait to be written."""
        return self._queue.qsize()

    @property
    def has_room(self) -> bool:
        """Whether less than half of the queue is in use."""
        return self._queue.qsize() < MAX_QUEUED_LINES // 2

    def close(self, timeout_seconds: float) -> None:
        """Wait until the queued lines are written, or until the timeout."""
        self._queue.put(None)
        with suppress(Empty):
            self._done.get(timeout=timeout_seconds)

    def _run(self) -> None:
        has_failed = is_torn = False
        while (item := self._queue.get()) is not None:
            line, weight = item
            if has_failed and self._ends_within_a_line(is_torn):
                line = b"\n" + line
            written = self._write(line)
            has_failed = written < len(line)
            if has_failed:
                self._drop(weight)
            if written:
                is_torn = line[written - 1 : written] != b"\n"
        self._done.put(None)

    def _write(self, line: bytes) -> int:
        """Write the line; return the number of bytes written, fewer than all if it fails."""
        written = 0
        while written < len(line):
            try:
                written += os.write(self._fd, line[written:])
            except BlockingIOError:
                # Another process set O_NONBLOCK on this descriptor and may rely on it.
                self._sleep(RETRY_SECONDS)
            except OSError:
                break  # There is no reader any more, or the disk is full. The queue still empties.
        return written

    def _ends_within_a_line(self, is_torn: bool) -> bool:
        """Whether the output ends within a line.

        In a file, that may be a line of another process. For a pipe, only the last line of this
        process is known: `is_torn` says whether it was written in part.
        """
        with suppress(OSError):
            if stat.S_ISREG(os.fstat(self._fd).st_mode):
                with open(f"/proc/self/fd/{self._fd}", "rb") as file:
                    file.seek(-1, os.SEEK_END)
                    return file.read(1) != b"\n"
        return is_torn


class EcsFormatter(JsonFormatter):
    """Formats an event as one JSON object. Long fields are cut; the last ones may be omitted."""

    #: stdout is the journal, so a line begins with its priority. The journal takes it off.
    has_priority = False

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = super().format(record)
        return f"<{PRIORITIES.get(record.levelno, 6)}>{line}" if self.has_priority else line

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        """Return the fields, the most important ones first, cut to what fits into a line."""
        fields = log_data.pop("fields", {})
        first = {
            "@timestamp": log_data.pop("@timestamp").isoformat(),
            "log.level": log_data.pop("log.level").lower(),
        }
        room = MAX_LINE_BYTES
        kept: dict[str, Any] = {}
        for key, value in {**first, **log_data, **fields}.items():
            shown = value if _is_plain(value) else cut(key, str(value))
            room -= len(json.dumps({key: shown}))
            if room < 0:
                break
            kept[key] = shown
        return kept


def _is_plain(value: object) -> bool:
    """Whether JSON has this value as it is: null, a bool or a number."""
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, int)


class TextFormatter(logging.Formatter):
    """Formats an event for a terminal. Control characters, which a peer may send, are escaped.

    `is_coloured`: levels from warning up have a colour.
    """

    def __init__(self, *, is_coloured: bool = False) -> None:
        super().__init__()
        self._is_coloured = is_coloured

    def format(self, record: logging.LogRecord) -> str:
        """Return `time level message`. The stack trace of an error follows on indented lines."""
        local_time = time.strftime("%H:%M:%S", time.localtime(record.created))
        colour = COLOURS.get(record.levelno, "") if self._is_coloured else ""
        trace = getattr(record, "fields", {}).get(STACK, "")
        if not trace and record.exc_info:
            trace = self.formatException(record.exc_info)
        message = cut("message", record.getMessage())
        level = f"{colour}{record.levelname:<7}{PLAIN if colour else ''}"
        rows = [f"{local_time} {level} {printable(message)}"]
        rows += [printable(row) for row in cut(STACK, trace).splitlines()]
        return "\n    ".join(rows)


def cut(key: str, text: str) -> str:
    """Return as much of the text as its field may hold as JSON.

    That is the end of a stack trace, and the beginning of any other text.
    """
    limit = MAX_LONG_FIELD_BYTES.get(key, MAX_FIELD_BYTES)
    while (size := len(json.dumps(text))) > limit:
        length = len(text) * limit // size
        text = text[-length:] if key == STACK else text[:length]
    return text


class LineHandler(logging.Handler):
    """Formats records and queues them for a writer."""

    #: Set by `start`.
    writer: LineWriter | None = None
    usual_level = "INFO"
    #: Set by `keep_events`.
    kept_actions: frozenset[str] = frozenset()
    keep: Callable[[str], None] = staticmethod(lambda _text: None)

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the record as one line. A record that cannot be formatted is reported as such."""
        weight = 1
        try:
            line = self.format(record)
            # If the report of suppressed or dropped events is lost, these events are lost again.
            weight = int(getattr(record, "fields", {}).get("gserver.suppressed", 1))
        except Exception as error:  # noqa: BLE001 - a bad call in a handler must not raise there
            place = f"{record.pathname}:{record.lineno}"
            message = f"bad logging call at {place}: {type(error).__name__}"
            plain = logging.LogRecord(
                record.name, record.levelno, record.pathname, record.lineno, message, None, None
            )
            line = self.format(plain)
        if self.writer is not None:
            self.writer.put(line.encode("ascii", "backslashreplace") + b"\n", weight)


class Suppressed(NamedTuple):
    """The warnings of one event and key that were not logged in a window."""

    action: str
    key: str
    number: int


@dataclass(slots=True)
class _Window:
    started_at: float
    count: int = 0


class RateLimiter:
    """Limits warnings by event and key. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._windows: dict[tuple[str, str], _Window] = {}

    def allows(self, action: str, key: str, now: float) -> bool:
        """Count a warning; return whether to log it."""
        name = action, key
        if key and name not in self._windows and len(self._windows) >= MAX_WINDOWS:
            name = action, OTHER_KEYS
        window = self._windows.setdefault(name, _Window(now))
        window.count += 1
        return window.count <= WARNINGS_PER_WINDOW

    def end_windows(self, now: float) -> list[Suppressed]:
        """End the windows that are over; return what was suppressed in them."""
        suppressed = []
        for (action, key), window in list(self._windows.items()):
            if now - window.started_at >= WINDOW_SECONDS:
                del self._windows[action, key]
                if window.count > WARNINGS_PER_WINDOW:
                    suppressed.append(Suppressed(action, key, window.count - WARNINGS_PER_WINDOW))
        return suppressed


class Outage:
    """Decides when a failure that repeats is logged: at its start, and then once a minute.

    Times are monotonic seconds.
    """

    def __init__(self) -> None:
        self._started_at: float | None = None
        self._logged_at = 0.0

    def note_failure(self, now: float) -> bool:
        """Return whether to log this failure."""
        if self._started_at is None:
            self._started_at = now
        elif now - self._logged_at < REMINDER_SECONDS:
            return False
        self._logged_at = now
        return True

    def note_success(self, now: float) -> float | None:
        """Return how many seconds the outage lasted that ends now; None if there was none."""
        started_at, self._started_at = self._started_at, None
        return None if started_at is None else now - started_at


def is_journal(fd: int) -> bool:
    """Whether a descriptor is the stream of the journal that systemd has opened (sd-daemon(3))."""
    try:
        found = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


_logger = logging.getLogger("gserver")
_handler = LineHandler()
_limiter = RateLimiter()


def start(level: str, format_name: str, server_id: str, fd: int = 1) -> None:
    """Start logging in this process. At exit, it waits a moment for the queued lines."""
    writer = LineWriter(fd)
    # Exit handlers run after `sys.excepthook`, so its event is written too.
    atexit.register(writer.close, LAST_LINES_SECONDS)
    _handler.writer = writer
    if format_name == "text":
        is_coloured = os.isatty(fd) and not os.environ.get("NO_COLOR")
        _handler.setFormatter(TextFormatter(is_coloured=is_coloured))
    else:
        formatter = EcsFormatter(
            "%(levelname)s %(message)s",
            timestamp="@timestamp",
            rename_fields={"levelname": "log.level", "exc_info": STACK},
            static_fields={
                "ecs.version": ECS_VERSION,
                "service.name": "gserver",
                "service.version": __version__,
                "service.instance.id": server_id,
                "host.name": socket.gethostname(),
                "process.pid": os.getpid(),
            },
        )
        formatter.has_priority = is_journal(fd)
        _handler.setFormatter(formatter)
    # On the root logger, so that the log calls of command modules have the same format.
    logging.root.handlers[:] = [_handler]
    _handler.usual_level = level.upper()
    logging.root.setLevel(_handler.usual_level)
    # An error that nothing catches is one event, not a traceback on stderr.
    sys.excepthook = lambda kind, error, trace: unhandled("main", kind, error, trace)
    sys.unraisablehook = lambda args: unhandled(
        args.object, args.exc_type, args.exc_value, args.exc_traceback
    )
    threading.excepthook = lambda args: unhandled(
        args.thread, args.exc_type, args.exc_value, args.exc_traceback
    )


def log_debug(*, is_on: bool) -> None:
    """Log events of the level debug, too, or go back to the level of `start`."""
    level = "DEBUG" if is_on else _handler.usual_level
    if logging.getLevelName(logging.root.level) != level:
        logging.root.setLevel(level)


def stop() -> None:
    """Stop logging in this process, after a moment for the queued lines."""
    if _handler.writer:
        atexit.unregister(_handler.writer.close)
        _handler.writer.close(LAST_LINES_SECONDS)


def keep_events(actions: Collection[str], keep: Callable[[str], None]) -> None:
    """Call `keep` with each event of these actions, as JSON, whatever the level of the log."""
    _handler.kept_actions, _handler.keep = frozenset(actions), keep


def as_kept(level: int, action: str, message: str) -> str:
    """Return an event of now as JSON, without its fields."""
    event = {
        "at": round(time.time(), 3),
        "level": logging.getLevelName(level).lower(),
        "action": action,
        "message": cut("kept", message),
    }
    return json.dumps(event)


def event(level: int, action: str, message: str, fields: Mapping[str, Any] | None = None) -> None:
    """Log one event. `action` is its name in docs/operations.md; `fields` have ECS names."""
    if action in _handler.kept_actions:
        _handler.keep(as_kept(level, action, message))
    if _logger.isEnabledFor(level):
        _logger.log(level, message, extra={"fields": {"event.action": action, **(fields or {})}})


def warn_ratelimited(
    action: str, message: str, fields: Mapping[str, Any] | None = None, *, key: str = ""
) -> None:
    """Log a warning, unless there were too many of this action and key in the current window.

    Suppressed warnings are counted: see `report_suppressed`. Use a `key` where one cause must not
    hide another one.
    """
    if _limiter.allows(action, key, time.monotonic()):
        event(logging.WARNING, action, message, fields)


def newly_dropped_lines(*, is_last: bool = False) -> int:
    """Return how many lines were dropped since the last call. `is_last`: those that wait, too."""
    writer = _handler.writer
    if not writer:
        return 0
    before, writer.counted = writer.counted, writer.dropped_in_all
    return writer.counted - before + (writer.queued if is_last else 0)


def dropped_message(lines: int) -> str:
    """Return what the event `log.dropped` says."""
    return f"dropped {lines} log lines: stdout was full or could not be written"


def report_suppressed(*, is_last: bool = False) -> None:
    """Log how many warnings were suppressed and lines dropped.

    Call this at least once a second; calling it more often is harmless. `is_last`: this process
    ends, so windows that are not over are reported as well.
    """
    for action, key, number in _limiter.end_windows(math.inf if is_last else time.monotonic()):
        fields = {"gserver.suppressed": number, "gserver.suppressed_action": action}
        name = action
        if key:
            fields["gserver.suppressed_key"] = key
            name = f"{action} ({key})"
        event(logging.WARNING, "log.suppressed", f"suppressed {number} more events: {name}", fields)
    writer = _handler.writer
    if writer is not None and writer.dropped and writer.has_room:
        dropped, writer.dropped = writer.dropped, 0
        fields = {"gserver.suppressed": dropped}
        event(logging.WARNING, "log.dropped", dropped_message(dropped), fields)


def text_of(error: BaseException) -> str:
    """Return the text of an exception. Its own code runs for that, and may raise anything."""
    try:
        return str(error)
    except BaseException:  # noqa: BLE001 - an exception of a command module
        return "(its text cannot be shown)"


def error_fields(error: BaseException) -> dict[str, str]:
    """Return the ECS fields of an exception: type, message, stack trace."""
    try:
        trace = "".join(traceback.format_exception(error)).rstrip("\n")
    except BaseException:  # noqa: BLE001 - it may run the code of an exception, as above
        trace = "(its stack trace cannot be shown)"
    return {"error.type": type(error).__name__, "error.message": text_of(error), STACK: trace}


def unhandled(context: object, kind: type[BaseException] | None, value: Any, trace: Any) -> None:
    """Log an error that nothing has caught. It can replace gevent's `Hub.print_exception`."""
    error = value if isinstance(value, BaseException) else RuntimeError(str(value or kind))
    error.__traceback__ = trace or error.__traceback__
    warn_ratelimited("process.error", f"{type(error).__name__} in {context!r}", error_fields(error))


def printable(text: str) -> str:
    """Return the text with every character escaped that a terminal might interpret."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
