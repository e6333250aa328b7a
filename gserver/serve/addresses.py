"""How many clients each address has, over all workers: for --max-clients-per-address.

A worker counts an address in two of its cells on the scoreboard, one in each of two rows, which a
keyed hash chooses. The lesser of their sums over the workers is what the address has, or more where
other addresses meet it in both. The key is drawn by lot at each start, so nobody can look for
addresses that meet a given one.
"""

import socket
from hashlib import blake2b
from struct import unpack

from gserver.scoreboard import Scoreboard


class Addresses:
    """The clients of one worker by their addresses; who calls `enter` owes a `leave`."""

    def __init__(self, scoreboard: Scoreboard, slot: int, limit: int) -> None:
        self._limit = limit
        self._key = scoreboard.get("address_key").to_bytes(8)
        self._cells = scoreboard.addresses
        self._own = scoreboard.addresses_of(slot)
        #: Where the client of each descriptor is counted.
        self._places: dict[int, tuple[int, int]] = {}

    def enter(self, fd: int, host: str) -> None:
        """Count a client, unless its address has as many as it may have already."""
        row = len(self._own) // 2
        first, second = unpack("II", blake2b(network(host), digest_size=8, key=self._key).digest())
        self._places[fd] = places = first % row, row + second % row
        for place in places:
            self._own[place] += 1
        # Compared once it is counted, so that two workers never both give away the last place.
        if min(sum(self._cells[place :: len(self._own)]) for place in places) > self._limit:
            self.leave(fd)

    def __contains__(self, fd: int) -> bool:
        """Whether it is counted."""
        return fd in self._places

    def leave(self, fd: int) -> None:
        """Count it out, if it is counted."""
        for place in self._places.pop(fd, ()):
            self._own[place] -= 1


def network(host: str) -> bytes:
    """Return what counts as one address: IPv4 in whole, of IPv6 its /64, for that is what one customer has."""
    host = host.removeprefix("::ffff:")  # IPv4 on a socket of IPv6.
    return host.encode() if "." in host else socket.inet_pton(socket.AF_INET6, host)[:8]
