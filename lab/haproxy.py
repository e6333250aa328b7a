"""HAProxy with the shipped configuration."""

import os
import re
import socket
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from lab.redises import free_port
from lab.running import LIMIT, ROOT, Running, program, until

CONFIG = ROOT / "deploy/haproxy/haproxy.cfg"
#: The address of HAProxy on this machine. Clients of tests have others.
ADDRESS = "127.0.0.10"
#: The option that servers behind it need.
TRUSTED = "--proxy-from", ADDRESS


class Front(ExitStack[None]):
    """HAProxy with the shipped configuration, on other ports, in front of servers."""

    def __init__(
        self,
        folder: Path,
        servers: list[Running],
        of_one_address: int = 0,
        addresses: Sequence[str] = ("127.0.0.1",) * 3,
        source: str = ADDRESS,
        **settings: list[str],
    ) -> None:
        """`source` is the address of its connections. `settings` extend the servers' lines: a value
        for each server.
        """
        super().__init__()
        self.port, self.statistics_port = free_port(), free_port()
        text = CONFIG.read_text().replace("}:4242", f"}}:{self.port}")
        text = text.replace("}:8404", f"}}:{self.statistics_port}")
        if os.geteuid():
            text = re.sub(r"^ +(user|group|chroot) .*$", "", text, flags=re.M)
        text = text.replace(
            "    #stats socket /run/haproxy.sock", f"    stats socket {folder}/haproxy.sock"
        )
        if of_one_address:
            text = re.sub(r"#(stick-table|tcp-request)", r"\1", text).replace(
                " gt 100 }", f" gt {of_one_address} }}"
            )
        text, count = re.subn(
            r"(default-server send-proxy-v2 check )port 4243 ", rf"\1source {source} ", text
        )
        assert count == 1
        for number, server in enumerate(servers, 1):
            old = f"server gs{number} 10.0.0.{number}:4242"
            assert old in text
            own = "".join(f" {name} {values[number - 1]}" for name, values in settings.items())
            where = f"{addresses[number - 1]}:{server.port} port {server.admin_port()}"
            text = text.replace(old, f"server gs{number} {where}{own}")
        self._socket = folder / "haproxy.sock"
        (folder / "haproxy.cfg").write_text(text)
        self.process = subprocess.Popen(
            [program("haproxy"), "-db", "-f", str(folder / "haproxy.cfg")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.callback(self._end)
        # HAProxy takes a server for up before its first check.
        good = [("UP", "L7OK")] * len(servers)
        until(
            lambda: self._socket.exists() and [*self._checks().values()] == good,
            "all servers are up",
        )

    def _end(self) -> None:
        self.process.kill()
        self.process.wait(LIMIT)

    def states(self) -> dict[str, str]:
        """HAProxy's state of each server: UP, DOWN ..."""
        return {name: state for name, (state, _) in self._checks().items()}

    def _checks(self) -> dict[str, tuple[str, str]]:
        """The state of each server, and the result of its last health check."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self._socket))
            sock.sendall(b"show stat\n")
            rows = [line.split(",") for line in sock.makefile().read().splitlines()]
        return {
            row[1]: (row[17].split()[0], row[36].removeprefix("* "))
            for row in rows
            if row[0] == "gservers" and row[1] != "BACKEND"
        }
