"""Several endpoints: one server, one WHO, whatever endpoint its clients use."""

import fcntl
import os
import signal
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from gserver.addresses import TCP, TLS, TRANSPORTS, UNIX, Endpoint
from gserver.errors import FatalError
from gserver.serve.admission import UNIX_SEND_BYTES
from gserver.supervise import listener
from lab.admin import listed, metrics, status
from lab.endpoints import Endpoints, three_endpoints
from lab.handover import listening, port_of, start
from lab.installed import Installed
from lab.proxy_header import line
from lab.running import (
    GSERVER,
    LIMIT,
    PATIENCE,
    Client,
    Running,
    UnixClient,
    argv,
    error_line,
    extended,
    gserver,
    stopped,
    unavailable,
    until,
)
from lab.tls_client import certified, trust

#: The user id of `nobody`.
NOBODY = 65534
WHENCE = """
from gserver.commands import command


@command("WHENCE", may_block=False)
def whence(request):
    return f"{request.address} {request.port}"
"""
#: A command that ends when there is a file `wake`.
NAP = """
import time
from pathlib import Path

from gserver.commands import command


@command("NAP")
def nap(request):
    while not Path("wake").exists():
        time.sleep(0.01)
    return "done"
"""


def by_transport(server: Running) -> dict[str, float]:
    figures = metrics(server)
    return {
        kind: figures[f'gserver_clients_by_transport{{transport="{kind}"}}'] for kind in TRANSPORTS
    }


def serve(path: Path, *options: str, wait: bool = True) -> Running:
    return Running("--bind", f"unix:{path}", *options, wait=wait)


# One WHO.


@pytest.mark.parametrize("workers", ["1", "2"])
def test_clients_of_all_endpoints_are_in_one_who(tmp_path: Path, pems: Path, workers: str) -> None:
    with (
        three_endpoints(tmp_path, pems, "--workers", workers) as (server, endpoints),
        ExitStack() as stack,
    ):
        clients = [
            stack.enter_context(endpoints.client(kind)) for kind in (*TRANSPORTS, *TRANSPORTS)
        ]
        until(lambda: {client.who() for client in clients} == {6}, "all are counted")
        assert {client.ask(b"WHY") for client in clients} == {b"42"}
        assert len({client.ask(b"WHERE") for client in clients}) == 1
        assert by_transport(server) == {TCP: 2, TLS: 2, UNIX: 2}
        assert status(server)["clients"]["by_transport"] == {TCP: 2, TLS: 2, UNIX: 2}
        for client in clients[:3]:
            client.sock.close()
        until(lambda: clients[3].who() == 3, "three have left")
        assert by_transport(server) == {TCP: 1, TLS: 1, UNIX: 1}


def test_each_endpoint_is_asked_by_the_address_that_the_server_shows(
    tmp_path: Path, pems: Path
) -> None:
    with three_endpoints(tmp_path, pems) as (server, _):
        tcp, tls, unix = server.endpoints()
        trusted = ("--tls-ca", str(pems / "ca.pem"))
        # What the address says wins over what the options imply.
        for address, *options in ((tcp,), (tcp, *trusted), (tls, *trusted), (unix,)):
            done = gserver("ask", "--server", address, *options)
            assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
        done = gserver("ask", "--server", tls)
        assert "has a certificate that is not trusted" in error_line(done, 1)


def test_a_client_of_another_endpoint_that_connected_before_is_in_the_reply(
    tmp_path: Path, pems: Path
) -> None:
    with three_endpoints(tmp_path, pems) as (server, endpoints), endpoints.client(TCP) as asking:
        asking.who()
        [worker] = server.workers()
        for number in range(1, 6):
            with stopped(worker), ExitStack() as stack:
                others = [stack.enter_context(endpoints.client(UNIX)) for _ in range(number)]
                asking.send(b"WHO\n")
                worker.resume()
                assert int(asking.line()) == 1 + number
                assert {other.who() for other in others} == {1 + number}
            until(lambda: asking.who() == 1, "the others have left")


def test_a_unix_client_is_listed_with_its_user_and_process(tmp_path: Path, pems: Path) -> None:
    with three_endpoints(tmp_path, pems) as (server, endpoints), ExitStack() as stack:
        for kind in TRANSPORTS:
            stack.enter_context(endpoints.client(kind)).who()
        found = {each["transport"]: each for each in listed(server)}
        assert set(found) == {*TRANSPORTS}
        assert (found[UNIX]["uid"], found[UNIX]["pid"]) == (os.getuid(), os.getpid())
        assert (found[UNIX]["address"], found[UNIX]["port"]) == ("unix", 0)
        for kind in (TCP, TLS):
            assert (found[kind]["uid"], found[kind]["pid"]) == (None, None)
            assert found[kind]["address"] == "127.0.0.1"
        shown = gserver("clients", "--admin", f"127.0.0.1:{server.admin_port()}").stdout
        assert f"uid {os.getuid()}, pid {os.getpid()}" in shown
        kicked = gserver("kick", "unix", "--admin", f"127.0.0.1:{server.admin_port()}")
        assert kicked.stdout == "closed 1 client\n"


def test_a_handler_and_the_log_name_a_unix_client(tmp_path: Path) -> None:
    path = tmp_path / "gserver.sock"
    options = ("--bind", f"unix:{path}", "--log-level", "debug")
    with extended(tmp_path, WHENCE, *options, wait=False) as server:
        server.wait_for("server.listening")
        with UnixClient(path) as client:
            assert client.ask(b"WHENCE") == b"unix 0"
        for action, verb in (("client.accepted", "accepted"), ("client.closed", "closed")):
            event = server.wait_for(action)
            assert (event["client.address"], event["client.port"]) == ("unix", 0)
            assert event["client.user.id"] == str(os.getuid())
            assert event["gserver.client_pid"] == os.getpid()
            assert event["message"] == f"{verb} unix uid {os.getuid()} pid {os.getpid()}"


# Limits.


def test_the_limit_of_clients_is_one_for_all_endpoints(tmp_path: Path, pems: Path) -> None:
    with (
        three_endpoints(tmp_path, pems, "--max-clients", "3") as (_, endpoints),
        ExitStack() as stack,
    ):
        clients = [stack.enter_context(endpoints.client(kind)) for kind in TRANSPORTS]
        until(lambda: {client.who() for client in clients} == {3}, "all are counted")
        for kind in TRANSPORTS:
            with endpoints.client(kind) as surplus:
                assert surplus.line() == b"ERR too many clients\n"


def test_the_limit_per_address_does_not_apply_to_a_socket_file(tmp_path: Path, pems: Path) -> None:
    options = argv("--max-clients-per-address 1 --workers 2")
    with three_endpoints(tmp_path, pems, *options) as (server, endpoints), ExitStack() as stack:
        clients = [stack.enter_context(endpoints.client(kind)) for kind in (TCP, UNIX, UNIX, UNIX)]
        until(lambda: {client.who() for client in clients} == {4}, "all are counted")
        for kind in (TCP, TLS):
            with endpoints.client(kind) as surplus:
                assert surplus.line() == b"ERR too many clients from your address\n"
        server.send_signal(signal.SIGHUP)
        server.wait_for("server.reloaded")
        stack.enter_context(endpoints.client(UNIX)).who()
        with endpoints.client(TCP) as surplus:
            assert surplus.line() == b"ERR too many clients from your address\n", (
                "the first client is still counted"
            )


def test_a_balancer_may_use_every_endpoint_with_a_port(tmp_path: Path, pems: Path) -> None:
    """The header comes before TLS. A socket file has no balancer."""
    balancer = "127.0.0.2"
    header = line("TCP4", "192.0.2.7", "10.0.0.1", 50000, 4242)
    with (
        three_endpoints(tmp_path, pems, "--proxy-from", balancer) as (server, endpoints),
        ExitStack() as up,
    ):
        plain = up.enter_context(Client(endpoints.port(TCP), source=balancer))
        plain.send(header)
        secret = up.enter_context(Client(endpoints.port(TLS), source=balancer))
        secret.send(header)
        secret.sock = trust(pems).wrap_socket(secret.sock, server_hostname="127.0.0.1")
        local = up.enter_context(endpoints.client(UNIX))
        until(lambda: {each.who() for each in (plain, secret, local)} == {3}, "all are counted")
        assert sorted(each["address"] for each in listed(server)) == [
            *("192.0.2.7", "192.0.2.7", "unix")
        ]


# Reloads, upgrades, deaths.


def test_a_reload_keeps_plain_and_unix_clients_and_serves_those_with_tls_for_a_while(
    tmp_path: Path, pems: Path
) -> None:
    with (
        three_endpoints(tmp_path, pems, "--drain-timeout", "3") as (server, endpoints),
        ExitStack() as stack,
    ):
        clients = {kind: stack.enter_context(endpoints.client(kind)) for kind in TRANSPORTS}
        until(lambda: {client.who() for client in clients.values()} == {3}, "all are counted")
        server.send_signal(signal.SIGHUP)
        moved = server.wait_for("worker.handed_over")
        assert (moved["gserver.clients"], moved["gserver.staying"]) == (2, 1)
        assert moved["message"].endswith("1 stay for up to 3 s (TLS)")
        until(lambda: {client.who() for client in clients.values()} == {3}, "all are served")
        server.wait_for("server.reloaded")
        assert clients[TLS].rest() == b""
        until(lambda: clients[TCP].who() == 2, "the one with TLS has gone")
        with endpoints.client(TLS) as late:
            assert late.who() == 3
            assert by_transport(server) == {TCP: 1, TLS: 1, UNIX: 1}
            assert clients[UNIX].who() == 3
        [unix] = [each for each in listed(server) if each["transport"] == UNIX]
        assert unix["pid"] == os.getpid()


@pytest.mark.outer
def test_a_tls_client_whose_command_runs_is_served_to_its_end_in_a_reload(
    tmp_path: Path, pems: Path
) -> None:
    """It must not move: the new worker would speak plain text to it."""
    options = (*certified(pems), *argv("--bind tls://127.0.0.1:0 --bind tcp://127.0.0.1:0"))
    options = (*options, "--drain-timeout", str(4 * PATIENCE))
    with extended(tmp_path, NAP, *options, wait=False) as server:
        server.wait_for("server.listening")
        endpoints = Endpoints(server, pems)
        with endpoints.client(TLS) as secret, endpoints.client(TCP) as plain:
            until(lambda: (secret.who(), plain.who()) == (2, 2), "both are counted")
            for client in (secret, plain):
                client.send(b"NAP\n")
            time.sleep(0.3)
            server.send_signal(signal.SIGHUP)
            server.wait_for("worker.ready", 2)
            time.sleep(0.3)
            (tmp_path / "wake").touch()
            server.wait_for("worker.handed_over")
            for client in (secret, plain):
                assert client.line() == b"done\n"
            # The one that moves may be counted twice for a moment.
            until(lambda: (secret.who(), plain.who()) == (2, 2), "both are served")
            server.wait_for("server.reloaded")
            assert secret.rest() == b""
            until(lambda: plain.who() == 1, "the one with TLS has gone")


@pytest.mark.outer
def test_a_worker_that_drains_alone_survives_a_reload(tmp_path: Path) -> None:
    """It has closed its endpoints, and is told to hand over."""
    options = argv("--bind tcp://127.0.0.1:0 --drain-timeout 60")
    with extended(tmp_path, NAP, *options) as server:
        with server.client() as client:
            client.send(b"NAP\n")
            time.sleep(0.3)
            server.workers()[0].terminate()
            time.sleep(0.3)
            server.send_signal(signal.SIGHUP)
            server.wait_for("worker.ready", 2)
            time.sleep(0.3)
            (tmp_path / "wake").touch()
            assert client.line() == b"done\n"
        server.wait_for("server.reloaded")
        assert not server.events("worker.died")


def test_an_upgrade_keeps_the_endpoints_and_their_clients(tmp_path: Path) -> None:
    installed, path = Installed(tmp_path), tmp_path / "gserver.sock"
    options = ["--bind", f"unix:{path}", "--bind", "tcp://127.0.0.1:0", "--admin-port", "0"]
    with installed.start(*options, wait=False) as server, ExitStack() as stack:
        server.wait_for("server.listening")
        server.wait_for("agent.ready")
        clients = [stack.enter_context(UnixClient(path)) for _ in range(3)]
        until(lambda: {client.who() for client in clients} == {3}, "all are counted")
        upgrade(installed, server)
        clients.append(stack.enter_context(UnixClient(path)))
        until(lambda: {client.who() for client in clients} == {4}, "all are counted")
        assert server.stop() == 0
    assert not path.exists()


@pytest.mark.outer
def test_an_upgraded_server_does_not_remove_the_file_of_another_one(tmp_path: Path) -> None:
    installed, path = Installed(tmp_path), tmp_path / "gserver.sock"
    with installed.start("--bind", f"unix:{path}", wait=False) as first:
        first.wait_for("server.listening")
        path.unlink()
        with serve(path):
            upgrade(installed, first)
            assert first.stop() == 0
            with UnixClient(path) as client:
                assert client.who() == 1


def upgrade(installed: Installed, server: Running) -> None:
    installed.set_version("1.0.1")
    server.send_signal(signal.SIGHUP)
    server.wait_for("server.upgraded")
    server.wait_for("server.reloaded")


def test_clients_of_a_worker_that_dies_leave_the_count_of_their_transports(
    tmp_path: Path, pems: Path
) -> None:
    with three_endpoints(tmp_path, pems) as (server, endpoints), ExitStack() as stack:
        for kind in TRANSPORTS:
            stack.enter_context(endpoints.client(kind)).who()
        server.workers()[0].kill()
        server.wait_for("worker.ready", 2)
        with endpoints.client(UNIX) as client:
            assert client.who() == 1
            assert by_transport(server) == {TCP: 0, TLS: 0, UNIX: 1}


def test_a_stop_answers_the_clients_in_the_queues_of_all_endpoints(
    tmp_path: Path, pems: Path
) -> None:
    with three_endpoints(tmp_path, pems) as (server, endpoints), ExitStack() as stack:
        [worker] = server.workers()
        with stopped(worker):
            clients = [stack.enter_context(endpoints.client(kind)) for kind in (TCP, UNIX)]
            for client in clients:
                client.send(b"WHY\n")
            server.send_signal(signal.SIGTERM)
            server.wait_for("server.draining")
        assert [client.rest() for client in clients] == [b"42\n"] * 2
        assert server.exit_code() == 0


# Socket files.


def test_a_socket_file_has_its_mode_and_is_removed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "gserver.sock"
    for mode, expected in (("", 0o660), ("?mode=0600", 0o600), ("?mode=0777", 0o777)):
        with Running("--bind", f"unix:{path}{mode}") as server:
            found = path.lstat()
            assert stat.S_ISSOCK(found.st_mode)
            assert stat.S_IMODE(found.st_mode) == expected
            assert server.stop() == 0
        assert not path.exists()


def test_a_stale_socket_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "gserver.sock"
    with serve(path) as dead:
        dead.process.kill()
    assert path.is_socket()
    with serve(path), UnixClient(path) as client:
        assert client.who() == 1


@pytest.mark.parametrize("is_full", [False, True])
def test_a_live_socket_file_is_not_replaced(tmp_path: Path, *, is_full: bool) -> None:
    path = tmp_path / "gserver.sock"
    with socket.socket(socket.AF_UNIX) as other, ExitStack() as stack:
        other.bind(str(path))
        other.listen(0)
        if is_full:
            stack.enter_context(UnixClient(path))
        before = path.lstat().st_ino
        done = gserver("--bind", f"unix:{path}")
        assert error_line(done, 1) == (
            f"cannot listen on {path}: it is in use by another program:"
            " stop that one, or choose another path"
        )
        assert path.lstat().st_ino == before


def test_another_file_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("kept")
    done = gserver("--bind", f"unix:{path}")
    assert error_line(done, 1) == (
        f"cannot listen on {path}: there is another file, which is no socket:"
        " remove it, or choose another path"
    )
    assert path.read_text() == "kept"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    done = gserver("--bind", f"unix:{tmp_path}/none/g.sock")
    assert error_line(done, 1) == (
        f"cannot listen on {tmp_path}/none/g.sock: the folder does not exist:"
        " make it, or choose another path"
    )


def test_the_file_of_the_next_server_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "gserver.sock"
    with serve(path) as first:
        path.unlink()
        with serve(path):
            assert first.stop() == 0
            with UnixClient(path) as client:
                assert client.who() == 1


def reasons(server: Running) -> list[str]:
    return [each["name"] for each in status(server)["reasons"]]


def test_a_socket_file_that_somebody_removes_is_made_again_by_a_reload(tmp_path: Path) -> None:
    path = tmp_path / "gserver.sock"
    with serve(path, "--admin-port", "0") as server, UnixClient(path) as before:
        assert before.who() == 1
        path.unlink()
        lost = server.wait_for("server.port_closed")
        until(lambda: reasons(server) == ["endpoint_lost"], "the verdict has it")
        assert lost["message"] == (
            f"{path} was removed or replaced: no client can connect by it; SIGHUP makes it again"
        )
        server.send_signal(signal.SIGHUP)
        server.wait_for("server.reloaded")
        with UnixClient(path) as after:
            until(lambda: (before.who(), after.who()) == (2, 2), "both are counted")
        until(lambda: reasons(server) == [], "the server is healthy again")
        assert len(server.events("server.port_closed")) == 1
        assert server.stop() == 0
    assert not path.exists()


#: An import fails if there is a file `fail`, and the one with the number in `late` waits for `go`.
SLOW_START = f"""{NAP}
with open("imports", "a") as file:
    file.write("x")
if Path("fail").exists():
    raise OSError("this version is broken")
if len(Path("imports").read_text()) == int(Path("late").read_text()):
    while not Path("go").exists():
        time.sleep(0.01)
"""


@pytest.mark.outer
def test_a_second_reload_that_fails_leaves_the_file_of_the_first_which_continues(
    tmp_path: Path,
) -> None:
    path, imports = tmp_path / "gserver.sock", tmp_path / "imports"
    (tmp_path / "late").write_text("4")
    options = ("--bind", f"unix:{path}", "--workers", "2")
    with extended(tmp_path, SLOW_START, *options, wait=False) as server:
        server.wait_for("worker.ready", 2)
        path.unlink()
        server.wait_for("server.port_closed")
        server.send_signal(signal.SIGHUP)
        server.wait_for("worker.ready", 3)
        until(lambda: len(imports.read_text()) == 4, "the next worker starts")
        (tmp_path / "fail").touch()
        server.send_signal(signal.SIGHUP)
        server.wait_for("server.reloading", 2)
        # A worker of the second reload takes its place.
        max(server.workers(), key=lambda each: each.create_time()).kill()
        failed = server.wait_for("server.reload_failed")
        assert failed["message"].startswith("reload failed, the previous reload continues")
        (tmp_path / "fail").unlink()
        server.wait_for("server.reloaded")
        with UnixClient(path) as client:
            assert client.who() == 1
        assert server.stop() == 0
    assert not path.exists()


@pytest.mark.outer
def test_a_reload_that_fails_makes_no_socket_file(tmp_path: Path) -> None:
    """The workers that stay do not have it: its clients would wait for ever."""
    path = tmp_path / "gserver.sock"
    options = ("--bind", f"unix:{path}", "--bind", "tcp://127.0.0.1:0")
    with extended(tmp_path, NAP, *options, wait=False) as server:
        server.wait_for("worker.ready")
        path.unlink()
        server.wait_for("server.port_closed")
        (tmp_path / "extra.py").write_text("import nonsense\n")
        server.send_signal(signal.SIGHUP)
        server.wait_for("server.reload_failed")
        with pytest.raises(FileNotFoundError):
            UnixClient(path)
        (tmp_path / "extra.py").write_text(NAP)
        server.send_signal(signal.SIGHUP)
        server.wait_for("server.reloaded")
        with UnixClient(path) as client:
            assert client.who() == 1


def test_a_socket_file_has_its_mode_before_anybody_can_connect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, modes, listen = tmp_path / "gserver.sock", [], listener._listen

    def look_and_listen(sock: socket.socket, backlog: int) -> None:
        modes.append(stat.S_IMODE(path.lstat().st_mode))
        listen(sock, backlog)

    monkeypatch.setattr(listener, "_listen", look_and_listen)
    opened = listener._bind_file(Endpoint(UNIX, path=str(path), mode=0o600), 1, "")
    opened.close()
    assert modes == [0o600]


def test_the_socket_of_another_user_is_not_removed(tmp_path: Path) -> None:
    if os.geteuid():
        unavailable("to be another user needs root")
    path = tmp_path / "gserver.sock"
    for folder in (tmp_path, *tmp_path.parents):
        folder.chmod(folder.stat().st_mode | 0o055)
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(path))
        os.seteuid(NOBODY)
        try:
            with pytest.raises(FatalError, match="another user's socket is there"):
                listener._bind_file(Endpoint(UNIX, path=str(path)), 1, "")
        finally:
            os.seteuid(0)
    assert path.exists()


def test_a_start_that_fails_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "gserver.sock"
    ca = str(tmp_path / "none")
    with listening() as taken:
        failures = [
            (1, ["--bind", f"tcp://127.0.0.1:{port_of(taken)}"], "choose another --bind"),
            (2, ["--user", "no-such-user"], "unknown user"),
            (2, ["--redis-url", "rediss://h", "--redis-ca-file", ca], "cannot be used"),
        ]
        for code, options, reason in failures:
            done = gserver("--bind", f"unix:{path}", *options)
            assert reason in error_line(done, code)
            assert not path.exists()


def test_of_two_servers_that_start_at_once_one_has_the_file(tmp_path: Path) -> None:
    path = tmp_path / "gserver.sock"
    with serve(path) as dead:  # It leaves a stale file.
        dead.process.kill()
    with locked(tmp_path) as lock, serve(path, wait=False) as one, serve(path, wait=False) as other:
        until(lambda: waits(one, tmp_path) and waits(other, tmp_path), "both wait for the lock")
        os.close(lock)
        first_to_end(one, other)
        loser, winner = (one, other) if one.process.poll() is not None else (other, one)
        assert loser.exit_code() == 1
        assert "in use by another program" in loser.stderr
        winner.wait_for("server.listening")
        with UnixClient(path) as client:
            assert client.who() == 1


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Another program has locked a folder. Closing the descriptor ends that."""
    fd = os.open(folder, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield fd
    finally:
        with suppress(OSError):
            os.close(fd)


def waits(server: Running, folder: Path) -> bool:
    """Whether a server that starts has the folder open."""
    fds = Path(f"/proc/{server.pid}/fd")
    with suppress(OSError):
        return any(os.readlink(fd) == str(folder) for fd in fds.iterdir())
    return False


def first_to_end(*servers: Running) -> None:
    until(lambda: any(each.process.poll() is not None for each in servers), "one has given up")


@pytest.mark.outer
def test_a_folder_that_stays_locked_is_an_error(tmp_path: Path) -> None:
    with locked(tmp_path):
        done = gserver("--bind", f"unix:{tmp_path}/g.sock")
    assert error_line(done, 1) == (
        f"cannot listen on {tmp_path}/g.sock: another program has locked the folder:"
        " choose another one"
    )


# Addresses.


def test_both_families_may_share_a_port(tmp_path: Path) -> None:
    with listening("::") as free:
        port = port_of(free)
    options = ["--bind", f"tcp://[::]:{port}", "--bind", f"tcp://127.0.0.1:{port}"]
    with Running(*options), Client(port, "::1") as six, Client(port) as four:
        until(lambda: (six.who(), four.who()) == (2, 2), "both are counted")


def test_the_short_form_excludes_the_long_one() -> None:
    for option in ("--port", "--host"):
        done = gserver("serve", option, "1", "--bind", "unix:g")
        assert error_line(done) == f"--bind and {option} are both set: set only one"
        done = gserver("serve", option, "1", GSERVER_BIND="unix:g")
        assert error_line(done) == f"GSERVER_BIND and {option} are both set: set only one"


def test_a_variable_of_a_process_runner_does_not_exclude_it(tmp_path: Path) -> None:
    path = tmp_path / "gserver.sock"
    env = {"PORT": "1", "GSERVER_BIND": f"unix:{path} tcp://127.0.0.1:0"}
    with Running(command=[*GSERVER, "serve"], env=env) as server, UnixClient(path) as client:
        assert client.who() == 1
        listening = server.events("server.listening")[0]
        assert listening["server.address"] == str(path)
        assert listening["server.port"] is None
        assert listening["message"] == f"listening on {', '.join(server.endpoints())}"


# Sockets from a service manager.


def test_a_service_manager_may_pass_a_socket_for_each_endpoint(tmp_path: Path, pems: Path) -> None:
    path = tmp_path / "passed.sock"
    with ExitStack() as stack:
        plain, secret = (stack.enter_context(listening()) for _ in range(2))
        file = stack.enter_context(socket.socket(socket.AF_UNIX))
        file.bind(str(path))
        file.listen()
        server = stack.enter_context(
            start(secret, file, plain, options=(*certified(pems),), LISTEN_FDNAMES="tls:any:tcp")
        )
        server.wait_for("server.listening")
        assert server.endpoints() == [
            f"tls://127.0.0.1:{port_of(secret)}",
            f"unix:{path}",
            f"tcp://127.0.0.1:{port_of(plain)}",
        ]
        endpoints = Endpoints(server, pems)
        clients = [stack.enter_context(endpoints.client(kind)) for kind in TRANSPORTS]
        until(lambda: {client.who() for client in clients} == {3}, "all are counted")
        assert server.stop() == 0
        assert path.is_socket(), "it belongs to the service manager"


def test_sockets_without_names_are_as_without_bind() -> None:
    with listening() as one, listening() as two, start(one, two) as server:
        server.wait_for("server.listening")
        with Client(port_of(one)) as first, Client(port_of(two)) as second:
            until(lambda: (first.who(), second.who()) == (2, 2), "both are counted")


def test_a_passed_socket_for_tls_needs_a_certificate() -> None:
    with listening() as sock, start(sock, LISTEN_FDNAMES="tls") as server:
        assert server.exit_code() == 2
        said = "an endpoint with TLS (tls://, or a passed socket named tls) needs --tls-cert"
        assert server.stderr == f"gserver: {said}\n"


def test_what_a_passed_socket_replaces_is_not_judged(pems: Path) -> None:
    """`--bind` has no TLS, but it is ignored."""
    options = ("--bind", "tcp://127.0.0.1:1", *certified(pems))
    with listening() as sock, start(sock, options=options, LISTEN_FDNAMES="tls") as server:
        server.wait_for("server.listening")
        assert server.endpoints() == [f"tls://127.0.0.1:{port_of(sock)}"]


@pytest.mark.parametrize("name", ["my app.sock", "g?mode=0600", "ü"])
def test_a_passed_socket_file_that_bind_cannot_name_is_refused(tmp_path: Path, name: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / name))
        sock.listen()
        with start(sock) as server:
            assert server.exit_code() == 2
            assert "has a path that --bind cannot name" in server.stderr


# Floods.


def test_after_a_flood_of_rejected_clients_all_endpoints_accept(tmp_path: Path, pems: Path) -> None:
    options = argv("--max-clients 1 --workers 2")
    with three_endpoints(tmp_path, pems, *options) as (_, endpoints), ExitStack() as stack:
        with endpoints.client(UNIX) as kept:
            assert kept.who() == 1
            flood = [stack.enter_context(endpoints.client(TCP)) for _ in range(100)]
            assert {client.line() for client in flood} == {b"ERR too many clients\n"}
            kept.end()
        for transport in TRANSPORTS:
            with endpoints.client(transport) as client:
                assert client.who() == 1
                socket.socket.shutdown(client.sock, socket.SHUT_WR)
                client.rest()


def test_a_slow_reader_of_a_socket_file_leaves_little_in_the_kernel(tmp_path: Path) -> None:
    """It cannot be reset, so what it has not read stays as long as it keeps its socket."""
    path = tmp_path / "gserver.sock"
    options = argv("--write-timeout 0.5 --log-level debug")
    with Running("--bind", f"unix:{path}", *options) as server, UnixClient(path) as client:
        client.sock.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                client.sock.send(1000 * b"WHERE\n")
        server.wait_for("client.closed")
        client.sock.settimeout(LIMIT)
        left = 0
        with suppress(ConnectionResetError):
            while data := client.sock.recv(65536):
                left += len(data)
        assert 0 < left <= 3 * UNIX_SEND_BYTES
