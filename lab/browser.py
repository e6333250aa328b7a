"""Headless Chromium, driven over WebDriver (https://www.w3.org/TR/webdriver2/)."""

import base64
import json
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

from lab.running import LIMIT, program, until

FLAGS = (
    *(
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
    ),
    *(
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-dev-shm-usage",
        "--no-proxy-server",
    ),
)


class Browser:
    """One browser window."""

    def __init__(self, driver: str, profile: str) -> None:
        self._opener = build_opener(ProxyHandler({}))
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"], "binary": program("chromium")}
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        self._session = driver
        made = self._call("/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"{driver}/session/{made['sessionId']}"

    def _call(self, path: str, body: Any = None, method: str = "POST") -> Any:
        data = json.dumps(body).encode() if method == "POST" else None
        headers = {"Content-Type": "application/json"}
        request = Request(self._session + path, data=data, method=method, headers=headers)
        with self._opener.open(request, timeout=4 * LIMIT) as reply:
            return json.load(reply)["value"]

    def open(self, url: str) -> None:
        """Show a page. The problems of an earlier one are forgotten: its server may have ended."""
        self._call("/url", {"url": "about:blank"})
        self.problems()
        self._call("/url", {"url": url})

    def run(self, script: str) -> Any:
        """Run JavaScript; return its result."""
        return self._call("/execute/sync", {"script": script, "args": []})

    def text(self, element: str) -> str:
        """The visible text of an element, by its id."""
        return str(self.run(f"return document.getElementById('{element}').innerText"))

    def problems(self) -> list[str]:
        """The errors in the browser's console."""
        return [
            entry["message"]
            for entry in self._call("/se/log", {"type": "browser"})
            if entry["level"] == "SEVERE"
        ]

    def resize(self, width: int, height: int, scheme: str = "light") -> None:
        """Set the size of the screen and the preferred colour scheme."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        for command, arguments in (
            ("Emulation.setDeviceMetricsOverride", screen),
            ("Emulation.setEmulatedMedia", feature),
        ):
            self._call("/goog/cdp/execute", {"cmd": command, "params": arguments})

    def picture(self, path: Path) -> None:
        """Save a screenshot as PNG."""
        path.write_bytes(base64.b64decode(self._call("/screenshot", method="GET")))

    def close(self) -> None:
        self._call("", method="DELETE")


@contextmanager
def browser() -> Iterator[Browser]:
    """Run a browser during the body."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [program("chromedriver"), f"--port={port}"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            until(lambda: _is_open(port), "chromedriver listens")
            window = Browser(f"http://127.0.0.1:{port}", profile)
            try:
                yield window
            finally:
                window.close()
        finally:
            process.terminate()
            process.wait(LIMIT)


def _is_open(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0
