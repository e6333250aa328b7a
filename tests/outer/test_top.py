"""`gserver top` and `gserver status`: on a terminal, in a pipe, and for scripts."""

import io
import json
import os
import pty
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gserver.agent.status import status as describe
from gserver.cli.admin_client import Target
from gserver.cli.main import DEFAULT_ADMIN
from gserver.cli.top import line, render
from gserver.config import Config
from gserver.scoreboard import Scoreboard
from lab.clusters import cluster
from lab.redises import Redis
from lab.running import GSERVER, LIMIT, PATIENCE, Running, environment, gserver, until

UNUSED = "127.0.0.1:1"


@pytest.fixture(scope="module")
def here() -> Iterator[Running]:
    with Running("--admin-port", "0", "--server-id", "here", "--workers", "2") as running:
        running.wait_for("agent.ready")
        running.wait_for("worker.ready", 2)
        yield running


def address(server: Running) -> str:
    return f"127.0.0.1:{server.admin_port()}"


def test_status_exits_with_0_only_if_all_servers_are_ready(here: Running) -> None:
    done = gserver("status", "--admin", address(here))
    assert (done.returncode, done.stderr) == (0, "")
    first, row, title = done.stdout.splitlines()[:3]
    assert first.split()[:3] == ["admin", "port", "state"]
    assert row.split()[:2] == [address(here), "ready"]
    assert row.split()[4:6] == ["0", "0"], "it has polled twice: rates are known"
    assert title.split()[1:3] == [address(here), "here"]
    done = gserver("status", "--admin", address(here), "--admin", UNUSED)
    assert (done.returncode, done.stderr) == (1, "")
    assert "Connection refused" in done.stdout
    assert gserver("status", GSERVER_ADMIN=address(here)).returncode == 0


def test_status_exits_with_1_for_a_wrong_token_or_another_service(here: Running) -> None:
    with Running("--admin-port", "0", env={"GSERVER_ADMIN_TOKEN": "right"}) as server:
        server.wait_for("agent.ready")
        assert (
            gserver("status", "--admin", address(server), GSERVER_ADMIN_TOKEN="right").returncode
            == 0
        )
        done = gserver("status", "--admin", address(server), GSERVER_ADMIN_TOKEN="wrong")
        assert done.returncode == 1
        assert "the admin token is missing or wrong" in done.stdout
        assert "Traceback" not in done.stderr
        assert gserver("status", "--admin", f"http://x:right@{address(server)}").returncode == 0
    assert gserver("status", "--admin", f"127.0.0.1:{here.port}").returncode == 1


def test_top_once_shows_rates_and_json_has_the_servers_status(here: Running) -> None:
    with here.client() as client:
        assert client.ask(b"WHY") == b"42"
        done = gserver("top", "--once", "--admin", address(here))
        assert done.returncode == 0
        for worker in here.workers():
            assert str(worker.pid) in done.stdout
        done = gserver("top", "--once", "--json", "--admin", address(here), "--admin", UNUSED)
        assert done.returncode == 1
        output = json.loads(done.stdout)
        assert output[address(here)]["clients"]["now"] == 1
        assert output[UNUSED]["error"] == "Connection refused"


def test_top_in_a_pipe_prints_a_plain_line_per_poll(here: Running) -> None:
    words = [*GSERVER, "top", "--interval", "0.2", "--admin", address(here)]
    with (
        subprocess.Popen(words, stdout=subprocess.PIPE, env=environment(), text=True) as process,
        here.client() as client,
    ):
        assert process.stdout
        try:
            assert process.stdout.readline().startswith(f"{address(here)} here ready ")
            assert client.who() == 1
            assert any(
                line.startswith(f"{address(here)} here ready 1 client ") for line in process.stdout
            )
        finally:
            process.kill()


def test_an_unresponsive_server_delays_no_other(here: Running) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        mute = f"127.0.0.1:{silent.getsockname()[1]}"
        words = [*GSERVER, "top", "--interval", "0.2", "--admin", mute, "--admin", address(here)]
        with subprocess.Popen(
            words, stdout=subprocess.PIPE, env=environment(), text=True
        ) as process:
            assert process.stdout
            try:
                assert process.stdout.readline() == f"{mute} unreachable: no answer yet\n"
                began, lines = time.monotonic(), [process.stdout.readline() for _ in range(12)]
                assert time.monotonic() - began < 6 * 0.7 + PATIENCE
            finally:
                process.kill()
    assert all(row.startswith(f"{address(here)} here ready ") for row in lines[::2])
    assert f"{mute} unreachable: no answer in 2 s\n" in lines


def test_top_on_a_terminal_is_a_full_screen_until_ctrl_c(here: Running) -> None:
    keyboard, terminal = pty.openpty()
    env = environment(TERM="xterm", COLUMNS="120", LINES="40")
    words = [*GSERVER, "top", "--interval", "0.2", "--admin", address(here)]
    process = subprocess.Popen(
        words, stdin=terminal, stdout=terminal, stderr=terminal, env=env, start_new_session=True
    )
    os.close(terminal)
    seen, end = b"", time.monotonic() + LIMIT
    try:
        while seen.count(b"ready") < 3:
            assert time.monotonic() < end
            if select.select([keyboard], [], [], 0.1)[0]:
                seen += os.read(keyboard, 65536)
        assert b"\x1b[?1049h" in seen  # the alternate screen
        assert b"Press Ctrl-C to quit" in seen
        process.send_signal(2)
        assert process.wait(LIMIT) == 1
        while select.select([keyboard], [], [], 0.1)[0]:
            try:
                seen += os.read(keyboard, 65536)
            except OSError:
                break
        assert b"\x1b[?1049l" in seen  # the normal screen is restored
        assert b"Traceback" not in seen
    finally:
        process.kill()
        process.wait()
        os.close(keyboard)


def test_the_servers_of_a_cluster_are_shown_once_for_several_targets(tmp_path: Path) -> None:
    options = ["--admin-port", "0", "--server-id"]
    hostile = "[red]<x>[/y]"
    with (
        Redis(tmp_path) as redis,
        cluster(
            redis.url, "east", [*options, "a"], [*options, hostile], [*options, "c"]
        ) as servers,
        servers[2].client() as client,
    ):
        assert client.ask(b"WHERE") == b"c"
        for server in servers:
            server.wait_for("agent.ready")
        watched = [word for server in servers[:2] for word in ("--admin", address(server))]
        done = until(lambda: shown(watched, ["c", "1"]), "the client is shown")
    assert done.stdout.count("servers of cluster east") == 1
    table = [
        line.strip("│ ").split()
        for line in done.stdout.partition("servers of cluster east")[2].splitlines()
    ]
    assert table[1] == ["server", "clients", "last", "heartbeat"]
    expected = {hostile: True, "a": True, "c": False}
    assert {line[0]: line[-1] == "watched" for line in table[2:5]} == expected


def shown(options: list[str], row: list[str]) -> subprocess.CompletedProcess[str] | None:
    """The run of `status`, if a line of its output begins with these words."""
    done = gserver("status", *options)
    return (
        done
        if any(line.strip("│ ").split()[: len(row)] == row for line in done.stdout.splitlines())
        else None
    )


def test_the_age_of_the_server_list_and_its_omissions_are_shown() -> None:
    server = {
        "id": "a",
        "clients": None,
        "silent_seconds": 102.5,
        "is_late": True,
        "is_this": False,
    }
    members = {
        "servers": [server],
        "omitted_servers": 1234,
        "age_seconds": 100.0,
        "error_kind": "timeout",
    }
    output = screen(members)
    assert "102.5 s ago  late" in output
    assert "1,234 more servers, with more recent heartbeats, not listed" in output
    assert "Redis cannot be read (timeout): this list is 1 min old" in output
    output = screen(members | {"age_seconds": 2.4, "error_kind": None, "omitted_servers": 0})
    assert "more" not in output
    assert "Redis" not in output
    assert "Redis has not answered yet: this list is 2 s old" in screen(
        members | {"age_seconds": 2.6, "error_kind": None}
    )
    assert "Redis has not answered yet: the servers are unknown" in screen(
        {"servers": None, "omitted_servers": 0, "age_seconds": None, "error_kind": None}
    )


def test_the_cluster_line_fits_its_numbers_and_the_width() -> None:
    def described(servers: int, clients: int) -> tuple[str, str]:
        scoreboard = Scoreboard.create(2)
        for name, value in (
            ("cluster_servers", servers),
            ("remote_clients", clients),
            ("cluster_updated_at", time.monotonic_ns()),
        ):
            scoreboard.put(name, value)
        watched = Target(
            "x", now=describe(Config(server_id="here", redis_url="redis://x"), scoreboard)
        )
        return shown_of(watched), line(watched)

    for servers, clients, words, brief in (
        (1, 0, "0 clients of 1 server", "0 clients of 0 in 1 server "),
        (3, 1, "1 client of 3 servers", "0 clients of 1 in 3 servers "),
        (2000, 1500, "1,500 clients of 2,000 servers", "0 clients of 1,500 in 2,000 servers "),
    ):
        long, short = described(servers, clients)
        assert f"cluster gserver: {words}, updated 0.0 s ago" in long
        assert brief in short
    assert "cluster gserver: not known yet" in screen(None)


def test_the_validity_of_a_certificate_is_never_overstated() -> None:
    for days, words, is_soon in (
        (4.99, "4 d", True),
        (13.99, "13 d", True),
        (14.01, "14 d", False),
        (0.5, "12 h", True),
    ):
        now = describe(Config(), Scoreboard.create(1))
        now["server"]["tls_expires_at"] = time.time() + days * 86400 + 5
        output = shown_of(Target("x", now=now), colours=True)
        assert f"certificate valid for {words}" in output
        assert (f"\x1b[31mcertificate valid for {words}" in output) is is_soon


def test_no_old_figures_are_shown_for_an_unreachable_server() -> None:
    now = describe(Config(server_id="here"), Scoreboard.create(1))
    now["server"]["uptime_seconds"], now["clients"]["now"] = 3 * 86400, 4711
    assert all(old in shown_of(Target("x", now=now)) for old in ("4,711", "3 d", "here"))
    output = shown_of(Target("x", now=now, error="timed out"))
    assert "x: timed out" in output
    assert not any(old in output for old in ("4,711", "3 d", "here"))


def test_texts_from_a_server_are_not_treated_as_markup() -> None:
    now = describe(Config(server_id="[/]", redis_url="redis://x"), Scoreboard.create(1))
    now |= {"commands": {"[/red]": 1}, "error_replies": {"[link=http://x]y[/link]": 7}}
    now["cluster"] |= {"name": "[bold]"}
    now["server"]["state"] = "[blink]"
    output = shown_of(Target("[red]", now=now, before=now))
    assert all(
        text in output
        for text in ("[/]", "[/red] -/s", "[link=http://x]y[/link] 7", "[bold]", "[blink]", "[red]")
    )


def screen(members: dict[str, Any] | None) -> str:
    """The screen for a server with these members of its cluster."""
    config = Config(server_id="here", redis_url="redis://x")
    return shown_of(Target("x", now=describe(config, Scoreboard.create(2), members)))


def shown_of(watched: Target, *, colours: bool = False) -> str:
    """The screen for one server, with 80 columns."""
    console = Console(
        width=80, file=io.StringIO(), record=True, force_terminal=True, color_system="standard"
    )
    console.print(render([watched]))
    return console.export_text(styles=colours)


# Options.


@pytest.mark.parametrize("command", ["top", "status"])
def test_the_help_shows_the_options_of_the_admin_port(command: str) -> None:
    text = " ".join(gserver(command, "--help").stdout.split())
    assert f"default: {DEFAULT_ADMIN}]" in text
    for word in ("--admin-token", "--admin-token-file", "GSERVER_ADMIN", "GSERVER_ADMIN_TOKEN"):
        assert word in text


def test_a_bad_option_is_reported_in_one_line_and_exits_with_2() -> None:
    for arguments in (("top", "--interval", "0"), ("status", "--once"), ("top", "x")):
        done = gserver(*arguments)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
