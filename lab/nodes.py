"""Hosts with a Redis and a Sentinel each, on networks of their own."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from lab.netns import Host
from lab.redises import FAILOVER_LIMIT, Redis, Server
from lab.running import until

#: Other hosts may connect to it.
OPEN: dict[str, Any] = {"bind": "0.0.0.0", "protected-mode": "no"}


class Node(NamedTuple):
    """A host with a Redis and a Sentinel."""

    host: Host
    redis: Redis
    sentinel: Server

    def role(self) -> str:
        with self.host.inside():
            return self.redis.role()

    def knows(self) -> tuple[str, str, str]:
        """Return the primary, the replicas and the other Sentinels that the Sentinel knows."""
        with self.host.inside():
            flat: list[str] = self.sentinel.command("SENTINEL", "MASTER", "gserver")
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        return fields["ip"], fields["num-slaves"], fields["num-other-sentinels"]


def start_nodes(stack: ExitStack[Any], folder: Path, hosts: list[Host]) -> list[Node]:
    """Start Redis and its replicas, each with a Sentinel; two of the Sentinels must agree."""
    redises: list[Redis] = []
    for host in hosts:
        primary: dict[str, Any] = (
            {"replicaof": f"{hosts[0].address} {redises[0].port}"} if redises else {}
        )
        (place := folder / host.address).mkdir()
        with host.inside():
            redises.append(stack.enter_context(Redis(place, **OPEN, **primary)))
    with hosts[0].inside():
        until(
            lambda: redises[0].command("INFO", "replication")["connected_slaves"] == 2,
            "both are replicas",
        )
    rules = [
        f"monitor gserver {hosts[0].address} {redises[0].port} 2",
        "down-after-milliseconds gserver 500",
    ]
    rules += ["failover-timeout gserver 2000"]
    lines = [
        "port PORT",
        *(f"{name} {value}" for name, value in OPEN.items()),
        *(f"sentinel {rule}" for rule in rules),
    ]
    nodes: list[Node] = []
    for host, redis in zip(hosts, redises, strict=True):
        with host.inside():
            sentinel = stack.enter_context(Server("redis-sentinel", folder / host.address, lines))
        nodes.append(Node(host, redis, sentinel))
    settled = (hosts[0].address, "2", "2")
    until(
        lambda: {node.knows() for node in nodes} == {settled},
        "the Sentinels know all",
        FAILOVER_LIMIT,
    )
    return nodes
