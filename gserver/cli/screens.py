"""What admin ports say, on a terminal: for `gserver top` and `gserver status`.

All texts are somebody else's, so none is read as rich's markup: they are `Text`, or go through it.
"""

import time
from collections.abc import Iterator, Sequence

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from gserver.cli.admin_client import Status, Watched

#: A certificate that expires within this time is worth a look.
SOON_SECONDS = 14 * 86400
#: What is known of a cluster's servers is read when it is asked for; when it is older than this,
#: that is said.
OLD_SECONDS = 2.5
STYLES = {"ready": "bold green", "away": "bold red"}


def line(each: Watched) -> str:
    """A server in one plain line."""
    if each.trouble:
        return f"{each.address} away: {each.trouble}"
    clients, cluster = each.now["clients"], each.now["cluster"]
    everywhere = (
        f" of {_number(cluster['clients'])} in {_servers(cluster)}"
        if cluster and cluster["servers"]
        else ""
    )
    rates = f"{_number(each.rate('commands'))} commands/s {_number(each.rate('error_replies'))} errors/s"
    here = f"{each.address} {each.now['server']['id']} {each.state}"
    return f"{here} {_count(clients['now'], 'client')}{everywhere} {rates}"


def screens(watched: Sequence[Watched]) -> Group:
    """What there is to see of them: a table of all, for each its workers, and the servers of their clusters."""
    table = Table(box=None, pad_edge=False, expand=True, header_style="dim")
    for name in ("admin port", "state", "clients", "peak", "commands/s", "errors/s", "up"):
        is_text = name in ("admin port", "state")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=name != "admin port")
    for each in watched:
        table.add_row(
            Text(each.address),
            Text(each.state, STYLES.get(each.state, "bold yellow")),
            *_figures(each),
        )
    troubles = [Text(f"{each.address}: {each.trouble}", "red") for each in watched if each.trouble]
    there = [each for each in watched if not each.trouble]
    return Group(table, *troubles, *(_details(each) for each in there), *_rosters(there))


def _figures(each: Watched) -> list[str]:
    """None of a server that is away: they would be old ones."""
    if each.trouble:
        return []
    counts = [_number(each.now["clients"][name]) for name in ("now", "peak")]
    rates = [_number(each.rate(name)) for name in ("commands", "error_replies")]
    return [*counts, *rates, _age(each.now["server"]["uptime_seconds"])]


def _details(each: Watched) -> Panel:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("worker", "age", "clients", "last sign of life"):
        table.add_column(name, justify="left" if name == "worker" else "right")
    for worker in each.now["workers"]["each"]:
        ago = f"{worker['silent_seconds']:.1f} s ago"
        table.add_row(
            str(worker["pid"]), _age(worker["age_seconds"]), _number(worker["clients"]), ago
        )
    told = [
        Text(f"{name} {_number(each.rate('commands', name))}/s") for name in each.now["commands"]
    ]
    wrong = each.now["error_replies"]
    told += [Text(f"{name} {_number(count)}", "red") for name, count in wrong.items() if count]
    expires_at = each.now["server"]["tls_expires_at"]
    if expires_at:
        left = expires_at - time.time()
        valid = f"certificate valid for {_age(left)}" if left > 0 else "certificate expired"
        told.append(Text(valid, "red" if left < SOON_SECONDS else ""))
    cluster = each.now["cluster"]
    if cluster:
        age = cluster["age_seconds"]
        known = f"{_count(cluster['clients'], 'client')} of {_servers(cluster)}, heard of {age or 0:.1f} s ago"
        told.append(Text(f"cluster {cluster['name']}: {'not known yet' if age is None else known}"))
    title = Text(f"{each.address}  {each.now['server']['id']}")
    return Panel(Group(table, Text("\n") + Text("   ").join(told)), title=title, title_align="left")


def _rosters(watched: Sequence[Watched]) -> Iterator[Panel]:
    """The servers of each cluster, once however many of them are watched."""
    own = {each.now["server"]["id"] for each in watched}
    shown: set[tuple[str, str]] = set()
    for each in watched:
        cluster = each.now["cluster"] or {}
        roster = cluster.get("roster")
        if roster and (cluster["name"], each.now["server"]["id"]) not in shown:
            shown |= {(cluster["name"], server["id"]) for server in roster["servers"] or []}
            yield Panel(
                _roster(roster, own),
                title=Text(f"servers of cluster {cluster['name']}"),
                title_align="left",
            )


def _roster(roster: Status, own: set[str]) -> Group:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("server", "clients", "last report", ""):
        is_number = name in ("clients", "last report")
        table.add_column(name, justify="right" if is_number else "left", no_wrap=name != "server")
    age = roster["age_seconds"]
    for server in roster["servers"] or []:
        silent = server["silent_seconds"]
        ago = "-" if silent is None else f"{silent:.1f} s ago"
        marks = ["late"] * server["is_late"] + ["watched"] * (server["id"] in own)
        style = "red" if server["is_late"] else "bold" if marks else ""
        table.add_row(
            Text(server["id"]), _number(server["clients"]), ago, ", ".join(marks), style=style
        )
    notes = (
        [f"{_number(roster['left_out'])} more, heard of more recently"]
        if roster["left_out"]
        else []
    )
    if age is None or age > OLD_SECONDS:
        why = (
            f"Redis cannot be read ({roster['trouble']})"
            if roster["trouble"]
            else "Redis has not answered yet"
        )
        known = (
            "the servers are not known" if age is None else f"this is what it said {_age(age)} ago"
        )
        notes.append(f"{why}: {known}")
    return Group(table, *(Text(note, "yellow") for note in notes))


def _number(value: float | None) -> str:
    return (
        "-"
        if value is None
        else f"{value:,.0f}"
        if value >= 100 or value == int(value)
        else f"{value:,.1f}"
    )


def _count(value: float | None, noun: str) -> str:
    return f"{_number(value)} {noun}{'' if value == 1 else 's'}"


def _servers(cluster: Status) -> str:
    return _count(cluster["servers"], "server")


def _age(seconds: float) -> str:
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds // 1:.0f} s"
