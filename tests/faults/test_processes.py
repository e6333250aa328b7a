"""Processes that die, hang or are told things: others' clients notice nothing, and all is as before a moment later."""

import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.faults.rows import PLAIN, SEVERAL, Notes, Variant, row
from tests.faults.site import CENSUS, SEED, Neighbours, Site
from tests.running import GSERVER, LIMIT, PATIENCE, Client, free_port, left_over, program, stopped, until
from tests.test_admin import status

Start = Callable[..., Site]


def kill_and_wait(site: Site, victims: list[psutil.Process]) -> None:
    """Kill these at once, and wait until others have their places."""
    for victim in victims:
        victim.kill()

    def are_replaced() -> bool:
        now = [*site.server.workers(), *site.server.agents()]
        return len(now) == site.variant.workers + 1 and not set(victims) & set(now)

    until(are_replaced, "others have their places")
    until(lambda: status(site.server)["workers"]["ready"] == site.variant.workers, "they are ready")
