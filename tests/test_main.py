"""The entry point of every process: started by a person, or as an internal child."""

import json
import os
import pty
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lab.running import GSERVER, LIMIT, ROOT, Client, Running, argv, environment, gserver, until

BY_HAND = "gserver: `child` is internal: only a `gserver serve` of the same version can start it\n"


def test_the_package_runs_as_a_module_from_its_own_folder() -> None:
    with Running(
        command=[sys.executable, "-m", "gserver"], env={"PORT": "0", "PYTHONPATH": ""}, cwd=ROOT
    ) as server:
        assert server.who() == 1
        assert server.stop() == 0
        assert server.stderr == ""


@pytest.mark.outer
@pytest.mark.parametrize("arguments", [("worker",), ("agent",), ("worker", "0"), ("os",), ()])
def test_a_child_without_instructions_reports_that_it_is_internal(
    arguments: tuple[str, ...],
) -> None:
    done = gserver("child", *arguments, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", BY_HAND)


@pytest.mark.outer
@pytest.mark.parametrize(
    "junk", [b"junk\n", b"\xff", b"42", b"[]", b"{}", b'{"config": {}}', b'{"config": {"x": 1}}']
)
def test_a_child_with_invalid_instructions_reports_that_it_is_internal(
    junk: bytes, tmp_path: Path
) -> None:
    (tmp_path / "junk").write_bytes(junk)
    with (tmp_path / "junk").open("rb") as stdin:
        done = gserver("child", "worker", stdin=stdin)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", BY_HAND)


def test_a_child_of_another_version_asks_for_a_restart() -> None:
    ours, theirs = os.pipe()
    payload = json.dumps({"config": {"an_option_that_is_gone": 1}, "control_fd": theirs})
    done = subprocess.run(
        [*GSERVER, "child", "worker"],
        input=payload,
        pass_fds=[theirs],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    os.close(theirs)
    with os.fdopen(ours) as reports:
        reason = (
            "the running supervisor has another version than the installed code: restart the server"
        )
        assert reports.read() == f"error {reason}\n"
    assert (done.returncode, done.stderr) == (2, f"gserver: {reason}\n")


def test_a_child_started_at_a_terminal_does_not_wait_for_input() -> None:
    ours, theirs = pty.openpty()
    try:
        done = gserver("child", "worker", stdin=theirs)
    finally:
        os.close(ours)
        os.close(theirs)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", BY_HAND)


def _port_of(server: Running) -> int:
    """The port of a server that cannot log it."""
    for found in psutil.Process(server.pid).net_connections("tcp"):
        if found.status == psutil.CONN_LISTEN:
            return int(found.laddr.port)
    return 0


@pytest.mark.outer
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_server_started_without_standard_streams_serves(closed: str) -> None:
    """Some supervisors start programs like this. The next opened file must not become a standard
    stream.
    """
    command = [
        "sh",
        "-c",
        f'exec "$@" {closed}',
        "sh",
        sys.executable,
        *argv("-P -m gserver --port 0"),
    ]
    with Running(command=command, wait=False) as server:
        until(lambda: server.process.poll() is not None or _port_of(server), "the server listens")
        assert server.process.poll() is None, server.stderr
        with Client(_port_of(server)) as client:
            assert client.ask(b"WHO") == b"1"
        assert server.stop() == 0
        assert server.stderr == ""


def test_an_error_has_its_exit_code_even_without_standard_streams() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [
            "sh",
            "-c",
            'exec "$@" >&- 2>&-',
            "sh",
            sys.executable,
            *argv("-P -m gserver --port"),
            port,
        ]
        assert (
            subprocess.run(command, env=environment(), timeout=LIMIT, check=False).returncode == 1
        )
