"""What a service and its manager tell each other: states and signs of life, and sockets that are
handed over.

The protocols of sd_notify(3), sd_watchdog_enabled(3) and sd_listen_fds(3), which others than
systemd speak too. Where nobody speaks them, all of it does nothing.
"""

import math
import os
import socket
import time

from gserver.errors import UsageError

#: How all of it begins. Taken out of the environment, for children are not whom it is meant for.
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
#: How soon a sign of life that could not be given is tried again.
RETRY_SECONDS = 0.1

READY = "READY=1"
RELOADING = "RELOADING=1"
STOPPING = "STOPPING=1"


class Manager:
    """The service manager that has started this process, if one has. Never blocks and never fails while serving."""

    def __init__(self) -> None:
        """Hear what it has to say; raise `UsageError` when that cannot be understood."""
        told = {name: os.environ.pop(name, "") for name in VARIABLES}
        #: Names and descriptors of the sockets that it has handed over.
        self.sockets = _handed_over(told)
        self._address = told["NOTIFY_SOCKET"]
        if self._address.startswith("@"):
            self._address = "\0" + self._address[1:]
        self._told: tuple[str, str] | None = None
        is_ours = told["WATCHDOG_PID"] in ("", str(os.getpid()))
        limit = (
            int(told["WATCHDOG_USEC"]) / 1e6
            if is_ours and told["WATCHDOG_USEC"].isdecimal()
            else 0.0
        )
        self._beat_seconds = limit / 2 or math.inf
        #: The monotonic second at which it wants a sign of life; infinity if it does not.
        self.due_at = -math.inf if limit else math.inf

    def tell(self, state: str, status: str) -> None:
        """Tell it a state, one of the above, and the same in words for people; once, but again if it is not heard."""
        if self._told != (state, status):
            moment = f"MONOTONIC_USEC={time.monotonic_ns() // 1000}\n" if state == RELOADING else ""
            if self._send(f"{state}\n{moment}STATUS={status}\n"):
                self._told = state, status

    def keep_heartbeat(self, now: float) -> None:
        """Give a sign of life, if one is due."""
        if now >= self.due_at:
            self.due_at = now + (
                self._beat_seconds if self._send("WATCHDOG=1\n") else RETRY_SECONDS
            )

    def _send(self, message: str) -> bool:
        """Send without waiting; return whether there is nothing left to do about it."""
        if not self._address:
            return True
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.sendto(message.encode(), socket.MSG_DONTWAIT, self._address)
        except OSError:  # Its queue is full, or it restarts.
            return False
        return True


def _handed_over(told: dict[str, str]) -> list[tuple[str, int]]:
    if told["LISTEN_PID"] != str(os.getpid()):
        return []  # They were for a parent of this process.
    if not told["LISTEN_FDS"].isdecimal():
        raise UsageError(
            f"LISTEN_FDS={told['LISTEN_FDS']} is no number of sockets: see sd_listen_fds(3)"
        )
    count = int(told["LISTEN_FDS"])
    names = told["LISTEN_FDNAMES"].split(":") if told["LISTEN_FDNAMES"] else ["unknown"] * count
    if len(names) != count:
        raise UsageError(
            f"LISTEN_FDNAMES={told['LISTEN_FDNAMES']} does not name {count} sockets: see sd_listen_fds(3)"
        )
    return list(zip(names, range(FIRST_FD, FIRST_FD + count), strict=True))
