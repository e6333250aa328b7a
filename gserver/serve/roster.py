"""Who is connected to this worker, and who was turned away: for the admin port, on request.

What a request needs is asked of the kernel when it comes, so an idle client costs no memory for it.
"""

import json
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from time import monotonic, monotonic_ns
from typing import Any

import gevent

from gserver import logs
from gserver.boot import LIST
from gserver.serve.client import BUSY, COUNTED, MOVING, Client
from gserver.serve.loop import Loop

#: Characters of a certificate's name on the list.
MAX_NAME = 256
#: Clients in a packet. Others are served between two packets.
PACKET_CLIENTS = 40
#: Pause after a packet, so that clients have their turn.
PAUSE_SECONDS = 0.001


def answer(loop: Loop, request: str, sock: socket.socket) -> None:
    """Answer a request in packets of JSON, and close the socket."""
    kind, _, text = request.partition(" ")
    with sock:
        for packet in _list(loop) if kind == LIST else _close(loop, text):
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


def _list(loop: Loop) -> Iterator[dict[str, Any]]:
    for ends in _parts(list(loop.recent_ends)):
        yield {"recent": ends}
    for part in _parts(list(loop.clients.values())):
        found = [_describe(loop, client) for client in part if _is_counted(loop, client)]
        yield {"clients": found}


def _is_counted(loop: Loop, client: Client) -> bool:
    return client.state in COUNTED and client not in loop.probes


def _parts(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), PACKET_CLIENTS):
        yield items[start : start + PACKET_CLIENTS]


def client_id(loop: Loop, client: Client) -> str:
    """Return the id of a client. It stays over handovers."""
    return f"{loop.accepted_ns[client.sock.fileno()]:x}"


def _describe(loop: Loop, client: Client) -> dict[str, Any]:
    address, port = loop.peer(client)
    age_ns = monotonic_ns() - loop.accepted_ns[client.sock.fileno()]
    pid, uid = client.credentials()
    return {
        "id": client_id(loop, client),
        "transport": client.transport,
        "address": address,
        "port": port,
        "uid": uid,
        "pid": pid,
        "worker": os.getpid(),
        "age_seconds": round(age_ns / 1e9, 3),
        "idle_seconds": round(monotonic() - client.quiet_since, 3),
        "state": client.state.value,
        "command": client.work.command if client.work and client.state is BUSY else None,
        "tls_name": getattr(client.sock, "peer_certificate_name", "")[:MAX_NAME],
    }


def _close(loop: Loop, id_or_address: str) -> Iterator[dict[str, Any]]:
    """Close the clients with this id or address. Those of a handover are left to the new worker."""
    closed, address = 0, ""
    for part in _parts(list(loop.clients.values())):
        chosen = [client for client in part if _is_meant(loop, client, id_or_address)]
        for client in chosen:
            address = loop.peer(client)[0]
            loop.guard(client, client.kick, monotonic())
        closed += len(chosen)
        yield {"closed": len(chosen)}
    if closed:
        # They all have the same address, whether an id or an address was asked for.
        fields = {"gserver.clients": closed, "client.address": address}
        message = f"closed by the operator: {closed} of {address}"
        logs.event(logging.INFO, "client.kicked", message, fields)


def _is_meant(loop: Loop, client: Client, id_or_address: str) -> bool:
    if not _is_counted(loop, client) or client.state is MOVING:
        return False
    return id_or_address in (client_id(loop, client), loop.peer(client)[0])
