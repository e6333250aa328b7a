"""Where a program runs: on this machine, or on a host of a `netns.Network`."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Host:
    """A network namespace with a loopback of its own, and an address that other hosts know."""

    name: str
    address: str

    @contextmanager
    def inside(self) -> Iterator[None]:
        """What this thread opens or starts in the body is on this host, and stays there."""
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
        """The address for a server that the other hosts are to reach."""
        return self.address if self == HERE else "0.0.0.0"


#: This machine, whose servers only this machine reaches.
HERE = Host("", "127.0.0.1")


def _enter(namespace: int) -> None:
    """As os.setns, which is there from Python 3.12 on."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
