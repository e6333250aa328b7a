"""The reply times of a good client on servers of one machine: one under attack, one not.

A separate process asks all servers in turn, so other load of the machine slows all equally.
"""

import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from lab.child import Child, begun, report
from lab.running import ROOT, Client
from lab.site import Site
from lab.tls_client import trust

PAUSE_SECONDS = 0.001


class Pace(NamedTuple):
    """The 99th percentile of the time to a reply, in seconds, and the number of replies."""

    p99: float
    replies: int


@contextmanager
def measured(*sites: Site) -> Iterator[list[Pace]]:
    """Measure during the body; the list is full after it."""
    paces: list[Pace] = []
    words = [word for site in sites for word in (site.server.port, int(site.variant.is_tls))]
    child = Child("lab.pace", sites[0].pems, *words)
    yield paces
    paces += [Pace(*each) for each in child.result()]


def _ask(clients: list[Client], seconds: list[list[float]]) -> None:
    for client, times in zip(clients, seconds, strict=True):
        began = time.perf_counter()
        reply = client.ask(b"WHY")
        times.append(time.perf_counter() - began)
        assert reply == b"42", reply
    time.sleep(PAUSE_SECONDS)


def main() -> None:
    """Ask until stdin ends."""
    pems, *words = sys.argv[1:]
    context = trust(ROOT / pems) if "1" in words[1::2] else None
    ports = [
        (int(port), is_tls == "1") for port, is_tls in zip(words[::2], words[1::2], strict=True)
    ]
    clients = [Client(port, context=context if is_tls else None) for port, is_tls in ports]
    seconds: list[list[float]] = [[] for _ in clients]
    _ask(clients, [[] for _ in clients])
    begun()
    while not select.select([sys.stdin], [], [], 0)[0]:
        _ask(clients, seconds)
    report([(sorted(times)[len(times) * 99 // 100], len(times)) for times in seconds])


if __name__ == "__main__":
    main()
