"""The protocols of a service manager: states, heartbeats, and sockets that are handed over.

See sd_notify(3), sd_watchdog_enabled(3) and sd_listen_fds(3). Other managers than systemd speak
them too. Without a manager, nothing here has an effect.
"""

import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from gserver.errors import UsageError

#: Where a manager's side begins. Removed from the environment: they are not for children.
VARIABLES = (
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_PID",
    "LISTEN_PIDFDID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
)
FIRST_FD = 3
#: How soon a heartbeat that could not be sent is tried again.
RETRY_SECONDS = 0.1

READY = "READY=1"
RELOADING = "RELOADING=1"
STOPPING = "STOPPING=1"


class Manager:
    """The service manager that has started this process, if one has.

    Never blocks, and raises nothing after its construction.
    """

    def __init__(
        self, address: str, heartbeat_seconds: float, sockets: Sequence[tuple[str, int]] = ()
    ) -> None:
        """`address` is where it listens, "" for nowhere; it wants heartbeats that often."""
        #: Names and descriptors of the sockets that it has handed over.
        self.sockets = sockets
        self._address = address
        self._sent: tuple[str, str] | None = None
        self._heartbeat_seconds = heartbeat_seconds
        #: When the next heartbeat is due, in monotonic seconds; infinity if the manager wants none.
        self.due_at = math.inf if heartbeat_seconds == math.inf else -math.inf

    @classmethod
    def from_environment(cls) -> "Manager":
        """Read the manager's variables; raise `UsageError` if they make no sense."""
        variables = {name: os.environ.pop(name, "") for name in VARIABLES}
        address = variables["NOTIFY_SOCKET"]
        if address.startswith("@"):
            address = "\0" + address[1:]
        return cls(address, _watchdog_seconds(variables) / 2, _handed_over(variables))

    def state(self) -> dict[str, Any]:
        """Return the arguments for the same manager in another program."""
        return {"address": self._address, "heartbeat_seconds": self._heartbeat_seconds}

    def notify(self, state: str, status: str) -> None:
        """Send a state (one of the above) and a status text for people.

        What was sent already is not sent again, unless it did not arrive.
        """
        if self._sent == (state, status):
            return
        lines = [state]
        if state == RELOADING:
            lines.append(f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        lines.append(f"STATUS={status}")
        if self._send("\n".join(lines) + "\n"):
            self._sent = state, status

    def keep_heartbeat(self, now: float) -> None:
        """Send a heartbeat if one is due."""
        if now >= self.due_at:
            was_sent = self._send("WATCHDOG=1\n")
            self.due_at = now + (self._heartbeat_seconds if was_sent else RETRY_SECONDS)

    def _send(self, message: str) -> bool:
        """Send without waiting; return whether nothing is left to do about it."""
        if not self._address:
            return True
        try:
            data = message.encode(errors="backslashreplace")  # A path may be no valid UTF-8.
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.sendto(data, socket.MSG_DONTWAIT, self._address)
        except OSError:  # Its queue is full, or it restarts.
            return False
        return True


def _watchdog_seconds(variables: Mapping[str, str]) -> float:
    """Return the time within which the manager wants a heartbeat; infinity for none."""
    is_ours = variables["WATCHDOG_PID"] in ("", str(os.getpid()))
    microseconds = variables["WATCHDOG_USEC"]
    if not is_ours or not microseconds.isdecimal():
        return math.inf
    return int(microseconds) / 1e6 or math.inf


def _handed_over(variables: Mapping[str, str]) -> list[tuple[str, int]]:
    """Return names and descriptors of the sockets that were handed over."""
    if variables["LISTEN_PID"] != str(os.getpid()):
        return []  # They were for a parent of this process.
    if not variables["LISTEN_FDS"].isdecimal():
        raise UsageError(
            f"LISTEN_FDS={variables['LISTEN_FDS']} is not a number of sockets: see sd_listen_fds(3)"
        )
    count = int(variables["LISTEN_FDS"])
    names = ["unknown"] * count
    if variables["LISTEN_FDNAMES"]:
        names = variables["LISTEN_FDNAMES"].split(":")
    if len(names) != count:
        raise UsageError(
            f"LISTEN_FDNAMES={variables['LISTEN_FDNAMES']} does not name {count} sockets:"
            " see sd_listen_fds(3)"
        )
    return list(zip(names, range(FIRST_FD, FIRST_FD + count), strict=True))
