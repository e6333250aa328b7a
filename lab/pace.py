"""How soon a good client is answered by two servers that have one machine: one under a flood, the
other in peace.

Both are asked in turn by one process of its own, so that whatever else the machine does slows both
alike.
"""

import json
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from lab.running import LIMIT, ROOT, Client, environment
from lab.site import Site
from lab.tls_client import trust

PAUSE_SECONDS = 0.001
EVERY = 50  #: questions of which one comes on a new connection


class Pace(NamedTuple):
    """The 99th percentile of the time to a reply, in seconds, and of how many."""

    p99: float
    replies: int


class Course:
    """Asks both from now on, until `result`."""

    def __init__(self, *sites: Site) -> None:
        words = [
            str(word) for site in sites for word in (site.server.port, int(site.variant.is_tls))
        ]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "lab.pace", str(sites[0].pems), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        assert self._process.stdout
        assert self._process.stdout.readline() == "ready\n"

    def result(self) -> list[Pace]:
        """End it; how each was."""
        told, _ = self._process.communicate(timeout=LIMIT)
        assert self._process.returncode == 0
        return [Pace(*each) for each in json.loads(told)]


@contextmanager
def measured(*sites: Site) -> Iterator[list[Pace]]:
    """Measure during the body; the list is full after it."""
    paces: list[Pace] = []
    course = Course(*sites)
    yield paces
    paces += course.result()


def _ask(clients: list[Client], seconds: list[list[float]]) -> None:
    for client, times in zip(clients, seconds, strict=True):
        began = time.perf_counter()
        reply = client.ask(b"WHY")
        times.append(time.perf_counter() - began)
        assert reply == b"42", reply
    time.sleep(PAUSE_SECONDS)


def main() -> None:
    """Ask until stdin ends; print what there is to tell as JSON."""
    pems, *words = sys.argv[1:]
    context = trust(ROOT / pems) if "1" in words[1::2] else None
    ports = [
        (int(port), is_tls == "1") for port, is_tls in zip(words[::2], words[1::2], strict=True)
    ]
    clients = [Client(port, context=context if is_tls else None) for port, is_tls in ports]
    seconds: list[list[float]] = [[] for _ in clients]
    _ask(clients, [[] for _ in clients])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while not select.select([sys.stdin], [], [], 0)[0]:
        _ask(clients, seconds)
    results = [(sorted(times)[len(times) * 99 // 100], len(times)) for times in seconds]
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
