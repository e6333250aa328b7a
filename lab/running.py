"""The real program, started on a free port and observed by its log, and a client for its sockets.

Nothing here sleeps for readiness, and nothing is retried: `wait_for` waits for an event, up to a
limit.
"""

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import psutil
import pytest

from lab.host import HERE, Host

ROOT = Path(__file__).parent.parent
#: A factor for all time limits: set it higher on a slow machine.
PATIENCE = float(os.environ.get("GSERVER_TEST_PATIENCE", "1"))
LIMIT = 60 * PATIENCE

#: The command line.
GSERVER = [sys.executable, "-P", "-m", "gserver"]

Event = dict[str, Any]


def unavailable(reason: str) -> NoReturn:
    """Skip the test, or fail it if CI is set: CI installs everything that tests need."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def program(name: str) -> str:
    """The path of a program that a test drives. Without the program, the test is skipped."""
    found = shutil.which(name)
    if found is None:
        unavailable(f"{name} is not installed: bin/programs installs it")
    return found


def argv(line: str) -> list[str]:
    """The words of a command line, as typed."""
    return line.split()


def environment(**extra: str) -> dict[str, str]:
    """This process's environment, without variables of gserver, and with `extra`."""
    theirs = (
        "PORT",
        "WEB_CONCURRENCY",
        "REDIS_URL",
        "STATSD_HOST",
        "STATSD_PORT",
        "STATSD_PREFIX",
        "VIRTUAL_ENV",
    )
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("GSERVER_") and key not in theirs
    }
    return {**kept, "PYTHONPATH": str(ROOT), **extra}


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs and is not a zombie."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def until(
    condition: Callable[[], Any],
    what: str | Callable[[], str],
    limit: float = LIMIT,
    pause: float = 0.005,
) -> Any:
    """Return the first true value of `condition`; AssertionError if there is none in time."""
    deadline = time.monotonic() + limit
    while not (value := condition()):
        if time.monotonic() > deadline:
            awaited = what if isinstance(what, str) else what()
            raise AssertionError(f"not within {limit:.1f} s: {awaited}")
        time.sleep(pause)
    return value


def gserver(*arguments: str, stdin: Any = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    return subprocess.run(
        [*GSERVER, *arguments],
        stdin=stdin,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env=environment(**env),
        check=False,
    )


def error_line(done: subprocess.CompletedProcess[str], code: int = 2) -> str:
    """The error line of a failed command, without `gserver: `."""
    assert (done.returncode, done.stdout) == (code, "")
    assert re.fullmatch(r"gserver: [^\n]+\n", done.stderr), done.stderr
    return done.stderr.removeprefix("gserver: ").rstrip("\n")


def limited(files: int) -> list[str]:
    """The command of a server whose processes may open `files` files."""
    return [program("prlimit"), f"--nofile={files}:{files}", *GSERVER, "serve", "--port", "0"]


def left_over(folder: Path) -> list[psutil.Process]:
    """The running processes of servers that were started for this folder, reparented or not."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MARK") == str(folder) and is_alive(process):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@contextmanager
def stopped(*workers: psutil.Process) -> Iterator[None]:
    """Stop processes with SIGSTOP during the body."""
    for worker in workers:
        worker.suspend()
    try:
        until(
            lambda: all(worker.status() == psutil.STATUS_STOPPED for worker in workers),
            "the processes are stopped",
        )
        yield
    finally:
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.resume()


def extended(folder: Path, module: str, *options: str, **more: Any) -> "Running":
    """A server with a module's commands, whose processes are marked with the folder.

    All its workers are ready, unless `wait` is false. The next worker that starts sees a new text
    of `extra.py` in the folder.
    """
    (folder / "extra.py").write_text(module)
    # Two texts of equal size, written within a second, look the same to the bytecode cache.
    env = {"PYTHONDONTWRITEBYTECODE": "1", "MARK": str(folder)}
    server = Running("--commands", "extra", *options, cwd=folder, env=env, **more)
    if server.port:
        with ExitStack() as stack:
            stack.enter_context(server)
            workers = server.events("server.listening")[0]["gserver.workers"]
            server.wait_for("worker.ready", workers)
            stack.pop_all()
    return server


def is_refused(port: int) -> bool:
    """Whether a port is closed to new clients."""
    try:
        with Client(port):
            return False
    except ConnectionRefusedError:
        return True


class Client:
    """A socket with a line reader. It does not know the protocol.

    With a context it speaks TLS, and an end without a closing alert is an error.
    """

    def __init__(
        self,
        port: int,
        host: str = "127.0.0.1",
        source: str = "",
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.sock = socket.create_connection((host, port), LIMIT, (source, 0) if source else None)
        if context:
            self.sock = context.wrap_socket(
                self.sock, server_hostname=host, suppress_ragged_eofs=False
            )
        self._buffer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def line(self) -> bytes:
        """The next line with its LF; or the rest, if the connection ends first."""
        while b"\n" not in self._buffer:
            data = self.sock.recv(65536)
            if not data:
                rest, self._buffer = self._buffer, b""
                return rest
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line + b"\n"

    def ask(self, command: bytes) -> bytes:
        """Send a line; return the reply without its LF."""
        self.send(command + b"\n")
        reply = self.line()
        assert reply.endswith(b"\n"), f"no reply to {command!r}: {reply!r}"
        return reply[:-1]

    def who(self) -> int:
        return int(self.ask(b"WHO"))

    def rest(self) -> bytes:
        """Read to a clean end; an unclean one raises ConnectionResetError."""
        received, self._buffer = self._buffer, b""
        while data := self.sock.recv(65536):
            received += data
        return received

    def end(self) -> bytes:
        """Send the end of input; return the rest.

        It is sent by TCP only: Python cannot end a TLS stream and continue to read.
        """
        socket.socket.shutdown(self.sock, socket.SHUT_WR)
        return self.rest()


class UnixClient(Client):
    """The same, over a Unix socket."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(LIMIT)
        try:
            self.sock.connect(str(path))
        except OSError:
            self.sock.close()
            raise
        self._buffer = b""


class Running:
    """A gserver process; `with Running("--workers", "2") as server:` waits until it listens."""

    log_type: type[list[str]] = list

    def __init__(
        self,
        *options: str,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        command: list[str] | None = None,
        pass_fds: Collection[int] = (),
        wait: bool = True,
        host: Host = HERE,
    ) -> None:
        self.host = host
        with host.inside():
            self.process = subprocess.Popen(
                _with_last_values([*(command or [*GSERVER, "serve", "--port", "0"]), *options]),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment(**(env or {})),
                cwd=cwd,
                pass_fds=pass_fds,
            )
        self.lines = self.log_type()
        self.errors: list[str] = []
        self._readers = [
            threading.Thread(target=_collect, args=(stream, into), daemon=True)
            for stream, into in (
                (self.process.stdout, self.lines),
                (self.process.stderr, self.errors),
            )
        ]
        for reader in self._readers:
            reader.start()
        self.port = 0
        if wait:
            try:
                self.port = self.wait_for("server.listening")["server.port"] or 0
            except BaseException:
                self.kill()
                raise

    def __enter__(self) -> "Running":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stderr(self) -> str:
        return "".join(self.errors)

    def events(self, action: str | None = None) -> list[Event]:
        """All events so far, or those of one action. A line that is not JSON fails the test."""
        found: list[Event] = [json.loads(line) for line in list(self.lines)]
        return [event for event in found if action is None or event.get("event.action") == action]

    def wait_for(self, action: str, count: int = 1, limit: float = LIMIT) -> Event:
        """Wait for the count-th event of this action."""

        def found() -> list[Event]:
            events = self.events(action)
            if (
                len(events) < count
                and self.process.poll() is not None
                and not any(r.is_alive() for r in self._readers)
            ):
                said = f"{self.stderr}{''.join(self.lines)}"
                pytest.fail(f"gserver ended with {self.process.returncode}: {said}")
            return events if len(events) >= count else []

        events: list[Event] = until(
            found, lambda: f"{count} of {action} in {self.lines} {self.errors}", limit
        )
        return events[count - 1]

    @contextmanager
    def expecting(self, action: str, kind: str = "", limit: float = LIMIT) -> Iterator[None]:
        """The body makes the server log another event of this action, and of this kind if given."""

        def count() -> int:
            return sum(kind in ("", event.get("gserver.kind")) for event in self.events(action))

        before = count()
        yield
        until(lambda: count() > before, f"{action} {kind}", limit)

    def admin_port(self) -> int:
        """The admin port."""
        port: int = self.events("server.listening")[0]["gserver.admin_port"]
        return port

    def endpoints(self) -> list[str]:
        """The URLs of the endpoints, with their real ports."""
        urls: str = self.events("server.listening")[0]["gserver.endpoints"]
        return urls.split()

    def client(self, source: str = "", context: ssl.SSLContext | None = None) -> Client:
        with self.host.inside():
            return Client(self.port, source=source, context=context)

    def who(self) -> int:
        """The reply to WHO of a new client, which counts itself."""
        with self.client() as client:
            return client.who()

    def workers(self) -> list[psutil.Process]:
        """The running worker processes."""
        return self._children("worker")

    def agents(self) -> list[psutil.Process]:
        return self._children("agent")

    def processes(self) -> list[psutil.Process]:
        """The supervisor, the workers and the agent."""
        return [*self.named_processes().values()]

    def named_processes(self) -> dict[str, psutil.Process]:
        """The processes by role and pid."""
        roles = {"supervisor": [psutil.Process(self.pid)], "worker": self.workers()}
        roles |= {"agent": self.agents()}
        return {f"{role} {each.pid}": each for role, found in roles.items() for each in found}

    def _children(self, role: str) -> list[psutil.Process]:
        found = []
        for child in psutil.Process(self.pid).children():
            try:
                if role in child.cmdline() and is_alive(child):
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        return found

    def send_signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def exit_code(self, limit: float = LIMIT) -> int:
        """Wait for the end; return the exit code, with all output read."""
        code = self.process.wait(limit)
        for reader in self._readers:
            reader.join(LIMIT)
        return code

    def stop(self, number: signal.Signals = signal.SIGTERM, limit: float = LIMIT) -> int:
        self.send_signal(number)
        return self.exit_code(limit)

    def kill(self) -> None:
        """Kill the server and its children, whatever their state."""
        if self.process.poll() is None:
            children = psutil.Process(self.pid).children(recursive=True)
            self.process.kill()
            for child in children:
                try:
                    child.kill()
                except psutil.NoSuchProcess:
                    continue
        self.exit_code()


def _with_last_values(words: list[str]) -> list[str]:
    """The command without options that are repeated later, which gserver refuses.

    So a test can replace an option of its helper. With --bind, it replaces the port of the helper.
    Words before `gserver`, such as those of `prlimit`, are kept.
    """
    joined = list(zip(["", *words], words, strict=False))
    programs = [
        index
        for index, (before, word) in enumerate(joined)
        if (before, word) == ("-m", "gserver") or word.endswith("bin/gserver")
    ]
    begin = programs[-1] + 1 if programs else len(words)
    kept: dict[str, list[str]] = {}
    name = ""
    for word in words[begin:]:
        if word.startswith("--"):
            name = word.partition("=")[0]
            kept[name] = kept[name] if name in kept and name == "--bind" else []
        kept.setdefault(name, []).append(word)
    if "--bind" in kept:
        kept.pop("--port", None)
    return [*words[:begin], *(word for group in kept.values() for word in group)]


def _collect(stream: Any, into: list[str]) -> None:
    into.extend(line.decode() for line in stream)
    stream.close()
