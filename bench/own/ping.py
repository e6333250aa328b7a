"""A custom command that cannot block: `gserver serve --commands ping`.

This folder is on the import path of every measured gserver. It contains nothing but such commands,
so it cannot hide another module.
"""

from gserver.commands import Request, command


@command("PING", may_block=False)
def ping(_request: Request) -> str:
    """Answer PONG."""
    return "PONG"
