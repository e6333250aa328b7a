"""`gserver top` and `gserver status`, as commands: what they take, print and exit with."""

import json
import sys
from collections.abc import Callable
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
    import time

    from rich.console import Console

    from gserver import top as tops

    watched = tops.watch(urls, token)
    if not (once or is_json or sys.stdout.isatty()):
        for line in tops.lines(watched, interval):
            click.echo(line)
    if not (once or is_json):
        tops.live(watched, interval, Console())
    while True:
        tops.look(watched)
        if once:
            time.sleep(interval)
            tops.look(watched)
        if is_json:
            click.echo(
                json.dumps({each.url: each.now if not each.trouble else {"trouble": each.trouble} for each in watched})
            )
        else:
            Console(highlight=False).print(tops.screens(watched))
        if once:
            sys.exit(EXIT_RUNTIME if any(each.trouble for each in watched) else 0)
        time.sleep(interval)


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
