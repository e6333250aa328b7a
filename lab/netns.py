"""A network that can be cut in one or both directions without notice to any host.

Hosts are network namespaces; the router between them drops packets. This needs root, and changes
nothing outside of the namespaces.
"""

import os
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lab.host import Host
from lab.running import LIMIT, program, unavailable

#: How long to wait for a packet that must not arrive. An allowed one takes microseconds.
LOST_SECONDS = 0.05


Way = tuple[Host, Host]


def both_ways(one: Host, *others: Host) -> list[Way]:
    """The paths between a host and others, in both directions."""
    return [way for other in others for way in ((one, other), (other, one))]


class Cut(NamedTuple):
    """The cut began between these two times."""

    after: float
    before: float


class Network(ExitStack[None]):
    """`count` hosts and their router. If impossible, skips the test, or fails it if CI is set."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._ip_program = program("ip")
        if os.geteuid() != 0:
            unavailable("network namespaces need root")
        prefix = f"gserver-{os.getpid()}-{secrets.token_hex(3)}"
        with ExitStack() as stack:
            try:
                self._router = self._add(stack, f"{prefix}-router", "")
                self.hosts = [
                    self._add(stack, f"{prefix}-{n}", f"198.18.{n}.1") for n in range(count)
                ]
                for number, host in enumerate(self.hosts):
                    self._connect(host, f"host{number}", f"198.18.{number}.254")
            except subprocess.CalledProcessError as error:
                unavailable(f"no network namespaces: {' '.join(error.cmd)}: {error.stderr.strip()}")
            with self._router.inside():
                Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
                # Otherwise the kernel also drops packets whose replies would be lost.
                for name in ("all", *(f"host{number}" for number in range(count))):
                    Path(f"/proc/sys/net/ipv4/conf/{name}/rp_filter").write_text("0")
            self.push(stack.pop_all())

    def _ip(self, *words: str, text: str = "") -> None:
        subprocess.run(
            [self._ip_program, *words], input=text, check=True, capture_output=True, text=True
        )

    def _add(self, stack: ExitStack[Any], name: str, address: str) -> Host:
        self._ip("netns", "add", name)
        stack.callback(self._ip, "netns", "delete", name)
        self._ip("-n", name, "link", "set", "lo", "up")
        return Host(name, address)

    def _connect(self, host: Host, port: str, gateway: str) -> None:
        router = self._router.name
        self._ip(
            "link",
            "add",
            port,
            "netns",
            router,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            host.name,
        )
        for name, link, address in ((router, port, gateway), (host.name, "eth0", host.address)):
            self._ip("-n", name, "address", "add", f"{address}/24", "dev", link)
            self._ip("-n", name, "link", "set", link, "up")
        self._ip("-n", host.name, "route", "add", "default", "via", gateway)

    def reaches(self, source: Host, target: Host, limit: float = LIMIT) -> bool:
        """Whether a packet arrives."""
        with target.inside():
            receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with source.inside():
            sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with receiver, sender:
            receiver.bind((target.address, 0))
            receiver.settimeout(limit)
            sender.sendto(b"?", receiver.getsockname())
            try:
                return receiver.recv(1) == b"?"
            except TimeoutError:
                return False

    @contextmanager
    def cut(self, *ways: Way) -> Iterator[Cut]:
        """Drop all packets from the first to the second host of each path, for the same time.

        Checks that they are lost, and that the other direction works unless it is cut too.
        """
        assert all(self.reaches(*way) for way in ways)
        after = time.monotonic()
        self._rules("add", ways)
        cut = Cut(after, time.monotonic())
        try:
            back = {(target, source) for source, target in ways} - set(ways)
            assert all(self.reaches(*way) for way in back)
            assert not any(self.reaches(*way, LOST_SECONDS) for way in ways)
            yield cut
            assert not any(self.reaches(*way, LOST_SECONDS) for way in ways)
        finally:
            self._rules("delete", ways)
        assert all(self.reaches(*way) for way in ways)

    def _rules(self, action: str, ways: tuple[Way, ...]) -> None:
        lines = (
            f"rule {action} from {a.address} to {b.address} priority 100 blackhole\n"
            for a, b in ways
        )
        self._ip("-n", self._router.name, "-batch", "-", text="".join(lines))
