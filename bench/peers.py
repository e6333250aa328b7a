"""The servers that are compared: how each is built, started and ended.

The sources of all except gserver are in `bench/peers/`. gserver runs with all features on: limits,
deadlines, logs, metrics. `BENCH_CHECKOUT` names another folder of gserver to measure.
"""

import hashlib
import os
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gserver.boot import RESERVED_FILES
from lab.redises import free_port
from lab.running import ROOT, Client, environment

#: The gserver that is measured.
CHECKOUT = Path(os.environ.get("BENCH_CHECKOUT") or ROOT).resolve()
SOURCES = ROOT / "bench" / "peers"
#: Command modules for gserver: a folder on its import path.
OWN_COMMANDS = ROOT / "bench" / "own"
BUILT = ROOT / ".tools" / "bench"
HOST = "127.0.0.1"
#: Seconds that a server has to start, and to end.
PATIENCE = 10.0
PYTHON = (sys.executable, "-P")
GSERVER = (*PYTHON, "-m", "gserver", "serve", "--port", "PORT")
#: Unmodified programs, and their packages.
PROGRAMS = {
    "redis-server": "redis-server",
    "haproxy": "haproxy",
    "stunnel": "stunnel4",
    "openssl": "openssl",
}
GCC = ("gcc", "-O2", "-Wall", "-Wextra", "-o")


@dataclass(frozen=True)
class Peer:
    """A server: its title in tables, its command line, and how it is compiled.

    One of the words is PORT: it is replaced by the port number.
    """

    name: str
    title: str
    words: tuple[str, ...]
    source: Path | None = None
    compiler: tuple[str, ...] = ()


@dataclass(frozen=True)
class Server:
    """A running server.

    `pids` are the processes that were started: its own, and that of a server behind it. gserver's
    process has children.
    """

    name: str
    pids: tuple[int, ...]
    host: str
    port: int
    is_tls: bool = False


def _target(source: Path) -> Path:
    """The path of the program compiled from `source`; it depends on the text of the source."""
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    return BUILT / f"{source.stem}-{digest}"


LOAD_SOURCE, EPOLL, GO = ROOT / "bench" / "load.c", SOURCES / "epoll.c", SOURCES / "main.go"
LOAD = _target(LOAD_SOURCE)


def _script(file: str, *more: str) -> tuple[str, ...]:
    return (*PYTHON, str(SOURCES / file), "PORT", *more)


PEERS = {
    peer.name: peer
    for peer in (
        Peer("gserver", "gserver", GSERVER),
        Peer("epoll", "C, epoll", (str(_target(EPOLL)), "PORT"), EPOLL, GCC),
        Peer("go", "Go, net", (str(_target(GO)), "PORT"), GO, ("go", "build", "-o")),
        Peer("uvloop", "uvloop, protocol", _script("protocol.py", "uvloop")),
        Peer("asyncio", "asyncio, protocol", _script("protocol.py", "asyncio")),
        Peer("uvloop-streams", "uvloop, streams", _script("streams.py", "uvloop")),
        Peer("asyncio-streams", "asyncio, streams", _script("streams.py", "asyncio")),
        Peer("threads", "threads, socketserver", _script("threads.py")),
        Peer("gevent", "gevent, makefile", _script("makefile.py")),
    )
}
#: The peers of the scenario `spellings`. The others understand only the exact spelling.
SPELLING_PEERS = {
    lines: Peer(f"uvloop-{lines}", "uvloop, protocol", _script("protocol.py", "uvloop", lines))
    for lines in ("any-spelling", "functions")
}
ALL_PEERS = {**PEERS, **{peer.name: peer for peer in SPELLING_PEERS.values()}}


def build(names: Iterable[str]) -> None:
    """Compile the load generator and the named servers, unless they are up to date."""
    for program, package in PROGRAMS.items():
        if not shutil.which(program):
            raise SystemExit(f"bench: {program} is missing: apt-get install {package}")
    _compile(LOAD_SOURCE, GCC, ("-lssl", "-lcrypto"))
    for peer in (PEERS[name] for name in names):
        if peer.source:
            _compile(peer.source, peer.compiler)


def _compile(source: Path, compiler: tuple[str, ...], libraries: tuple[str, ...] = ()) -> None:
    target = _target(source)
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(f".{os.getpid()}")
    try:
        subprocess.run([*compiler, str(unfinished), str(source), *libraries], check=True)
        unfinished.rename(target)
    except FileNotFoundError:
        package = "golang-go" if compiler[0] == "go" else f"{compiler[0]} libc6-dev"
        raise SystemExit(f"bench: {compiler[0]} is missing: apt-get install {package}") from None
    except subprocess.CalledProcessError:
        raise SystemExit(
            f"bench: {compiler[0]} could not build {source.relative_to(ROOT)}: see above"
        ) from None


@contextmanager
def running(
    name: str, *, cores: set[int], options: tuple[str, ...] = (), tls: ssl.SSLContext | None = None
) -> Iterator[Server]:
    """Run a server on a free loopback port and on these cores while the body runs.

    `options` are added to its command line. `tls` is the client's side if the server speaks TLS.
    """
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as statsd:
        statsd.bind((HOST, 0))  # Never read: the kernel drops the excess.
        if ALL_PEERS[name].words[: len(GSERVER)] == GSERVER:
            metrics = ("--statsd-host", HOST, "--statsd-port", str(statsd.getsockname()[1]))
            options = (*metrics, "--idle-timeout", "600", *options)
            if "--max-clients" not in options:
                options = (*options, "--max-clients", str(min(60_000, limit - RESERVED_FILES)))
        port = free_port()
        words = [str(port) if word == "PORT" else word for word in ALL_PEERS[name].words]
        with started(name, [*words, *options], port, cores=cores, tls=tls) as server:
            yield server


@contextmanager
def started(
    name: str, words: list[str], port: int, *, cores: set[int], tls: ssl.SSLContext | None = None
) -> Iterator[Server]:
    """Run a program on these cores while the body runs; it answers on this loopback port."""
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))  # children inherit it
    env = environment(PYTHONPATH=f"{CHECKOUT}:{OWN_COMMANDS}", GOMAXPROCS=str(len(cores)))
    pinned = ["taskset", "-c", ",".join(map(str, sorted(cores)))]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*pinned, *words], stdout=log, stderr=log, env=env, start_new_session=True
        )
        server = Server(name, (process.pid,), HOST, port, tls is not None)
        try:
            _wait_until_it_answers(process, server, tls, log)
            yield server
        finally:
            has_died = process.poll() is not None
            _end(process)
            if has_died:
                raise RuntimeError(
                    f"{name} ended with status {process.returncode}; its output:\n{_said(log)}"
                )


def _said(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read()[-4000:].decode(errors="replace")


def _wait_until_it_answers(
    process: "subprocess.Popen[bytes]", server: Server, tls: ssl.SSLContext | None, log: IO[bytes]
) -> None:
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None:
        with suppress(OSError, AssertionError), Client(server.port, context=tls) as client:
            if client.ask(b"WHY") == b"42":
                return
        if time.monotonic() > deadline:
            raise TimeoutError(f"{server.name} does not answer; its output:\n{_said(log)}")
        time.sleep(0.01)
    raise ChildProcessError(f"{server.name} has not started")


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # gserver's children end by themselves
    process.wait()
