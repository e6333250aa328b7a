"""`gserver clients` and `gserver kick`: who is connected, and who shall not be."""

import json
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gserver.cli import admin_client
from gserver.cli.admin_client import Target
from gserver.errors import EXIT_CLEAN, EXIT_RUNTIME, FatalError

#: Addresses, and recent ends, that are shown.
MAX_ADDRESSES, MAX_RECENT = 10, 10
STATES = {"busy": "in a handler", "blocked": "blocked on write"}


def show(targets: Sequence[Target], sort: str, limit: int, *, is_json: bool) -> int:
    """Print the clients of each server; return the exit code: 0 if all have answered."""
    for target in targets:
        path = f"/clients.json?sort={sort}&limit={0 if is_json else limit}"
        document = admin_client.ask_once(target, path)
        try:
            if is_json:
                click.echo(json.dumps({"server": target.address, **document}))
            else:
                _print(target, document)
        except (KeyError, TypeError, ValueError) as error:
            raise FatalError(f"{target.address}: {admin_client.STRANGE}") from error
    return EXIT_CLEAN


def kick(targets: Sequence[Target], client: str) -> int:
    """Close clients; return the exit code: 0 if there was at least one."""
    closed = 0
    for target in targets:
        document = admin_client.ask_once(target, f"/kick?client={quote(client)}", method="POST")
        closed += int(document["closed"])
    click.echo(f"closed {_count(closed, 'client')}")
    return EXIT_CLEAN if closed else EXIT_RUNTIME


def _print(target: Target, document: dict[str, Any]) -> None:
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("id", "address", "port", "worker", "age", "idle", "state", "TLS name"):
        is_number = name in ("port", "worker", "age", "idle")
        table.add_column(name, justify="right" if is_number else "left")
    for each in document["clients"]:
        state = STATES.get(each["state"], each["state"])
        if each["command"]:
            state += f" ({each['command']})"
        table.add_row(
            Text(each["id"]),
            Text(each["address"]),
            str(each["port"]),
            str(each["worker"]),
            _seconds(each["age_seconds"]),
            _seconds(each["idle_seconds"]),
            Text(state),
            Text(each["tls_name"]),
        )
    console.print(table)
    shown, total = len(document["clients"]), document["total"]
    notes = [f"{target.address}: {_count(total, 'client')}"]
    if shown < total:
        notes.append(f"{total - shown} not shown (--limit)")
    if not document["is_complete"]:
        notes.append("a worker has not answered: its clients are missing")
    console.print(Text("; ".join(notes), "bold"))
    addresses = document["by_address"][:MAX_ADDRESSES]
    text = ", ".join(f"{each['address']} {each['clients']}" for each in addresses)
    if addresses:
        console.print(Text(f"by address: {text}"))
    for each in document["recent"][:MAX_RECENT]:
        at = time.strftime("%H:%M:%S", time.localtime(each["at"]))
        console.print(Text(f"{at} {each['address']} port {each['port']}: {each['reason']}", "dim"))


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 100 else f"{value:,.0f} s"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
