"""Faulty handlers: each affects only its own command or its own worker."""

from collections.abc import Callable
from pathlib import Path

import psutil

from lab.rows import ALL, PLAIN, Notes, row
from lab.running import is_alive, until
from lab.site import Site

Start = Callable[..., Site]

MODULE = """
import asyncio, os, signal, socket, sys, threading, time
import gevent
from gserver.commands import command
from lab.commands import census

class Own(BaseException):
    pass

class NoText(Exception):
    def __str__(self):
        raise SystemExit(1)
    __notes__ = property(__str__)

KINDS = [
    Exception, MemoryError, KeyboardInterrupt, SystemExit, gevent.GreenletExit, gevent.Timeout,
    GeneratorExit, StopIteration, asyncio.CancelledError, Own, NoText, BrokenPipeError,
    ConnectionResetError, BlockingIOError,
]
WRONG = [None, 1.5, b"bytes", ["list"], "two\\nlines", "\\x1b[2J", "\\u00e9", 10**5000]

def define(name):
    return lambda function: globals().__setitem__(name, command(name)(function))

def throw(kind):
    raise kind

# Not `*_`: Python before 3.13.8 does not end such a recursion (python/cpython#132744).
def recurse(request):
    recurse(service)

BAD = [recurse, *(lambda service, kind=kind: throw(kind()) for kind in KINDS)]
BAD += [lambda service, reply=reply: reply for reply in WRONG]
for number, handler in enumerate(BAD):
    define(f"BAD-{number}")(handler)
    define(f"LATE-{number}")(
        lambda service, handler=handler: (time.sleep(0.01), handler(service))[1]
    )

@command("THREADS")
def threads(request):
    kinds = SystemExit, Own, gevent.Timeout
    each = [threading.Thread(target=throw, args=(kind,)) for kind in kinds]
    [thread.start() for thread in each]
    [thread.join() for thread in each]
    return "done"

@command("SURROUNDINGS")
def surroundings(request):
    os.chdir("/proc")
    os.umask(0o777)
    os.environ.clear()
    socket.setdefaulttimeout(0.0001)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    return os.getpid()

def descriptors(kind):
    folder = "/proc/self/fd"
    fds = [fd for fd in os.listdir(folder) if int(fd) > 2 and os.path.exists(f"{folder}/{fd}")]
    return sorted(int(fd) for fd in fds if kind in os.readlink(f"{folder}/{fd}"))

def listens(fd):
    with socket.socket(fileno=os.dup(fd)) as sock:
        return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))

for name, choose in {
    "WATCH": lambda: descriptors("eventpoll")[1:],
    "LISTENER": lambda: [fd for fd in descriptors("socket:") if listens(fd)],
    "CLIENTS": lambda: [fd for fd in descriptors("socket:") if not listens(fd)],
    "ALL": lambda: range(3, 1000),
}.items():
    define(f"CLOSE-{name}")(
        lambda service, choose=choose: "closed" if [os.close(fd) for fd in choose()] else "none"
    )

def leave(): sys.exit(0)
def fail(): raise LookupError
for name, end in {"EXIT": leave, "RAISE": fail, "RETURN": lambda: "a child"}.items():
    define(f"FORK-{name}")(lambda service, end=end: "a parent" if os.fork() else end())

@command("SHORTEN")
def shorten(request):
    for fd in descriptors("gserver-scoreboard"):
        os.ftruncate(fd, 0)
"""
COUNT = 23


def begin(start: Start, folder: Path, *options: str) -> Site:
    (folder / "bad.py").write_text(MODULE)
    return start("--commands", "bad", *options)


@row("Handler raises or returns nonsense", *ALL)
def test_whatever_a_handler_raises_or_returns_costs_its_command_alone(
    start: Start, notes: Notes, tmp_path: Path
) -> None:
    site = begin(start, tmp_path)
    with site.neighbours(), site.client() as client:
        commands = [f"{when}-{number}" for when in ("BAD", "LATE") for number in range(COUNT)]
        replies = [client.ask(command.encode()) for command in commands]
        assert replies == [b"ERR internal"] * len(commands)
        assert client.ask(b"BAD-23") == b"ERR unknown command"
        notes.happened(f"{len(replies)} different commands failed")
    assert not site.server.events("worker.died")


@row("Handler changes its process", *PLAIN)
def test_a_handler_that_changes_its_process_does_not_affect_clients(
    start: Start, notes: Notes, tmp_path: Path
) -> None:
    site = begin(start, tmp_path)
    with site.neighbours(), site.client() as client:
        pid = int(client.ask(b"SURROUNDINGS"))
        assert client.ask(b"SHORTEN") == b"ERR internal"
        folder = Path(f"/proc/{pid}/cwd").readlink()
        notes.happened(f"the working directory of worker {pid} is {folder}")
        assert folder == Path("/proc")
    assert not site.server.events("worker.died")
    assert site.server.stop() == 0


@row(
    "Handler forks, and the child returns",
    *PLAIN,
    values={"exits": "EXIT", "raises": "RAISE", "returns": "RETURN"},
)
def test_a_forked_child_neither_counts_nor_answers_clients(
    start: Start, notes: Notes, kind: str, tmp_path: Path
) -> None:
    site = begin(start, tmp_path)
    with site.neighbours(), site.client() as client:
        assert [client.ask(f"FORK-{kind}".encode()) for _ in range(20)] == [b"a parent"] * 20
        notes.happened("20 forked children returned from the handler")
        assert client.ask(b"WHY") == b"42"

        def living() -> list[psutil.Process]:
            children = [each for worker in site.server.workers() for each in worker.children()]
            return [each for each in children if is_alive(each)]

        until(lambda: not living(), "the forked children have ended")
    until(lambda: sum(site.clients()) == 0, "no client is counted")
    assert not site.server.events("worker.died")


@row(
    "Handler closes descriptors of the worker",
    *ALL,
    values={"of its watch": "WATCH", "listener": "LISTENER", "clients": "CLIENTS", "all": "ALL"},
)
def test_a_worker_whose_descriptors_a_handler_closes_is_replaced(
    start: Start, notes: Notes, tmp_path: Path, kind: str
) -> None:
    site = begin(start, tmp_path)
    before = site.server.workers()
    site.may_lose = site.may_log_errors = True
    with site.neighbours(), site.client() as client:
        client.send(f"CLOSE-{kind}\n".encode())
        until(lambda: site.server.events("worker.died"), "the worker has ended")
        notes.happened(site.server.events("worker.died")[0]["message"])
    assert len(set(before) - set(site.server.workers())) == 1
