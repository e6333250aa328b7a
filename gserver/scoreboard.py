"""The scoreboard: a table of integers in shared memory, through which the processes share state.

It is a memfd that every process maps. Its figures are int64 cells, which `gserver.metrics` names.
Beside them are command names, client counts by address, and the agent's last StatsD values. A
directory in it says which cell has which name. So processes of two versions can share it: a new
version enters the names that are missing, and cells that it does not know stay as they are.

Each cell has one writer at a time, and readers take no lock. A worker writes the cells of its slot,
the supervisor and the agent those of the server. The two workers of a handover write `transfers`
and `clients_arriving` in turn. When a worker has died, the supervisor clears what is current of it
(`CURRENT`), and its addresses, and counts its clients as lost or closed.
"""

import fcntl
import json
import mmap
import os
import secrets
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from gserver.errors import OTHER_VERSION, UsageError
from gserver.metrics import (
    DURATION_BOUNDS_NS,
    HISTORY_COLUMNS,
    METRICS,
    Combine,
    Metric,
    Source,
    cell_names,
    is_shown,
)
from gserver.protocol import MAX_NAME_BYTES

WORKER_CELLS = cell_names(Source.WORKER)
SERVER_CELLS = cell_names(Source.SERVER)
#: What is true of a worker only while it lives.
CURRENT = (
    *("clients", "clients_arriving", "is_transferring", "pid", "tls_expires_at"),
    *(name for name in WORKER_CELLS if name.startswith("clients_by_transport.")),
)
#: Command names that a slot can hold, over all reloads.
MAX_COMMANDS = 64
#: In the cells of a command in a slot, after its count: its time, and the buckets of this time.
TIME_OFFSET, BUCKETS_OFFSET = 1, 2
BUCKETS = len(DURATION_BOUNDS_NS) + 1
COMMAND_CELLS = BUCKETS_OFFSET + BUCKETS

_CELL_BYTES = 8
_ADDRESS_BYTES = 4
_FIRST = 1  # Cell 0 holds the fingerprint of the layout.
#: Cells that each slot, and the server, have: more than there are names, for those of later
#: versions.
WORKER_ROOM, SERVER_ROOM = 96, 192
#: Rows of the history: a second for five minutes, ten seconds for the hour. The agent writes them.
HISTORY_SECONDS, HISTORY_TENS = 300, 360
HISTORY_CELLS = len(HISTORY_COLUMNS)
#: Recent events that the supervisor and the agent keep, each, and their size as JSON.
MAX_EVENTS, EVENT_BYTES = 64, 512
#: `settled_clients` looks so often for a moment at which no count changes.
MAX_LOOKS = 100
_DIRECTORY_BYTES = 16_384
_FINGERPRINT = zlib.crc32(
    repr(
        (
            WORKER_ROOM,
            SERVER_ROOM,
            MAX_COMMANDS,
            MAX_NAME_BYTES,
            DURATION_BOUNDS_NS,
            (BUCKETS_OFFSET, TIME_OFFSET),
            (HISTORY_COLUMNS, HISTORY_SECONDS, HISTORY_TENS),
            (MAX_EVENTS, EVENT_BYTES),
            _DIRECTORY_BYTES,
        )
    ).encode()
)


class MissingCellsError(UsageError):
    """The scoreboard lacks cells of this version. The supervisor can add them."""


class Scoreboard:
    """All cells, mapped by one process. The value of a cell is `scoreboard.cells[index]`."""

    def __init__(
        self, fd: int, slots: int, address_cells: int = 0, *, may_extend: bool = False
    ) -> None:
        self.fd = fd
        self.slots = slots
        self._first_server_cell = _FIRST + slots * (WORKER_ROOM + MAX_COMMANDS * COMMAND_CELLS)
        end = (self._first_server_cell + SERVER_ROOM) * _CELL_BYTES
        directory = 2 * end + slots * MAX_COMMANDS * MAX_NAME_BYTES
        history = directory + _DIRECTORY_BYTES
        events = history + (HISTORY_SECONDS + HISTORY_TENS) * HISTORY_CELLS * _CELL_BYTES
        size = events + 2 * MAX_EVENTS * EVENT_BYTES
        if os.fstat(fd).st_size == 0:
            os.ftruncate(fd, size + slots * address_cells * _ADDRESS_BYTES)
        memory = memoryview(mmap.mmap(fd, 0))
        self.cells = memory[:end].cast("q")
        #: The agent's copy of all cells at its last StatsD flush. The next agent continues from it.
        self.sent = memory[end : 2 * end].cast("q")
        self._names = memory[2 * end : directory]
        self._directory = memory[directory:history]
        #: The figures of the last hour, for charts.
        self.history = memory[history:events].cast("q")
        self._events = memory[events:size]
        #: Clients by hashed address, one slot after the other; empty if addresses have no limit.
        self.addresses = memory[size:].cast("i")
        self._worker_index, self._server_index = self._read_directory(may_extend=may_extend)
        # WHO reads these for every command, so the clients of all slots lie side by side.
        clients = self.cell("clients", 0)
        self._clients = self.cells[clients : clients + slots]
        arriving = self.cell("clients_arriving", 0)
        self._arriving = self.cells[arriving : arriving + slots]
        transferring = self.cell("is_transferring", 0)
        self._transferring = self.cells[transferring : transferring + slots]
        self._transfers = self.server_cell("transfers")
        self._seen_transfers = self.cells[self._transfers]
        self._remote_clients = self.server_cell("remote_clients")

    @classmethod
    def create(cls, slots: int, address_cells: int = 0) -> "Scoreboard":
        """Make an empty scoreboard with this many slots, and address cells in each slot."""
        fd = os.memfd_create("gserver-scoreboard", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        scoreboard = cls(fd, slots, address_cells, may_extend=True)
        # A process that shortened the file would end all others: their next access is a SIGBUS.
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        scoreboard.cells[0] = _FINGERPRINT
        scoreboard.put("incarnation", secrets.randbits(62))
        scoreboard.put("address_key", secrets.randbits(62))
        for name in ("server_started_at", "supervisor_heartbeat"):
            scoreboard.put(name, time.monotonic_ns())
        return scoreboard

    @classmethod
    def attach(cls, fd: int, slots: int, *, may_extend: bool = False) -> "Scoreboard":
        """Map the supervisor's scoreboard.

        `may_extend`: enter the names of this version that are missing, which only the supervisor
        may do. Raises `UsageError` if the layout is not that of this code: another version made it.
        """
        fingerprint = os.pread(fd, _CELL_BYTES, 0)
        if int.from_bytes(fingerprint, "little") != _FINGERPRINT:
            raise UsageError(OTHER_VERSION)
        return cls(fd, slots, may_extend=may_extend)

    @classmethod
    def check(cls, fd: int, slots: int) -> None:
        """Raise `UsageError` if `attach` with `may_extend` would."""
        with suppress(MissingCellsError):
            cls.attach(fd, slots)

    def _read_directory(self, *, may_extend: bool) -> tuple[dict[str, int], dict[str, int]]:
        """Return the places of the names of workers' cells, and of the server's.

        Raises `UsageError` if names of this version are missing and cannot be entered.
        """
        text = bytes(self._directory).rstrip(b"\0")
        known = json.loads(text) if text else [[], []]
        wanted = WORKER_CELLS, SERVER_CELLS
        names = [list(dict.fromkeys([*old, *new])) for old, new in zip(known, wanted, strict=True)]
        if names != known:
            text = json.dumps(names).encode()
            has_room = len(names[0]) <= WORKER_ROOM and len(names[1]) <= SERVER_ROOM
            if not has_room or len(text) > _DIRECTORY_BYTES:
                raise UsageError(OTHER_VERSION)
            if not may_extend:
                raise MissingCellsError(OTHER_VERSION)
            self._directory[: len(text)] = text
        worker, server = ({name: place for place, name in enumerate(each)} for each in names)
        return worker, server

    def clients(self) -> int:
        """Return the number of clients that are connected to this server.

        During a handover it is too high by a batch for a moment, and never too low. Without a
        second look, the old worker's cell could be read after a batch has left it, and the new
        worker's before it has arrived there.
        """
        total = sum(self._clients)
        while self.cells[self._transfers] != self._seen_transfers:
            self._seen_transfers = self.cells[self._transfers]
            total = sum(self._clients)
        return total

    def settled_clients(self) -> int:
        """Return the same without the clients of a handover that two workers count.

        For the agent, since the cluster must not hear of a handover, and for limits.
        """
        for _ in range(MAX_LOOKS):
            is_busy, before = any(self._transferring), self.cells[self._transfers]
            settled = sum(self._clients) - sum(self._arriving)
            if not is_busy and self.cells[self._transfers] == before:
                break
        return settled

    @contextmanager
    def transfer(self, slot: int) -> Iterator[None]:
        """Change counts of a handover in the body, as the worker in a slot. Two do so in turn."""
        self._transferring[slot] = 1
        self.cells[self._transfers] += 1
        yield
        self.cells[self._transfers] += 1
        self._transferring[slot] = 0

    def cluster_clients(self) -> int:
        """Return the clients of the cluster: of this server now, of the others as last known."""
        return self.clients() + self.cells[self._remote_clients]

    def keep_event(self, text: str, *, is_agent: bool) -> None:
        """Keep an event, as JSON, in place of the oldest one. One that is too long is left out.

        The supervisor and the agent have places of their own.
        """
        data = text.encode("ascii")
        if len(data) < EVENT_BYTES:
            name = "agent_events" if is_agent else "supervisor_events"
            number = self.get(name)
            start = (number % MAX_EVENTS + is_agent * MAX_EVENTS) * EVENT_BYTES
            self._events[start : start + EVENT_BYTES] = data.ljust(EVENT_BYTES, b"\0")
            self.put(name, number + 1)

    def events(self) -> list[str]:
        """Return the events that are kept, as JSON, in no order."""
        texts = bytes(self._events)
        places = range(0, len(texts), EVENT_BYTES)
        found = (texts[at : at + EVENT_BYTES].rstrip(b"\0").decode("ascii") for at in places)
        return [text for text in found if text]

    def get(self, name: str) -> int:
        """Return the value of a cell of the server."""
        return self.cells[self.server_cell(name)]

    def put(self, name: str, value: int) -> None:
        """Set a cell of the server."""
        self.cells[self.server_cell(name)] = value

    def add(self, name: str, amount: int) -> None:
        """Add to a cell of the server."""
        self.cells[self.server_cell(name)] += amount

    def server_cell(self, name: str) -> int:
        """Return the index of a cell of the server."""
        return self._first_server_cell + self._server_index[name]

    def cell(self, name: str, slot: int) -> int:
        """Return the index of a cell of the worker in a slot."""
        return _FIRST + self._worker_index[name] * self.slots + slot

    def command_cell(self, name: str, slot: int) -> int:
        """Return the index of the cell that counts a command in a slot; enter a new name.

        After it come the cell of its time (TIME_OFFSET) and the buckets of this time
        (BUCKETS_OFFSET). Names stay, so the next worker in the slot continues the count. Raises
        `UsageError` if the slot has `MAX_COMMANDS` other names.
        """
        names = self._command_names(slot)
        if name not in names:
            if len(names) == MAX_COMMANDS:
                raise UsageError(
                    f"more than {MAX_COMMANDS} command names, including those of earlier reloads:"
                    " use fewer, or restart gserver"
                )
            start = (slot * MAX_COMMANDS + len(names)) * MAX_NAME_BYTES
            self._names[start : start + MAX_NAME_BYTES] = name.encode().ljust(MAX_NAME_BYTES, b"\0")
            names.append(name)
        return self._first_command(slot) + names.index(name) * COMMAND_CELLS

    def heartbeat_cell(self, slot: int) -> int:
        """Return the index of the heartbeat of the worker in a slot, or of the agent (slot -1)."""
        return self.server_cell("agent_heartbeat") if slot < 0 else self.cell("heartbeat", slot)

    def clear_dead_worker(self, slot: int, *, has_died: bool = True) -> int:
        """Clear what is current of a dead worker; count its clients, return how many are lost.

        They are lost if the worker died by itself, and closed if the supervisor ended it.
        """
        # Clients that were arriving are still those of the worker that hands them over.
        clients = self.cells[self.cell("clients", slot)]
        clients = max(0, clients - self.cells[self.cell("clients_arriving", slot)])
        for name in CURRENT:
            self.cells[self.cell(name, slot)] = 0
        addresses = self.addresses_of(slot)
        addresses[:] = memoryview(bytes(addresses.nbytes)).cast("i")
        if not has_died:
            self.cells[self.cell("clients_closed", slot)] += clients
            return 0
        self.add("clients_lost", clients)
        return clients

    def addresses_of(self, slot: int) -> "memoryview[int]":
        """Return the clients by hashed address of the worker in a slot."""
        size = len(self.addresses) // self.slots
        return self.addresses[slot * size : (slot + 1) * size]

    def by_slot(self, name: str, cells: Sequence[int] | None = None) -> Sequence[int]:
        """Return a cell of every worker, in the order of the slots."""
        first = self.cell(name, 0)
        return (self.cells if cells is None else cells)[first : first + self.slots]

    def totals(self, cells: Sequence[int] | None = None) -> dict[str, int]:
        """Return the figures of the catalogue that the cells hold, by name.

        Cells of workers are combined over all slots. The count of a command is `commands.NAME`, its
        time `command_ns.NAME`, and bucket 0 of it `command_buckets.NAME.0`. The figures of the
        cluster are included once it is known. `cells` are those of another time, like `sent`.
        """
        cells = self.cells if cells is None else cells
        totals: dict[str, int] = {}
        for metric in METRICS:
            if is_shown(metric):
                totals.update(self._figures(metric, cells))
        self._add_commands(totals, cells)
        updated_at = cells[self.server_cell("cluster_updated_at")]
        if updated_at:
            now_ms = time.monotonic_ns() // 1_000_000
            totals["cluster_clients"] = totals["clients"] + cells[self._remote_clients]
            totals["cluster_age_ms"] = now_ms - cells[self.server_cell("cluster_doubtful_at")]
            totals["cluster_silent_ms"] = now_ms - updated_at // 1_000_000
        else:
            del totals["cluster_servers"]
        return totals

    def _add_commands(self, totals: dict[str, int], cells: Sequence[int]) -> None:
        """Add what each command has in the cells of all slots."""
        for slot in range(self.slots):
            first = self._first_command(slot)
            for name in self._command_names(slot):
                keys = [f"commands.{name}", f"command_ns.{name}"]
                keys += [f"command_buckets.{name}.{number}" for number in range(BUCKETS)]
                for offset, key in enumerate(keys):
                    totals[key] = totals.get(key, 0) + cells[first + offset]
                first += COMMAND_CELLS

    def _figures(self, metric: Metric, cells: Sequence[int]) -> dict[str, int]:
        if metric.source is Source.SERVER:
            return {name: cells[self.server_cell(name)] for name in metric.names}
        if metric.source is Source.COMPUTED:
            return {}
        values = {name: self.by_slot(name, cells) for name in metric.names}
        if metric.combine is Combine.MAX:
            return {name: max(each) for name, each in values.items()}
        if metric.combine is Combine.MIN:
            return {name: min(filter(None, each)) for name, each in values.items() if any(each)}
        return {name: sum(each) for name, each in values.items()}

    def _first_command(self, slot: int) -> int:
        return _FIRST + self.slots * WORKER_ROOM + slot * MAX_COMMANDS * COMMAND_CELLS

    def _command_names(self, slot: int) -> list[str]:
        size = MAX_COMMANDS * MAX_NAME_BYTES
        area = bytes(self._names[slot * size : (slot + 1) * size])
        names = (
            area[at : at + MAX_NAME_BYTES].rstrip(b"\0").decode()
            for at in range(0, size, MAX_NAME_BYTES)
        )
        return [name for name in names if name]
