"""How many clients may connect, and how many are connected.

`admit` counts a client and `uncount` takes it out again; `count_address` and `uncount_address` do
the same for its address, from the accept (behind a balancer: from the end of the PROXY header) to
the close of its socket. A caller of the first must also call the second. For clients that pass from
one worker to another, the new worker calls `take_over` and `take_over_address`, and the old one
`hand_over` and `uncount_address`. A connection of a Unix socket is noted by `exempt` in place of
`count_address`.
"""

import socket
from collections.abc import Sequence
from hashlib import blake2b
from struct import unpack

from gserver.addresses import TRANSPORTS, plain_host
from gserver.config import Config
from gserver.protocol import TOO_MANY_CLIENTS, TOO_MANY_FROM_ADDRESS, ErrorReply
from gserver.scoreboard import Scoreboard

#: The cells in which a connection's address is counted: two, or none for a Unix socket.
Places = tuple[int, ...]


class Limits:
    """Admission to one worker: `--max-clients` and `--max-clients-per-address`."""

    def __init__(self, config: Config, scoreboard: Scoreboard, slot: int) -> None:
        self._max_clients = config.max_clients
        self._scoreboard = scoreboard
        self._cells = scoreboard.cells
        self._slot = slot
        # In a handover some clients count twice. No client may be rejected because of that.
        self._count_clients = scoreboard.settled_clients
        self._clients = scoreboard.cell("clients", slot)
        self._accepted = scoreboard.cell("clients_accepted", slot)
        self._closed = scoreboard.cell("clients_closed", slot)
        self._peak = scoreboard.cell("clients_peak", slot)
        self._arriving = scoreboard.cell("clients_arriving", slot)
        self._handed_over = scoreboard.cell("clients_handed_over", slot)
        self._transports = {
            transport: scoreboard.cell(f"clients_by_transport.{transport}", slot)
            for transport in TRANSPORTS
        }
        limit = config.max_clients_per_address
        self._addresses = AddressCounts(scoreboard, slot, limit) if limit else None

    def count_address(self, fd: int, host: str) -> None:
        """Count a new connection of an address, unless the address is at its limit."""
        if self._addresses:
            self._addresses.add(fd, host)

    def exempt(self, fd: int) -> None:
        """Note a connection of a Unix socket: no limit per address applies to it."""
        if self._addresses:
            self._addresses.add_at(fd, ())

    def uncount_address(self, fd: int) -> None:
        """Take a connection out of the count of its address, if it was counted."""
        if self._addresses:
            self._addresses.remove(fd)

    def is_over_address_limit(self, fd: int) -> bool:
        """Whether a connection is not counted, because its address was at the limit."""
        return self._addresses is not None and fd not in self._addresses

    def admit(self, fd: int, transport: str) -> ErrorReply | None:
        """Count a client, or return why it is rejected."""
        if self.is_over_address_limit(fd):
            return TOO_MANY_FROM_ADDRESS
        cells = self._cells
        if self._count_clients() < self._max_clients:
            cells[self._clients] += 1
            # Compared again after counting: two workers must not both give away the last place.
            count = self._count_clients()
            if count <= self._max_clients:
                cells[self._accepted] += 1
                cells[self._transports[transport]] += 1
                cells[self._peak] = max(cells[self._peak], count)
                return None
            cells[self._clients] -= 1
        self.uncount_address(fd)
        return TOO_MANY_CLIENTS

    def would_reject(self, fd: int) -> bool:
        """Whether a connection would be rejected now."""
        return self.is_over_address_limit(fd) or self._count_clients() >= self._max_clients

    def uncount(self, transport: str) -> None:
        """Take an admitted client out of the count."""
        self._cells[self._transports[transport]] -= 1
        self._cells[self._clients] -= 1
        self._cells[self._closed] += 1

    # Handovers. For a moment, both workers count the clients of a batch. `clients_arriving` is
    # their number. The two workers write it in turn.

    def take_over(self, transports: Sequence[str]) -> None:
        """Count a batch of clients, each with its transport, that another worker still counts."""
        clients = len(transports)
        self._count_transports(transports, 1)
        with self._scoreboard.transfer(self._slot):
            self._cells[self._arriving] = clients
            self._cells[self._clients] += clients

    def end_arrival(self, *, has_sender_died: bool) -> None:
        """Note that no client counts in two workers any more.

        If the old worker has died, the supervisor counts all of its clients as lost, also those
        that had arrived here. So they are accepted once more.
        """
        cells = self._cells
        if has_sender_died:
            cells[self._accepted] += cells[self._arriving]
        cells[self._arriving] = 0

    def hand_over(self, transports: Sequence[str], slot: int) -> None:
        """Take a batch out of the count, which the worker in `slot` counts by now."""
        clients = len(transports)
        self._count_transports(transports, -1)
        cells, arriving = self._cells, self._scoreboard.cell("clients_arriving", slot)
        if not cells[arriving]:
            # The new worker has died, and the supervisor has left these clients to this worker.
            cells[self._closed] += clients
        with self._scoreboard.transfer(self._slot):
            cells[self._clients] -= clients
            cells[arriving] = 0
        cells[self._handed_over] += clients

    def _count_transports(self, transports: Sequence[str], amount: int) -> None:
        for transport in transports:
            self._cells[self._transports[transport]] += amount

    def places(self, fd: int) -> Places | None:
        """Return where the address of a connection is counted, for `take_over_address`."""
        return self._addresses.places.get(fd) if self._addresses else None

    def take_over_address(self, fd: int, places: Sequence[int] | None) -> None:
        """Count a connection's address where another worker has counted it."""
        if self._addresses and places is not None:
            self._addresses.add_at(fd, places)

    @property
    def clients(self) -> int:
        """Clients of this worker."""
        return self._cells[self._clients]

    def clients_by(self, transport: str) -> int:
        """Clients of this worker that use a transport."""
        return self._cells[self._transports[transport]]

    def clients_of_server(self) -> int:
        """Clients of all workers."""
        return self._count_clients()


class AddressCounts:
    """How many connections each address has, over all workers.

    A worker counts an address in two of its cells, one in each of two rows; a keyed hash chooses
    them. The smaller of their sums over all workers is the address's number, or more if other
    addresses collide with it in both. The key is random for each start, so nobody can search for
    addresses that collide with a given one.
    """

    def __init__(self, scoreboard: Scoreboard, slot: int, limit: int) -> None:
        self._limit = limit
        self._key = scoreboard.get("address_key").to_bytes(8)
        self._cells = scoreboard.addresses
        self._own = scoreboard.addresses_of(slot)
        #: The cells in which the connection of each descriptor is counted.
        self.places: dict[int, Places] = {}

    def add(self, fd: int, host: str) -> None:
        """Count a connection, unless its address is at its limit."""
        row = len(self._own) // 2
        digest = blake2b(network(host), digest_size=8, key=self._key).digest()
        first, second = unpack("II", digest)
        places = first % row, row + second % row
        self.add_at(fd, places)
        # Compared after counting: two workers must not both give away the last place.
        if min(sum(self._cells[place :: len(self._own)]) for place in places) > self._limit:
            self.remove(fd)

    def add_at(self, fd: int, places: Sequence[int]) -> None:
        """Count a connection in these cells."""
        self.places[fd] = tuple(places)
        for place in places:
            self._own[place] += 1

    def __contains__(self, fd: int) -> bool:
        """Whether the connection is counted."""
        return fd in self.places

    def remove(self, fd: int) -> None:
        """Take a connection out, if it is counted."""
        for place in self.places.pop(fd, ()):
            self._own[place] -= 1


def network(host: str) -> bytes:
    """Return what counts as one address: all of an IPv4 address, the /64 of an IPv6 address.

    A /64 is what one customer usually has.
    """
    host = plain_host(host)
    return host.encode() if "." in host else socket.inet_pton(socket.AF_INET6, host)[:8]
