"""States that a service manager is sent, and sockets that it passes.

Tested with real sockets and with systemd-socket-activate.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from gserver.errors import UsageError
from gserver.supervise.systemd import VARIABLES, Manager
from lab.admin import status
from lab.handover import listening, port_of, start
from lab.installed import Installed
from lab.redises import free_port
from lab.running import GSERVER, LIMIT, PATIENCE, ROOT, Client, Running, argv, program, until
from lab.tls_client import certified

SECOND = PATIENCE

MODULE = """
import os
from gserver.commands import command

@command("VARIABLES")
def variables(request):
    theirs = ("LISTEN_", "NOTIFY_", "WATCHDOG_")
    return " ".join(sorted(name for name in os.environ if name.startswith(theirs))) or "-"
"""


class Listener:
    """The manager's end of sd_notify: a datagram socket."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self._socket.settimeout(LIMIT)
        self.address = address.replace("\0", "@")

    def __enter__(self) -> "Listener":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def message(self, *but: str) -> list[str]:
        """The lines of the next message whose first line is not in `but`."""
        while (lines := self._socket.recv(4096).decode().splitlines())[0] in but:
            continue
        return lines

    def waiting(self) -> list[str]:
        """The first lines of all messages that have arrived."""
        found = []
        self._socket.setblocking(False)
        try:
            while True:
                found.append(self._socket.recv(4096).decode().splitlines()[0])
        except BlockingIOError:
            return found
        finally:
            self._socket.settimeout(LIMIT)


# States and heartbeats.


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    with Listener(str(tmp_path / "notify")) as listener:
        yield listener


def test_the_manager_is_sent_ready_reloading_and_stopping(
    listener: Listener, tmp_path: Path
) -> None:
    (tmp_path / "extra.py").write_text(MODULE)
    options = ("--workers", "2", "--commands", "extra")
    env = {"NOTIFY_SOCKET": listener.address, "PYTHONDONTWRITEBYTECODE": "1"}
    with Running(*options, env=env, cwd=tmp_path) as server:
        assert listener.message() == [
            "READY=1",
            f"STATUS=listening on 127.0.0.1:{server.port}, workers: 2",
        ]

        began = time.monotonic_ns() // 1000
        server.send_signal(signal.SIGHUP)
        state, moment, status = listener.message()
        assert (state, status) == ("RELOADING=1", "STATUS=replacing the workers one by one")
        name, _, value = moment.partition("=")
        assert name == "MONOTONIC_USEC"
        assert began <= int(value) <= time.monotonic_ns() // 1000
        assert listener.message()[0] == "READY=1"
        assert server.events("server.reloaded")

        (tmp_path / "extra.py").write_text("raise RuntimeError('broken')")
        server.send_signal(signal.SIGHUP)
        assert listener.message()[0] == "RELOADING=1"
        state, status = listener.message()
        assert state == "READY=1"
        assert "; the last reload failed: a new worker did not start: " in status
        assert status.endswith("cannot import it: RuntimeError: broken (extra.py, line 1)")
        server.wait_for("server.reload_failed")
        assert len(server.events("server.reloaded")) == 1

        with server.client() as client:
            client.who()
            server.send_signal(signal.SIGUSR2)
            assert listener.message() == ["STOPPING=1", "STATUS=stopping, clients: 1"]
            assert client.who() == 1, "the lame duck still serves"
        assert server.exit_code() == 0
    assert set(listener.waiting()) <= {"STOPPING=1"}, "only the number of clients changes"


def test_the_manager_is_sent_a_reload_that_fails_at_once(
    listener: Listener, pems: Path, tmp_path: Path
) -> None:
    for name in ("server.pem", "server.key"):
        shutil.copy(pems / name, tmp_path)
    with Running(*certified(tmp_path), env={"NOTIFY_SOCKET": listener.address}) as server:
        assert listener.message()[0] == "READY=1"
        (tmp_path / "server.pem").unlink()
        server.send_signal(signal.SIGHUP)
        assert listener.message()[0] == "RELOADING=1"
        state, status = listener.message()
        assert state == "READY=1"
        assert "the last reload failed: --tls-cert " in status


def test_an_upgrade_keeps_the_manager_and_its_sockets(listener: Listener, tmp_path: Path) -> None:
    installed = Installed(tmp_path)
    with (
        listening() as port,
        listening() as admin,
        start(
            port,
            admin,
            options=("--admin-port", "0"),
            program=installed.program,
            NOTIFY_SOCKET=listener.address,
            LISTEN_FDNAMES="gserver:admin",
            WATCHDOG_USEC="500000",
            PYTHONDONTWRITEBYTECODE="1",
        ) as server,
        Client(port_of(port)) as client,
    ):
        assert listener.message("WATCHDOG=1")[0] == "READY=1"
        installed.set_version("1.0.1")
        server.send_signal(signal.SIGHUP)
        assert listener.message("WATCHDOG=1")[0] == "RELOADING=1"
        server.wait_for("server.reloaded")
        assert listener.message("WATCHDOG=1", "RELOADING=1")[0] == "READY=1"
        assert listener.message()[0] == "WATCHDOG=1"
        assert client.who() == 1
        with Client(port_of(port)) as other:
            assert other.who() == 2
        server.wait_for("agent.ready", 2)
        assert status(server)["server"]["version"] == "1.0.1"


def test_a_server_that_is_never_ready_does_not_send_ready(
    listener: Listener, tmp_path: Path
) -> None:
    (tmp_path / "extra.py").write_text("import os; os.abort()")
    env = {"NOTIFY_SOCKET": listener.address}
    with Running("--commands", "extra", env=env, cwd=tmp_path, wait=False) as server:
        server.wait_for("worker.died", 2)
        assert listener.waiting() == []
        server.stop()
    assert listener.waiting() == ["STOPPING=1"]


def test_heartbeats_are_sent_at_least_twice_per_watchdog_interval(tmp_path: Path) -> None:
    with Listener(str(tmp_path / "notify")) as listener:
        env = {"NOTIFY_SOCKET": listener.address, "WATCHDOG_USEC": "400000"}
        with Running(env=env) as server:
            supervisor = psutil.Process(server.pid)
            used, moments = sum(supervisor.cpu_times()[:2]), []
            listener.waiting()
            for _ in range(5):
                assert listener.message("READY=1") == ["WATCHDOG=1"]
                moments.append(time.monotonic())
            assert moments[-1] - moments[0] < 4 * 0.2 * SECOND + 0.2
            assert moments[-1] - moments[0] > 0.5, "heartbeats are not more frequent"
            assert sum(supervisor.cpu_times()[:2]) - used < 0.5
            supervisor.suspend()
            listener.waiting()
            time.sleep(0.5)
            assert listener.waiting() == [], "a hung supervisor sends no heartbeat"
            supervisor.resume()
            assert listener.message() == ["WATCHDOG=1"]


def test_a_watchdog_of_another_process_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "600000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert Manager.from_environment().due_at < 0
    monkeypatch.setenv("WATCHDOG_USEC", "600000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getppid()))
    assert Manager.from_environment().due_at > 1e9


def test_an_undelivered_message_is_sent_again_without_blocking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    monkeypatch.setenv("WATCHDOG_USEC", "10000000")
    manager = Manager.from_environment()
    manager.notify("READY=1", "no listener")
    manager.keep_heartbeat(100.0)
    assert manager.due_at == pytest.approx(100.1)
    with Listener(address) as listener:
        manager.notify("READY=1", "no listener")
        assert listener.message() == ["READY=1", "STATUS=no listener"]
        for number in range(10_000):  # Without a reader the queue fills long before that.
            manager.notify("READY=1", str(number))
        assert 0 < len(listener.waiting()) < 10_000
        manager.notify("READY=1", "9999")
        assert listener.message() == ["READY=1", "STATUS=9999"]


def test_the_address_may_be_an_abstract_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    with Listener(f"\0gserver-test-{os.getpid()}") as listener:
        monkeypatch.setenv("NOTIFY_SOCKET", listener.address)
        Manager.from_environment().notify("READY=1", "here")
        assert listener.message() == ["READY=1", "STATUS=here"]


@pytest.mark.parametrize(
    "address", ["/no/such/folder/notify", "@nobody", "vsock:2:1234", "/" + "x" * 200, "@"]
)
def test_an_address_without_a_listener_is_not_an_error(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    manager = Manager.from_environment()
    manager.notify("READY=1", "here")
    manager.keep_heartbeat(100.0)
    assert manager.due_at > 100.0


def test_an_unreachable_manager_uses_no_cpu() -> None:
    with Running(env={"NOTIFY_SOCKET": "@nobody", "WATCHDOG_USEC": "1000000"}) as server:
        used = sum(psutil.Process(server.pid).cpu_times()[:2])
        time.sleep(0.3)
        assert sum(psutil.Process(server.pid).cpu_times()[:2]) - used < 0.1, (
            "the supervisor does not spin"
        )
        assert server.who() == 1
        assert server.stop() == 0
        assert server.stderr == ""


@pytest.mark.parametrize("text", ["", "0", "soon", "-1", "1.5"])
def test_a_watchdog_without_a_time_is_ignored(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", text)
    assert Manager.from_environment().due_at > 1e9
    assert "WATCHDOG_USEC" not in os.environ


# Passed sockets.


def refused(*handed: socket.socket | int, options: tuple[str, ...] = (), **env: str) -> str:
    """The error line of a server that refuses to start with these sockets."""
    with start(*handed, options=options, **env) as server:
        assert server.exit_code() == 2, server.lines
        assert len(server.errors) == 1
        assert server.stderr.startswith("gserver: ")
        assert server.lines == []
    return server.stderr


@pytest.mark.parametrize(("host", "name"), [("127.0.0.1", "gserver.socket"), ("::1", "")])
def test_a_passed_socket_is_the_port(host: str, name: str) -> None:
    with (
        listening(host) as sock,
        start(sock, options=("--port", "1"), LISTEN_FDNAMES=name) as server,
    ):
        said = server.wait_for("server.listening")
        assert (said["server.address"], said["server.port"]) == (host, port_of(sock))
        with Client(port_of(sock), host) as client:
            assert client.who() == 1
        assert server.stop() == 0
        with socket.create_connection((host, port_of(sock)), LIMIT):
            pass  # The socket stays open for the next server.


def test_named_sockets_are_the_port_and_the_admin_port() -> None:
    with ExitStack() as stack:
        admin, port = (stack.enter_context(listening()) for _ in range(2))
        options = ("--admin-port", "1")
        with start(admin, port, options=options, LISTEN_FDNAMES="admin:gserver") as server:
            said = server.wait_for("server.listening")
            assert (said["server.port"], said["gserver.admin_port"]) == (
                port_of(port),
                port_of(admin),
            )

            def readiness() -> bytes:
                command = [program("curl"), "-sS", f"http://127.0.0.1:{port_of(admin)}/readyz"]
                return subprocess.run(command, capture_output=True, check=True).stdout

            until(lambda: readiness() == b"ready\n", "that is published")
            with Client(port_of(port)) as client:
                assert client.who() == 1


def test_a_passed_socket_gets_the_options_of_a_bound_one() -> None:
    with (
        listening() as sock,
        start(sock, options=("--backlog", "7", "--admin-port", "0")) as server,
    ):
        admin_port = server.wait_for("server.listening")["gserver.admin_port"]
        assert admin_port not in (port_of(sock), 0), "the admin port was not passed, so it is bound"
        listing = subprocess.run(
            [program("ss"), "-Hltn", f"sport = :{port_of(sock)}"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert listing.stdout.split()[2] == "7"
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        options = (
            socket.TCP_KEEPIDLE,
            socket.TCP_KEEPINTVL,
            socket.TCP_KEEPCNT,
            socket.TCP_USER_TIMEOUT,
        )
        expected = [60, 15, 4, 120_000]
        assert [sock.getsockopt(socket.IPPROTO_TCP, each) for each in options] == expected
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        assert os.get_blocking(sock.fileno()) is False


def test_children_do_not_get_the_variables_of_the_manager(tmp_path: Path) -> None:
    (tmp_path / "extra.py").write_text(MODULE)
    env = {"NOTIFY_SOCKET": "@nobody", "WATCHDOG_USEC": "9000000", "LISTEN_FDNAMES": "gserver"}
    with (
        listening() as sock,
        start(sock, options=("--commands", "extra"), cwd=str(tmp_path), **env) as server,
    ):
        server.wait_for("server.listening")
        assert set(psutil.Process(server.pid).environ()) >= {*VARIABLES} - {
            "LISTEN_PIDFDID",
            "WATCHDOG_PID",
        }
        with Client(port_of(sock)) as client:
            assert client.ask(b"VARIABLES") == b"-"


def test_sockets_for_another_process_are_ignored() -> None:
    with listening() as sock, start(sock, options=("--port", "0"), OFFSET="1") as server:
        assert server.wait_for("server.listening")["server.port"] != port_of(sock)


def test_a_descriptor_that_is_not_a_listening_stream_socket_is_refused(tmp_path: Path) -> None:
    with ExitStack() as stack:
        wrong: dict[str, socket.socket | int] = {
            "not a socket": (stack.enter_context((tmp_path / "file").open("w"))).fileno(),
            "AF_INET SOCK_DGRAM": stack.enter_context(
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            ),
            "AF_UNIX SOCK_DGRAM": stack.enter_context(
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            ),
            "not listening": stack.enter_context(socket.socket()),
        }
        for what, handed in wrong.items():
            said = f"socket 3 (unknown) was passed by the service manager, but is {what}:"
            assert f"{said} it must be a listening stream socket" in refused(handed)


def test_unused_passed_sockets_are_refused() -> None:
    """Their clients would wait endlessly."""
    with listening() as one, listening() as two, listening() as three:
        passed = "socket {} (admin) was passed by the service manager, but {}\n"
        unused = passed.format(4, "there is no admin port: set --admin-port")
        assert unused in refused(one, two, LISTEN_FDNAMES="gserver:admin")
        second = passed.format(5, "it has passed one already")
        options = ("--admin-port", "0")
        assert second in refused(
            one, two, three, options=options, LISTEN_FDNAMES="gserver:admin:admin"
        )


@pytest.mark.parametrize(
    ("fds", "names"), [("many", ""), ("-1", ""), ("", ""), ("2", "one"), ("1", "one:two")]
)
def test_inconsistent_socket_numbers_and_names_are_refused(
    fds: str, names: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", fds)
    monkeypatch.setenv("LISTEN_FDNAMES", names)
    with pytest.raises(UsageError, match="see sd_listen_fds"):
        Manager.from_environment()


# systemd-socket-activate waits for a client before it starts the server.


def test_the_client_that_starts_the_server_is_served(listener: Listener) -> None:
    port = free_port()
    kept = [f"--setenv=PYTHONPATH={ROOT}", f"--setenv=NOTIFY_SOCKET={listener.address}"]
    activate = [
        *argv(f"{program('systemd-socket-activate')} -l 127.0.0.1:{port} --fdname=gserver"),
        *kept,
    ]
    with Running(command=[*activate, *GSERVER, "--workers", "1"], wait=False) as server:
        until(lambda: any("Listening" in line for line in server.errors), "systemd listens")
        with Client(port) as client:
            assert client.who() == 1
            assert listener.message() == [
                "READY=1",
                f"STATUS=listening on 127.0.0.1:{port}, workers: 1",
            ]
            server.send_signal(signal.SIGHUP)
            assert [listener.message()[0] for _ in range(2)] == ["RELOADING=1", "READY=1"]
            server.wait_for("server.reloaded")
            assert client.who() == 1
        assert server.stop() == 0
        assert listener.message()[0] == "STOPPING=1"


def test_a_datagram_socket_of_systemd_is_refused() -> None:
    address = ("127.0.0.1", free_port())
    listen = [program("systemd-socket-activate"), "-d", "-l", f"127.0.0.1:{address[1]}"]
    with Running(
        command=[*listen, f"--setenv=PYTHONPATH={ROOT}", *GSERVER, "serve"], wait=False
    ) as server:
        until(lambda: any("Listening" in line for line in server.errors), "systemd listens")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"WHO\n", address)
            assert server.exit_code() == 2
            assert "is AF_INET SOCK_DGRAM" in server.stderr
