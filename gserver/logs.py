"""Logs: one JSON event a line on stdout (or text for a person), written by a thread of its own.

A reader of stdout that stalls or goes away never stalls the service: lines wait in a bounded queue,
and what does not fit is dropped and counted. Field names are those of ECS and OpenTelemetry. Lines
stay under 4,096 bytes, so that those of several processes do not mix in one pipe (PIPE_BUF,
pipe(7)).
"""

import atexit
import contextlib
import json
import logging
import math
import os
import stat
import sys
import threading
import time
import traceback
from _queue import Empty, SimpleQueue  # the C one, which stays native when gevent patches `queue`
from _thread import start_new  # `start_new_thread` under its old name, which gevent does not patch
from collections.abc import Mapping
from typing import Any

from pythonjsonlogger.json import JsonFormatter

from gserver.errors import FatalError

MAX_QUEUED_LINES = 10_000
MAX_LINE_BYTES = 4000  # PIPE_BUF, less the line's ends
MAX_TEXT_BYTES = 300
#: A complaint is logged so often in a window; the rest is counted, and the count logged when the
#: window ends.
COMPLAINTS = 5
WINDOW_SECONDS = 10.0
#: How long a process that ends waits for a reader of its last lines.
LAST_WORDS_SECONDS = 0.2
STACK = "error.stack_trace"
LIMITS = {"message": 800, STACK: 1800}

_logger = logging.getLogger("gserver")
_writer: "LineWriter | None" = None
_windows: dict[str, list[float]] = {}


class LineWriter:
    """Writes lines to a descriptor from a native thread; `put` never waits."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._queue: SimpleQueue[tuple[bytes, int] | None] = SimpleQueue()
        self._done: SimpleQueue[None] = SimpleQueue()
        self.dropped = 0
        try:
            start_new(self._run, ())
        except RuntimeError as error:
            raise FatalError(
                "the system has no thread left for it: raise the limit of processes (ulimit -u)"
            ) from error

    def put(self, line: bytes, worth: int = 1) -> None:
        """Queue a line, or count it as so many dropped when the queue is full."""
        if self._queue.qsize() < MAX_QUEUED_LINES:
            self._queue.put((line, worth))
        else:
            self.dropped += worth

    @property
    def has_room(self) -> bool:
        """Whether the reader has caught up with half of the queue."""
        return self._queue.qsize() < MAX_QUEUED_LINES // 2

    def close(self, timeout_seconds: float) -> None:
        """Write what is queued, for so long at most."""
        self._queue.put(None)
        with contextlib.suppress(Empty):
            self._done.get(timeout=timeout_seconds)

    def _run(self) -> None:
        has_failed = has_torn = False
        while (item := self._queue.get()) is not None:
            line, worth = item
            # The half of a line that was written before the disk was full may be another process's.
            rest = b"\n" + line if has_failed and self._ends_within_a_line(has_torn) else line
            has_failed = has_torn = False
            while rest:
                try:
                    rest = rest[os.write(self._fd, rest) :]
                except BlockingIOError:
                    # O_NONBLOCK on a shared descriptor is somebody else's, so not ours to clear:
                    # wait a little. (For what never comes: a sleep that gevent has not patched.)
                    with contextlib.suppress(Empty):
                        SimpleQueue[None]().get(timeout=0.05)
                except OSError:
                    # Nobody reads any more, or the disk is full. The service and the emptying of
                    # the queue go on.
                    self.dropped += worth
                    has_failed, has_torn = True, len(rest) < len(line)
                    break
        self._done.put(None)

    def _ends_within_a_line(self, has_torn: bool) -> bool:
        """Whether a file that was full does; of what is no file, nobody knows more than what this process has done."""
        with contextlib.suppress(OSError):
            if stat.S_ISREG(os.fstat(self._fd).st_mode):
                with open(f"/proc/self/fd/{self._fd}", "rb") as file:
                    file.seek(-1, os.SEEK_END)
                    return file.read(1) != b"\n"
        return has_torn


class EcsFormatter(JsonFormatter):
    """One event as JSON, with what makes it too long cut or left out."""

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        """Put the fields in order, the most important first, and cut them to what a line may hold."""
        fields = log_data.pop("fields", {})
        first = {
            "@timestamp": log_data.pop("@timestamp").isoformat(),
            "log.level": log_data.pop("log.level").lower(),
        }
        room, kept = MAX_LINE_BYTES, {}
        for key, value in {**first, **log_data, **fields}.items():
            is_plain = isinstance(value, int | None) or (
                isinstance(value, float) and math.isfinite(value)
            )
            kept[key] = value if is_plain else cut(key, str(value))
            room -= len(json.dumps({key: kept[key]}))
            if room < 0:
                del kept[key]
                break
        return kept


class TextFormatter(logging.Formatter):
    """One event for a person at a terminal. Control characters are escaped: they may be a peer's."""

    def format(self, record: logging.LogRecord) -> str:
        """Return `time level message`, and the stack trace of an error on lines of its own."""
        moment = time.strftime("%H:%M:%S", time.localtime(record.created))
        trace = getattr(record, "fields", {}).get(STACK, "")
        trace = trace or (self.formatException(record.exc_info) if record.exc_info else "")
        rows = [f"{moment} {record.levelname:<7} {cut('message', record.getMessage())}"]
        return "\n    ".join(printable(row) for row in (*rows, *cut(STACK, trace).splitlines()))


def cut(key: str, text: str) -> str:
    """Return the text, or as much of it as its field may take when written as JSON; of a stack trace, the end."""
    limit = LIMITS.get(key, MAX_TEXT_BYTES)
    while (size := len(json.dumps(text))) > limit:
        length = len(text) * limit // size
        text = text[-length:] if key == STACK else text[:length]
    return text


class _QueueHandler(logging.Handler):
    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self._line_writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        worth = 1
        try:
            line = self.format(record)
            # When a report of what was left out is lost, all that is to be told of again.
            worth = int(getattr(record, "fields", {}).get("gserver.suppressed", 1))
        except Exception as error:
            where = f"{record.pathname}:{record.lineno}"
            message = f"a log call cannot be carried out: {type(error).__name__} at {where}"
            plain = logging.LogRecord(
                record.name, record.levelno, record.pathname, record.lineno, message, None, None
            )
            line = self.format(plain)
        self._line_writer.put(line.encode("ascii", "backslashreplace") + b"\n", worth)


def start(level: str, format_name: str, server_id: str, fd: int = 1) -> None:
    """Begin logging in this process; what is queued when it ends is still written, unless nobody reads."""
    global _writer
    _writer = LineWriter(fd)
    atexit.register(_writer.close, LAST_WORDS_SECONDS)  # after `sys.excepthook` has had its word
    handler = _QueueHandler(_writer)
    if format_name == "text":
        handler.setFormatter(TextFormatter())
    else:
        handler.setFormatter(
            EcsFormatter(
                "%(levelname)s %(message)s",
                timestamp="@timestamp",
                rename_fields={"levelname": "log.level", "exc_info": STACK},
                static_fields={
                    "service.name": "gserver",
                    "service.instance.id": server_id,
                    "process.pid": os.getpid(),
                },
            )
        )
    # On the root, so that what a command module logs in the usual way comes out in the same form.
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(level.upper())
    # What nothing catches, wherever it happens, is one event, and not a print on stderr.
    sys.excepthook = lambda kind, error, trace: unhandled("main", kind, error, trace)
    sys.unraisablehook = lambda args: unhandled(
        args.object, args.exc_type, args.exc_value, args.exc_traceback
    )
    threading.excepthook = lambda args: unhandled(
        args.thread, args.exc_type, args.exc_value, args.exc_traceback
    )


def event(level: int, action: str, message: str, fields: Mapping[str, Any] | None = None) -> None:
    """Log one event. `action` is its name in docs/operations.md; `fields` have ECS names."""
    if _logger.isEnabledFor(level):
        _logger.log(level, message, extra={"fields": {"event.action": action, **(fields or {})}})


def warn_ratelimited(action: str, message: str, fields: Mapping[str, Any] | None = None) -> None:
    """Log a warning that may come often: some of each kind in a window, the rest only counted."""
    now = time.monotonic()
    started, count = _windows.get(action, (now, 0))
    _windows[action] = [started, count + 1]
    if count < COMPLAINTS:
        event(logging.WARNING, action, message, fields)


def report_suppressed() -> None:
    """Log how many complaints and lines were left out. To be called about once a second."""
    now = time.monotonic()
    for action, (started, count) in list(_windows.items()):
        if now - started >= WINDOW_SECONDS:
            del _windows[action]
            if count > COMPLAINTS:
                fields = {
                    "gserver.suppressed": int(count) - COMPLAINTS,
                    "gserver.suppressed_action": action,
                }
                event(
                    logging.WARNING,
                    "log.suppressed",
                    f"{fields['gserver.suppressed']} more of {action}",
                    fields,
                )
    if _writer is not None and _writer.dropped and _writer.has_room:
        dropped, _writer.dropped = _writer.dropped, 0
        fields = {"gserver.suppressed": dropped}
        event(
            logging.WARNING,
            "log.dropped",
            f"{dropped} lines dropped: stdout did not take them",
            fields,
        )


def text_of(error: BaseException) -> str:
    """Return the text of an exception, whose own code may raise anything."""
    try:
        return str(error)
    except BaseException:  # noqa: BLE001 - as above
        return "(its text cannot be shown)"


def error_fields(error: BaseException) -> dict[str, str]:
    """Return the ECS fields of an exception, its stack trace's end included."""
    try:
        trace = "".join(traceback.format_exception(error)).rstrip("\n")
        # Not str(error): that is somebody's code too, and may raise.
        message = traceback.format_exception_only(error)[-1].rstrip("\n").partition(": ")[2]
    except BaseException:
        trace = message = "cannot be put into words"
    return {"error.type": type(error).__name__, "error.message": message, STACK: trace}


def unhandled(context: object, kind: type[BaseException] | None, value: Any, trace: Any) -> None:
    """Log an error that nothing has caught. Has the shape of gevent's `Hub.print_exception`, which it stands in for."""
    error = value if isinstance(value, BaseException) else RuntimeError(str(value or kind))
    error.__traceback__ = trace or error.__traceback__
    warn_ratelimited("process.error", f"{type(error).__name__} in {context!r}", error_fields(error))


def printable(text: str) -> str:
    """Return the text without anything that a terminal would obey."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
