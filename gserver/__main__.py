"""Where every process begins: `python -m gserver` for a person, `python -m gserver child ROLE` for the supervisor."""

import os
import sys


def main() -> None:
    """Run the command line, or a role that a supervisor has asked for."""
    open_standard_streams()
    if sys.argv[1:2] == ["child"]:
        sys.exit(run_child("agent" if sys.argv[2:3] == ["agent"] else "worker"))
    from gserver.cli import main as command_line

    command_line.main()


def open_standard_streams() -> None:
    """Open what the caller has closed of the three: else the next file opened would get its number, and its output."""
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, mode, closefd=False))


def run_child(role: str) -> int:
    """Be a worker or the agent. gevent patches the standard library before anything else is imported."""
    from gevent import monkey

    monkey.patch_all()
    from importlib import import_module

    import gevent

    from gserver import boot, logs

    setattr(gevent.get_hub(), "print_exception", logs.unhandled)
    module = {"worker": "gserver.serve.worker", "agent": "gserver.agent.agent"}[role]
    return boot.run_role(import_module(module).run)


if __name__ == "__main__":
    main()
