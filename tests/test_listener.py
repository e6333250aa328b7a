"""The listening socket: its options, and the errors for an unusable address."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gserver.addresses import show_address
from gserver.errors import EXIT_RUNTIME, EXIT_USAGE, FatalError
from gserver.supervise.listener import Listener, bind
from lab.handover import listening, start
from lab.running import LIMIT, Client, Running, environment

#: The user and group `nobody`.
NOBODY = 65534


def accepted_by(listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    """A client of this listener, and the accepted socket."""
    client = socket.create_connection(listener.getsockname()[:2], LIMIT)
    listener.settimeout(LIMIT)
    return client, listener.accept()[0]


def needs_ipv6() -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"this machine has no ::1: {error}")


def test_a_listener_does_not_block() -> None:
    with bind("127.0.0.1", 0, 5) as listener:
        assert os.get_blocking(listener.fileno()) is False


def test_a_port_in_time_wait_can_be_bound_again() -> None:
    listener = bind("127.0.0.1", 0, 5)
    port = listener.getsockname()[1]
    client, accepted = accepted_by(listener)
    accepted.close()  # The server closes first, so its side stays in TIME_WAIT.
    assert client.recv(1) == b""
    client.close()
    listener.close()
    bind("127.0.0.1", port, 5).close()


@pytest.mark.parametrize(
    ("host", "text"),
    [
        (
            "host.invalid",
            r"cannot listen on host\.invalid:0: "
            r"the name 'host\.invalid' does not resolve: .*--host",
        ),
        (
            "a" * 64,
            r"the name 'a{64}' does not resolve: choose another --host",
        ),  # no label may be that long
        ("not..a.name", r"the name 'not\.\.a\.name' does not resolve"),
        (
            "192.0.2.1",
            r"cannot listen on 192\.0\.2\.1:0: "
            r"this machine has no such address: choose another --host",
        ),
    ],
    ids=["unknown", "too long", "empty label", "not of this machine"],
)
def test_an_unusable_host_is_reported_with_advice(host: str, text: str) -> None:
    with pytest.raises(FatalError, match=text) as caught:
        bind(host, 0, 5)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == EXIT_RUNTIME


def test_a_low_port_without_permission_is_reported_with_advice() -> None:
    if int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) <= 1:
        pytest.skip("every user of this machine may listen on a low port")
    script = (
        "import os\n"
        "from gserver.errors import FatalError\n"
        "from gserver.supervise.listener import bind\n"
        # Import everything first: the other user may not be able to read the files.
        "bind('127.0.0.1', 0, 5).close()\n"
        f"os.geteuid() or (os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY}))\n"
        "try:\n    bind('127.0.0.1', 1, 5)\nexcept FatalError as failure:\n    print(failure)\n"
    )
    output = subprocess.check_output(
        [sys.executable, "-P", "-c", script], text=True, env=environment()
    )
    assert output == (
        "cannot listen on 127.0.0.1:1: no permission:"
        " choose a --port from 1024 up, or grant CAP_NET_BIND_SERVICE\n"
    )


def test_a_failed_bind_leaves_no_descriptor_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    # The traceback keeps the socket alive, so nothing else closes it.
    with pytest.raises(FatalError) as caught:
        bind("192.0.2.1", 0, 5)
    assert len(os.listdir("/proc/self/fd")) == before, caught


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("127.0.0.1", "127.0.0.1:80"),
        ("localhost", "localhost:80"),
        ("::1", "[::1]:80"),
        ("::", "[::]:80"),
        ("::ffff:127.0.0.1", "[::ffff:127.0.0.1]:80"),
    ],
)
def test_an_address_is_shown_as_it_would_be_typed(host: str, shown: str) -> None:
    assert show_address(host, 80) == shown


def test_an_ipv6_address_in_use_is_shown_in_brackets() -> None:
    needs_ipv6()
    with bind("::1", 0, 5) as other:
        port = other.getsockname()[1]
        with pytest.raises(FatalError, match=rf"cannot listen on \[::1\]:{port}: it is in use"):
            bind("::1", port, 5)


def test_clients_are_served_over_ipv6() -> None:
    needs_ipv6()
    with Running("--host", "::1") as server:
        listening = server.wait_for("server.listening")
        assert listening["server.address"] == "::1"
        assert f"listening on [::1]:{server.port}" in listening["message"]
        with Client(server.port, "::1") as client:
            assert client.ask(b"WHO") == b"1"
            assert client.sock.family == socket.AF_INET6


def test_a_wildcard_host_listens_on_both_address_families() -> None:
    needs_ipv6()
    with bind("::", 0, 5) as listener:
        listener.settimeout(LIMIT)
        port = listener.getsockname()[1]
        for host in ("::1", "127.0.0.1", "127.0.0.2"):
            with socket.create_connection((host, port), LIMIT):
                listener.accept()[0].close()


def test_a_closed_port_that_is_taken_is_not_replaced_by_another_port(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The kernel chose the port, so the socket lost it when it was shut down."""
    with bind("127.0.0.1", 0) as listener:
        address, port = listener.getsockname(), Listener(listener, 5)
        listener.shutdown(socket.SHUT_RDWR)
        with socket.create_server(address):
            port.reopen_if_closed()
            assert not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            assert f"{address[0]}:{address[1]}" in caplog.text
            assert "Address already in use" in caplog.text
        port.reopen_if_closed()
        assert listener.getsockname() == address
        with socket.create_connection(address, LIMIT):
            assert "listening again" in caplog.text


def test_an_admin_socket_from_a_service_manager_needs_a_token_beyond_loopback() -> None:
    options = ("--admin-port", "0")
    with (
        listening() as port,
        listening("0.0.0.0") as admin,
        start(port, admin, options=options, LISTEN_FDNAMES="gserver:admin") as server,
    ):
        assert server.exit_code() == EXIT_USAGE
        reason = "--admin-host 0.0.0.0 is not loopback: set --admin-token, too"
        assert server.stderr == f"gserver: {reason}\n"
