"""A custom command that cannot block: `gserver serve --commands ping`.

This folder is on the import path of every measured gserver. It contains nothing else, so it cannot
hide another module.
"""

from gserver.commands import Service, command


@command("PING", may_block=False)
def ping(_service: Service) -> str:
    """Answer PONG."""
    return "PONG"
