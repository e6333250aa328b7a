"""`gserver top` and `gserver status`, as commands: what they take, print and exit with."""

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import click

from gserver.errors import EXIT_RUNTIME

DEFAULT_ADMIN = "127.0.0.1:4243"


def _ports(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that say which admin ports to ask."""
    token = click.option(
        "--admin-token", "token", envvar="GSERVER_ADMIN_TOKEN", default="", metavar="TEXT", help="Their secret, if any."
    )
    urls = click.option(
        "--admin",
        "urls",
        multiple=True,
        metavar="HOST:PORT",
        envvar="GSERVER_ADMIN",
        default=[DEFAULT_ADMIN],
        show_default=True,
        help="Admin port; give several for several servers (in GSERVER_ADMIN: separated by blanks).",
    )
    return urls(token(command))


@click.command()
@_ports
@click.option(
    "--interval", type=click.FloatRange(0.2, 3600), default=1.0, show_default=True, help="Seconds between looks."
)
@click.option("--once", is_flag=True, help="Look twice, print once, and end.")
@click.option("--json", "is_json", is_flag=True, help="Print what the servers say, as one line of JSON for each look.")
def top(urls: tuple[str, ...], token: str, interval: float, once: bool, is_json: bool) -> None:
    """Show servers live, by their admin ports: on a terminal a screen, else a line for each a second."""
    from rich.console import Console
    from rich.live import Live

    from gserver import top as tops

    watched, console = tops.watch(urls, token), Console(highlight=False)
    is_screen = sys.stdout.isatty() and not (once or is_json)
    with Live(console=console, screen=True, auto_refresh=False) if is_screen else nullcontext() as screen:
        for number, _ in enumerate(tops.looks(watched, interval)):
            if once and number == 0:
                continue  # Rates are between two looks.
            if is_json:
                click.echo(json.dumps({each.url: each.told() for each in watched}))
            elif screen:
                screen.update(tops.screens(watched), refresh=True)
            elif once:
                console.print(tops.screens(watched))
            else:
                click.echo("\n".join(each.line() for each in watched))
            if once:
                sys.exit(EXIT_RUNTIME if any(each.trouble for each in watched) else 0)


@click.command()
@_ports
def status(urls: tuple[str, ...], token: str) -> None:
    """Say in a screen how servers are, by their admin ports; exit with 0 when all are ready, 1 when not."""
    from rich.console import Console

    from gserver import top as tops

    watched = tops.watch(urls, token)
    tops.look(watched)
    Console(highlight=False).print(tops.screens(watched))
    sys.exit(0 if all(each.state == "ready" for each in watched) else EXIT_RUNTIME)
