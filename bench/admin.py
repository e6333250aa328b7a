"""The cost of the admin port: a scenario of `bin/bench`.

It compares a server that is scraped every second with one that has no admin port. The scrapes run
on the load generator's core.
"""

import time
import urllib.request
from collections.abc import Iterator

from bench.measure import CLIENTS, PATIENCE_SECONDS, SERVER_CORE, Sample, cpu_ns, in_role, work
from bench.peers import HOST, running
from lab.redises import free_port

OFF, SCRAPED = "off", "on, scraped every second"
#: The paths to fetch, in turn.
PATHS = ("/metrics", "/status.json")


def admin(seconds: float, admin_port: str) -> Iterator[Sample]:
    """Answer commands, one in flight on each connection, with the admin port OFF or SCRAPED.

    The sample has the agent's share of the CPU.
    """
    port = free_port()
    is_scraped = admin_port == SCRAPED
    options = ("--admin-port", str(port)) if is_scraped else ()
    with running("gserver", cores=SERVER_CORE, options=options) as server:

        def scrape() -> Sample:
            agent = in_role(server, "agent")
            started, before = time.monotonic(), cpu_ns(agent)
            for number in range(1, int(seconds) + 1):
                for path in PATHS if is_scraped else ():
                    _fetch(port, path)
                time.sleep(max(0.0, started + number - time.monotonic()))
            used = cpu_ns(agent) - before
            return {"agent_percent": 100 * used / 1e9 / (time.monotonic() - started)}

        yield work(server, "pipeline", CLIENTS, 1, seconds, during=scrape)


def _fetch(port: int, path: str) -> None:
    """A response without success raises an OSError."""
    with urllib.request.urlopen(f"http://{HOST}:{port}{path}", timeout=PATIENCE_SECONDS) as answer:
        answer.read()
