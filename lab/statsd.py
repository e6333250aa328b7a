"""The real StatsD daemon and its figures."""

import contextlib
import json
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lab.redises import free_port
from lab.running import LIMIT, ROOT, argv, program, unavailable, until

STATSD = ROOT / ".tools/node_modules/statsd/stats.js"
#: From Node 23 on, a function that the daemon uses is missing.
START = "require('util').log ??= console.log; require(process.argv[1])"
#: A line of a datagram.
LINE = re.compile(rb"[A-Za-z0-9_.-]+:-?[0-9.]+\|(c|g|ms)")
#: A daemon's UDP port, and the TCP port of its management interface.
Daemon = tuple[int, int]


@contextlib.contextmanager
def statsd_daemon(folder: Path, port: int = 0) -> Iterator[Daemon]:
    """The real StatsD daemon. It never flushes, so its counters add up."""
    node = program("node")
    if not STATSD.exists():
        unavailable(f"{STATSD} is missing: bin/programs installs it")
    port, management = port or free_port(), free_port()
    address = "127.0.0.1"
    config = {"address": address, "port": port, "mgmt_address": address, "mgmt_port": management}
    file = folder / f"{port}.js"
    file.write_text(json.dumps({**config, "backends": [], "flushInterval": 10**8, "title": False}))
    process = subprocess.Popen([node, "-e", START, STATSD, file], stdout=subprocess.DEVNULL)
    try:
        until(lambda: has_started((port, management)), "a StatsD daemon that counts")
        yield port, management
    finally:
        process.kill()
        process.wait()


def has_started(daemon: Daemon) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.sendto(b"probe:1|c", ("127.0.0.1", daemon[0]))
    try:
        return "probe" in received(daemon, "counters")
    except ConnectionRefusedError:
        return False


def received(daemon: Daemon, kind: str, prefix: str = "") -> dict[str, Any]:
    """The daemon's `counters`, `gauges` or `timers` with a prefix, by name without the prefix."""
    with socket.create_connection(("127.0.0.1", daemon[1]), LIMIT) as management:
        management.sendall(kind.encode() + b"\n")
        answer = b""
        while not answer.endswith(b"END\n\n"):
            answer += management.recv(65536)
    # The daemon writes JavaScript, with quotes only around names that need them.
    found = re.findall(r"'?([\w.-]+)'?: (\[[^\]]*\]|[-+.\de]+)", answer.decode())
    return {
        name.removeprefix(prefix): json.loads(value)
        for name, value in found
        if name.startswith(prefix)
    }


def becomes(read: Callable[[], Any], expected: Any) -> None:
    """Wait until the value is as expected; on a timeout, fail with the difference."""
    deadline = time.monotonic() + LIMIT
    while read() != expected and time.monotonic() < deadline:
        time.sleep(0.02)
    assert read() == expected


def to(daemon: Daemon, prefix: str) -> list[str]:
    return [*argv(f"--statsd-host 127.0.0.1 --statsd-port {daemon[0]} --statsd-prefix"), prefix]
