"""`gserver clients` and `gserver kick`: who is connected, and who shall not be."""

import ipaddress
import json
import re
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gserver.addresses import plain_host
from gserver.cli import admin_client
from gserver.cli.admin_client import Target
from gserver.errors import EXIT_CLEAN, EXIT_RUNTIME, FatalError, UsageError

#: Addresses, and recent ends, that are shown.
MAX_ADDRESSES, MAX_RECENT = 10, 10
#: Columns of the output if it is no terminal.
PIPE_COLUMNS = 200
#: Later moments cannot be shown.
MAX_TIME = 2**40
STATES = {"busy": "in a handler", "blocked": "blocked on write"}


def show(targets: Sequence[Target], sort: str, limit: int, *, is_json: bool) -> int:
    """Print the clients of each server; return the exit code: 0 if all workers have answered."""
    path = f"/clients.json?sort={sort}&limit={0 if is_json else limit}"
    answers = _ask(targets, path, admin_client.CLIENTS)
    for target, document in answers:
        if is_json:
            click.echo(json.dumps({"server": target.address, **document}))
        else:
            _print(target, document)
    has_all = _are_complete(answers) and len(answers) == len(targets)
    return EXIT_CLEAN if has_all else EXIT_RUNTIME


def kick(targets: Sequence[Target], client: str) -> int:
    """Close clients; return the exit code: 0 if there was one, and all workers have answered."""
    with suppress(ValueError):  # Other spellings of an address.
        client = str(ipaddress.ip_address(plain_host(client)))
    if not re.fullmatch("[0-9A-Za-z.:%_-]{1,64}", client):
        raise UsageError(
            f"{client!r} is neither the id of a client nor an address: see gserver clients"
        )
    path = f"/kick?client={quote(client)}"
    answers = _ask(targets, path, admin_client.KICKED, method="POST")
    closed = sum(int(document["closed"]) for _, document in answers)
    text = f"closed {_count(closed, 'client')}"
    if not (is_complete := _are_complete(answers)):
        text += "; a worker has not answered: it closes its clients when it does"
    if answers:
        click.echo(text)
    has_all = is_complete and len(answers) == len(targets)
    return EXIT_CLEAN if closed and has_all else EXIT_RUNTIME


def _ask(
    targets: Sequence[Target], path: str, shape: Any, method: str = "GET"
) -> list[tuple[Target, dict[str, Any]]]:
    """Ask all servers; return the answers. A server without one is named on stderr."""
    answers = []
    for target in targets:
        try:
            answers.append((target, admin_client.ask_once(target, path, shape, method=method)))
        except FatalError as error:
            click.echo(f"gserver: {error}", err=True)
    return answers


def _are_complete(answers: list[tuple[Target, dict[str, Any]]]) -> bool:
    return all(document["is_complete"] for _, document in answers)


def _print(target: Target, document: dict[str, Any]) -> None:
    # Lines that another program reads are not wrapped.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_COLUMNS)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("id", "via", "address", "port", "worker", "age", "idle", "state", "who"):
        is_number = name in ("port", "worker", "age", "idle")
        table.add_column(name, justify="right" if is_number else "left")
    for each in document["clients"]:
        state = STATES.get(each["state"], each["state"])
        if each["command"]:
            state += f" ({each['command']})"
        table.add_row(
            Text(each["id"]),
            Text(each["transport"]),
            Text(each["address"]),
            f"{each['port']:.0f}" if each["port"] else "",
            f"{each['worker']:.0f}",
            _seconds(each["age_seconds"]),
            _seconds(each["idle_seconds"]),
            Text(state),
            Text(_identity(each)),
        )
    console.print(table)
    shown, total = len(document["clients"]), document["total"]
    notes = [f"{target.address}: {_count(total, 'client')}"]
    if shown < total:
        notes.append(f"{total - shown} not shown (--limit)")
    if not document["is_complete"]:
        notes.append(
            "clients may be missing: a worker has not answered, or a reload was moving them"
        )
    console.print(Text("; ".join(notes), "bold"))
    addresses = document["by_address"][:MAX_ADDRESSES]
    text = ", ".join(f"{each['address']} {each['clients']}" for each in addresses)
    if addresses:
        console.print(Text(f"by address: {text}"))
    if document["recent"]:
        console.print(Text("last rejected or closed:"))
    for each in document["recent"][:MAX_RECENT]:
        at = time.strftime("%m-%d %H:%M:%S", time.localtime(min(each["at"], MAX_TIME)))
        console.print(
            Text(f"{at} {each['address']} port {each['port']:.0f}: {each['reason']}", "dim")
        )


def _identity(client: dict[str, Any]) -> str:
    """Return who a client is: the process at a Unix socket, or the name in a certificate."""
    if client["uid"] is None or client["pid"] is None:
        return str(client["tls_name"])
    return f"uid {client['uid']:.0f}, pid {client['pid']:.0f}"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 100 else f"{value:,.0f} s"


def _count(number: float, noun: str) -> str:
    return f"{number:,.0f} {noun}{'' if number == 1 else 's'}"
