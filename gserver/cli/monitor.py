"""`gserver top` and `gserver status`, as commands: what they take, print and exit with."""

import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import click

from gserver.errors import EXIT_RUNTIME

DEFAULT_ADMIN = "127.0.0.1:4243"
#: From the first look of `status` to the second.
MOMENT_SECONDS = 0.3
#: How long those of `top` that have answered wait for the others to be shown.
GRACE_SECONDS = 0.5


def _ports(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that say which admin ports to ask."""
    token = click.option(
        "--admin-token",
        "token",
        envvar="GSERVER_ADMIN_TOKEN",
        default="",
        metavar="TEXT",
        help="Their secret, if any.",
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
    "--interval",
    type=click.FloatRange(0.2, 3600),
    default=1.0,
    show_default=True,
    help="Seconds between looks.",
)
@click.option("--once", is_flag=True, help="Look twice, print once, and end.")
@click.option(
    "--json",
    "is_json",
    is_flag=True,
    help="Print what the servers say, as one line of JSON for each look.",
)
def top(urls: tuple[str, ...], token: str, interval: float, once: bool, is_json: bool) -> None:
    """Show servers live, by their admin ports: on a terminal a screen, else lines, until Ctrl-C."""
    from rich.console import Console, Group
    from rich.live import Live

    from gserver.cli import admin_client as client
    from gserver.cli import screens as tops

    watched, console = client.watch(urls, token), Console(highlight=False)
    if once:
        client.look_twice(watched, interval)
        click.echo(json.dumps(client.told(watched))) if is_json else console.print(
            tops.screens(watched)
        )
        sys.exit(EXIT_RUNTIME if any(each.trouble for each in watched) else 0)
    is_screen = sys.stdout.isatty() and not is_json
    with (
        Live(console=console, screen=True, auto_refresh=False)
        if is_screen
        else nullcontext() as screen
    ):
        while True:
            client.look(watched, GRACE_SECONDS)
            if screen:
                screen.update(Group("[dim]Ctrl-C ends it[/]", tops.screens(watched)), refresh=True)
            else:
                click.echo(
                    json.dumps(client.told(watched))
                    if is_json
                    else "\n".join(tops.line(each) for each in watched)
                )
            time.sleep(interval)


@click.command()
@_ports
def status(urls: tuple[str, ...], token: str) -> None:
    """Say in a screen how servers are, by their admin ports; exit with 0 when all are ready, 1 when not."""
    from rich.console import Console

    from gserver.cli import admin_client as client
    from gserver.cli import screens as tops

    watched = client.watch(urls, token)
    client.look_twice(watched, MOMENT_SECONDS)
    Console(highlight=False).print(tops.screens(watched))
    sys.exit(0 if all(each.state == "ready" for each in watched) else EXIT_RUNTIME)
