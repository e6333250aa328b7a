"""Several ways in: one server, one WHO, whatever way its clients have come."""

import os
import signal
import socket
import stat
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from gserver.addresses import KINDS, TCP, TLS, UNIX
from lab.admin import listed, metrics, status
from lab.handover import listening, port_of, start
from lab.installed import Installed
from lab.proxy_header import line
from lab.running import (
    Client,
    Running,
    UnixClient,
    argv,
    error_line,
    extended,
    gserver,
    stopped,
    until,
)
from lab.three_ways import SERVE, Ways, three_ways
from lab.tls_client import certified, trust

WHENCE = """
from gserver.commands import command


@command("WHENCE", may_block=False)
def whence(request):
    return f"{request.address} {request.port}"
"""


def by_way(server: Running) -> dict[str, float]:
    figures = metrics(server)
    return {kind: figures[f'gserver_clients_by_way{{way="{kind}"}}'] for kind in KINDS}


def serve(path: Path, *, wait: bool = True) -> Running:
    return Running("--bind", f"unix:{path}", command=SERVE, wait=wait)


# One WHO.


@pytest.mark.parametrize("workers", ["1", "2"])
def test_clients_of_all_ways_are_in_one_who(tmp_path: Path, pems: Path, workers: str) -> None:
    with three_ways(tmp_path, pems, "--workers", workers) as (server, ways), ExitStack() as stack:
        clients = [stack.enter_context(ways.client(kind)) for kind in (*KINDS, *KINDS)]
        until(lambda: {client.who() for client in clients} == {6}, "all are counted")
        assert {client.ask(b"WHY") for client in clients} == {b"42"}
        assert len({client.ask(b"WHERE") for client in clients}) == 1
        assert by_way(server) == {TCP: 2, TLS: 2, UNIX: 2}
        assert status(server)["clients"]["by_way"] == {TCP: 2, TLS: 2, UNIX: 2}
        for client in clients[:3]:
            client.sock.close()
        until(lambda: clients[3].who() == 3, "three have left")
        assert by_way(server) == {TCP: 1, TLS: 1, UNIX: 1}


def test_a_client_of_the_other_way_that_connected_before_is_in_the_reply(
    tmp_path: Path, pems: Path
) -> None:
    with three_ways(tmp_path, pems) as (server, ways), ways.client(TCP) as asking:
        asking.who()
        [worker] = server.workers()
        for number in range(1, 6):
            with stopped(worker), ExitStack() as stack:
                others = [stack.enter_context(ways.client(UNIX)) for _ in range(number)]
                asking.send(b"WHO\n")
                worker.resume()
                assert int(asking.line()) == 1 + number
                assert {other.who() for other in others} == {1 + number}
            until(lambda: asking.who() == 1, "the others have left")


def test_a_unix_client_is_listed_with_its_user_and_process(tmp_path: Path, pems: Path) -> None:
    with three_ways(tmp_path, pems) as (server, ways), ExitStack() as stack:
        for kind in KINDS:
            stack.enter_context(ways.client(kind)).who()
        found = {each["way"]: each for each in listed(server)}
        assert set(found) == {*KINDS}
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
        accepted = server.wait_for("client.accepted")
        assert (accepted["client.address"], accepted["client.port"]) == ("unix", 0)
        server.wait_for("client.closed")


# Limits.


def test_the_limit_of_clients_is_one_for_all_ways(tmp_path: Path, pems: Path) -> None:
    with three_ways(tmp_path, pems, "--max-clients", "3") as (_, ways), ExitStack() as stack:
        clients = [stack.enter_context(ways.client(kind)) for kind in KINDS]
        until(lambda: {client.who() for client in clients} == {3}, "all are counted")
        for kind in KINDS:
            with ways.client(kind) as surplus:
                assert surplus.line() == b"ERR too many clients\n"


def test_clients_of_a_socket_file_have_no_address_and_no_limit_by_it(
    tmp_path: Path, pems: Path
) -> None:
    options = argv("--max-clients-per-address 1 --workers 2")
    with three_ways(tmp_path, pems, *options) as (server, ways), ExitStack() as stack:
        clients = [stack.enter_context(ways.client(kind)) for kind in (TCP, UNIX, UNIX, UNIX)]
        until(lambda: {client.who() for client in clients} == {4}, "all are counted")
        for kind in (TCP, TLS):
            with ways.client(kind) as surplus:
                assert surplus.line() == b"ERR too many clients from your address\n"
        server.send_signal(signal.SIGHUP)
        server.wait_for("server.reloaded")
        stack.enter_context(ways.client(UNIX)).who()
        with ways.client(TCP) as surplus:
            assert surplus.line() == b"ERR too many clients from your address\n", (
                "the first client is still counted"
            )


def test_a_balancer_may_use_every_way_with_a_port(tmp_path: Path, pems: Path) -> None:
    """The header comes before TLS. A socket file has no balancer."""
    balancer = "127.0.0.2"
    header = line("TCP4", "192.0.2.7", "10.0.0.1", 50000, 4242)
    with three_ways(tmp_path, pems, "--proxy-from", balancer) as (server, ways), ExitStack() as up:
        plain = up.enter_context(Client(ways.port(TCP), source=balancer))
        plain.send(header)
        secret = up.enter_context(Client(ways.port(TLS), source=balancer))
        secret.send(header)
        secret.sock = trust(pems).wrap_socket(secret.sock, server_hostname="127.0.0.1")
        local = up.enter_context(ways.client(UNIX))
        until(lambda: {each.who() for each in (plain, secret, local)} == {3}, "all are counted")
        assert sorted(each["address"] for each in listed(server)) == [
            *("192.0.2.7", "192.0.2.7", "unix")
        ]


# Reloads, upgrades, deaths.


def test_a_reload_keeps_plain_and_unix_clients_and_serves_those_with_tls_for_a_while(
    tmp_path: Path, pems: Path
) -> None:
    with three_ways(tmp_path, pems, "--drain-timeout", "3") as (server, ways), ExitStack() as stack:
        clients = {kind: stack.enter_context(ways.client(kind)) for kind in KINDS}
        until(lambda: {client.who() for client in clients.values()} == {3}, "all are counted")
        server.send_signal(signal.SIGHUP)
        moved = server.wait_for("worker.handed_over")
        assert (moved["gserver.clients"], moved["gserver.staying"]) == (2, 1)
        assert moved["message"].endswith("1 stay for up to 3 s (TLS)")
        assert {client.who() for client in clients.values()} == {3}
        server.wait_for("server.reloaded")
        assert clients[TLS].rest() == b""
        until(lambda: clients[TCP].who() == 2, "the one with TLS has gone")
        with ways.client(TLS) as late:
            assert late.who() == 3
            assert by_way(server) == {TCP: 1, TLS: 1, UNIX: 1}
            assert clients[UNIX].who() == 3
        [unix] = [each for each in listed(server) if each["way"] == UNIX]
        assert unix["pid"] == os.getpid()


def test_an_upgrade_keeps_the_ways_in_and_their_clients(tmp_path: Path) -> None:
    installed, path = Installed(tmp_path), tmp_path / "gserver.sock"
    options = ["--bind", f"unix:{path}", "--bind", "tcp://127.0.0.1:0", "--admin-port", "0"]
    with installed.start(*options, wait=False) as server, ExitStack() as stack:
        server.wait_for("server.listening")
        server.wait_for("agent.ready")
        clients = [stack.enter_context(UnixClient(path)) for _ in range(3)]
        until(lambda: {client.who() for client in clients} == {3}, "all are counted")
        installed.set_version("1.0.1")
        server.send_signal(signal.SIGHUP)
        server.wait_for("server.upgraded")
        server.wait_for("server.reloaded")
        clients.append(stack.enter_context(UnixClient(path)))
        until(lambda: {client.who() for client in clients} == {4}, "all are counted")
        assert server.stop() == 0
    assert not path.exists()


def test_clients_of_a_worker_that_dies_leave_the_count_of_their_ways(
    tmp_path: Path, pems: Path
) -> None:
    with three_ways(tmp_path, pems) as (server, ways), ExitStack() as stack:
        for kind in KINDS:
            stack.enter_context(ways.client(kind)).who()
        server.workers()[0].kill()
        server.wait_for("worker.ready", 2)
        with ways.client(UNIX) as client:
            assert client.who() == 1
            assert by_way(server) == {TCP: 0, TLS: 0, UNIX: 1}


def test_a_stop_answers_the_clients_in_the_queues_of_all_ways(tmp_path: Path, pems: Path) -> None:
    with three_ways(tmp_path, pems) as (server, ways), ExitStack() as stack:
        [worker] = server.workers()
        with stopped(worker):
            clients = [stack.enter_context(ways.client(kind)) for kind in (TCP, UNIX)]
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
        with Running("--bind", f"unix:{path}{mode}", command=SERVE) as server:
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


def test_a_start_that_fails_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "gserver.sock"
    with listening() as taken:
        port = port_of(taken)
        done = gserver("--bind", f"unix:{path}", "--bind", f"tcp://127.0.0.1:{port}")
        assert error_line(done, 1) == (
            f"cannot listen on 127.0.0.1:{port}: it is in use by another program:"
            " stop that one, or choose another --bind"
        )
    assert not path.exists()


def test_of_two_servers_that_start_at_once_one_has_the_file(tmp_path: Path) -> None:
    path = tmp_path / "gserver.sock"
    for _ in range(3):
        with serve(path) as dead:  # It leaves a stale file.
            dead.process.kill()
        with serve(path, wait=False) as one, serve(path, wait=False) as other:
            first_to_end(one, other)
            loser, winner = (one, other) if one.process.poll() is not None else (other, one)
            assert loser.exit_code() == 1
            assert "in use by another program" in loser.stderr
            winner.wait_for("server.listening")
            with UnixClient(path) as client:
                assert client.who() == 1


def first_to_end(*servers: Running) -> None:
    until(lambda: any(each.process.poll() is not None for each in servers), "one has given up")


# Addresses.


def test_both_families_may_share_a_port(tmp_path: Path) -> None:
    with listening("::") as free:
        port = port_of(free)
    options = ["--bind", f"tcp://[::]:{port}", "--bind", f"tcp://127.0.0.1:{port}"]
    with Running(*options, command=SERVE), Client(port, "::1") as six, Client(port) as four:
        until(lambda: (six.who(), four.who()) == (2, 2), "both are counted")


def test_the_short_form_excludes_the_long_one() -> None:
    for option in ("--port", "--host"):
        done = gserver("serve", option, "1", "--bind", "unix:g")
        assert error_line(done) == f"--bind and {option} are both set: set only one"


def test_a_variable_of_a_process_runner_does_not_exclude_it(tmp_path: Path) -> None:
    path = tmp_path / "gserver.sock"
    env = {"PORT": "1", "GSERVER_BIND": f"unix:{path} tcp://127.0.0.1:0"}
    with Running(command=SERVE, env=env) as server, UnixClient(path) as client:
        assert client.who() == 1
        listening = server.events("server.listening")[0]
        assert listening["server.address"] == str(path)
        assert listening["server.port"] is None
        assert listening["message"] == f"listening on {', '.join(server.ways())}"


# Sockets from a service manager.


def test_a_service_manager_may_pass_a_socket_for_each_way(tmp_path: Path, pems: Path) -> None:
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
        assert server.ways() == [
            f"tls://127.0.0.1:{port_of(secret)}",
            f"unix:{path}",
            f"tcp://127.0.0.1:{port_of(plain)}",
        ]
        ways = Ways(server, pems)
        clients = [stack.enter_context(ways.client(kind)) for kind in KINDS]
        until(lambda: {client.who() for client in clients} == {3}, "all are counted")
        assert server.stop() == 0
        assert path.is_socket(), "it belongs to the service manager"


def test_sockets_without_names_are_ways_of_the_default_kind() -> None:
    with listening() as one, listening() as two, start(one, two) as server:
        server.wait_for("server.listening")
        with Client(port_of(one)) as first, Client(port_of(two)) as second:
            until(lambda: (first.who(), second.who()) == (2, 2), "both are counted")


def test_a_passed_socket_for_tls_needs_a_certificate() -> None:
    with listening() as sock, start(sock, LISTEN_FDNAMES="tls") as server:
        assert server.exit_code() == 2
        assert server.stderr == "gserver: --bind tls://... needs --tls-cert\n"


def test_a_pause_of_one_way_does_not_stop_the_other(tmp_path: Path, pems: Path) -> None:
    """Rejections pause the acceptor of their way; the other goes on."""
    with three_ways(tmp_path, pems, "--max-clients", "1") as (server, ways), ExitStack() as stack:
        [kept] = [stack.enter_context(ways.client(UNIX))]
        assert kept.who() == 1
        flood = [stack.enter_context(ways.client(TCP)) for _ in range(100)]
        assert {client.line() for client in flood} == {b"ERR too many clients\n"}
        kept.sock.close()
        until(lambda: metrics(server)["gserver_clients"] == 0, "it has left")
        with ways.client(UNIX) as client:
            assert client.who() == 1
        assert psutil.Process(server.pid).is_running()
