"""Where a program runs: on this machine, or on a host of a `netns.Network`."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Host:
    """A network namespace with its own loopback, and an address for other hosts."""

    name: str
    address: str

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Everything that this thread opens or starts in the body belongs to this host."""
        if self == HERE:
            yield
            return
        with open("/proc/thread-self/ns/net") as outside, open(f"/run/netns/{self.name}") as inside:
            _enter(inside.fileno())
            try:
                yield
            finally:
                _enter(outside.fileno())

    @property
    def listens_on(self) -> str:
        """The listening address for a server that other hosts reach."""
        return self.address if self == HERE else "0.0.0.0"


#: This machine. Only this machine reaches its servers.
HERE = Host("", "127.0.0.1")


def _enter(namespace: int) -> None:
    """Like os.setns, which Python has from 3.12 on."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
