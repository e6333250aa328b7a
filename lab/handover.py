"""Sockets that are passed to a server, as a service manager does."""

import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from lab.running import GSERVER, Running

#: Renumbers the descriptors in its first argument from 3 on, and runs the other arguments.
HAND_OVER = """
import os, sys
fds = [int(fd) for fd in sys.argv[1].split(",")]
for number, fd in enumerate(fds):
    os.dup2(fd, 100 + number)
for number in range(len(fds)):
    os.dup2(100 + number, 3 + number)
    os.close(100 + number)
os.environ["LISTEN_PID"] = str(os.getpid() + int(os.environ.pop("OFFSET", "0")))
os.execv(sys.argv[2], sys.argv[2:])
"""


def start(
    *handed: socket.socket | int,
    options: tuple[str, ...] = (),
    cwd: str = "/",
    program: Sequence[str] = (*GSERVER, "serve"),
    **env: str,
) -> Running:
    """A server that gets these sockets; it may fail to start."""
    fds = [each if isinstance(each, int) else each.fileno() for each in handed]
    command = [sys.executable, "-S", "-c", HAND_OVER, ",".join(map(str, fds)), *program]
    variables = {"LISTEN_FDS": str(len(fds)), **env}
    return Running(
        *options, command=command, env=variables, pass_fds=fds, cwd=Path(cwd), wait=False
    )


def listening(host: str = "127.0.0.1") -> socket.socket:
    return socket.create_server(
        (host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET
    )


def port_of(sock: socket.socket) -> int:
    port: int = sock.getsockname()[1]
    return port
