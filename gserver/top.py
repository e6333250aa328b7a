"""What admin ports say, on a terminal: for `gserver top` and `gserver status`. Knows nothing else of a server."""

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from gserver.errors import Misuse

TIMEOUT_SECONDS = 2.0
#: A certificate that expires within this time is worth a look.
SOON_SECONDS = 14 * 86400
#: What is known of a cluster's servers is read when it is asked for; when it is older than this, that is said.
OLD_SECONDS = 2.5
STYLES = {"ready": "bold green", "draining": "bold yellow", "starting": "bold yellow", "away": "bold red"}

Status = dict[str, Any]


@dataclass
class Watched:
    """One server's admin port: what it said last, and before that."""

    url: str
    token: str = ""
    now: Status = field(default_factory=dict)
    before: Status = field(default_factory=dict)
    #: Why there is no answer; "" when there is.
    trouble: str = ""

    def look(self) -> None:
        """Ask once more."""
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        try:
            opener = build_opener(ProxyHandler({}))  # An admin port is never behind the proxy that a shell names.
            request = Request(f"{self.url}/status.json", headers=headers)  # noqa: S310 (the scheme is http)
            with opener.open(request, timeout=TIMEOUT_SECONDS) as reply:
                now: Status = json.load(reply)
            now["server"]["state"]  # It is one of ours.
        except HTTPError as error:
            self.trouble = "the admin token is missing or wrong" if error.code == 401 else f"HTTP {error.code}"
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.trouble = str(getattr(error, "reason", error)) or type(error).__name__
        else:
            self.before, self.now, self.trouble = self.now, now, ""

    @property
    def state(self) -> str:
        """The server's state, or `away`."""
        return "away" if self.trouble else str(self.now["server"]["state"])

    def rate(self, *path: str) -> float | None:
        """How fast a counter, or a dict of them, has grown since the last look; None when that is not known."""
        if self.trouble or not self.before or self.before["server"]["id"] != self.now["server"]["id"]:
            return None
        seconds = self.now["server"]["uptime_seconds"] - self.before["server"]["uptime_seconds"]
        now, before = (_total(status, path) for status in (self.now, self.before))
        return (now - before) / seconds if seconds > 0 else None

    def told(self) -> Status:
        """What the server said, or why it said nothing."""
        return {"trouble": self.trouble} if self.trouble else self.now

    def line(self) -> str:
        """It in one plain line."""
        if self.trouble:
            return f"{self.url} away: {self.trouble}"
        clients, cluster = self.now["clients"], self.now["cluster"]
        everywhere = (
            f" of {cluster['clients']} in {cluster['servers']} servers" if cluster and cluster["servers"] else ""
        )
        rates = f"{_number(self.rate('commands'))} commands/s {_number(self.rate('errors'))} errors/s"
        return f"{self.now['server']['id']} {self.state} {clients['now']} clients{everywhere} {rates}"


def watch(urls: Sequence[str], token: str) -> list[Watched]:
    """Return a watch for each URL or HOST:PORT; raise `Misuse` for what is neither."""
    return [Watched(*_parse(url, token)) for url in urls]


def look(watched: Sequence[Watched]) -> None:
    """Ask all of them at once."""
    with ThreadPoolExecutor(len(watched)) as pool:
        list(pool.map(Watched.look, watched))


def looks(watched: Sequence[Watched], seconds: float) -> Iterator[None]:
    """Ask all of them again and again, with so many seconds between."""
    while True:
        look(watched)
        yield
        time.sleep(seconds)


def screens(watched: Sequence[Watched]) -> Group:
    """What there is to see of them: a table of all, for each its workers, and the servers of their clusters."""
    table = Table(box=None, pad_edge=False, expand=True, header_style="dim")
    for name in ("server", "state", "clients", "peak", "commands/s", "errors/s", "up"):
        table.add_column(name, justify="left" if name in ("server", "state") else "right", no_wrap=name != "server")
    for each in watched:
        table.add_row(*_row(each))
    troubles = [Text(f"{each.url}: {each.trouble}", "red") for each in watched if each.trouble]
    there = [each for each in watched if not each.trouble]
    return Group(table, *troubles, *(_details(each) for each in there), *_rosters(there))


def _row(each: Watched) -> list[Text | str]:
    state = Text(each.state, STYLES[each.state])
    if not each.now:
        return [Text(each.url), state]
    clients, server = each.now["clients"], each.now["server"]
    counts = [f"{clients[name]:,}" for name in ("now", "peak")]
    rates = [_number(value) for value in (each.rate("commands"), each.rate("errors"))]
    return [Text(server["id"]), state, *counts, *rates, _age(server["uptime_seconds"])]


def _details(each: Watched) -> Panel:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("worker", "age", "clients", "taken in", "last sign of life"):
        table.add_column(name, justify="left" if name == "worker" else "right")
    for worker in each.now["workers"]["each"]:
        counts = [f"{worker[name]:,}" for name in ("clients", "accepted")]
        table.add_row(str(worker["pid"]), _age(worker["age_seconds"]), *counts, f"{worker['silent_seconds']:.1f} s ago")
    told = [f"{name} {_number(each.rate('commands', name))}/s" for name in each.now["commands"]]
    wrong = {**each.now["errors"], **each.now["rejected"]}
    told += [f"[red]{name} {count:,}[/]" for name, count in wrong.items() if count]
    expires_at = each.now["server"]["tls_expires_at"]
    if expires_at:
        left = expires_at - time.time()
        valid = f"certificate valid for {_age(left)}" if left > 0 else "certificate expired"
        told.append(f"[red]{valid}[/]" if left < SOON_SECONDS else valid)
    cluster = each.now["cluster"]
    if cluster:
        known = cluster["servers"] is not None
        heard = f", heard of {cluster['view_age_seconds']:.1f} s ago" if known else ", not heard of yet"
        told.append(f"cluster {cluster['name']}: {cluster['clients']} clients of {cluster['servers']} servers{heard}")
    words = Text.from_markup("\n" + "   ".join(told))
    return Panel(Group(table, words), title=Text(each.now["server"]["id"]), title_align="left")


def _rosters(watched: Sequence[Watched]) -> Iterator[Panel]:
    """The servers of each cluster, once however many of them are watched."""
    own = {each.now["server"]["id"] for each in watched}
    shown: set[tuple[str, str]] = set()
    for each in watched:
        cluster = each.now["cluster"] or {}
        roster = cluster.get("roster")
        if roster and (cluster["name"], each.now["server"]["id"]) not in shown:
            shown |= {(cluster["name"], server["id"]) for server in roster["servers"] or []}
            yield Panel(_roster(roster, own), title=Text(f"servers of cluster {cluster['name']}"), title_align="left")


def _roster(roster: Status, own: set[str]) -> Group:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("server", "clients", "last report", ""):
        is_number = name in ("clients", "last report")
        table.add_column(name, justify="right" if is_number else "left", no_wrap=name != "server")
    age = roster["age_seconds"]
    for server in roster["servers"] or []:
        silent = server["silent_seconds"]
        ago = "-" if silent is None else f"{silent + age:.1f} s ago"
        marks = ["late"] * server["is_late"] + ["watched"] * (server["id"] in own)
        style = "red" if server["is_late"] else "bold" if marks else ""
        table.add_row(Text(server["id"]), _number(server["clients"]), ago, ", ".join(marks), style=style)
    notes = [f"{roster['left_out']:,} more, which have reported since"] if roster["left_out"] else []
    if age is None or age > OLD_SECONDS:
        why = f"Redis cannot be read ({roster['trouble']})" if roster["trouble"] else "Redis has not answered yet"
        known = "the servers are not known" if age is None else f"this is what it said {_age(age)} ago"
        notes.append(f"{why}: {known}")
    return Group(table, *(Text(note, "yellow") for note in notes))


def _parse(url: str, token: str) -> tuple[str, str]:
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        is_good = parts.scheme == "http" and bool(parts.hostname) and parts.port is not None
    except ValueError:
        is_good = False
    if not is_good or parts.path.strip("/") or parts.query:
        raise Misuse(f"{url!r} is no admin port: name it as HOST:PORT or http://HOST:PORT")
    return f"http://{parts.netloc.rpartition('@')[2]}", parts.password or token


def _total(status: Status, path: Sequence[str]) -> float:
    value: Any = status
    for name in path:
        value = value.get(name, 0)
    return float(sum(value.values()) if isinstance(value, dict) else value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.1f}"


def _age(seconds: float) -> str:
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
