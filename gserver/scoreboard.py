"""The scoreboard: one shared table of integers through which the processes know of each other.

A memfd of int64 cells, mapped by every process; each cell has one writer, and readers take no lock.
A worker writes its own column; the supervisor writes its own cells, and settles the column of a
worker that has died. Every cell is named here and nowhere else.
"""

import fcntl
import mmap
import os
import secrets
import time
import zlib
from collections.abc import Sequence

from gserver.errors import UsageError
from gserver.protocol import ERROR_REPLIES, MAX_NAME_BYTES
from gserver.redis_errors import HEARTBEAT_ERRORS

#: Upper bounds of the classes by which the times of bursts are counted; what is longer is in a last
#: class.
SERVICE_BOUNDS_NS = tuple(
    round(us * 1000) for us in (5, 10, 20, 50, 100, 200, 500, 1e3, 5e3, 2e4, 1e5, 1e6, 1e7)
)
#: Of each worker, what adds up over all of them: counters, and the gauge `clients`, which comes
#: first.
WORKER_TOTALS = (
    "clients",  # connected now
    "accepted",  # clients taken in
    "closed",  # clients that have gone
    "bursts",  # times that bytes were read and answered
    "service_ns",  # time from bytes read to replies handed to the kernel, over all bursts
    *(
        f"service.{number}" for number in range(len(SERVICE_BOUNDS_NS) + 1)
    ),  # bursts by their time: classes above
    *(f"refused.{refusal.name}" for refusal in ERROR_REPLIES),
)
#: What does not. Moments are monotonic nanoseconds.
WORKER_CELLS = (
    *WORKER_TOTALS,
    "heartbeat",  # when its loop last turned
    "pid",  # of the worker that has this column; 0 = none
    "begun",  # when it began
    "tls_expires_at",  # when the certificate it shows expires, in Unix seconds; 0 = it has none
    "peak",  # most clients of all workers at once that it has seen
)
#: Of the supervisor and of the agent, likewise.
SINGLE_TOTALS = (
    "workers",  # workers that accept
    "worker_restarts",  # workers replaced because they died or hung
    "agent_starts",
    "reloads",  # SIGHUPs carried out
    "reload_failures",  # and given up
    "lost",  # clients of workers that died
    "beats",  # answered by Redis
    "beat_ns",  # time until the answer, over all beats
    *(f"beat_errors.{kind}" for kind in HEARTBEAT_ERRORS),
)
SINGLE_CELLS = (
    *SINGLE_TOTALS,
    "agent_heartbeat",
    "begun_at",  # when the supervisor began
    "stopping",  # 1 from the signal on that ends it
    "draining",  # 1 from when it accepts no more
    "incarnation",  # which life of this server it is: drawn by lot
    "address_key",  # of the hash of addresses: drawn by lot, and secret
    "remote",  # clients of the other servers, as last known
    "servers",  # servers in the cluster, as last known; 0 before the first beat
    "view",  # when that was learned
    "lease_clock",  # of the cluster, as last known; milliseconds
    "lost_at",  # on that clock: when Redis last lost data
    "answered",  # the stamp of the last beat that was answered
    "hold_until",  # on that clock: how long `remote` is an older number that is held; 0 = it is not
)
MAX_COMMANDS = 64

_CELL_BYTES = 8
_ADDRESS_BYTES = 4
_FIRST = 1  # cell 0 holds the layout's fingerprint
_FINGERPRINT = zlib.crc32(repr((WORKER_CELLS, SINGLE_CELLS, MAX_COMMANDS, MAX_NAME_BYTES)).encode())


class Scoreboard:
    """All cells, as seen by one process. A cell is `scoreboard.cells[index]`."""

    def __init__(self, fd: int, slots: int, address_cells: int = 0) -> None:
        self.fd = fd
        self.slots = slots
        singles = _FIRST + slots * (len(WORKER_CELLS) + MAX_COMMANDS)
        self.single = {name: singles + index for index, name in enumerate(SINGLE_CELLS)}
        end = (singles + len(SINGLE_CELLS)) * _CELL_BYTES
        size = 2 * end + slots * MAX_COMMANDS * MAX_NAME_BYTES
        if os.fstat(fd).st_size == 0:
            os.ftruncate(fd, size + slots * address_cells * _ADDRESS_BYTES)
        memory = memoryview(mmap.mmap(fd, 0))
        self.cells = memory[:end].cast("q")
        #: The agent's: the cells as they were when it last sent them, from where one that follows
        #: it goes on.
        self.sent = memory[end : 2 * end].cast("q")
        self._names = memory[2 * end : size]
        #: Gauges of clients by address, those of one worker after those of another; empty where
        #: nobody needs them.
        self.addresses = memory[size:].cast("i")
        self._clients = self.cells[_FIRST : _FIRST + slots]
        self._remote = self.single["remote"]

    @classmethod
    def create(cls, slots: int, address_cells: int = 0) -> "Scoreboard":
        """Make an empty scoreboard with a column for each of `slots` workers, and so many cells of each for addresses."""
        scoreboard = cls(
            os.memfd_create("gserver-scoreboard", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING),
            slots,
            address_cells,
        )
        # Whoever has the descriptor could cut the file short: a SIGBUS for all processes at their
        # next look.
        fcntl.fcntl(
            scoreboard.fd,
            fcntl.F_ADD_SEALS,
            fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL,
        )
        scoreboard.cells[0] = _FINGERPRINT
        scoreboard.put("incarnation", secrets.randbits(62))
        scoreboard.put("address_key", secrets.randbits(62))
        scoreboard.put("begun_at", time.monotonic_ns())
        return scoreboard

    @classmethod
    def attach(cls, fd: int, slots: int) -> "Scoreboard":
        """Map the supervisor's scoreboard; raise `UsageError` when it was made by another version of this file."""
        cell = os.pread(fd, _CELL_BYTES, 0)
        if int.from_bytes(cell, "little") != _FINGERPRINT:
            raise UsageError(
                "the running supervisor is of another version than this code: restart it"
            )
        return cls(fd, slots)

    def clients(self) -> int:
        """Clients connected to all workers now."""
        return sum(self._clients)

    def everybody(self) -> int:
        """Clients of the whole cluster: those of this server now, and those of the others as last known."""
        return sum(self._clients) + self.cells[self._remote]

    def get(self, name: str) -> int:
        """Return the value of a cell of the supervisor's or the agent's."""
        return self.cells[self.single[name]]

    def put(self, name: str, value: int) -> None:
        """Set such a cell."""
        self.cells[self.single[name]] = value

    def add(self, name: str, amount: int) -> None:
        """Count in such a cell."""
        self.cells[self.single[name]] += amount

    def cell(self, name: str, slot: int) -> int:
        """Return the index of a worker's cell."""
        return _FIRST + WORKER_CELLS.index(name) * self.slots + slot

    def command_cell(self, name: str, slot: int) -> int:
        """Return the index of the cell where a worker counts a command, after entering its name if
        it is new.

        Names stay: a worker that follows in the slot goes on counting where the last one ended.
        """
        names = self._command_names(slot)
        if name not in names:
            if len(names) == MAX_COMMANDS:
                raise UsageError(
                    f"more than {MAX_COMMANDS} commands, those of earlier reloads included: restart gserver"
                )
            start = (slot * MAX_COMMANDS + len(names)) * MAX_NAME_BYTES
            self._names[start : start + MAX_NAME_BYTES] = name.encode().ljust(MAX_NAME_BYTES, b"\0")
            names.append(name)
        return self._first_command(slot) + names.index(name)

    def heartbeat_cell(self, slot: int) -> int:
        """Return the index of the cell where the worker in a slot, or the agent (-1), gives its signs of life."""
        return self.single["agent_heartbeat"] if slot < 0 else self.cell("heartbeat", slot)

    def settle(self, slot: int, *, has_died: bool = True) -> int:
        """Zero the gauges of a worker that is dead; count its clients, and return how many are lost.

        They are lost if it has died by itself, and closed if it was told to end.
        """
        index = self.cell("clients", slot)
        clients, self.cells[index] = self.cells[index], 0
        self.cells[self.cell("pid", slot)] = self.cells[self.cell("tls_expires_at", slot)] = 0
        addresses = self.addresses_of(slot)
        addresses[:] = memoryview(bytes(addresses.nbytes)).cast("i")
        if not has_died:
            self.cells[self.cell("closed", slot)] += clients
            return 0
        self.add("lost", clients)
        return clients

    def addresses_of(self, slot: int) -> "memoryview[int]":
        """Return the gauges by address of one worker."""
        size = len(self.addresses) // self.slots
        return self.addresses[slot * size : (slot + 1) * size]

    def column(self, name: str, cells: Sequence[int] | None = None) -> Sequence[int]:
        """Return a cell of every worker, in the order of their slots."""
        return (self.cells if cells is None else cells)[
            self.cell(name, 0) : self.cell(name, 0) + self.slots
        ]

    def totals(self, cells: Sequence[int] | None = None) -> dict[str, int]:
        """Return every counter and gauge by name, summed over the workers; commands as
        `commands.NAME`.

        In a cluster that has been heard of: `servers`, `everybody` and `view_age_ms` too.
        """
        cells = self.cells if cells is None else cells
        totals = {name: sum(self.column(name, cells)) for name in WORKER_TOTALS}
        totals.update((name, cells[self.single[name]]) for name in SINGLE_TOTALS)
        for slot in range(self.slots):
            for offset, name in enumerate(self._command_names(slot)):
                key = f"commands.{name}"
                totals[key] = totals.get(key, 0) + cells[self._first_command(slot) + offset]
        if cells[self.single["view"]]:
            totals["servers"] = cells[self.single["servers"]]
            totals["everybody"] = totals["clients"] + cells[self._remote]
            totals["view_age_ms"] = (time.monotonic_ns() - cells[self.single["view"]]) // 1_000_000
        return totals

    @staticmethod
    def under(totals: dict[str, int], prefix: str) -> dict[str, int]:
        """Return those of such totals that are named `prefix.NAME`, by NAME."""
        return {
            key.removeprefix(f"{prefix}."): total
            for key, total in totals.items()
            if key.startswith(f"{prefix}.")
        }

    def _first_command(self, slot: int) -> int:
        return _FIRST + self.slots * len(WORKER_CELLS) + slot * MAX_COMMANDS

    def _command_names(self, slot: int) -> list[str]:
        size = MAX_COMMANDS * MAX_NAME_BYTES
        area = bytes(self._names[slot * size : (slot + 1) * size])
        names = (
            area[at : at + MAX_NAME_BYTES].rstrip(b"\0").decode()
            for at in range(0, size, MAX_NAME_BYTES)
        )
        return [name for name in names if name]
