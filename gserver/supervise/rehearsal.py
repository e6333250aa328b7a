"""A start without serving: finds what would stop a server with these options."""

import json
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from gserver import certificates
from gserver.boot import file_in_memory
from gserver.config import Config
from gserver.errors import EXIT_USAGE, UsageError
from gserver.supervise import privileges
from gserver.supervise.child import PACKAGE, child_environment

#: How long the module of `--commands` may take to load.
LOAD_SECONDS = 30.0


def rehearse(config: Config) -> list[dict[str, Any]]:
    """Return the commands that a server with these options would have.

    Each has its `usage`, `may_block`, `timeout` and `at_once`. Raises `FatalError` if the server
    could not start. Ports are not opened: a server may be using them. With `--user`, this process
    is that user from here.
    """
    pems = certificates.read(config)
    # As a server does: the module must not run as root.
    privileges.become(config.user)
    given = json.dumps({"config": asdict(config.for_worker()), "certificates": asdict(pems)})
    with file_in_memory("gserver-check", given) as stdin:
        try:
            done = subprocess.run(  # noqa: S603 - the arguments are ours
                [sys.executable, "-P", PACKAGE, "child", "check"],
                stdin=stdin,
                stdout=subprocess.PIPE,
                text=True,
                timeout=LOAD_SECONDS,
                env=child_environment(),
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise UsageError(
                f"--commands {config.commands}: not loaded in {LOAD_SECONDS:.0f} s"
            ) from error
    if done.returncode == EXIT_USAGE:
        raise UsageError(done.stdout.strip())
    if done.returncode:
        raise UsageError(f"a worker would end with the exit code {done.returncode}")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found
