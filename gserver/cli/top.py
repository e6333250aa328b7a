"""`gserver top` and `gserver status`: shows the state of servers, read from their admin ports.

All texts come from servers, so none is read as rich's markup: they are printed as `Text`.
"""

import os
import re
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import click
from rich.columns import Columns
from rich.console import Console, Group, JustifyMethod
from rich.live import Live
from rich.panel import Panel
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

from gserver.cli import admin_client
from gserver.cli.admin_client import Status, Target
from gserver.errors import EXIT_CLEAN, EXIT_RUNTIME
from gserver.metrics import EXPIRES_SOON_SECONDS, SILENT_SECONDS

#: Time between the two requests of `status`.
PAUSE_SECONDS = 0.3
#: How long `top` waits for slow servers before it shows those that have answered.
GRACE_SECONDS = 0.5
#: A list of the cluster's servers that is older than this has not just been read from Redis.
OLD_SECONDS = 2.5
#: Red and amber are for what is wrong now.
STYLES = {"healthy": "bold green", "degraded": "bold yellow"}
WRONG = "bold red"
KEYS = "q quit  s sort  e details  ↑↓ scroll  ? help"
HELP = """\
q, Ctrl-C   quit
s           sort by the next column
e           show or hide the details of each server
↑ ↓ k j     scroll by a line; PgUp and PgDn by a page
?           show or hide this help

Rates and percentiles are those since the last snapshot.
p50, p99    half of the commands, and 99 of 100, took less
mistakes    errors for which a client is to blame; failures: those of the service"""
#: What the arrow keys and their like send.
ESCAPES = {b"\x1b[A": "k", b"\x1b[B": "j", b"\x1b[5~": "page up", b"\x1b[6~": "page down"}


def show_once(targets: Sequence[Target], interval_seconds: float, *, is_json: bool) -> int:
    """Ask twice and print once; return the exit code: 0 if all servers have answered."""
    admin_client.poll_twice(targets, interval_seconds)
    if is_json:
        click.echo(admin_client.as_json(targets))
    else:
        Console(highlight=False).print(render(targets))
    return EXIT_RUNTIME if any(target.error for target in targets) else EXIT_CLEAN


def show_status(targets: Sequence[Target]) -> int:
    """Ask twice and print once; return the exit code: 0 if all servers are healthy."""
    admin_client.poll_twice(targets, PAUSE_SECONDS)
    Console(highlight=False).print(render(targets))
    is_healthy = all(target.verdict == "healthy" for target in targets)
    return EXIT_CLEAN if is_healthy else EXIT_RUNTIME


def show_live(targets: Sequence[Target], interval_seconds: float, *, is_json: bool) -> None:
    """Ask and print until `q` or Ctrl-C: a screen on a terminal, otherwise lines."""
    if sys.stdout.isatty() and not is_json:
        _show_screen(targets, interval_seconds)
        return
    while True:
        admin_client.poll(targets, GRACE_SECONDS)
        click.echo(admin_client.as_json(targets) if is_json else "\n".join(map(line, targets)))
        time.sleep(interval_seconds)


# The screen


@dataclass
class View:
    """What the person at the terminal has chosen."""

    sorted_by: int = 0
    is_expanded: bool = True
    is_help: bool = False
    is_over: bool = False
    #: The first line that is shown below the head.
    first: int = 0

    def press(self, key: str, page: int) -> None:
        """Act on a key. A page has so many lines."""
        match key:
            case "q":
                self.is_over = True
            case "s":
                self.sorted_by = (self.sorted_by + 1) % len(COLUMNS)
            case "e":
                self.is_expanded = not self.is_expanded
            case "?" | "h":
                self.is_help = not self.is_help
            case _:
                steps = {"j": 1, "k": -1, "page down": page, "page up": -page}
                self.first = max(0, self.first + steps.get(key, 0))


def _show_screen(targets: Sequence[Target], interval_seconds: float) -> None:
    console, view = Console(highlight=False), View()
    with _keyboard() as read_keys, Live(console=console, screen=True, auto_refresh=False) as live:
        while not view.is_over:
            admin_client.poll(targets, GRACE_SECONDS)
            until = time.monotonic() + interval_seconds
            while not view.is_over and (left := until - time.monotonic()) > 0:
                live.update(frame(targets, view, console), refresh=True)
                for key in read_keys(left):
                    view.press(key, max(1, console.height - 3))


def _no_keys(seconds: float) -> list[str]:
    time.sleep(seconds)
    return []


@contextmanager
def _keyboard() -> Iterator[Callable[[float], list[str]]]:
    """Yield a function that waits so long for keys; it returns none when the time is over."""
    fd = sys.stdin.fileno()
    if not os.isatty(fd):
        yield _no_keys
        return
    before = termios.tcgetattr(fd)

    def read_keys(seconds: float) -> list[str]:
        if not select.select([fd], [], [], seconds)[0]:
            return []
        data = os.read(fd, 256)
        if not data:  # The terminal is gone.
            return ["q"]
        return keys_of(data)

    try:
        tty.setcbreak(fd)
        yield read_keys
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def keys_of(data: bytes) -> list[str]:
    """Return the keys that a terminal has sent."""
    found = re.findall(rb"\x1b\[[0-9;]*[A-Za-z~]|[ -~]", data)
    return [ESCAPES.get(each, each.decode("ascii")) for each in found]


def frame(targets: Sequence[Target], view: View, console: Console) -> Segments:
    """Return a screen of lines: what fits, and what is hidden."""
    body = Text(HELP) if view.is_help else render(targets, view)
    lines = console.render_lines(body, pad=False)
    room = max(1, console.height - 1)
    view.first = min(view.first, max(0, len(lines) - room))
    hidden = len(lines) - room - view.first
    foot = KEYS if hidden <= 0 else f"{KEYS}   {_count(hidden, 'more line')} below"
    if view.first:
        foot += f", {view.first} above"
    shown = lines[view.first : view.first + room]
    shown += [[]] * (room - len(shown))
    segments = [segment for each in shown for segment in (*each, Segment.line())]
    foot_line = console.render_lines(Text(foot[: console.width - 1], "dim"), pad=False)[0]
    return Segments([*segments, *foot_line])


def line(target: Target) -> str:
    """Return the state of a server as one plain line."""
    if target.error:
        return f"{target.address} unreachable: {target.error}"
    clients = _count(target.now["clients"]["now"], "client")
    cluster = target.now["cluster"]
    if cluster and cluster["servers"]:
        clients += f" of {_number(cluster['clients'])} in {_servers(cluster)}"
    figures = f"{_number(target.rate('commands'))} commands/s p99 {_time(target.percentile(99))}"
    server = f"{target.address} {target.now['server']['id']} {target.verdict}"
    reasons = "; ".join(reason["text"] for reason in target.now["reasons"])
    return f"{server} {clients} {figures}" + (f": {reasons}" if reasons else "")


#: The columns of the table of servers. The first is text.
COLUMNS = ("admin port", "verdict", "clients", "commands/s", "p50", "p99", "errors/s", "uptime")


def render(targets: Sequence[Target], view: View | None = None) -> Group:
    """Return a table of all servers, the details of each, and the servers of their clusters."""
    view = view or View()
    table = Table(box=None, pad_edge=False, expand=True, header_style="dim")
    for number, name in enumerate(COLUMNS):
        mark = " ▾" if number == view.sorted_by and len(targets) > 1 else ""
        justify: JustifyMethod = "left" if number < 2 else "right"
        table.add_column(name + mark, justify=justify, no_wrap=number > 0, overflow="fold")
    ordered = sorted(targets, key=lambda target: _rank(target, view.sorted_by))
    for target in ordered:
        style = STYLES.get(target.verdict, WRONG)
        table.add_row(Text(target.address), Text(target.verdict, style), *_figures(target))
    if len(targets) > 1:
        table.add_row(Text("all", "bold"), "", *_totals(targets))
    errors = [
        Text(f"{target.address}: {target.error}", "red") for target in ordered if target.error
    ]
    present = [target for target in ordered if not target.error]
    if not view.is_expanded:
        reasons = [text for target in present for text in _reasons(target, f"{target.address}: ")]
        return Group(table, *errors, *reasons)
    return Group(table, *errors, *(_details(target) for target in present), *_clusters(present))


def _rank(target: Target, column: int) -> tuple[bool, float, str]:
    """Return what to sort by: a name as it is, numbers the largest first."""
    if column < 2:
        return False, 0.0, target.address if column == 0 else f"{target.verdict} {target.address}"
    value = None if target.error else _values(target)[column - 2]
    return value is None, -(value or 0.0), target.address


def _values(target: Target) -> list[float | None]:
    """Return the numbers of a server, in the order of the columns."""
    return [
        target.now["clients"]["now"],
        target.rate("commands"),
        target.percentile(50),
        target.percentile(99),
        target.rate("error_replies"),
        target.now["server"]["uptime_seconds"],
    ]


def _figures(target: Target) -> list[str]:
    """Return the numbers of a server; none if it is unreachable, because they would be old."""
    if target.error:
        return []
    clients, commands, p50, p99, errors, uptime = _values(target)
    return [
        _number(clients),
        _number(commands),
        _time(p50),
        _time(p99),
        _number(errors),
        _duration(uptime or 0.0),
    ]


def _totals(targets: Sequence[Target]) -> list[str]:
    """Return the sums over all servers that have answered. Percentiles have none."""
    rows = [_values(target) for target in targets if not target.error]
    sums = [sum(filter(None, column)) for column in zip(*rows, strict=True)] or [0.0] * 6
    return [_number(sums[0]), _number(sums[1]), "", "", _number(sums[4])]


def _reasons(target: Target, prefix: str = "") -> Iterator[Text]:
    style = STYLES["degraded"] if target.verdict == "degraded" else WRONG
    for reason in target.now["reasons"]:
        yield Text(f"{prefix}{reason['text']}", style)


def _details(target: Target) -> Panel:
    """Return a server's endpoints and workers, then its counters, certificate and cluster."""
    workers = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("worker", "age", "clients", "last heartbeat"):
        workers.add_column(name, justify="left" if name == "worker" else "right")
    for worker in target.now["workers"]["each"]:
        is_silent = worker["silent_seconds"] > SILENT_SECONDS
        silence = f"{worker['silent_seconds']:.1f} s ago"
        workers.add_row(
            str(worker["pid"]),
            _duration(worker["age_seconds"]),
            _number(worker["clients"]),
            f"{silence}, does not answer" if is_silent else silence,
            style=WRONG if is_silent else "",
        )
    notes = [*_errors(target), *_certificate(target.now), *_cluster(target.now)]
    commands = Columns(_commands(target), padding=(0, 3))
    title = Text(f"{target.address}  {target.now['server']['id']}")
    foot = [Text("   ").join(notes)] if notes else []
    where = Text(f"listening on {'  '.join(target.now['server']['endpoints'])}")
    content = Group(*_reasons(target), where, "", workers, "", commands, *foot)
    return Panel(content, title=title, title_align="left")


def _commands(target: Target) -> Iterator[Text]:
    for name in target.now["commands"]:
        rate = f"{name} {_number(target.rate('commands', name))}/s"
        if name in target.now["command_seconds"]:
            p50, p99 = (target.percentile(each, name) for each in (50, 99))
            rate += f" p50 {_time(p50)} p99 {_time(p99)}" if p50 is not None else ""
        yield Text(rate)


def _errors(target: Target) -> Iterator[Text]:
    minute = target.now["last_minute"]
    for kind, style in (("mistakes", ""), ("failures", "yellow")):
        if minute[kind]:
            noun = kind.removesuffix("s")
            yield Text(f"{_count(minute[kind], noun)} in the last minute", style)
    counts = target.now["error_replies"].items()
    shown = ", ".join(f"{name} {_number(count)}" for name, count in counts if count)
    if shown:
        yield Text(f"errors since start: {shown}")
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
        age, silence = cluster["age_seconds"], cluster["silent_seconds"]
        total = "not known yet"
        if age is not None and silence is not None:
            clients = _count(cluster["clients"], "client")
            is_away = silence > OLD_SECONDS
            state = f"Redis silent for {silence:.0f} s" if is_away else f"at most {age:.1f} s old"
            total = f"{clients} of {_servers(cluster)}, {state}"
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
    value = round(value, 1)  # 10 a second may be 10.000000000000142 of them.
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.1f}"


def _count(value: float | None, noun: str) -> str:
    return f"{_number(value)} {noun}{'' if value == 1 else 's'}"


def _servers(cluster: Status) -> str:
    return _count(cluster["servers"], "server")


def _time(seconds: float | None) -> str:
    """Return a duration with two digits, in the unit that fits."""
    if seconds is None:
        return "-"
    for factor, unit in ((1e6, "µs"), (1e3, "ms")):
        if seconds * factor < 1000:
            value = seconds * factor
            return f"{value:.2g} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{seconds:.2g} s"


def _duration(seconds: float) -> str:
    """Return a duration in its largest unit, rounded down: 90 s is `1 min`."""
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds // 1:.0f} s"
