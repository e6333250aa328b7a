"""Measurement: CPU and memory of a server's processes, and the load generator."""

import itertools
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from bench.peers import LOAD, Server

#: Read before this process binds itself to one core.
CORES = frozenset(os.sched_getaffinity(0))
SERVER_CORE, LOAD_CORE = {min(CORES)}, {max(CORES)}
PATIENCE_SECONDS = 60.0
#: Active connections, unless their number is the measured variable.
CLIENTS = 64

_runs = itertools.count()

#: The figures of one run, by name.
Sample = dict[str, Any]


class Failed(Exception):
    """A run without valid figures; the message has the reason."""


def tree(server: Server) -> list[int]:
    """The processes of a server: the started ones and their descendants."""
    return [
        each
        for pid in server.pids
        for each in (
            pid,
            *sorted(child.pid for child in psutil.Process(pid).children(recursive=True)),
        )
    ]


def in_role(server: Server, role: str) -> list[int]:
    """The processes of gserver with this role: `worker` or `agent`."""
    return [
        pid for pid in tree(server) if f"\0{role}\0" in Path(f"/proc/{pid}/cmdline").read_text()
    ]


def cpu_ns(pids: list[int]) -> int:
    """CPU time that processes have used, including that of ended threads.

    It is read from the CPU clock that the kernel keeps for each process.
    """
    return sum(time.clock_gettime_ns((~pid << 3) | 2) for pid in pids)


def memory(pids: list[int]) -> int:
    """Bytes of memory of processes, with shared memory counted once (PSS)."""
    return _memory(pids, "Pss")


def own_memory(pids: list[int]) -> int:
    """The same without mapped files, whose share shrinks with each process that maps them."""
    return _memory(pids, "Pss_Anon") + _memory(pids, "Pss_Shmem")


def _memory(pids: list[int], kind: str) -> int:
    rollups = (Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids)
    return sum(1024 * int(rollup.partition(f"\n{kind}:")[2].split()[0]) for rollup in rollups)


@contextmanager
def load(
    mode: str, server: Server, *arguments: object, limit: float = PATIENCE_SECONDS, lines: str = ""
) -> Iterator["Load"]:
    """Run the load generator while the body runs, for at most `limit` seconds.

    `lines` are sent in place of WHO, WHERE and WHY; each has its line ending.
    """
    words = [str(LOAD)]
    if server.is_tls:
        words.append("tls")
    if lines:
        words += ["lines", lines]
    words += [mode, server.host, str(server.port), *map(str, arguments)]
    if mode == "connect":
        # A new address: the ports of the previous run stay in TIME_WAIT for a minute.
        words.append(f"127.1.{next(_runs) % 250}.1")
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        timer = threading.Timer(limit, process.kill)
        timer.start()
        try:
            yield Load(process)
        finally:
            timer.cancel()
            process.kill()


class Load:
    """A running load generator."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def line(self) -> str:
        """The next line that it prints."""
        assert self._process.stdout
        assert self._process.stderr
        line = self._process.stdout.readline().strip()
        if not line:
            self._process.kill()
            reason = self._process.stderr.read().strip() or "it took too long"
            raise Failed(f"the load generator ended: {reason}")
        return line

    def expect(self, wanted: str) -> None:
        """Read a line that must be this one."""
        if (line := self.line()) != wanted:
            raise Failed(f"the load generator printed {line!r}, not {wanted!r}")

    def ask(self, words: str) -> str:
        """Send a line and read one."""
        assert self._process.stdin
        print(words, file=self._process.stdin, flush=True)
        return self.line()

    def result(self) -> Sample:
        """Its line of JSON; an error in it invalidates the run."""
        result: Sample = json.loads(self.line())
        if result["errors"] or not result["answers"]:
            self._process.kill()
            assert self._process.stderr
            errors = self._process.stderr.read().strip().replace("\n", "; ")
            raise Failed(f"{result['answers']} answers, {result['errors']} errors: {errors}")
        return result


def work(
    server: Server,
    mode: str,
    *arguments: object,
    during: Callable[[], Sample] = dict,
    lines: str = "",
) -> Sample:
    """Put load on a server; return latencies, CPU per answer and what `during` returns.

    `during` is called while the load runs. `lines` are those of `load`.
    """
    pids = tree(server)
    with load(mode, server, *arguments, lines=lines) as process:
        process.expect("start")
        before = cpu_ns(pids)
        more = during()
        result = process.result()
        used = cpu_ns(pids) - before
    if tree(server) != pids:
        raise Failed("a process of the server ended or started meanwhile")
    return {
        "cpu_us": used / 1e3 / result["answers"],
        "busy": used / 1e9 / result["seconds"],
        **result,
        **more,
    }
