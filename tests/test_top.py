"""`gserver top` and `gserver status`: on a terminal, in a pipe, and for scripts."""

import io
import json
import os
import pty
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gserver.board import Board
from gserver.config import Config
from gserver.errors import Misuse
from gserver.status import status as describe
from gserver.top import Watched, screens, watch
from tests.redises import Redis
from tests.running import GSERVER, LIMIT, Running, environment, gserver, until
from tests.test_cluster import cluster

NOBODY = "127.0.0.1:1"


@pytest.fixture(scope="module")
def here() -> Iterator[Running]:
    with Running("--admin-port", "0", "--server-id", "here", "--workers", "2") as running:
        running.wait_for("agent.ready")
        running.wait_for("worker.ready", 2)
        yield running


def address(server: Running) -> str:
    return f"127.0.0.1:{server.admin_port()}"


def test_status_is_0_when_all_are_ready_and_1_when_not(here: Running) -> None:
    done = gserver("status", "--admin", address(here))
    assert (done.returncode, done.stderr) == (0, "")
    assert "here" in done.stdout
    assert "ready" in done.stdout
    done = gserver("status", "--admin", address(here), "--admin", NOBODY)
    assert (done.returncode, done.stderr) == (1, "")
    assert "Connection refused" in done.stdout
    assert gserver("status", GSERVER_ADMIN=address(here)).returncode == 0


def test_status_is_1_for_a_token_that_is_wrong_and_for_something_else_that_listens(here: Running) -> None:
    with Running("--admin-port", "0", env={"GSERVER_ADMIN_TOKEN": "right"}) as server:
        server.wait_for("agent.ready")
        assert gserver("status", "--admin", address(server), GSERVER_ADMIN_TOKEN="right").returncode == 0
        done = gserver("status", "--admin", address(server), GSERVER_ADMIN_TOKEN="wrong")
        assert done.returncode == 1
        assert "the admin token is missing or wrong" in done.stdout
        assert "Traceback" not in done.stderr
        assert gserver("status", "--admin", f"http://x:right@{address(server)}").returncode == 0
    assert gserver("status", "--admin", f"127.0.0.1:{here.port}").returncode == 1


@pytest.mark.parametrize(
    "url", ["", "x", "http://", "https://127.0.0.1:1", "127.0.0.1:x", "127.0.0.1:1/x", "127.0.0.1:99999"]
)
def test_what_is_no_admin_port_is_refused_in_one_line(url: str) -> None:
    with pytest.raises(Misuse, match="is no admin port"):
        watch([url], "")
    done = gserver("top", "--once", "--admin", url)
    assert done.returncode == 2 or url == ""
    assert len(done.stderr.splitlines()) <= 1


def test_top_once_shows_rates_and_json_what_the_server_says(here: Running) -> None:
    with here.client() as client:
        assert client.ask(b"WHY") == b"42"
        done = gserver("top", "--once", "--admin", address(here))
        assert done.returncode == 0
        for worker in here.workers():
            assert str(worker.pid) in done.stdout
        done = gserver("top", "--once", "--json", "--admin", address(here), "--admin", NOBODY)
        assert done.returncode == 1
        told = json.loads(done.stdout)
        assert told[f"http://{address(here)}"]["clients"]["now"] == 1
        assert "refused" in told[f"http://{NOBODY}"]["trouble"]


def test_top_in_a_pipe_is_a_plain_line_for_each_look(here: Running) -> None:
    words = [*GSERVER, "top", "--interval", "0.2", "--admin", address(here)]
    with (
        subprocess.Popen(words, stdout=subprocess.PIPE, env=environment(), text=True) as process,
        here.client() as client,
    ):
        assert process.stdout
        try:
            assert process.stdout.readline().startswith("here ready ")
            assert client.who() == 1
            assert any(line.startswith("here ready 1 clients ") for line in process.stdout)
        finally:
            process.kill()


def test_top_on_a_terminal_is_a_screen_that_ctrl_c_ends(here: Running) -> None:
    keyboard, terminal = pty.openpty()
    env = environment(TERM="xterm", COLUMNS="120", LINES="40")
    words = [*GSERVER, "top", "--interval", "0.2", "--admin", address(here)]
    process = subprocess.Popen(words, stdin=terminal, stdout=terminal, stderr=terminal, env=env, start_new_session=True)
    os.close(terminal)
    seen, end = b"", time.monotonic() + LIMIT
    try:
        while seen.count(b"ready") < 3:
            assert time.monotonic() < end
            if select.select([keyboard], [], [], 0.1)[0]:
                seen += os.read(keyboard, 65536)
        assert b"\x1b[?1049h" in seen  # a screen of its own
        process.send_signal(2)
        assert process.wait(LIMIT) == 1
        while select.select([keyboard], [], [], 0.1)[0]:
            try:
                seen += os.read(keyboard, 65536)
            except OSError:
                break
        assert b"\x1b[?1049l" in seen  # and the old one is back
        assert b"Traceback" not in seen
    finally:
        process.kill()
        process.wait()
        os.close(keyboard)


def test_the_servers_of_a_cluster_are_shown_once_whoever_is_watched(tmp_path: Path) -> None:
    options = ["--admin-port", "0", "--server-id"]
    hostile = "[red]<x>[/y]"
    with (
        Redis(tmp_path) as redis,
        cluster(redis.url, "east", [*options, "a"], [*options, hostile], [*options, "c"]) as servers,
        servers[2].client() as client,
    ):
        assert client.ask(b"WHERE") == b"c"
        for server in servers:
            server.wait_for("agent.ready")
        watched = [word for server in servers[:2] for word in ("--admin", address(server))]
        done = until(lambda: shown(watched, ["c", "1"]), "the client is told of")
    assert done.stdout.count("servers of cluster east") == 1
    table = [line.strip("│ ").split() for line in done.stdout.partition("servers of cluster east")[2].splitlines()]
    assert table[1] == ["server", "clients", "last", "report"]
    assert {line[0]: line[-1] == "watched" for line in table[2:5]} == {hostile: True, "a": True, "c": False}


def shown(options: list[str], row: list[str]) -> subprocess.CompletedProcess[str] | None:
    """What `status` shows, if a line of it begins with these words."""
    done = gserver("status", *options)
    return done if any(line.strip("│ ").split()[: len(row)] == row for line in done.stdout.splitlines()) else None


def test_how_old_the_list_of_servers_is_and_who_is_not_on_it_is_said() -> None:
    server = {"id": "a", "clients": None, "silent_seconds": 2.5, "is_late": True, "is_this": False}
    roster = {"servers": [server], "left_out": 1234, "age_seconds": 100.0, "trouble": "timeout"}
    told = screen(roster)
    assert "102.5 s ago  late" in told
    assert "1,234 more, which have reported since" in told
    assert "Redis cannot be read (timeout): this is what it said 2 min ago" in told
    told = screen(roster | {"age_seconds": 0.5, "trouble": None, "left_out": 0})
    assert "more" not in told
    assert "Redis" not in told
    assert "Redis has not answered yet: the servers are not known" in screen(
        {"servers": None, "left_out": 0, "age_seconds": None, "trouble": None}
    )


def screen(roster: dict[str, Any]) -> str:
    """What is shown of a server that tells this of its cluster."""
    config = Config(server_id="here", redis_url="redis://x")
    now = describe(config, Board.create(2), roster)
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(screens([Watched("x", now=now)]))
    return console.export_text()


def status(uptime: float, who: int = 0, server_id: str = "a") -> dict[str, object]:
    return {"server": {"id": server_id, "state": "ready", "uptime_seconds": uptime}, "commands": {"WHO": who, "WHY": 1}}


def test_a_rate_is_by_the_servers_own_clock_and_none_is_made_up() -> None:
    watched = Watched("x")
    watched.now = status(10, 100)
    assert watched.rate("commands") is None
    watched.before, watched.now = watched.now, status(12, 150)
    assert watched.rate("commands") == watched.rate("commands", "WHO") == 25
    assert watched.rate("commands", "WHY") == 0
    watched.before, watched.now = watched.now, status(1, 0, "another")
    assert watched.rate("commands") is None
    watched.before, watched.now = status(12), status(12)
    assert watched.rate("commands") is None
