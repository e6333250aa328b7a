"""`gserver check`: whether a server would start, with which options and commands."""

import re
import subprocess
from pathlib import Path

import pytest

from gserver.config import OPTIONS, flag
from lab.certificates import make_certificates
from lab.running import GSERVER, LIMIT, Running, argv, environment, error_line, gserver

MODULE = """
from gserver.commands import command

print("a line on import")


@command("RESOLVE", timeout=2.5, at_once=8)
def resolve(request, name: str, port: int = 80):
    return name


@command("NAP")
def nap(request):
    return "rested"


@command("QUICK", may_block=False)
def quick(request, *words):
    return "quick"


@command("FREE", timeout=0, at_once=0)
def free(request):
    return "free"
"""


def check(folder: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `gserver check` in a folder."""
    return subprocess.run(
        [*GSERVER, "check", *options],
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def rows(text: str) -> dict[str, tuple[str, ...]]:
    """The cells of the lines of all tables, by the first one."""
    lines = [re.split(r"  +", line) for line in text.splitlines()]
    return {first: tuple(rest) for first, *rest in lines}


def test_every_option_is_shown_with_its_value_and_its_source(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cr3t\n")
    options = argv("--max-clients 7 --admin-token-file token --redis-tls-verify no")
    variables = {
        "PORT": "5000",
        "WEB_CONCURRENCY": "2",
        "GSERVER_WORKERS": "3",
        "GSERVER_STATSD_PREFIX": "a:b",
        "REDIS_URL": "redis://me:s3cr3t@redis.example/2",
    }
    done = check(tmp_path, *options, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert "s3cr3t" not in done.stdout
    shown = rows(done.stdout)
    assert {flag(name) for name in OPTIONS} <= shown.keys()
    assert shown["--max-clients"] == ("7", "flag")
    assert shown["--port"] == ("5000", "PORT")
    assert shown["--workers"] == ("3", "GSERVER_WORKERS")
    assert shown["--statsd-prefix"] == ("a_b", "GSERVER_STATSD_PREFIX")
    assert shown["--redis-url"] == ("redis://redis.example:6379/2", "REDIS_URL")
    assert shown["--admin-token"] == ("(secret)", "--admin-token-file")
    assert shown["--redis-tls-verify"] == ("no", "flag")
    assert shown["--line-timeout"] == ("10", "default")
    assert shown["--admin-port"] == ("off", "default")
    assert shown["--server-id"][1] == "a new one at each start"
    assert done.stdout.endswith("\nA server would start with these options.\n")


def test_the_commands_are_shown_with_their_usage_and_limits(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(MODULE)
    done = check(tmp_path, *argv("--commands own --command-timeout 9 --command-at-once 0"))
    assert (done.returncode, done.stderr) == (0, "a line on import\n")
    shown = rows(done.stdout)
    assert shown["WHO"] == ("-", "-")
    assert shown["RESOLVE name [port]"] == ("2.5 s", "8")
    assert shown["NAP"] == ("9 s", "no limit")
    assert shown["QUICK [words ...]"] == ("-", "-")
    assert shown["FREE"] == ("none", "no limit")


PROBLEMS = {
    "--commands missing": "--commands missing: cannot import it: ModuleNotFoundError",
    "--commands many": "more than 64 command names",
    "--commands ends": "--commands ends: cannot import it: SystemExit: 0 (ends.py, line 1)",
    "--tls-cert missing.pem": "--tls-cert missing.pem cannot be read",
    "--tls-cert server.pem": "--tls-cert must contain a certificate, and it or --tls-key the key",
    "--tls-key server.key": "--tls-key needs --tls-cert",
    "--user no-such-user": "--user no-such-user: unknown user or group, or root",
    "--redis-url rediss://x --redis-ca-file ca": "--redis-ca-file ca cannot be used",
    "--redis-url rediss://x --redis-ca-file server.key": "server.key cannot be used",
    "--redis-url rediss://x --redis-ca-file .": "--redis-ca-file . cannot be used",
    "--admin-host 0.0.0.0 --admin-port 0": "--admin-host 0.0.0.0 is not loopback",
    "--max-clients 10000000": "--max-clients 10000000 is too high",
    "--max-clients none": "'none' is not a valid whole number",
    "--no-such-option 1": "No such option",
}


@pytest.mark.parametrize(("options", "problem"), PROBLEMS.items(), ids=PROBLEMS)
def test_what_would_stop_a_start_is_one_line(tmp_path: Path, options: str, problem: str) -> None:
    make_certificates(tmp_path)
    (tmp_path / "ends.py").write_text("raise SystemExit(0)")
    (tmp_path / "many.py").write_text(
        "from gserver.commands import command\n"
        "for n in range(62):\n    globals()[f'c{n}'] = command(f'C{n}')(lambda request: 1)\n"
    )
    assert problem in error_line(check(tmp_path, *argv(options)))


def test_a_server_may_be_running_meanwhile() -> None:
    with Running() as server, server.client() as client:
        done = gserver("check", "--port", str(client.sock.getpeername()[1]))
        assert (done.returncode, done.stderr) == (0, "")
        assert client.who() == 1


def test_a_module_gets_no_secrets(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import os\nassert 'REDIS_URL' not in os.environ\n"
        "from gserver.commands import who, command\nx = command('X')(who.handler)\n"
    )
    done = check(tmp_path, "--commands", "own", REDIS_URL="redis://:s3cr3t@localhost")
    assert (done.returncode, done.stderr) == (0, "")
