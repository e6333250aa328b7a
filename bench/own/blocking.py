"""A custom command that may block, and does not: `gserver serve --commands blocking`."""

from gserver.commands import Request, command


@command("PING")
def ping(_request: Request) -> str:
    """Answer PONG."""
    return "PONG"
