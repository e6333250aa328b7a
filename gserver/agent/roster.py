"""Asks the workers who is connected, and makes them close clients, for the admin port.

The agent has no connection to a worker. It passes one end of a socket pair to the supervisor, which
passes it on to every worker. They answer in packets, and close their ends.
"""

import json
import os
import socket
from collections import Counter
from contextlib import suppress
from math import inf
from time import monotonic
from typing import Any

from gevent.lock import BoundedSemaphore

from gserver.boot import CLOSE, LIST, QUERY
from gserver.scoreboard import Scoreboard

#: How long a worker may be silent, and how long all may take. A worker that hangs is left out.
SILENCE_SECONDS, ANSWER_SECONDS = 1.5, 4.0
#: Requests within this time get the same list.
LIST_SECONDS = 1.0
MAX_PACKET_BYTES = 262_144
#: Clients that were turned away or closed for a reason, at most.
MAX_RECENT = 200
#: Addresses in the summary, at most.
MAX_ADDRESSES = 100
#: What a list can be sorted by, and whether the largest come first.
SORTS = {"age": True, "idle": True, "address": False, "state": False, "worker": False}

Packets = list[dict[str, Any]]


class Roster:
    """The clients of all workers. One request at a time goes to the workers."""

    def __init__(self, scoreboard: Scoreboard, control_fd: int) -> None:
        self._scoreboard = scoreboard
        self._control = socket.socket(fileno=os.dup(control_fd))
        self._control.settimeout(SILENCE_SECONDS)  # A stopped supervisor does not read it.
        self._turn = BoundedSemaphore()
        #: The last list, and when it was made.
        self._list: tuple[Packets, bool] = ([], False)
        self._listed_at = -inf

    def document(self, sort: str, limit: int) -> dict[str, Any]:
        """Return the document of `/clients.json`. With a `limit` of 0, it has all clients."""
        with self._turn:
            if monotonic() > self._listed_at + LIST_SECONDS:
                self._list, self._listed_at = self._ask_all(), monotonic()
        packets, is_complete = self._list
        # During a reload, a client may be in two lists.
        found = {each["id"]: each for packet in packets for each in packet.get("clients", ())}
        clients = sorted(found.values(), key=lambda each: _key(each, sort), reverse=SORTS[sort])
        addresses = Counter(each["address"] for each in clients)
        recent = [each for packet in packets for each in packet.get("recent", ())]
        recent.sort(key=lambda each: float(each["at"]))  # Keeps the order within a millisecond.
        return {
            "clients": clients[:limit] if limit else clients,
            "total": len(clients),
            "is_complete": is_complete,
            "by_address": [
                {"address": address, "clients": count}
                for address, count in addresses.most_common(MAX_ADDRESSES)
            ],
            "recent": recent[::-1][:MAX_RECENT],
        }

    def close(self, text: str) -> dict[str, Any]:
        """Close the clients with this id or address; return how many, and whether all workers did.

        A worker that has not answered closes its clients later.
        """
        with self._turn:
            packets, is_complete = self._ask(f"{CLOSE} {text}")
            self._listed_at = -inf
        closed = sum(packet.get("closed", 0) for packet in packets)
        return {"closed": closed, "is_complete": is_complete}

    def _ask_all(self) -> tuple[Packets, bool]:
        """Return the lists of all workers, and whether no client is missing in them.

        One that moves meanwhile may be in none: then they are asked once more.
        """
        packets: Packets = []
        for _ in range(2):
            transfers = self._scoreboard.get("transfers")
            packets, is_complete = self._ask(LIST)
            if self._scoreboard.get("transfers") == transfers:
                return packets, is_complete
        return packets, False

    def _ask(self, request: str) -> tuple[Packets, bool]:
        """Return the packets of all workers, and whether each has answered to the end."""
        waiting = {pid for pid in self._scoreboard.by_slot("pid") if pid}
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        packets: Packets = []
        deadline = monotonic() + ANSWER_SECONDS
        with ours, suppress(TimeoutError):
            with theirs:
                order = f"{QUERY} {request}\n".encode()
                socket.send_fds(self._control, [order], [theirs.fileno()])
            while waiting:
                left = min(SILENCE_SECONDS, deadline - monotonic())
                ours.settimeout(max(0.001, left))
                data = ours.recv(MAX_PACKET_BYTES)
                if not data:
                    break
                packets.append(json.loads(data))
                waiting.discard(packets[-1].get("end_of"))
        return packets, not waiting


def _key(client: dict[str, Any], sort: str) -> Any:
    names = {"age": "age_seconds", "idle": "idle_seconds"}
    value = client[names.get(sort, sort)]
    return value if sort in names else (value, client["port"])
