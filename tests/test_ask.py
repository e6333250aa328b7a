"""`gserver ask`: the replies of one server, and one line for failed commands and servers."""

import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gserver.cli.ask import Answer, Server, ask, parse_server
from gserver.errors import FatalError, UsageError
from lab.running import (
    LIMIT,
    PATIENCE,
    Running,
    UnixClient,
    argv,
    environment,
    error_line,
    extended,
    gserver,
    program,
    unavailable,
)

NOT_IN_TIME = "did not answer in time"
NOT_RUNNING = "refused the connection (is it running?)"


def _options(*ports: int) -> list[str]:
    return [word for port in ports for word in ("--server", f"127.0.0.1:{port}")]


def _port(listener: socket.socket) -> int:
    return int(listener.getsockname()[1])


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port without a listener. It is bound, so that none can appear."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield _port(bound)


@pytest.fixture
def mute() -> Iterator[int]:
    """A port where the kernel accepts connections, and nothing is ever sent."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield _port(listener)


@contextmanager
def _server_that(act: Callable[[socket.socket], object]) -> Iterator[int]:
    """The port of a server that does this with its only client, and then closes."""

    def serve() -> None:
        sock, _ = listener.accept()
        with sock, suppress(OSError):
            sock.settimeout(LIMIT)
            sock.recv(100)
            act(sock)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(LIMIT)
        thread = threading.Thread(target=serve)
        thread.start()
        yield _port(listener)
        thread.join()


# Replies.


def test_without_a_command_it_asks_who(server: Running) -> None:
    with server.client() as client:
        client.ask(b"WHY")
        done = gserver("ask", *_options(server.port))
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) >= 2


def test_several_commands_get_their_replies_in_order_from_one_call(server: Running) -> None:
    done = gserver("ask", "WHY", "where", "WHO", "Why", *_options(server.port))
    assert (done.returncode, done.stderr) == (0, "")
    why, where, who, again = done.stdout.splitlines()
    assert (why, again) == ("42", "42")
    assert where == server.events("server.listening")[0]["service.instance.id"]
    assert who.isdigit()


def test_replies_that_come_in_pieces_over_one_connection_are_put_together() -> None:
    def in_pieces(sock: socket.socket) -> None:
        for piece in (b"on", b"e\ntw", b"o\nth", b"ree\n"):
            sock.sendall(piece)
            time.sleep(0.02)

    with _server_that(in_pieces) as port:
        answer = ask(["A", "B", "C"], [Server(("127.0.0.1", port))], LIMIT)
    assert answer == Answer(["one", "two", "three"])


def test_the_first_server_that_answers_is_used(
    server: Running, closed_port: int, mute: int
) -> None:
    done = gserver(
        "ask", "WHY", "WHERE", "--timeout", str(PATIENCE), *_options(closed_port, mute, server.port)
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout == "42\n" + server.events("server.listening")[0]["service.instance.id"] + "\n"
    )


def test_no_further_server_is_asked_after_one_has_answered(server: Running) -> None:
    with socket.create_server(("127.0.0.1", 0)) as later:
        servers = [Server(("127.0.0.1", each)) for each in (server.port, _port(later))]
        assert ask(["WHY", "NOPE"], servers, LIMIT) == Answer(["42"], ["NOPE: ERR unknown command"])
        later.setblocking(False)
        with pytest.raises(BlockingIOError):
            later.accept()


def test_a_reply_of_a_megabyte_is_printed_whole(tmp_path: Path) -> None:
    module = "from lab.commands import replying\nlong = replying('LONG', 1_000_000)\n"
    with extended(tmp_path, module) as server:
        done = gserver("ask", "LONG", "WHY", *_options(server.port))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "x" * 1_000_000 + "\n42\n"


def test_an_ipv6_address_is_given_in_brackets() -> None:
    if not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")
    with Running("--host", "::1") as server:
        done = gserver("ask", "WHY", "--server", f"[::1]:{server.port}")
        assert (done.returncode, done.stdout, done.stderr) == (0, "42\n", "")


# No server answers.


def test_without_an_answer_one_line_reports_what_each_server_did(
    closed_port: int, mute: int
) -> None:
    done = gserver(
        "ask",
        "--timeout",
        "0.2",
        "--server",
        "no-such-host.invalid:42",
        *_options(closed_port, mute),
    )
    assert (done.returncode, done.stdout) == (1, "")
    said = done.stderr.removeprefix("gserver: no server answered: ").split("; ")
    assert said[0].startswith("no-such-host.invalid:42 ")
    assert said[1:] == [
        f"127.0.0.1:{closed_port} {NOT_RUNNING}",
        f"127.0.0.1:{mute} {NOT_IN_TIME}\n",
    ]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"", "closed the connection without a reply"),
        (b"42", "closed the connection without a reply"),
        (b"ERR too many clients\n", "replied ERR too many clients"),
        (b"ERR cluster unavailable\n", "replied ERR cluster unavailable"),
        (b"ERR TLS only\n", "replied ERR TLS only"),
        (b"HTTP/1.1 400 Bad Request\r\n", "sent an invalid reply: 'HTTP/1.1 400 Bad Request\\r'"),
        (b"43\n", "sent an invalid reply to WHY: '43'"),
    ],
)
def test_a_server_that_does_not_answer_is_reported(said: bytes, reason: str) -> None:
    with _server_that(lambda sock: sock.sendall(said)) as port, pytest.raises(FatalError) as caught:
        ask(["WHY"], [Server(("127.0.0.1", port))], LIMIT)
    assert str(caught.value) == f"no server answered: 127.0.0.1:{port} {reason}"


@pytest.mark.parametrize(
    ("said", "replies", "failures"),
    [
        (b"42\n", ["42"], "127.0.0.1:{} closed the connection without a reply (no reply to WHERE)"),
        (
            b"42\nx",
            ["42"],
            "127.0.0.1:{} closed the connection without a reply (no reply to WHERE)",
        ),
        (b"42\nERR idle\n", ["42"], "127.0.0.1:{} replied ERR idle"),
        (b"42\nERR internal\nhere\n", ["42", "here"], "NOPE: ERR internal"),
    ],
)
def test_received_replies_are_printed_and_failures_are_named(
    said: bytes, replies: list[str], failures: str
) -> None:
    commands = ["WHY", "NOPE", "WHERE"] if b"internal" in said else ["WHY", "WHERE"]
    with _server_that(lambda sock: sock.sendall(said)) as port:
        done = gserver("ask", *commands, *_options(port))
    assert done.returncode == 1
    assert done.stdout.splitlines() == replies
    assert done.stderr == f"gserver: {failures.format(port)}\n"


def test_a_command_that_takes_too_long_is_named_and_the_others_are_printed() -> None:
    def halt(sock: socket.socket) -> None:
        sock.sendall(b"42\n")
        sock.recv(1)  # Wait until the client leaves.

    with _server_that(halt) as port:
        done = gserver("ask", "WHY", "SLOW", "--timeout", str(PATIENCE), *_options(port))
    assert (done.returncode, done.stdout) == (1, "42\n")
    assert done.stderr == f"gserver: 127.0.0.1:{port} {NOT_IN_TIME} (no reply to SLOW)\n"


def test_a_server_that_disconnects_is_skipped_for_one_that_answers_fully(server: Running) -> None:
    with _server_that(lambda sock: sock.sendall(b"7\n")) as port:
        done = gserver("ask", "WHO", "WHY", *_options(port, server.port))
    who, why = done.stdout.splitlines()
    assert (done.returncode, done.stderr, why) == (0, "", "42")
    assert who != "7"


def test_a_connection_reset_is_reported() -> None:
    def reset(sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with (
        _server_that(reset) as port,
        pytest.raises(FatalError, match=r"127\.0\.0\.1:[0-9]+ Connection reset by peer$"),
    ):
        ask(["WHY"], [Server(("127.0.0.1", port))], LIMIT)


@pytest.mark.parametrize(
    "garbage", [b"\x1b[31mred\n", b"\x07\n", b"a\tb\n", b"caf\xe9\n", b"\xff\xfe\n", b"a\rb\n"]
)
def test_bytes_that_are_not_printable_ascii_are_not_a_reply(garbage: bytes) -> None:
    with (
        _server_that(lambda sock: sock.sendall(garbage)) as port,
        pytest.raises(FatalError) as caught,
    ):
        ask(["WHY"], [Server(("127.0.0.1", port))], LIMIT)
    assert str(caught.value).isprintable()


def test_an_endless_reply_is_abandoned_before_the_timeout() -> None:
    def talk(sock: socket.socket) -> None:
        while True:
            sock.sendall(b"x" * 65536)

    with _server_that(talk) as port, pytest.raises(FatalError) as caught:
        ask(["WHO"], [Server(("127.0.0.1", port))], LIMIT)
    assert NOT_IN_TIME not in str(caught.value)


def test_a_full_server_is_skipped_and_its_error_reply_is_reported(server: Running) -> None:
    with Running("--max-clients", "1") as full, full.client() as only:
        only.ask(b"WHY")
        done = gserver("ask", "WHO", "WHY", *_options(full.port))
        word = f"no server answered: 127.0.0.1:{full.port} replied ERR too many clients"
        assert error_line(done, 1) == word
        done = gserver("ask", "WHY", *_options(full.port, server.port))
        assert (done.returncode, done.stdout, done.stderr) == (0, "42\n", "")


def test_a_command_that_failed_is_named_and_the_other_replies_are_printed(server: Running) -> None:
    done = gserver("ask", "WHY", "NOPE", "why", "--server", f"127.0.0.1:{server.port}")
    assert (done.returncode, done.stdout) == (1, "42\n42\n")
    assert done.stderr == "gserver: NOPE: ERR unknown command\n"
    done = gserver("ask", "NOPE", "WHY", "caf\u00e9", *_options(server.port))
    assert (done.returncode, done.stdout) == (1, "42\n")
    assert done.stderr == "gserver: NOPE: ERR unknown command; caf\u00e9: ERR not ASCII\n"


@pytest.mark.parametrize("text", ["ERRATIC", "ERR-or"])
def test_a_reply_that_only_begins_like_an_error_is_a_reply(text: str) -> None:
    with Running("--server-id", text) as server:
        done = gserver("ask", "WHERE", *_options(server.port))
    assert (done.returncode, done.stdout) == (0, f"{text}\n")


# TLS.


def test_tls_to_a_plain_port_is_reported_in_one_line(server: Running) -> None:
    done = gserver("ask", "WHY", "--tls", *_options(server.port))
    assert error_line(done, 1) == (
        f"no server answered: 127.0.0.1:{server.port} closed the connection in the TLS"
        " handshake: it does not speak TLS, or is stopping"
    )


@pytest.mark.parametrize(
    "said", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n", b"220 mail\r\n"]
)
def test_tls_to_another_service_is_reported_in_one_line(said: bytes) -> None:
    with _server_that(lambda sock: sock.sendall(said)) as port:
        done = gserver("ask", "WHY", "--tls", *_options(port))
    reason = f"127.0.0.1:{port} does not speak TLS: ask without it"
    assert error_line(done, 1) == f"no server answered: {reason}"


@pytest.mark.parametrize("word", ["", " ", "WHO\nWHY", "WHY\n"])
def test_a_command_that_is_not_one_line_with_one_reply_is_refused(
    server: Running, word: str
) -> None:
    assert error_line(gserver("ask", word, "WHY", "--timeout", "0.5", *_options(server.port)))


# Time.


@contextmanager
def _full_queue() -> Iterator[int]:
    """A port on all loopback addresses with a full accept queue: a connect never completes."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("", 0))
        listener.listen(0)
        for _ in range(3):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", _port(listener)))
        yield _port(listener)


def _say_nothing(sock: socket.socket) -> None:
    sock.recv(1)  # Wait until the client leaves.


def _drip(sock: socket.socket) -> None:
    for _ in range(600):
        sock.sendall(b"4")
        time.sleep(0.05)


def _begin_late(sock: socket.socket) -> None:
    time.sleep(0.7)
    sock.sendall(b"4")
    sock.recv(1)


SLOW = {
    "sends nothing": lambda: _server_that(_say_nothing),
    "drips bytes": lambda: _server_that(_drip),
    "starts just before the timeout": lambda: _server_that(_begin_late),
    "does not accept": _full_queue,
}


@pytest.mark.parametrize("slow", SLOW.values(), ids=SLOW)
def test_a_slow_server_takes_at_most_the_timeout(
    slow: Callable[[], AbstractContextManager[int]],
) -> None:
    with slow() as port:
        began = time.monotonic()
        with pytest.raises(FatalError, match=NOT_IN_TIME):
            ask(["WHO"], [Server(("127.0.0.1", port))], 0.8)
        assert 0.8 <= time.monotonic() - began < 0.8 + 15 * PATIENCE


@pytest.mark.outer
def test_the_timeout_covers_all_addresses_of_a_name(tmp_path: Path) -> None:
    unshare = program("unshare")
    if os.geteuid() != 0:
        unavailable("a private /etc/hosts needs root")
    (tmp_path / "hosts").write_text("127.0.0.2 thrice\n127.0.0.3 thrice\n127.0.0.4 thrice\n")
    own_hosts = 'mount --bind "$1" /etc/hosts && exec "$2" -P -c "$3" "$4"'
    code = """if True:
        import sys, time
        from gserver.cli.ask import Server, ask
        from gserver.errors import FatalError

        began = time.monotonic()
        try:
            ask(["WHO"], [Server(("thrice", int(sys.argv[1])))], 3)
        except FatalError as failure:
            print(time.monotonic() - began, failure)
    """
    with _full_queue() as port:
        done = subprocess.run(
            [
                unshare,
                "-m",
                "sh",
                "-c",
                own_hosts,
                "sh",
                tmp_path / "hosts",
                sys.executable,
                code,
                str(port),
            ],
            capture_output=True,
            text=True,
            timeout=LIMIT,
            env=environment(),
            check=False,
        )
    if "mount" in done.stderr or "unshare" in done.stderr:
        unavailable(f"mounting is not permitted here: {done.stderr}")
    taken, _, said = done.stdout.partition(" ")
    assert said == f"no server answered: thrice:{port} {NOT_IN_TIME}\n"
    assert 3 <= float(taken) < 8


def test_each_of_several_servers_has_the_whole_timeout(mute: int) -> None:
    began = time.monotonic()
    with pytest.raises(FatalError):
        ask(["WHO"], [Server(("127.0.0.1", mute))] * 3, 0.2)
    assert 0.6 <= time.monotonic() - began < 0.6 + 15 * PATIENCE


# Socket files.


def test_a_server_is_asked_by_its_socket_file(tmp_path: Path) -> None:
    path = tmp_path / "gserver.sock"
    with Running("--bind", f"unix:{path}", "--server-id", "here") as server:
        done = gserver("ask", "--server", f"unix:{path}", "WHO", "WHERE")
        assert (done.returncode, done.stdout) == (0, "1\nhere\n")
        done = gserver("ask", "--server", f"unix:{path}", "--tls")
        assert (done.returncode, done.stdout) == (0, "1\n"), "it has no TLS, and others may have"
        assert server.stop() == 0
    done = gserver("ask", "--server", f"unix:{path}")
    assert error_line(done, 1) == f"no server answered: {path} does not exist (is it running?)"


def test_a_full_queue_of_a_socket_file_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "full.sock"
    with socket.socket(socket.AF_UNIX) as busy, ThreadPoolExecutor() as pool, ExitStack() as stack:
        busy.bind(str(path))
        busy.listen(0)
        stack.enter_context(UnixClient(path))
        asked = pool.submit(ask, ["WHY"], [Server(str(path))], LIMIT)
        time.sleep(0.1)
        for _ in range(2):
            accepted, _ = busy.accept()
            stack.enter_context(accepted)
        assert accepted.recv(10) == b"WHY\n"
        accepted.sendall(b"42\n")
        assert asked.result().replies == ["42"]
        stack.enter_context(UnixClient(path))
        with pytest.raises(FatalError, match="did not answer in time"):
            ask(["WHY"], [Server(str(path))], 0.2)


# Addresses.


@pytest.mark.parametrize(
    ("text", "server"),
    [
        ("127.0.0.1:4242", Server(("127.0.0.1", 4242))),
        ("localhost:1", Server(("localhost", 1))),
        ("example.org:65535", Server(("example.org", 65535))),
        ("[::1]:4242", Server(("::1", 4242))),
        ("[fe80::1%eth0]:80", Server(("fe80::1%eth0", 80))),
        ("tcp://127.0.0.1:4242", Server(("127.0.0.1", 4242), has_tls=False)),
        ("tls://[::1]:4244", Server(("::1", 4244), has_tls=True)),
        ("unix:/run/gserver.sock", Server("/run/gserver.sock", has_tls=False)),
        ("unix:///run/gserver.sock?mode=0660", Server("/run/gserver.sock", has_tls=False)),
        ("unix:gserver.sock", Server("gserver.sock", has_tls=False)),
    ],
)
def test_an_address_is_a_host_and_a_port_or_a_path(text: str, server: Server) -> None:
    assert parse_server(text) == server


BAD_ADDRESSES = [
    "",
    *argv(
        ": 4242 :4242 []:4242 localhost localhost: localhost:0"
        " localhost:65536 localhost:-1 localhost:+1"
    ),
    "localhost: 1",
    "localhost:1 ",
    "localhost:1.5",
    "localhost:http",
    "localhost:٤٢",
    "localhost:²",
    "localhost:" + "9" * 5000,
    *argv("://localhost:1 http://localhost:1 tls://localhost tcp://tls://localhost:1 tls://:1"),
]
BAD_PATHS = "unix:", "unix:?mode=0660", "unix:/" + "x" * 107


@pytest.mark.parametrize("text", BAD_ADDRESSES)
def test_an_invalid_address_is_refused(text: str) -> None:
    with pytest.raises(
        UsageError,
        match=r"is not an address: write HOST:PORT, such as 127\.0\.0\.1:4242 or \[::1\]:4242",
    ):
        parse_server(text)


@pytest.mark.parametrize("text", BAD_PATHS)
def test_an_invalid_path_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a Unix socket: write unix:PATH"):
        parse_server(text)


@given(st.text(max_size=30))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        found = parse_server(text)
    except UsageError:
        return
    host, port = (found.address, 1) if isinstance(found.address, str) else found.address
    assert host
    assert 0 < port < 65536


@pytest.mark.parametrize("text", ["4242", "localhost:" + "9" * 5000])
def test_a_bad_address_is_reported_before_any_server_is_asked(server: Running, text: str) -> None:
    done = gserver("ask", *_options(server.port), "--server", text)
    assert error_line(done).startswith(f"{text[:20]!r}"[:-1])


@pytest.mark.parametrize(
    "host", ["no-such-host.invalid", "a..b", "x" * 64, "x" * 300, " ", "a b", "http://localhost"]
)
def test_a_name_that_does_not_resolve_is_reported(host: str) -> None:
    with pytest.raises(FatalError) as caught:
        ask(["WHO"], [Server((host, 1))], LIMIT)
    said = str(caught.value)
    assert said.startswith(f"no server answered: {host}:1 ")
    assert len(said) > len(f"no server answered: {host}:1 ")
    assert "Traceback" not in said


@pytest.mark.parametrize("timeout", ["0", "-1", "nan", "inf", "soon"])
def test_an_invalid_timeout_is_refused(timeout: str) -> None:
    said = error_line(gserver("ask", "--timeout", timeout))
    assert said.startswith("Invalid value for '--timeout': ")


# Output that is not read.


def _ask_into(stdout: int, port: int) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "gserver", "ask", "WHY", *_options(port)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=LIMIT,
        env=environment(),
        check=False,
    )
    return done.returncode, done.stderr


def test_a_closed_output_pipe_ends_the_command_silently(server: Running) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    try:
        assert _ask_into(theirs, server.port) == (1, "")
    finally:
        os.close(theirs)


def test_output_to_a_full_disk_is_reported_in_one_line(server: Running) -> None:
    with Path("/dev/full").open("wb") as full:
        code, said = _ask_into(full.fileno(), server.port)
    assert code == 1
    assert said.startswith("gserver: ")
    assert "No space left on device" in said
    assert said.count("\n") == 1
