"""`gserver top` and `gserver status`: shows the state of servers, read from their admin ports.

All texts come from servers, so none is read as rich's markup: they are printed as `Text`.
"""

import sys
import time
from collections.abc import Iterator, Sequence

import click
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from gserver.cli import admin_client
from gserver.cli.admin_client import Status, Target
from gserver.errors import EXIT_CLEAN, EXIT_RUNTIME

#: Time between the two requests of `status`.
PAUSE_SECONDS = 0.3
#: How long `top` waits for slow servers before it shows those that have answered.
GRACE_SECONDS = 0.5
#: A certificate that expires within this time is marked.
EXPIRES_SOON_SECONDS = 14 * 86400
#: A list of the cluster's servers that is older than this has not just been read from Redis.
OLD_SECONDS = 2.5
STYLES = {"ready": "bold green", "unreachable": "bold red"}


def show_once(targets: Sequence[Target], interval_seconds: float, *, is_json: bool) -> int:
    """Ask twice and print once; return the exit code: 0 if all servers have answered."""
    admin_client.poll_twice(targets, interval_seconds)
    if is_json:
        click.echo(admin_client.as_json(targets))
    else:
        Console(highlight=False).print(render(targets))
    return EXIT_RUNTIME if any(target.error for target in targets) else EXIT_CLEAN


def show_status(targets: Sequence[Target]) -> int:
    """Ask twice and print once; return the exit code: 0 if all servers are ready."""
    admin_client.poll_twice(targets, PAUSE_SECONDS)
    Console(highlight=False).print(render(targets))
    is_ready = all(target.state == "ready" for target in targets)
    return EXIT_CLEAN if is_ready else EXIT_RUNTIME


def show_live(targets: Sequence[Target], interval_seconds: float, *, is_json: bool) -> None:
    """Ask and print until Ctrl-C: a screen on a terminal, otherwise lines."""
    if sys.stdout.isatty() and not is_json:
        with Live(console=Console(highlight=False), screen=True, auto_refresh=False) as screen:
            while True:
                admin_client.poll(targets, GRACE_SECONDS)
                screen.update(Group("[dim]Press Ctrl-C to quit[/]", render(targets)), refresh=True)
                time.sleep(interval_seconds)
    while True:
        admin_client.poll(targets, GRACE_SECONDS)
        click.echo(admin_client.as_json(targets) if is_json else "\n".join(map(line, targets)))
        time.sleep(interval_seconds)


def line(target: Target) -> str:
    """Return the state of a server as one plain line."""
    if target.error:
        return f"{target.address} unreachable: {target.error}"
    clients = _count(target.now["clients"]["now"], "client")
    cluster = target.now["cluster"]
    if cluster and cluster["servers"]:
        clients += f" of {_number(cluster['clients'])} in {_servers(cluster)}"
    commands, errors = (_number(target.rate(name)) for name in ("commands", "error_replies"))
    server = f"{target.address} {target.now['server']['id']} {target.state}"
    return f"{server} {clients} {commands} commands/s {errors} errors/s"


def render(targets: Sequence[Target]) -> Group:
    """Return a table of all servers, the details of each, and the servers of their clusters."""
    table = Table(box=None, pad_edge=False, expand=True, header_style="dim")
    for name in ("admin port", "state", "clients", "peak", "commands/s", "errors/s", "uptime"):
        is_text = name in ("admin port", "state")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=name != "admin port")
    for target in targets:
        state = Text(target.state, STYLES.get(target.state, "bold yellow"))
        table.add_row(Text(target.address), state, *_figures(target))
    errors = [
        Text(f"{target.address}: {target.error}", "red") for target in targets if target.error
    ]
    present = [target for target in targets if not target.error]
    return Group(table, *errors, *(_details(target) for target in present), *_clusters(present))


def _figures(target: Target) -> list[str]:
    """Return the numbers of a server; none if it is unreachable, because they would be old."""
    if target.error:
        return []
    counts = [_number(target.now["clients"][name]) for name in ("now", "peak")]
    rates = [_number(target.rate(name)) for name in ("commands", "error_replies")]
    return [*counts, *rates, _duration(target.now["server"]["uptime_seconds"])]


def _details(target: Target) -> Panel:
    """Return the workers of a server, and below them its counters, certificate and cluster."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("worker", "age", "clients", "last heartbeat"):
        table.add_column(name, justify="left" if name == "worker" else "right")
    for worker in target.now["workers"]["each"]:
        table.add_row(
            str(worker["pid"]),
            _duration(worker["age_seconds"]),
            _number(worker["clients"]),
            f"{worker['silent_seconds']:.1f} s ago",
        )
    notes = [*_counters(target), *_certificate(target.now), *_cluster(target.now)]
    title = Text(f"{target.address}  {target.now['server']['id']}")
    content = Group(table, Text("\n") + Text("   ").join(notes))
    return Panel(content, title=title, title_align="left")


def _counters(target: Target) -> Iterator[Text]:
    for name in target.now["commands"]:
        yield Text(f"{name} {_number(target.rate('commands', name))}/s")
    counts = target.now["error_replies"].items()
    shown = ", ".join(f"{name} {_number(count)}" for name, count in counts if count)
    if shown:
        yield Text(f"errors since start: {shown}", "red")
    yield from _handovers(target.now)


def _handovers(status: Status) -> Iterator[Text]:
    clients, server = status["clients"], status["server"]
    if server["handovers"]:
        mean = server["handover_seconds"] / server["handovers"]
        moved = _number(clients["handed_over"])
        text = f"handed over by reloads: {moved} ({mean:.2f} s per worker)"
        if clients["left_behind"]:
            text += f", left behind: {_number(clients['left_behind'])}"
        yield Text(text)


def _certificate(status: Status) -> Iterator[Text]:
    expires_at = status["server"]["tls_expires_at"]
    if expires_at:
        left = expires_at - time.time()
        text = f"certificate valid for {_duration(left)}" if left > 0 else "certificate expired"
        yield Text(text, "red" if left < EXPIRES_SOON_SECONDS else "")


def _cluster(status: Status) -> Iterator[Text]:
    cluster = status["cluster"]
    if cluster:
        age = cluster["age_seconds"]
        total = "not known yet"
        if age is not None:
            clients = _count(cluster["clients"], "client")
            total = f"{clients} of {_servers(cluster)}, updated {age:.1f} s ago"
        yield Text(f"cluster {cluster['name']}: {total}")


def _clusters(targets: Sequence[Target]) -> Iterator[Panel]:
    """Yield the servers of each cluster, once even if several targets belong to it."""
    watched = {target.now["server"]["id"] for target in targets}
    shown: set[tuple[str, str]] = set()
    for target in targets:
        cluster = target.now["cluster"] or {}
        members = cluster.get("members")
        if members and (cluster["name"], target.now["server"]["id"]) not in shown:
            shown |= {(cluster["name"], server["id"]) for server in members["servers"] or []}
            title = Text(f"servers of cluster {cluster['name']}")
            yield Panel(_members(members, watched), title=title, title_align="left")


def _members(members: Status, watched: set[str]) -> Group:
    """Return the servers of a cluster, and notes on what is missing or old."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("server", "clients", "last heartbeat", ""):
        is_number = name in ("clients", "last heartbeat")
        table.add_column(name, justify="right" if is_number else "left", no_wrap=name != "server")
    for server in members["servers"] or []:
        silent, is_watched = server["silent_seconds"], server["id"] in watched
        marks = [("late", server["is_late"]), ("watched", is_watched)]
        table.add_row(
            Text(server["id"]),
            _number(server["clients"]),
            "-" if silent is None else f"{silent:.1f} s ago",
            ", ".join(mark for mark, is_set in marks if is_set),
            style="red" if server["is_late"] else "bold" if is_watched else "",
        )
    return Group(table, *(Text(note, "yellow") for note in _members_notes(members)))


def _members_notes(members: Status) -> Iterator[str]:
    age, error_kind = members["age_seconds"], members["error_kind"]
    if members["omitted_servers"]:
        omitted = _count(members["omitted_servers"], "more server")
        yield f"{omitted}, with more recent heartbeats, not listed"
    if age is None or age > OLD_SECONDS:
        why = f"Redis cannot be read ({error_kind})" if error_kind else "Redis has not answered yet"
        if age is None:
            yield f"{why}: the servers are unknown"
        else:
            yield f"{why}: this list is {_duration(age)} old"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.1f}"


def _count(value: float | None, noun: str) -> str:
    return f"{_number(value)} {noun}{'' if value == 1 else 's'}"


def _servers(cluster: Status) -> str:
    return _count(cluster["servers"], "server")


def _duration(seconds: float) -> str:
    """Return a duration in its largest unit, rounded down: 90 s is `1 min`."""
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds // 1:.0f} s"
