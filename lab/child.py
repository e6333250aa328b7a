"""A load in its own process, so that the parent does not slow it: `python -m MODULE ...`.

The module calls `begun` when it has started. It ends by itself or with its stdin, and calls
`report` with its result.
"""

import json
import subprocess
import sys
from typing import Any

from lab.host import HERE, Host
from lab.running import LIMIT, ROOT, environment


class Child:
    """A child that runs until `result`."""

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
        """Close its stdin, wait for its end, and return its report."""
        output, _ = self._process.communicate(timeout=4 * LIMIT)
        assert self._process.returncode == 0
        return json.loads(output)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(LIMIT)


def begun() -> None:
    """Tell the parent that the load has started."""
    sys.stdout.write("begun\n")
    sys.stdout.flush()


def report(found: Any) -> None:
    sys.stdout.write(json.dumps(found))
