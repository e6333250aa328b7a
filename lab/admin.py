"""Requests to the admin port of a server."""

import http.client
import json
import socket
from typing import Any

from lab.running import LIMIT, Running


def get(
    server: Running,
    path: str,
    method: str = "GET",
    host: str = "127.0.0.1",
    limit: float = LIMIT,
    **headers: str,
) -> tuple[int, dict[str, str], bytes]:
    """Send a request; return the status code, headers and body of the response."""
    connection = http.client.HTTPConnection(host, server.admin_port(), timeout=limit)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return (
            answer.status,
            {name.lower(): value for name, value in answer.getheaders()},
            answer.read(),
        )
    finally:
        connection.close()


def status(server: Running, limit: float = LIMIT, **headers: str) -> Any:
    code, _, body = get(server, "/status.json", limit=limit, **headers)
    assert code == 200, body
    return json.loads(body)


def listed(server: Running) -> Any:
    """The clients of the server."""
    code, _, body = get(server, "/clients.json?sort=age&limit=0")
    assert code == 200, body
    return json.loads(body)["clients"]


def metrics(server: Running) -> dict[str, float]:
    """The samples of /metrics, by name and labels."""
    _, _, body = get(server, "/metrics")
    lines = [line for line in body.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def dial(server: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.admin_port()), LIMIT)
