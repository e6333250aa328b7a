"""Who is connected to this worker, and who was turned away: for the admin port, on request.

What a request needs is asked of the kernel when it comes, so an idle client costs no memory for it.
"""

import json
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from time import monotonic
from typing import Any

import gevent

from gserver import logs
from gserver.boot import LIST
from gserver.serve.client import Client
from gserver.serve.conversation import Conversations

#: Characters of a certificate's name on the list.
MAX_NAME = 256
#: Clients in a packet. Others are served between two packets.
PACKET_CLIENTS = 40
#: Pause after a packet, so that clients have their turn.
PAUSE_SECONDS = 0.001


def answer(conversations: Conversations, request: str, sock: socket.socket) -> None:
    """Answer a request in packets of JSON, and close the socket."""
    kind, _, text = request.partition(" ")
    with sock:
        for packet in _list(conversations) if kind == LIST else _close(conversations, text):
            # Clients are closed even if the agent waits no longer.
            if not _send(sock, packet) and kind == LIST:
                return
            gevent.sleep(PAUSE_SECONDS)
        _send(sock, {"end_of": os.getpid()})


def _send(sock: socket.socket, packet: dict[str, Any]) -> bool:
    """Return whether there is still somebody who reads."""
    try:
        sock.send(json.dumps(packet).encode())
    except OSError:
        return False
    return True


def _list(conversations: Conversations) -> Iterator[dict[str, Any]]:
    clients = conversations.clients
    for ends in _parts(list(clients.recent_ends)):
        yield {"recent": ends}
    for part in _parts([*clients.by_fd.values(), *clients.parked]):
        found = [
            _describe(client, is_moving=client in clients.parked)
            for client in part
            if client.is_counted
        ]
        yield {"clients": found}


def _parts(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), PACKET_CLIENTS):
        yield items[start : start + PACKET_CLIENTS]


def _describe(client: Client, *, is_moving: bool) -> dict[str, Any]:
    address, port = client.peer
    pid, uid = client.credentials
    now = monotonic()
    return {
        "id": client.id,
        "transport": client.transport,
        "address": address,
        "port": port,
        "uid": uid,
        "pid": pid,
        "worker": os.getpid(),
        "age_seconds": round(now - client.accepted_at, 3),
        "idle_seconds": round(now - client.quiet_since, 3),
        "state": "moving" if is_moving else _state(client),
        "command": client.stream.command or None if client.stream else None,
        "tls_name": client.peer_certificate_name[:MAX_NAME],
    }


def _state(client: Client) -> str:
    """Return what a client does: nothing, or what its conversation waits for."""
    stream = client.stream
    if not stream:
        return "idle"
    if stream.command:
        return "busy"
    return "blocked" if stream.is_sending else "reading"


def _close(conversations: Conversations, id_or_address: str) -> Iterator[dict[str, Any]]:
    """Close the clients with this id or address. Those of a handover are left to the new worker."""
    closed, address = 0, ""
    for part in _parts(list(conversations.clients.by_fd)):
        in_part = 0
        for client in filter(None, map(conversations.clients.by_fd.get, part)):
            if client.is_counted and id_or_address in (client.id, client.peer[0]):
                address = client.peer[0]
                conversations.kick(client)
                in_part += 1
        closed += in_part
        yield {"closed": in_part}
    if closed:
        # They all have the same address, whether an id or an address was asked for.
        fields = {"gserver.clients": closed, "client.address": address}
        message = f"closed by the operator: {closed} of {address}"
        logs.event(logging.INFO, "client.kicked", message, fields)
