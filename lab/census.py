"""What the processes of a server hold while each worker has one client: none of it may leak."""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, NamedTuple

from lab.admin import status
from lab.running import Client, Running, until

#: A documented way to look into a worker: a command of one's own, in a module `census.py`.
CENSUS = "from lab.commands import census\n"
Connect = Callable[[], Client]


class Held(NamedTuple):
    """What a process holds."""

    resident: int  #: bytes
    descriptors: int
    greenlets: int  #: 0 if it is no worker


def clients(server: Running) -> dict[int, int]:
    """How many clients each worker has, by its pid."""
    return {worker["pid"]: worker["clients"] for worker in status(server)["workers"]["each"]}


def connect_crowd(connect: Connect, count: int) -> None:
    """Have so many clients at once for a moment: an allocator keeps some of what they take."""
    with ExitStack() as stack:
        for _ in range(count):
            with suppress(OSError):
                stack.enter_context(connect()).send(b"WHY\nNOPE\nWH")


def one_each(server: Running, connect: Connect, stack: ExitStack[Any]) -> dict[int, Client]:
    """One client for each worker, by its pid, and no other."""

    def have(wanted: dict[int, int]) -> bool:
        return clients(server) == wanted

    until(lambda: not any(clients(server).values()), "all clients have gone")
    chosen: dict[int, Client] = {}
    while len(chosen) < len(clients(server)):
        before = clients(server)
        client = connect()
        client.ask(b"WHY")
        [pid] = [pid for pid, count in clients(server).items() if count > before[pid]]
        if pid in chosen:
            client.sock.close()
            until(partial(have, before), "it has gone")
        else:
            chosen[pid] = stack.enter_context(client)
    return chosen


def held(server: Running, chosen: dict[int, Client]) -> dict[str, Held]:
    """What each process holds, by its role and pid, with one client for each worker."""
    for client in chosen.values():
        client.ask(b"CENSUS")  # It has a greenlet now, which waits again when it asks once more.
    greenlets = {pid: int(client.ask(b"CENSUS")) for pid, client in chosen.items()}
    return {
        name: Held(process.memory_info().rss, process.num_fds(), greenlets.get(process.pid, 0))
        for name, process in server.named_processes().items()
    }
