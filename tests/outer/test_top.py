"""`gserver top` and `gserver status`: on a terminal, in a pipe, and for scripts."""

import io
import json
import os
import pty
import re
import select
import signal
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
from gserver.cli.top import View, frame, keys_of, line, render
from gserver.config import Config
from gserver.metrics import DURATION_BOUNDS_NS
from gserver.scoreboard import BUCKETS_OFFSET, Scoreboard
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


def test_status_exits_with_0_only_if_all_servers_are_healthy(here: Running) -> None:
    done = gserver("status", "--admin", address(here))
    assert (done.returncode, done.stderr) == (0, "")
    first, row, title = done.stdout.splitlines()[:3]
    assert first.split()[:3] == ["admin", "port", "verdict"]
    assert row.split()[:2] == [address(here), "healthy"]
    assert row.split()[2:4] == ["0", "0"], "it has polled twice: rates are known"
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
        assert f"listening on tcp://127.0.0.1:{here.port} " in done.stdout
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
            assert process.stdout.readline().startswith(f"{address(here)} here healthy ")
            assert client.who() == 1
            assert any(
                line.startswith(f"{address(here)} here healthy 1 client ")
                for line in process.stdout
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
    assert all(row.startswith(f"{address(here)} here healthy ") for row in lines[::2])
    assert f"{mute} unreachable: no answer in 2 s\n" in lines


@pytest.mark.parametrize(("key", "code"), [(b"q", 0), (b"\x03", 1)], ids=["q", "Ctrl-C"])
def test_top_on_a_terminal_is_a_full_screen_until_it_is_left(
    here: Running, key: bytes, code: int
) -> None:
    keyboard, terminal = pty.openpty()
    env = environment(TERM="xterm", COLUMNS="120", LINES="40")
    words = [*GSERVER, "top", "--interval", "0.2", "--admin", address(here)]
    process = subprocess.Popen(
        words, stdin=terminal, stdout=terminal, stderr=terminal, env=env, start_new_session=True
    )
    os.close(terminal)
    seen, end = b"", time.monotonic() + LIMIT
    try:
        while seen.count(b"healthy") < 3:
            assert time.monotonic() < end
            if select.select([keyboard], [], [], 0.1)[0]:
                seen += os.read(keyboard, 65536)
        assert b"\x1b[?1049h" in seen  # the alternate screen
        assert b"q quit" in seen
        if key == b"\x03":  # The terminal is not that of the process's session.
            process.send_signal(signal.SIGINT)
        else:
            os.write(keyboard, key)
        assert process.wait(LIMIT) == code
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
    assert "Redis cannot" not in output
    assert "not answered yet" not in output
    assert "Redis has not answered yet: this list is 2 s old" in screen(
        members | {"age_seconds": 2.6, "error_kind": None}
    )
    assert "Redis has not answered yet: the servers are unknown" in screen(
        {"servers": None, "omitted_servers": 0, "age_seconds": None, "error_kind": None}
    )


def test_the_cluster_line_fits_its_numbers_and_the_width() -> None:
    def described(servers: int, clients: int, silence: int = 0) -> tuple[str, str]:
        scoreboard = Scoreboard.create(2)
        for name, value in (
            ("cluster_servers", servers),
            ("remote_clients", clients),
            ("cluster_updated_at", time.monotonic_ns() - silence * 1_000_000_000),
            ("cluster_doubtful_at", time.monotonic_ns() // 1_000_000),
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
        assert f"cluster gserver: {words}, at most 0.0 s old" in long
        assert brief in short
    assert "1 client of 3 servers, Redis silent for 70 s" in described(3, 1, 70)[0]
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
    now |= {"verdict": "[blink]", "reasons": [{"name": "x", "text": "[blue]"}]}
    now["command_seconds"] = {}
    output = shown_of(Target("[red]", now=now, before=now))
    assert all(
        text in output
        for text in (
            *("[/]", "[/red] -/s", "[link=http://x]y[/link] 7", "[bold]", "[blink]", "[red]"),
            "[blue]",
        )
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


# Keys.


def frame_of(targets: list[Target], view: View, height: int = 24) -> list[str]:
    written = io.StringIO()
    console = Console(width=80, height=height, file=written, force_terminal=True)
    console.print(frame(targets, view, console))
    return re.sub(r"\x1b\[[0-9;]*m", "", written.getvalue()).splitlines()


def crowd() -> list[Target]:
    """Servers with 0, 1, 2 ... clients, the first of which does not answer."""
    targets = []
    for number in range(12):
        scoreboard = Scoreboard.create(2)
        scoreboard.put("workers", 1)
        for name, value in (("pid", 1), ("clients", number), ("heartbeat", time.monotonic_ns())):
            scoreboard.cells[scoreboard.cell(name, 0)] = value
        now = describe(Config(server_id=f"s{number}"), scoreboard)
        targets.append(Target(f"t{number}:1", now=now, before=now))
    targets[0].error = "timed out"
    return targets


def test_the_screen_shows_what_fits_and_says_what_is_hidden() -> None:
    view = View()
    lines = frame_of(crowd(), view)
    assert len(lines) == 24
    found = re.search(r"(\d+) more lines below$", lines[-1])
    assert found
    view.press("page down", 21)
    lines = frame_of(crowd(), view)
    assert lines[-1].endswith(f"{int(found[1]) - 21} more lines below, 21 above")
    for _ in range(100):
        view.press("j", 21)
    lines = frame_of(crowd(), view)
    assert lines[-1].endswith(f"? help, {found[1]} above")
    assert lines[-2].startswith("╰")
    view.press("e", 21)
    lines = frame_of(crowd(), view)
    assert "above" not in lines[-1]
    assert lines[0].startswith("admin port")


def test_servers_are_sorted_by_the_chosen_column_and_added_up() -> None:
    view = View(is_expanded=False)

    def column(number: int) -> list[str]:
        return [line.split()[number] for line in frame_of(crowd(), view)[1:14]]

    by_name = sorted(f"t{number}:1" for number in range(12))
    assert column(0) == [*by_name, "all"]
    view.press("s", 1)
    view.press("s", 1)
    lines = frame_of(crowd(), view)
    assert "clients ▾" in lines[0]
    assert column(0) == [*(f"t{number}:1" for number in range(11, 0, -1)), "t0:1", "all"]
    assert lines[13].split()[:2] == ["all", "66"]


def test_keys_that_arrive_together_are_told_apart() -> None:
    assert keys_of(b"j\x1b[A\x1b[6~?\x1b[1;5Cq") == ["j", "k", "page down", "?", "\x1b[1;5C", "q"]
    assert keys_of(b"\x00\xff\r") == []


def test_a_key_leaves_or_explains() -> None:
    view = View()
    view.press("?", 1)
    assert "PgUp" in "\n".join(frame_of(crowd(), view))
    view.press("?", 1)
    assert frame_of(crowd(), view)[0].startswith("admin port")
    view.press("x", 1)
    assert not view.is_over
    view.press("q", 1)
    assert view.is_over


def test_a_worker_that_hangs_is_marked_and_a_healthy_server_has_no_colour() -> None:
    scoreboard = Scoreboard.create(2)
    for slot in range(2):
        scoreboard.cells[scoreboard.cell("pid", slot)] = 7 + slot
        silent_ns = 3_000_000_000 * slot
        scoreboard.cells[scoreboard.cell("heartbeat", slot)] = time.monotonic_ns() - silent_ns
    scoreboard.put("workers", 1)
    for name in ("unknown_command", "internal"):
        scoreboard.cells[scoreboard.cell(f"error_replies.{name}", 0)] = 5
    output = shown_of(Target("x", now=describe(Config(), scoreboard)), colours=True)
    assert "\x1b[1;31m3.0 s ago, does not answer" in output
    assert "worker 8 does not answer: no heartbeat for 3 s" in output
    scoreboard.cells[scoreboard.cell("heartbeat", 1)] = time.monotonic_ns()
    output = shown_of(Target("x", now=describe(Config(), scoreboard)), colours=True)
    assert "errors since start: unknown_command 5, internal 5" in output
    assert not re.search(r"\x1b\[[0-9;]*3[13]m", output), "totals since the start have no colour"


def test_percentiles_are_those_since_the_last_snapshot() -> None:
    scoreboard = Scoreboard.create(1)
    first = scoreboard.command_cell("WHO", 0)
    up_to_a_second = DURATION_BOUNDS_NS.index(10**9)
    scoreboard.cells[first + BUCKETS_OFFSET + up_to_a_second] = 100
    before = describe(Config(server_id="a"), scoreboard)
    assert Target("x", now=before, before=before).percentile(50) == pytest.approx(0.75)
    scoreboard.cells[first] = scoreboard.cells[first + BUCKETS_OFFSET] = 10  # up to 5 us
    now = describe(Config(server_id="a"), scoreboard)
    now["server"]["uptime_seconds"] = before["server"]["uptime_seconds"] + 1
    target = Target("x", now=now, before=before)
    assert target.percentile(50) == target.percentile(50, "WHO") == pytest.approx(2.5e-6)
    assert "WHO 10/s p50 2.5 µs p99 5 µs" in shown_of(target)
    assert Target("x", now=now, error="gone").percentile(50) is None


# Options.


@pytest.mark.parametrize("command", ["top", "status"])
def test_the_help_shows_the_options_of_the_admin_port(command: str) -> None:
    text = " ".join(gserver(command, "--help").stdout.split())
    assert f"default: {DEFAULT_ADMIN}]" in text
    for word in ("--admin-token", "--admin-token-file", "GSERVER_ADMIN", "GSERVER_ADMIN_TOKEN"):
        assert word in text


def test_a_bad_option_is_reported_in_one_line_and_exits_with_2() -> None:
    for words in ("top --interval 0", "top --interval nan", "status --once", "top x"):
        done = gserver(*words.split())
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
