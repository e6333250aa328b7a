"""A copy of the package that a test can change, as an installation of another version does."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab.running import ROOT, Running


class Installed:
    """The copy in a folder."""

    def __init__(self, folder: Path) -> None:
        self.package = folder / "gserver"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "gserver", self.package, ignore=ignored)

    @property
    def program(self) -> list[str]:
        """The command that starts a server with this copy."""
        return [sys.executable, "-P", str(self.package), "serve"]

    def start(self, *options: str, **more: Any) -> Running:
        """A server that runs this copy."""
        # Two texts of equal size, written within a second, look the same to the bytecode cache.
        env = {"PYTHONDONTWRITEBYTECODE": "1", **more.pop("env", {})}
        port = () if "--bind" in options else ("--port", "0")
        return Running(*port, *options, command=self.program, env=env, **more)

    def set_version(self, version: str) -> None:
        self.change("__init__.py", '__version__ = "', f'__version__ = "{version}" # ')

    def change(self, module: str, old: str, new: str) -> None:
        """Replace a text that occurs once in a module."""
        path = self.package / module
        text = path.read_text()
        assert text.count(old) == 1, f"{old!r} in {module}"
        path.write_text(text.replace(old, new))

    @contextmanager
    def changed(self, module: str, old: str, new: str) -> Iterator[None]:
        """Replace the text during the body."""
        before = (self.package / module).read_text()
        self.change(module, old, new)
        try:
            yield
        finally:
            (self.package / module).write_text(before)
