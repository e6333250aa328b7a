"""Commands that several tests use: `--commands lab.commands` adds them all.

A test's own module imports what it needs from here: `from lab.commands import napping, pid`.
"""

import gc
import os
import time
from typing import NoReturn

from greenlet import GreenletExit, greenlet

from gserver.commands import Command, Request, command


def count_greenlets() -> int:
    """The number of greenlets of this worker."""
    gc.collect()
    return sum(isinstance(item, greenlet) and not item.dead for item in gc.get_objects())


def napping(name: str, seconds: float) -> Command:
    """A command that blocks for `seconds`."""

    def rest(_request: Request) -> str:
        time.sleep(seconds)
        return "rested"

    return command(name)(rest)


def replying(name: str, size: int) -> Command:
    """A command with a reply of `size` bytes."""
    return command(name)(lambda _request: "x" * size)


nap = napping("NAP", 0.05)


@command("PID")
def pid(_request: Request) -> int:
    return os.getpid()


@command("CENSUS")
def census(_request: Request) -> int:
    return count_greenlets()


@command("SPIN")
def spin(_request: Request) -> NoReturn:
    """Compute endlessly."""
    while True:
        pass


@command("FAIL")
def fail(_request: Request) -> NoReturn:
    raise RuntimeError("failed on request")


@command("EXIT")
def end_greenlet(_request: Request) -> NoReturn:
    raise GreenletExit
