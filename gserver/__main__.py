"""Every process begins here: `gserver` from a shell, `child ROLE SLOT` from the supervisor.

`child trial` tries whether this version could take over from a running supervisor, `child check`
whether a worker could start.
"""

import os
import signal
import sys
import time
from typing import Any, NoReturn

#: As in `gserver.config`, which may not be importable.
UPGRADE_VARIABLE = "GSERVER_UPGRADE_FD"
RETRY_SECONDS = 1.0
#: The modules of the roles of a child.
MODULES = {"worker": "gserver.serve.worker", "agent": "gserver.agent.agent"}


def main() -> None:
    """Run the command line, or the role that a supervisor has asked for."""
    find_package()
    open_standard_streams()
    if sys.argv[1:3] == ["child", "trial"]:
        sys.exit(run_trial())
    if sys.argv[1:3] == ["child", "check"]:
        sys.exit(run_check())
    if sys.argv[1:2] == ["child"]:
        sys.exit(run_child("agent" if sys.argv[2:3] == ["agent"] else "worker"))
    try:
        from gserver.cli import main as command_line

        if UPGRADE_VARIABLE in os.environ:
            from gserver.supervise import supervisor, upgrade  # noqa: F401 - may fail as well
    except Exception as error:
        if UPGRADE_VARIABLE not in os.environ:
            raise
        start_again(error)
    else:
        command_line.main()


def start_again(error: Exception) -> NoReturn:
    """Start this program again: it has replaced a supervisor, and its files are being changed.

    The children serve meanwhile. They live as long as this process does.
    """
    sys.stderr.write(f"gserver: the new version cannot start, trying again: {error!r}\n")
    time.sleep(RETRY_SECONDS)
    # The program that was replaced has blocked signals, so that none is lost.
    if signal.sigpending() & {signal.SIGTERM, signal.SIGINT}:
        sys.exit("gserver: stopped before the new version could start")
    os.execv(sys.executable, sys.orig_argv)  # noqa: S606 - as this program was started


def find_package() -> None:
    """Make the package importable if Python was started with its folder (`python -P gserver/`).

    Python has put that folder itself first in `sys.path`; the one above it belongs there. So no
    PYTHONPATH is needed, which programs that handlers start would inherit.
    """
    folder = os.path.dirname(os.path.abspath(__file__))
    if sys.path and os.path.abspath(sys.path[0]) == folder:
        sys.path[0] = os.path.dirname(folder)


def open_standard_streams() -> None:
    """Open those of the three streams that the caller has closed.

    Otherwise the next file to be opened would get the number of one, and its output.
    """
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(fd, mode, closefd=False))


def run_trial() -> int:
    """Import everything, and try the state of a running supervisor; return the exit code."""
    from gevent import monkey

    monkey.patch_all()
    from importlib import import_module
    from pkgutil import walk_packages

    import gserver

    for module in walk_packages(gserver.__path__, "gserver."):
        if module.name != "gserver.__main__":
            import_module(module.name)
    from gserver.errors import FatalError
    from gserver.supervise import supervisor

    try:
        supervisor.try_state(sys.stdin.read())
    except FatalError as problem:
        sys.stdout.write(f"{problem}\n")
        return problem.exit_code
    return 0


def run_check() -> int:
    """Try to load what a worker loads; return the exit code."""
    from gevent import monkey

    monkey.patch_all()
    from gserver.serve import check

    return check.run()


def run_child(role: str) -> int:
    """Run a worker or the agent; return the exit code.

    gevent patches the standard library before anything else is imported.
    """
    from gevent import monkey

    monkey.patch_all()
    from importlib import import_module

    import gevent

    from gserver import boot, logs

    hub: Any = gevent.get_hub()
    hub.print_exception = logs.unhandled
    return boot.run_role(import_module(MODULES[role]).run)


if __name__ == "__main__":
    main()
