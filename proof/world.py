"""Three servers, their Redis, and HAProxy, on seven hosts.

Hosts are network namespaces (lab/netns.py), so this needs root. All processes have priority over
others, which would distort the measurement.
"""

import json
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

from lab.haproxy import Front
from lab.installed import Installed
from lab.machine import processor, source, version
from lab.member import Member
from lab.netns import Network
from lab.redises import Pair, Redis, Sentinels

NAMES = "A", "B", "C"
NICENESS = -10
OPTIONS = "--workers", "2", "--drain-delay", "2", "--drain-spread", "2"


class World(ExitStack[None]):
    """The whole scene, with the times of the cluster.

    Redis is one, with two replicas and three Sentinels; or there are two that are independent.
    """

    def __init__(
        self, folder: Path, interval: float = 0.5, ttl: float = 5.0, engines: int = 1
    ) -> None:
        super().__init__()
        self.ttl = ttl
        with ExitStack() as stack:
            self.network = stack.enter_context(Network(7))
            self.front_host, *rest = self.network.hosts
            self.redis_hosts = rest[:3]
            self.store: Sentinels | Pair
            if engines == 1:
                self.store = stack.enter_context(Sentinels(folder, hosts=self.redis_hosts))
            else:
                self.store = stack.enter_context(Pair(folder, hosts=self.redis_hosts[:2]))
            options = ["--redis-url", self.store.url, "--heartbeat-interval", str(interval)]
            options += ["--member-ttl", str(ttl), "--proxy-from", self.front_host.address, *OPTIONS]
            env = {"GSERVER_ADMIN_TOKEN": "secret"}
            #: The code that all servers run.
            self.installed = Installed(folder)
            self.members: list[Member] = []
            for name, host in zip(NAMES, rest[3:], strict=True):
                admin = ["--admin-host", host.address, "--admin-port", "4243"]
                program = self.installed.program
                member = Member(name, *admin, *options, host=host, program=program, env=env)
                self.members.append(member)
                stack.callback(member.end)
            with self.front_host.inside():
                addresses = [member.host.address for member in self.members]
                servers = [member.server for member in self.members]
                self.front = stack.enter_context(
                    Front(folder, servers, addresses=addresses, source=self.front_host.address)
                )
            self.push(stack.pop_all())

    @property
    def redis(self) -> Sentinels:
        """The Redis, its replicas and the Sentinels."""
        assert isinstance(self.store, Sentinels)
        return self.store

    @property
    def first_redis(self) -> Redis:
        """The first of two."""
        assert isinstance(self.store, Pair)
        return self.store.redises[0]


@contextmanager
def undisturbed() -> Iterator[None]:
    """Give this process, and those started in the body, priority over others."""
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, min(usual, NICENESS))
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, usual)


def need_root() -> None:
    """Exit with 2 and a reason if namespaces cannot be created."""
    if os.geteuid():
        click.echo("This needs root: it makes network namespaces.", err=True)
        sys.exit(2)


def machine() -> dict[str, str]:
    """The machine and the versions behind the figures."""
    redis, haproxy = version("redis-server", "--version"), version("haproxy", "-v")
    return {
        **source(),
        "processor": processor(os.cpu_count() or 1),
        "system": f"Linux {platform.release()}, Python {platform.python_version()}",
        "redis": f"Redis {redis}, HAProxy {haproxy}",
        "load": f"load {os.getloadavg()[0]:.1f} before, nice {NICENESS}",
    }


def write(report: dict[str, Any], path: Path) -> None:
    """Write a report as JSON, with each list of numbers, or of such lists, on one line."""
    text = re.sub(
        r"\[\s+([^][{}]+?)\s+\]",
        lambda found: f"[{' '.join(found[1].split())}]",
        json.dumps(report, indent=1),
    )
    path.write_text(re.sub(r"\],\s+\[", "], [", text) + "\n")
