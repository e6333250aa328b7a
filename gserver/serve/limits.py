"""The clients of one worker: what they have in common, and how many they are.

Owns the two ends of the count, `admit` and `release`; who calls the one owes the other.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import replace
from time import monotonic, monotonic_ns

from gserver.commands import Command, Service
from gserver.config import Config
from gserver.errors import ClusterUnavailable
from gserver.metrics import SERVICE_BOUNDS_NS
from gserver.protocol import (
    ERROR_REPLIES,
    TOO_MANY_CLIENTS,
    TOO_MANY_FROM_ADDRESS,
    ErrorReply,
    Grammar,
)
from gserver.scoreboard import Scoreboard
from gserver.serve.addresses import Addresses


class Limits:
    """All clients of one worker."""

    def __init__(
        self, config: Config, scoreboard: Scoreboard, slot: int, commands: Iterable[Command]
    ) -> None:
        self.config = config
        self.service = Service(config.server_id, _who(config, scoreboard))
        table = {
            item.name.encode(): replace(item, cell=scoreboard.command_cell(item.name, slot))
            for item in commands
        }
        self.grammar = Grammar(table, config.max_line_bytes)
        self.cells = scoreboard.cells
        self.count_clients = scoreboard.clients
        self.clients = scoreboard.cell("clients", slot)
        self.accepted = scoreboard.cell("clients_accepted", slot)
        self.closed = scoreboard.cell("clients_closed", slot)
        self._peak = scoreboard.cell("clients_peak", slot)
        self._bursts = scoreboard.cell("reads", slot)
        self._service_ns = scoreboard.cell("service_ns", slot)
        self._classes = [
            scoreboard.cell(f"service_bucket.{number}", slot)
            for number in range(len(SERVICE_BOUNDS_NS) + 1)
        ]
        self.refusals = {
            refusal: scoreboard.cell(f"error_replies.{refusal.name}", slot)
            for refusal in ERROR_REPLIES
        }
        #: By address, from the accept on; None where that is not limited.
        self.addresses = (
            Addresses(scoreboard, slot, limit)
            if (limit := config.max_clients_per_address)
            else None
        )
        self.is_draining = False
        self.drain_started_at = 0.0

    def admit(self, fd: int) -> ErrorReply | None:
        """Count a client in, or, if there are too many, as refused; who is in owes `release` and `leave`."""
        if self.addresses and fd not in self.addresses:
            self.refuse(TOO_MANY_FROM_ADDRESS)
            return TOO_MANY_FROM_ADDRESS
        if self.count_clients() < self.config.max_clients:
            self.cells[self.clients] += 1
            # Compared again once it is counted, so that two workers never both give away the last
            # place.
            if (count := self.count_clients()) <= self.config.max_clients:
                self.cells[self.accepted] += 1
                self.cells[self._peak] = max(self.cells[self._peak], count)
                return None
            self.cells[self.clients] -= 1
        self.leave(fd)
        self.refuse(TOO_MANY_CLIENTS)
        return TOO_MANY_CLIENTS

    def leave(self, fd: int) -> None:
        """Count who has no descriptor any more, or was not admitted, out of those of its address."""
        if self.addresses:
            self.addresses.leave(fd)

    def release(self) -> None:
        """Count a client out; for its address it is there until it `leave`s, as its descriptor is."""
        self.cells[self.clients] -= 1
        self.cells[self.closed] += 1

    def refuse(self, refusal: ErrorReply) -> None:
        """Count a refusal."""
        self.cells[self.refusals[refusal]] += 1

    def note_service(self, bursts: int, nanoseconds: int) -> None:
        """Count bursts that have been answered in so much time together."""
        self.cells[self._bursts] += bursts
        self.cells[self._service_ns] += nanoseconds
        self.cells[self._classes[bisect_left(SERVICE_BOUNDS_NS, nanoseconds // bursts)]] += bursts

    def drain(self) -> None:
        """From now on every client is to go as soon as what it has sent is answered."""
        self.is_draining = True
        self.drain_started_at = monotonic()


def _who(config: Config, scoreboard: Scoreboard) -> Callable[[], int]:
    """Return what counts the clients for WHO: those of this server, and in a cluster those of all."""
    if not config.redis_url:
        return scoreboard.clients
    if config.on_cluster_loss == "last-known":
        return scoreboard.cluster_clients
    view, max_age_ns = (
        scoreboard.server_cell("cluster_updated_at"),
        round(config.cluster_max_age_seconds * 1e9),
    )

    def count() -> int:
        if scoreboard.cells[view] and monotonic_ns() - scoreboard.cells[view] <= max_age_ns:
            return scoreboard.cluster_clients()
        if config.on_cluster_loss == "error":
            raise ClusterUnavailable
        return scoreboard.clients()

    return count
