"""Who is connected to this worker, and who was turned away: for the admin port, on request.

What a request needs is asked of the kernel when it comes, so an idle client costs no memory for it.
"""

import json
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from time import monotonic, monotonic_ns
from typing import Any

import gevent

from gserver import logs
from gserver.serve.client import BUSY, COUNTED, MOVING, Client
from gserver.serve.loop import Loop

#: The requests: list all clients, or close those with an id or an address.
LIST, CLOSE = "list", "close"
#: Clients in a packet. Others are served between two packets.
PACKET_CLIENTS = 40
#: Pause after a packet, so that clients have their turn.
PAUSE_SECONDS = 0.001


def answer(loop: Loop, request: str, sock: socket.socket) -> None:
    """Answer a request in packets of JSON, and close the socket."""
    kind, _, text = request.partition(" ")
    with suppress(OSError), sock:
        for packet in _list(loop) if kind == LIST else _close(loop, text):
            sock.send(json.dumps(packet).encode())
            gevent.sleep(PAUSE_SECONDS)


def _list(loop: Loop) -> Iterator[dict[str, Any]]:
    clients = list(loop.clients.values())
    for part in _parts(clients):
        found = [_describe(loop, client) for client in part if client.state in COUNTED]
        yield {"clients": found}
    for ends in _parts(list(loop.recent_ends)):
        yield {"recent": ends}


def _parts(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), PACKET_CLIENTS):
        yield items[start : start + PACKET_CLIENTS]


def client_id(loop: Loop, client: Client) -> str:
    """Return the id of a client. It stays over handovers."""
    return f"{loop.accepted_ns[client.sock.fileno()]:x}"


def _describe(loop: Loop, client: Client) -> dict[str, Any]:
    address, port = loop.peer(client)
    age_ns = monotonic_ns() - loop.accepted_ns[client.sock.fileno()]
    return {
        "id": client_id(loop, client),
        "address": address,
        "port": port,
        "worker": os.getpid(),
        "age_seconds": round(age_ns / 1e9, 3),
        "idle_seconds": round(monotonic() - client.quiet_since, 3),
        "state": client.state.value,
        "command": client.work.command if client.work and client.state is BUSY else None,
        "tls_name": getattr(client.sock, "peer_certificate_name", ""),
    }


def _close(loop: Loop, text: str) -> Iterator[dict[str, Any]]:
    """Close the clients with this id or address. Those of a handover are another worker's."""
    closed = 0
    for client in list(loop.clients.values()):
        if client.state not in COUNTED or client.state is MOVING:
            continue
        address, port = loop.peer(client)
        if text in (client_id(loop, client), address):
            fields = {"client.address": address, "client.port": port}
            message = f"closed {address} port {port} for the operator"
            logs.event(logging.INFO, "client.kicked", message, fields)
            loop.guard(client, client.kick, monotonic())
            closed += 1
    yield {"closed": closed}
