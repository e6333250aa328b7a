"""Signals are queued in order, wake a selector, and are taken once.

The test runs in its own process, since handlers are set for a whole process.
"""

import subprocess
import sys

import pytest

from lab.running import LIMIT, environment

PROGRAM = """
import os, select, signal
from gserver.supervise.signals import PendingSignals

pending = PendingSignals(signal.SIGHUP, signal.SIGTERM)
assert select.select([pending.fd], [], [], 0)[0] == []
os.kill(os.getpid(), signal.SIGHUP)
os.kill(os.getpid(), signal.SIGTERM)
assert select.select([pending.fd], [], [], 5)[0] == [pending.fd]
assert pending.take() == [(signal.SIGHUP, False), (signal.SIGTERM, True)]
assert pending.take() == []
assert select.select([pending.fd], [], [], 0)[0] == []
if os.fork() == 0:
    os._exit(0)
assert select.select([pending.fd], [], [], 5)[0] == [pending.fd]
assert pending.take() == []
for _ in range(100_000):
    os.kill(os.getpid(), signal.SIGHUP)
assert len(pending.take()) == 100_000
"""


HANGUP = """
import os, pty, signal
from gserver.supervise.signals import PendingSignals

ours, theirs = pty.openpty()
os.dup2(theirs, 0)
os.close(theirs)
pending = PendingSignals(signal.SIGHUP, signal.SIGTERM)
os.kill(os.getpid(), signal.SIGHUP)
assert pending.take() == [(signal.SIGHUP, False)]
os.close(ours)
os.kill(os.getpid(), signal.SIGHUP)
os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGHUP)
assert pending.take() == [(signal.SIGHUP, True)]
"""


@pytest.mark.parametrize("program", [PROGRAM, HANGUP], ids=["in order", "a closed terminal"])
def test_signals_are_queued_and_a_closed_terminal_is_one_stop_request(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env=environment(),
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
