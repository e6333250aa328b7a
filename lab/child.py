"""A load in a process of its own, so that what starts it does not slow it: `python -m MODULE ...`.

The module calls `begun` when it is under way. It ends by itself, or with its stdin, and calls
`report` with what there was.
"""

import json
import subprocess
import sys
from typing import Any

from lab.host import HERE, Host
from lab.running import LIMIT, ROOT, environment


class Child:
    """One that is under way, until `result`."""

    def __init__(self, module: str, *words: object, host: Host = HERE) -> None:
        with host.inside():
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, *map(str, words)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment(),
                cwd=ROOT,
            )
        assert self._process.stdout
        assert self._process.stdout.readline() == "begun\n"

    @property
    def pid(self) -> int:
        return self._process.pid

    def result(self) -> Any:
        """End its stdin, and wait for its end; what it has reported."""
        output, _ = self._process.communicate(timeout=4 * LIMIT)
        assert self._process.returncode == 0
        return json.loads(output)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(LIMIT)


def begun() -> None:
    """Say that all is ready."""
    sys.stdout.write("begun\n")
    sys.stdout.flush()


def report(found: Any) -> None:
    sys.stdout.write(json.dumps(found))
