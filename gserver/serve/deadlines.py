"""Clients by their deadlines.

Pure: it knows no clock. A deadline is rounded up to a whole tick of 10 ms, and clients of one tick
share its list and its number. So many clients that come together cost 8 bytes and 0.2 us each,
where a heap of their own deadlines would cost 144 bytes and 0.6 us.
"""

import heapq
from math import inf
from typing import Generic, Protocol, TypeVar

TICKS_PER_SECOND = 100
#: Fewer entries are not worth a look for stale ones.
MIN_ENTRIES = 1024


class HasDeadline(Protocol):
    """What a client has: the moment of its deadline in seconds, or infinity."""

    deadline: float


C = TypeVar("C", bound=HasDeadline)


class Deadlines(Generic[C]):
    """An entry is put in whenever a client's `deadline` changes; those it had before are stale."""

    def __init__(self) -> None:
        #: Each tick with its moment, and the clients that have been given it.
        self._ticks: dict[int, tuple[float, list[C]]] = {}
        #: The ticks as a heap.
        self._order: list[int] = []
        self.entries = 0
        #: Stale entries are dropped at this number: twice as many as were left the last time.
        self._max_entries = MIN_ENTRIES

    def put(self, client: C, at: float) -> None:
        """Give a client a deadline, which is at most a tick later than `at`."""
        number = int(at * TICKS_PER_SECOND) + 1
        tick = self._ticks.get(number)
        if tick is None:
            tick = self._ticks[number] = number / TICKS_PER_SECOND, []
            heapq.heappush(self._order, number)
        deadline, clients = tick
        if client.deadline == deadline:
            return
        client.deadline = deadline
        clients.append(client)
        self.entries += 1
        if self.entries >= self._max_entries:
            self._drop_stale()

    @property
    def next_at(self) -> float:
        """When to call `pop` next; infinity for never."""
        return self._order[0] / TICKS_PER_SECOND if self._order else inf

    def pop(self, now: float) -> list[C]:
        """Take out and return the clients whose deadlines have passed.

        A client can be in it twice.
        """
        due: list[C] = []
        while self.next_at <= now:
            deadline, clients = self._ticks.pop(heapq.heappop(self._order))
            self.entries -= len(clients)
            due += [client for client in clients if client.deadline == deadline]
        return due

    def _drop_stale(self) -> None:
        """Keep one entry for each client that has a deadline.

        A client that sends its lines in pieces leaves a stale entry with each, and more than one
        in a tick if its deadline is taken away and given again.
        """
        ticks, self._ticks = self._ticks, {}
        for number, (deadline, clients) in ticks.items():
            current = [each for each in dict.fromkeys(clients) if each.deadline == deadline]
            if current:
                self._ticks[number] = deadline, current
        self._order = list(self._ticks)
        heapq.heapify(self._order)
        self.entries = sum(len(clients) for _, clients in self._ticks.values())
        self._max_entries = max(2 * self.entries, MIN_ENTRIES)
