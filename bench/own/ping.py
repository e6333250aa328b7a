"""A command of one's own that cannot block: `gserver serve --commands ping`.

This folder is on the import path of every gserver that is measured. It holds nothing else, so that
no name of it can hide another module.
"""

from gserver.commands import Service, command


@command("PING", may_block=False)
def ping(_service: Service) -> str:
    """Answer PONG."""
    return "PONG"
