"""The resources that a server's processes hold with one client per worker: none may leak."""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, NamedTuple

from lab.admin import status
from lab.running import Client, Running, until

#: A custom command in a module `census.py`: the documented way to look into a worker.
CENSUS = "from lab.commands import census\n"
Connect = Callable[[], Client]


class Held(NamedTuple):
    """The resources of a process."""

    resident: int  #: bytes
    descriptors: int
    greenlets: int  #: 0 if the process is not a worker


def clients(server: Running) -> dict[int, int]:
    """The number of clients of each worker, by pid."""
    return {worker["pid"]: worker["clients"] for worker in status(server)["workers"]["each"]}


def connect_crowd(connect: Connect, count: int) -> None:
    """Connect `count` clients at once, briefly: allocators keep some of their memory."""
    with ExitStack() as stack:
        for _ in range(count):
            with suppress(OSError):
                stack.enter_context(connect()).send(b"WHY\nNOPE\nWH")


def one_each(server: Running, connect: Connect, stack: ExitStack[Any]) -> dict[int, Client]:
    """Exactly one client for each worker, by pid."""

    def have(wanted: dict[int, int]) -> bool:
        return clients(server) == wanted

    until(lambda: not any(clients(server).values()), "all clients have left")
    chosen: dict[int, Client] = {}
    while len(chosen) < len(clients(server)):
        before = clients(server)
        client = connect()
        client.ask(b"WHY")
        [pid] = [pid for pid, count in clients(server).items() if count > before[pid]]
        if pid in chosen:
            client.sock.close()
            until(partial(have, before), "the surplus client has left")
        else:
            chosen[pid] = stack.enter_context(client)
    return chosen


def held(server: Running, chosen: dict[int, Client]) -> dict[str, Held]:
    """The resources of each process, by role and pid, with one client for each worker."""
    for client in chosen.values():
        client.ask(b"CENSUS")  # The first call creates its greenlet, which the second call reuses.
    greenlets = {pid: int(client.ask(b"CENSUS")) for pid, client in chosen.items()}
    return {
        name: Held(process.memory_info().rss, process.num_fds(), greenlets.get(process.pid, 0))
        for name, process in server.named_processes().items()
    }
