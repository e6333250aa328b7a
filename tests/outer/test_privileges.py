"""`--user`: the ids and capabilities of every thread of every process, as /proc shows them.

This needs root.
"""

import os
import random
import re
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from gserver.errors import FatalError
from gserver.supervise.privileges import give_socket
from lab.booted import INSTALL, INSTALLED
from lab.certificates import make_certificates
from lab.running import (
    LIMIT,
    Client,
    Running,
    UnixClient,
    argv,
    gserver,
    program,
    unavailable,
    until,
)

UID, GID, OTHER_GID, KEY_GID = 64123, 64124, 64125, 64126
#: Runs a command in a private mount namespace, with users and groups that this machine does not
#: have, and a Python that they may execute.
START = f"""
set -eu
folder=$1 base=$2 packages=$3 repository=$4
shift 4
mount --make-rprivate /
for name in passwd group; do
    cat /etc/$name "$folder/$name" >"$folder/both"
    cat "$folder/both" >"$folder/$name"
    mount --bind "$folder/$name" /etc/$name
done
mount -t tmpfs -o mode=755 tmpfs /opt && cd /opt
{INSTALL}
mkdir files && mount --bind "$folder/files" files
unset ${{!COVERAGE_*}}  # The users cannot write its files.
export PYTHONPATH=/opt/gserver LD_LIBRARY_PATH=/opt/python/lib
cd files && exec "$@"
"""
SERVE = ["/opt/venv/bin/python", "-P", "-m", "gserver", "serve"]
UNKNOWN = "unknown user or group, or root; a numeric id that has no name needs USER:GROUP"
NO_CAPABILITY = dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapAmb"), "0000000000000000")

MODULE = """
import subprocess
from gserver.commands import command

@command("ID")
def id(request):
    return subprocess.run(["/opt/files/id"], capture_output=True, text=True).stdout.strip()
"""

#: Tries to become each of its arguments; prints the errors, then its own status.
BECOME = """
import sys
from gserver.errors import FatalError
from gserver.supervise.privileges import become
for who in sys.argv[1:]:
    try:
        become(who)
    except FatalError as failure:
        print(failure.exit_code, failure)
print(open("/proc/self/status").read())
"""


@pytest.fixture
def start(tmp_path: Path) -> list[str]:
    """The start of a command that runs with these users."""
    if os.geteuid() != 0:
        unavailable("only root may become another user")
    (tmp_path / "passwd").write_text(f"gserver-test:x:{UID}:{GID}::/:/bin/false\n")
    groups = {
        "gserver-test": (GID, ""),
        "gserver-other": (OTHER_GID, ""),
        "gserver-key": (KEY_GID, "gserver-test"),
    }
    (tmp_path / "group").write_text(
        "".join(f"{name}:x:{gid}:{who}\n" for name, (gid, who) in groups.items())
    )
    files = tmp_path / "files"
    files.mkdir()
    files.chmod(0o755)
    tmp_path.chmod(0o711)
    return [
        *argv(f"{program('unshare')} --mount {program('bash')} -c"),
        START,
        "start",
        str(tmp_path),
        *INSTALLED,
    ]


def low_port() -> int:
    """A free port that only root may bind."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", random.randrange(600, 1024)))
            return int(probe.getsockname()[1])


def run(command: list[str]) -> str:
    """The output of a command."""
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=True).stdout


def fields(status: str) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)


def assert_is(status: dict[str, str], uid: int, gid: int, groups: set[int]) -> None:
    assert status["Uid"] == "\t".join([str(uid)] * 4)
    assert status["Gid"] == "\t".join([str(gid)] * 4)
    assert {int(group) for group in status["Groups"].split()} == groups
    assert {name: status[name] for name in NO_CAPABILITY} == NO_CAPABILITY
    assert status["NoNewPrivs"] == "1"


def assert_is_the_user(server: Running, processes: int) -> None:
    """Check each thread of each process."""
    family = (psutil.Process(server.pid), *psutil.Process(server.pid).children())
    assert len(family) == processes
    for process in family:
        for path in Path(f"/proc/{process.pid}/task").glob("*/status"):
            assert_is(fields(path.read_text()), UID, GID, {GID, KEY_GID})


def test_a_low_port_is_served_by_another_user_permanently(start: list[str], tmp_path: Path) -> None:
    (tmp_path / "files/extra.py").write_text(MODULE)
    setuid = tmp_path / "files/id"
    setuid.write_bytes(Path(program("id")).read_bytes())
    setuid.chmod(0o6755)
    port = low_port()
    options = ["--port", str(port), "--user", "gserver-test", "--workers", "2", "--admin-port", "0"]
    with Running(*options, "--commands", "extra", command=[*start, *SERVE]) as server:
        server.wait_for("worker.ready", 2)
        server.wait_for("agent.ready")
        assert_is_the_user(server, 4)
        assert Path(f"/proc/{server.pid}/mem").stat().st_uid == 0, (
            "the supervisor holds the key: only root may look into it"
        )
        with server.client() as client:
            assert (server.port, client.who()) == (port, 1)
            assert re.match(rb"uid=64123\S+ gid=64124\S+ groups=", client.ask(b"ID")), (
                "although the program belongs to root and is setuid"
            )
        for child in (*server.workers(), *server.agents()):
            child.kill()
        server.wait_for("worker.ready", 4)
        server.wait_for("agent.ready", 2)
        assert_is_the_user(server, 4)
        with Client(server.admin_port()) as client:
            client.send(b"GET /readyz HTTP/1.0\r\n\r\n")
            assert client.rest().endswith(b"\r\n\r\nready\n")
        assert (server.stop(), server.stderr) == (0, "")


def test_a_key_file_of_root_is_read_at_start_and_as_the_user_at_a_reload(
    start: list[str], tmp_path: Path
) -> None:
    files = tmp_path / "files"
    make_certificates(files)
    key = files / "server.key"
    assert key.stat().st_mode & 0o777 == 0o600
    options = argv("--port 0 --user gserver-test --tls-cert server.pem --tls-key server.key")
    with Running(*options, command=[*start, *SERVE]) as server:
        assert_is_the_user(server, 2)

        def who() -> str:
            return gserver(
                "ask", "--server", f"127.0.0.1:{server.port}", "--tls-ca", str(files / "ca.pem")
            ).stdout

        worker = server.workers()[0].pid
        server.send_signal(signal.SIGHUP)
        why = "--tls-key server.key cannot be read: Permission denied"
        why += f": give user {UID} permission to read it"
        assert server.wait_for("server.reload_failed")["message"].endswith(why)
        assert (who(), server.workers()[0].pid) == ("1\n", worker)
        os.chown(key, 0, KEY_GID)
        key.chmod(0o640)
        server.send_signal(signal.SIGHUP)
        server.wait_for("server.reloaded")
        assert who() == "1\n"
        assert (server.stop(), server.stderr) == (0, "")


def test_a_secret_file_of_root_is_read_before_privileges_are_dropped(
    start: list[str], tmp_path: Path
) -> None:
    token = tmp_path / "files/token"
    token.write_text("a secret\n")
    token.chmod(0o600)
    options = ["--port", "0", "--user", "gserver-test"]
    options += ["--admin-port", "0", "--admin-token-file", "token"]
    with Running(*options, command=[*start, *SERVE]) as server:
        server.wait_for("agent.ready")
        assert_is_the_user(server, 3)
        admin = ["--admin", f"127.0.0.1:{server.admin_port()}"]
        assert gserver("status", *admin, "--admin-token-file", str(token)).returncode == 0
        assert gserver("status", *admin).returncode == 1
        assert (server.stop(), server.stderr) == (0, "")


def test_a_passed_socket_is_taken_before_privileges_are_dropped(start: list[str]) -> None:
    port = low_port()
    kept = [f"--setenv={name}" for name in ("PYTHONPATH", "LD_LIBRARY_PATH")]
    activate = [
        *argv(f"{program('systemd-socket-activate')} -l 127.0.0.1:{port} --fdname=gserver"),
        *kept,
    ]
    with Running(
        "--user", "gserver-test", command=[*start, *activate, *SERVE], wait=False
    ) as server:
        until(lambda: any("Listening" in line for line in server.errors), "systemd listens")
        with Client(port) as client:
            assert client.who() == 1
            assert_is_the_user(server, 2)
        assert server.stop() == 0


@pytest.mark.parametrize(
    ("user", "uid", "gid", "groups"),
    [
        ("gserver-test:gserver-other", UID, OTHER_GID, {OTHER_GID, KEY_GID}),
        ("gserver-test:64998", UID, 64998, {64998, KEY_GID}),
        ("64123", UID, GID, {GID}),
        ("64999:64998", 64999, 64998, {64998}),
    ],
)
def test_a_group_or_numbers_may_be_named(
    user: str, uid: int, gid: int, groups: set[int], start: list[str]
) -> None:
    assert_is(fields(run([*start, SERVE[0], "-c", BECOME, user])), uid, gid, groups)


# Rejected users.


def test_an_unknown_user_and_root_are_refused(start: list[str]) -> None:
    users = argv("no-such-user root 0 0:64124 64999 gserver-test:no-such-group : :64124")
    users += ["4294967295:64124", "64123:4294967295", "99999999999:64124", "-1:64124", "9" * 5000]
    said = run([*start, SERVE[0], "-c", BECOME, *users]).splitlines()
    assert said[: len(users)] == [f"2 --user {user}: {UNKNOWN}" for user in users]
    assert fields("\n".join(said))["Uid"] == "0\t0\t0\t0", "the process is still root"
    done = gserver("--port", "0", "--user", "no-such-user")
    expected = (2, "", f"gserver: --user no-such-user: {UNKNOWN}\n")
    assert (done.returncode, done.stdout, done.stderr) == expected


def test_a_non_root_user_cannot_become_another_user(start: list[str]) -> None:
    as_user = [*start, program("setpriv"), f"--reuid={UID}", f"--regid={GID}", "--clear-groups"]
    said = run([*as_user, SERVE[0], "-c", BECOME, "nobody", "gserver-test"])
    assert said.startswith("1 --user nobody needs root: start it as root\n")
    assert_is(fields(said), UID, GID, set())


def test_capabilities_are_dropped_even_if_the_kernel_would_keep_them(start: list[str]) -> None:
    keep = [
        program("setpriv"),
        "--securebits=+no_setuid_fixup",
        SERVE[0],
        "-c",
        BECOME,
        "gserver-test",
    ]
    assert_is(fields(run([*start, *keep])), UID, GID, {GID, KEY_GID})


def test_a_user_that_may_not_execute_this_python_is_refused(start: list[str]) -> None:
    locked = [
        "sh",
        "-c",
        'chmod 700 /opt && exec "$@"',
        "sh",
        SERVE[0],
        "-c",
        BECOME,
        "gserver-test",
    ]
    said = run([*start, *locked])
    assert re.match(
        r"1 --user gserver-test cannot read /opt/\S+ or /opt/\S+: install both where", said
    )


# Socket files.


def test_a_socket_file_belongs_to_the_user_and_a_stale_one_is_replaced(
    start: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "files/gserver.sock"
    options = ["--bind", "unix:/opt/files/gserver.sock", "--user", "gserver-test"]
    for _ in range(2):
        with Running(*options, command=[*start, *SERVE]) as server:
            found = path.lstat()
            assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (UID, GID, 0o660)
            with UnixClient(path) as client:
                assert client.who() == 1
            assert server.stop() == 0
        assert path.is_socket(), "its folder belongs to root"


@pytest.mark.parametrize("is_link", [True, False])
def test_another_file_in_the_place_of_a_new_socket_is_not_given_away(
    tmp_path: Path, is_link: bool
) -> None:
    precious, path = tmp_path / "precious", tmp_path / "gserver.sock"
    precious.write_text("secret")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        made = path.lstat()
        path.unlink()
        if is_link:
            path.symlink_to(precious)
        else:
            path.hardlink_to(precious)
        with pytest.raises(FatalError, match="was replaced by another file"):
            give_socket(str(path), made.st_dev, made.st_ino, "nobody")
    assert precious.stat().st_uid == os.getuid()
    assert path.lstat().st_uid == os.getuid()
