"""Asks the workers who is connected, and makes them close clients, for the admin port.

The agent has no connection to a worker. It passes one end of a socket pair to the supervisor, which
passes it on to every worker. They answer in packets, and close their ends.
"""

import json
import os
import socket
from collections import Counter
from contextlib import suppress
from time import monotonic
from typing import Any

from gserver.boot import QUERY

#: How long the workers have to answer. A worker that hangs is left out.
ANSWER_SECONDS = 1.5
MAX_PACKET_BYTES = 262_144
#: Clients that were turned away or closed for a reason, at most.
MAX_RECENT = 200
#: Addresses in the summary, at most.
MAX_ADDRESSES = 100
#: What a list can be sorted by, and whether the largest come first.
SORTS = {"age": True, "idle": True, "address": False, "state": False, "worker": False}


class Roster:
    """The clients of all workers."""

    def __init__(self, control_fd: int) -> None:
        self._control = socket.socket(fileno=os.dup(control_fd))

    def document(self, sort: str, limit: int) -> dict[str, Any]:
        """Return the document of `/clients.json`. `limit` 0 is none."""
        packets, is_complete = self._ask("list")
        # During a reload, a client may be in two lists.
        found = {each["id"]: each for packet in packets for each in packet.get("clients", ())}
        clients = sorted(found.values(), key=lambda each: _key(each, sort), reverse=SORTS[sort])
        addresses = Counter(each["address"] for each in clients)
        recent = [each for packet in packets for each in packet.get("recent", ())]
        return {
            "clients": clients[:limit] if limit else clients,
            "total": len(clients),
            "is_complete": is_complete,
            "by_address": [
                {"address": address, "clients": count}
                for address, count in addresses.most_common(MAX_ADDRESSES)
            ],
            "recent": sorted(recent, key=lambda each: -float(each["at"]))[:MAX_RECENT],
        }

    def close(self, text: str) -> int:
        """Close the clients with this id or address; return how many there were."""
        packets, _ = self._ask(f"close {text}")
        return sum(packet["closed"] for packet in packets)

    def _ask(self, request: str) -> tuple[list[dict[str, Any]], bool]:
        """Return the packets of all workers, and whether all have answered in time."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        packets: list[dict[str, Any]] = []
        with ours:
            with theirs:
                order = f"{QUERY} {request}\n".encode()
                socket.send_fds(self._control, [order], [theirs.fileno()])
            deadline = monotonic() + ANSWER_SECONDS
            with suppress(TimeoutError):
                while True:
                    ours.settimeout(max(0.001, deadline - monotonic()))
                    packet = ours.recv(MAX_PACKET_BYTES)
                    if not packet:
                        return packets, True
                    packets.append(json.loads(packet))
        return packets, False


def _key(client: dict[str, Any], sort: str) -> Any:
    names = {"age": "age_seconds", "idle": "idle_seconds"}
    value = client[names.get(sort, sort)]
    return value if sort in names else (value, client["port"])
