"""The protocol over real sockets: the table of cases, deadlines, closing, slow and greedy clients,
and everyday programs.
"""

import os
import pty
import select
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from lab import wire_cases as wire
from lab.running import LIMIT, PATIENCE, Client, Running, argv, program, until
from lab.wire_cases import CASES, Case

#: Timeouts of the servers below, in seconds.
UNTERMINATED_AFTER = 1.0
LINE_TIMEOUT = 1.0
WRITE_TIMEOUT = 2.0
IDLE_TIMEOUT = 1.0
NAP = 1.5
MAX_CLIENTS = 8
#: States in /proc/net/tcp.
LAST_ACK = "09"

NAPS = f"""
import sys
import time
import gevent
from gserver.commands import command
from lab.commands import napping, replying

nap = napping("NAP", {NAP})
large = replying("LARGE", 20_000_000)

@command("BOOM")
def boom(request):
    raise RuntimeError("no secret of mine")

@command("LEAVE")
def leave(request):
    sys.exit(3)

@command("LATE")
def late(request):
    with gevent.Timeout(0.01):
        time.sleep(60)

@command("LINES")
def lines(request):
    return "one\\ntwo"
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """A server with default options."""
    with Running() as running:
        yield running


@pytest.fixture(scope="module")
def here() -> Iterator[Running]:
    """The server for the table of cases.

    Its `--unterminated-after` is long, so a stall of this machine does not end a line.
    """
    options = ("--server-id", wire.SERVER_ID, "--unterminated-after", str(UNTERMINATED_AFTER))
    with Running(*options) as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a module of commands."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "naps.py").write_text(NAPS)
    return folder


@pytest.fixture(scope="module")
def strict(folder: Path) -> Iterator[Running]:
    """A server with short deadlines and few places; it never answers an unterminated command."""
    timeouts = argv(
        f"--line-timeout {LINE_TIMEOUT} --write-timeout {WRITE_TIMEOUT} --unterminated-after 0"
    )
    with Running(
        *timeouts, "--max-clients", str(MAX_CLIENTS), "--commands", "naps", cwd=folder
    ) as running:
        yield running


@pytest.fixture(scope="module")
def napping(folder: Path) -> Iterator[Running]:
    """A server that closes idle clients."""
    with Running("--commands", "naps", "--idle-timeout", str(IDLE_TIMEOUT), cwd=folder) as running:
        yield running


def wait_until_alone(server: Running) -> None:
    """Wait until the clients of earlier tests are uncounted."""

    def is_alone() -> bool:
        with server.client() as client:
            is_one = client.ask(b"WHO") == b"1"  # This client may be rejected.
            with suppress(OSError):
                client.end()  # A client that has read the end is already uncounted.
        return is_one

    until(is_alone, "all other clients have left")


def is_readable(client: Client, within: float = 0) -> bool:
    """Whether the server sends anything, or closes, within that time."""
    return bool(select.select([client.sock], [], [], within)[0])


@contextmanager
def stalled(server: Running) -> Iterator[None]:
    """Stop the worker during the body, as on an overloaded machine."""
    [worker] = server.workers()
    worker.suspend()
    try:
        yield
    finally:
        worker.resume()


# The table.

every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
short_cases = [case for case in CASES if 1 < len(case.sent) < 50][::4]


@every_case
def test_a_case_with_end_of_input_gets_its_replies_and_a_clean_close(
    here: Running, case: Case
) -> None:
    with here.client() as client:
        client.send(case.sent)
        assert client.end() == case.replies


@every_case
def test_a_case_with_a_newline_gets_its_replies_and_is_closed_or_not(
    here: Running, case: Case
) -> None:
    with here.client() as client:
        client.send(case.sent + b"\n")
        assert b"".join(client.line() for _ in range(case.replies.count(b"\n"))) == case.replies
        if case.stays_open:
            assert client.ask(b"WHY") == b"42"
            assert client.end() == b""
        else:
            assert client.rest() == b""


@pytest.mark.parametrize("case", short_cases, ids=[case.name for case in short_cases])
def test_a_case_sent_byte_by_byte_gets_the_same_replies(here: Running, case: Case) -> None:
    with here.client() as client:
        client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(len(case.sent)):
            client.send(case.sent[at : at + 1])
        assert client.end() == case.replies


def test_after_end_of_input_all_is_answered_and_closed_cleanly(server: Running) -> None:
    with server.client() as client:
        client.send(b"WHY\nNOPE\n" * 10_000 + b"why")
        assert client.end() == b"42\nERR unknown command\n" * 10_000 + b"42\n"


# Without a newline.


@pytest.mark.parametrize("command", [b"WHY", b"why", b" Why\t", b"WHY\r"])
def test_an_unterminated_command_is_answered_after_a_tenth_of_a_second(
    server: Running, command: bytes
) -> None:
    with server.client() as client:
        began = time.monotonic()
        client.send(command)
        assert client.line() == b"42\n"
        assert 0.08 <= time.monotonic() - began < 5 * PATIENCE
        # The late newline is a blank line.
        client.send(b"\r\n")
        assert client.ask(b"NOPE") == b"ERR unknown command"
        assert client.end() == b""


def test_a_reply_does_not_wait_for_the_unterminated_command_behind_it(here: Running) -> None:
    with here.client() as client:
        client.send(b"WHERE\nWHY")
        assert client.line() == b"here\n"
        assert not is_readable(client, 0.1)
        assert client.line() == b"42\n"


def test_blanks_before_a_pause_are_not_part_of_the_next_line(server: Running) -> None:
    with server.client() as client:
        client.send(b" " * 10)
        assert not is_readable(client, 0.3)
        assert client.ask(b"x" * wire.LIMIT_BYTES) == b"ERR unknown command"


def test_a_non_command_is_not_answered_before_its_newline(server: Running) -> None:
    with server.client() as client:
        client.send(b"WHOEVER")
        assert not is_readable(client, 0.3)
        client.send(b"\n")
        assert client.line() == b"ERR unknown command\n"


@pytest.mark.outer
def test_a_line_that_continues_while_the_worker_is_stalled_is_one_line(here: Running) -> None:
    with here.client() as client:
        client.send(b"WHERE")
        assert not is_readable(client, 0.1)
        with stalled(here):
            client.send(b"VER\n")
            time.sleep(UNTERMINATED_AFTER)
        assert client.line() == b"ERR unknown command\n"
        assert client.end() == b""


# Deadlines.


@pytest.mark.outer
def test_with_unterminated_after_0_a_command_without_its_newline_is_too_slow(
    strict: Running,
) -> None:
    [worker] = strict.workers()
    used = sum(worker.cpu_times()[:2])
    with strict.client() as client:
        began = time.monotonic()
        client.send(b"WHY")
        assert client.line() == b"ERR too slow\n"
        assert LINE_TIMEOUT * 0.9 <= time.monotonic() - began < LINE_TIMEOUT + LIMIT
        assert client.rest() == b""
    assert (
        sum(worker.cpu_times()[:2]) - used < LINE_TIMEOUT / 5
    )  # The worker has waited, not polled.


@pytest.mark.outer
def test_the_line_timeout_runs_from_the_first_byte_even_if_more_arrive(strict: Running) -> None:
    with strict.client() as client:
        began = time.monotonic()
        count = 0
        while not is_readable(client, 0.05):
            assert time.monotonic() - began < LINE_TIMEOUT + LIMIT
            client.send(b"x")
            count += 1
        assert time.monotonic() - began >= LINE_TIMEOUT * 0.9
        assert count >= 3
        assert client.rest() == b"ERR too slow\n"


@pytest.mark.outer
def test_a_command_that_was_complete_before_a_stall_is_not_too_slow() -> None:
    with (
        Running("--line-timeout", "1", "--unterminated-after", "0.5") as server,
        server.client() as client,
    ):
        assert client.ask(b"WHERE")
        client.send(b"WHY")
        assert server.who() == 2  # The command has been read.
        with stalled(server):
            time.sleep(1.2)
        assert client.line() == b"42\n"


@pytest.mark.outer
def test_each_line_has_its_own_deadline(strict: Running) -> None:
    with strict.client() as client:
        for piece in (b"WH", b"Y\nWH", b"Y\n  "):
            client.send(piece)
            time.sleep(LINE_TIMEOUT * 0.6)
        client.send(b"WHY\n")
        assert client.end() == b"42\n42\n42\n"


@pytest.mark.outer
@pytest.mark.parametrize("said", [b"", b"WHY\n"], ids=["at all", "after a command"])
def test_a_silent_client_is_idle(napping: Running, said: bytes) -> None:
    with napping.client() as client:
        began = time.monotonic()
        client.send(said)
        assert client.rest() == (b"42\n" if said else b"") + b"ERR idle\n"
        assert IDLE_TIMEOUT * 0.9 <= time.monotonic() - began < IDLE_TIMEOUT + LIMIT


@pytest.mark.outer
def test_a_client_that_sends_now_and_then_is_not_idle(napping: Running) -> None:
    with napping.client() as client:
        for _ in range(8):
            assert client.ask(b"WHY") == b"42"
            assert not is_readable(client, IDLE_TIMEOUT / 4)


@pytest.mark.outer
@pytest.mark.parametrize("sent", [b"NAP\n", b"NAP"], ids=["a line", "ended by a pause"])
def test_time_in_a_handler_is_not_idle_time(napping: Running, sent: bytes) -> None:
    assert NAP > IDLE_TIMEOUT
    with napping.client() as client:
        client.send(sent)
        assert client.line() == b"rested\n"
        assert not is_readable(client, IDLE_TIMEOUT / 2)
        client.send(
            b"WHY"
        )  # A pause ends the unterminated command; the pause must not count as idle.
        assert client.line() == b"42\n"
        assert client.ask(b"WHY") == b"42"


@pytest.mark.outer
def test_a_client_that_sends_while_the_worker_is_stalled_is_not_idle(napping: Running) -> None:
    with napping.client() as client:
        assert client.ask(b"WHY") == b"42"
        assert not is_readable(
            client, IDLE_TIMEOUT / 2
        )  # The client has been silent, but for less than the timeout.
        with stalled(napping):
            client.send(b"WHY\n")
            time.sleep(IDLE_TIMEOUT * 1.5)
        assert client.line() == b"42\n"
        client.send(b"WHY")  # The pause that ends this command is not idle time either.
        assert client.line() == b"42\n"


# Closing: the client reads the last line in full, then a clean end. A reset would raise
# ConnectionResetError.

MUCH = b"more\n" * 200_000
#: The server, the client's input, whether more follows at once or after the reply, and the last
#: lines that the client reads.
CLOSINGS = {
    "too long": ("server", b"WHY\n" + b"x" * 2000, True, b"42\nERR line too long\n"),
    "like HTTP": ("server", b"POST / HTTP/1.1\r\n", True, b""),
    "too slow": ("strict", b"x", False, b"ERR too slow\n"),
}
IDLE = pytest.param("napping", b"", False, b"ERR idle\n", id="idle", marks=pytest.mark.outer)


@pytest.mark.parametrize(
    ("name", "sent", "is_at_once", "last_lines"),
    [*(pytest.param(*case, id=name) for name, case in CLOSINGS.items()), IDLE],
)
def test_a_client_that_keeps_sending_gets_the_reason_and_a_clean_close(
    request: pytest.FixtureRequest, name: str, sent: bytes, is_at_once: bool, last_lines: bytes
) -> None:
    with request.getfixturevalue(name).client() as client:
        client.send(sent)
        assert is_at_once or is_readable(client, LIMIT)
        client.send(MUCH)
        assert client.rest() == last_lines


def test_a_rejected_client_that_keeps_sending_gets_a_clean_close(strict: Running) -> None:
    wait_until_alone(strict)
    with ExitStack() as stack:
        clients = [stack.enter_context(strict.client()) for _ in range(MAX_CLIENTS)]
        assert clients[-1].who() == MAX_CLIENTS
        with strict.client() as client:
            client.send(MUCH)
            assert client.rest() == b"ERR too many clients\n"
        assert clients[0].who() == MAX_CLIENTS


# Clients that do not read, that send endlessly, or that leave.


def fill(sock: socket.socket, data: bytes, most: int) -> int:
    """Send until the socket stays full; return the number of bytes sent, at most `most`."""
    sock.settimeout(0.3)
    sent = 0
    try:
        while sent < most:
            sent += sock.send(data[sent % len(data) :])
    except TimeoutError:
        pass
    finally:
        sock.settimeout(LIMIT)
    return sent


def read_to_the_end(sock: socket.socket) -> int:
    """Read and discard everything; return the number of bytes."""
    received = 0
    while data := sock.recv(65536):
        received += len(data)
    return received


@contextmanager
def small_window(server: Running) -> Iterator[socket.socket]:
    """A client with a tiny receive buffer."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.settimeout(LIMIT)
        sock.connect(("127.0.0.1", server.port))
        yield sock


@pytest.mark.outer
def test_a_client_that_does_not_read_is_reset_and_delays_no_other(strict: Running) -> None:
    wait_until_alone(strict)
    [worker] = strict.workers()
    before = worker.memory_info().rss
    with strict.client() as other, small_window(strict) as sock:
        began = time.monotonic()
        # The server stops reading, so the rest fills the kernel's buffers.
        assert fill(sock, b"WHERE\n" * 1000, 100_000_000) < 100_000_000
        for _ in range(20):
            assert other.who() == 2
        until(lambda: other.who() == 1, "the client that does not read is uncounted")
        assert WRITE_TIMEOUT * 0.9 <= time.monotonic() - began < WRITE_TIMEOUT + LIMIT
        with pytest.raises(ConnectionResetError):
            read_to_the_end(sock)
    assert worker.memory_info().rss - before < 2_000_000


@pytest.mark.outer
def test_a_client_that_reads_during_a_stall_is_not_a_slow_reader(strict: Running) -> None:
    with strict.client() as client:
        client.send(b"LARGE\n")
        until(lambda: is_readable(client), "the reply starts to arrive")
        received = 0
        with stalled(strict):
            client.sock.settimeout(WRITE_TIMEOUT + 1.5)
            with suppress(TimeoutError):
                while data := client.sock.recv(65536):
                    received += len(data)
        assert 0 < received < 20_000_000
        while received < 20_000_001:
            data = client.sock.recv(1 << 20)
            assert data
            received += len(data)
        assert client.ask(b"WHY") == b"42"


@pytest.mark.outer
def test_unread_replies_of_a_client_that_has_left_are_dropped(strict: Running) -> None:
    def kernel() -> str:
        """The queues of a connection in LAST_ACK; empty if there is none."""
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return next(
            (
                row[4]
                for row in rows
                if row[1].endswith(f":{strict.port:04X}") and row[3] == LAST_ACK
            ),
            "",
        )

    with small_window(strict) as sock:
        for _ in range(20):
            sock.sendall(b"WHERE\n" * 500)
        sock.shutdown(socket.SHUT_WR)
        until(kernel, "the connection is closed")
        until(lambda: not kernel(), "the unread bytes are dropped", WRITE_TIMEOUT + LIMIT)


@pytest.mark.outer
def test_a_client_that_leaves_one_large_reply_unread_is_reset(strict: Running) -> None:
    # The server has read all of its input, so a plain close would not reset the connection: the
    # kernel would keep the unread reply.
    wait_until_alone(strict)
    with strict.client() as other, small_window(strict) as sock:
        sock.sendall(b"LARGE\n")
        until(lambda: other.who() == 2, "the client is counted")
        until(lambda: other.who() == 1, "the client that does not read is uncounted")
        with pytest.raises(ConnectionResetError):
            read_to_the_end(sock)


@pytest.mark.outer
@pytest.mark.parametrize("command", [b"WHERE", b"WHY"])
def test_a_client_that_reads_late_but_within_the_timeout_gets_all_replies(
    strict: Running, command: bytes
) -> None:
    with strict.client() as client, small_window(strict) as sock:
        reply = client.ask(command) + b"\n"
        line = command + b"\n"
        sent = fill(sock, line * 1000, 100_000_000)
        sock.shutdown(socket.SHUT_WR)
        # The last line may be incomplete: a prefix of a command, or a command without its newline.
        last = {0: b"", len(command): reply}.get(sent % len(line), b"ERR unknown command\n")
        assert read_to_the_end(sock) == sent // len(line) * len(reply) + len(last)


#: Runs many greedy clients for some seconds: each sends endlessly, reads everything, and reconnects
#: when it is closed. Prints `ready` when all are connected, and at the end the number of reply
#: bytes.
GREEDY = """
import select, socket, sys, time

port, count, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
data = sys.argv[4].encode() * 500

def dial():
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setblocking(False)
    return sock

socks = [dial() for _ in range(count)]
print("ready", flush=True)
end, received = time.monotonic() + seconds, 0
while time.monotonic() < end:
    readable, writable, _ = select.select(socks, socks, [], 0.1)
    for index, sock in enumerate(socks):
        try:
            had = len(sock.recv(65536)) if sock in readable else -1
            received += max(had, 0)
            if had and sock in writable:
                sock.send(data)
        except OSError:
            had = 0
        if had == 0:
            sock.close()
            socks[index] = dial()
print(received)
"""


@pytest.mark.outer
@pytest.mark.parametrize(
    ("data", "least_received"),
    [("WHY\n", 100_000), ("xxxx", 1000)],
    ids=["commands", "a line without end"],
)
def test_twenty_clients_that_send_endlessly_do_not_starve_others(
    server: Running, data: str, least_received: int
) -> None:
    worst = 0.0
    count = 0
    with server.client() as client:
        greedy = subprocess.Popen(
            [sys.executable, "-c", GREEDY, str(server.port), "20", "5", data],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert greedy.stdout
            assert greedy.stdout.readline() == "ready\n"
            while greedy.poll() is None:
                began = time.monotonic()
                assert client.ask(b"WHY") == b"42"
                worst = max(worst, time.monotonic() - began)
                count += 1
                time.sleep(0.002)
            received = int(greedy.stdout.readline())
        finally:
            greedy.kill()
            greedy.communicate()
    assert received > least_received  # The clients did send a lot.
    assert worst < 3.0, f"the slowest of {count} replies took {worst:.3f} s"


@pytest.mark.parametrize(
    "sent",
    [b"", b"WH", b"WHY\n", b"WHY\nWH", b"WHERE\n" * 2_000_000],
    ids=[
        "nothing sent",
        "in a line",
        "after a command",
        "after a command, in a line",
        "with replies that it does not read",
    ],
)
def test_a_client_that_resets_is_uncounted_and_does_not_affect_others(
    server: Running, sent: bytes
) -> None:
    wait_until_alone(server)
    [worker] = server.workers()
    with server.client() as other:
        client = server.client()
        assert client.ask(b"WHY") == b"42"
        assert other.who() == 2
        fill(client.sock, sent, len(sent))
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.sock.close()
        until(lambda: other.who() == 1, "the client that has reset is uncounted")
    assert server.workers() == [worker]
    assert [event for event in server.events() if event["log.level"] in ("warning", "error")] == []


def test_silent_clients_are_counted_and_delay_no_other(server: Running) -> None:
    wait_until_alone(server)
    with server.client() as client:
        with ExitStack() as stack:
            for _ in range(50):
                stack.enter_context(server.client())
            assert client.who() == 51
        until(lambda: client.who() == 1, "the silent clients are uncounted")


# Handlers.


def test_a_failed_handler_replies_err_internal_and_the_connection_stays(napping: Running) -> None:
    [worker] = napping.workers()
    with napping.client() as client:
        client.send(b"WHY\nBOOM\nboom\nLINES\nLEAVE\nLATE\nNOPE\nWHY\n")
        refused = b"ERR internal\n" * 5 + b"ERR unknown command\n"
        assert b"".join(client.line() for _ in range(8)) == b"42\n" + refused + b"42\n"
        client.send(b"BOOM")  # Also without a newline.
        assert client.line() == b"ERR internal\n"
        assert client.ask(b"WHY") == b"42"
        client.send(b"BOOM")  # Also at the end of input.
        assert client.end() == b"ERR internal\n"
    assert napping.workers() == [worker]


# Everyday programs.


def read_until(fd: int, text: bytes) -> bytes:
    """Read up to this text."""
    received = b""
    while text not in received:
        assert select.select([fd], [], [], LIMIT)[0], f"{text!r} has not arrived, only {received!r}"
        data = os.read(fd, 4096)
        assert data, f"{text!r} has not arrived before the end, only {received!r}"
        received += data
    return received


@pytest.mark.outer
@pytest.mark.parametrize(
    "options", [(), ("--http1.0",), ("-X", "get")], ids=["HTTP/1.1", "HTTP/1.0", "lower case"]
)
def test_curl_cannot_be_made_to_run_commands(server: Running, options: tuple[str, ...]) -> None:
    # With --http0.9, curl would print any bytes. 52: it received none.
    curl = [program("curl"), "--silent", "--noproxy", "*", "--max-time", str(LIMIT), "--http0.9"]
    url = f"http://127.0.0.1:{server.port}/"
    command = [*curl, *options, "-d", "x=1\nWHO\nWHERE\nWHO\n", url]
    done = subprocess.run(command, check=False, capture_output=True, timeout=LIMIT)
    assert (done.returncode, done.stdout) == (52, b"")


def test_lines_in_a_client_hello_are_not_run(server: Running) -> None:
    context, sent = ssl.create_default_context(), ssl.MemoryBIO()
    context.set_alpn_protocols(["\nWHO\nWHERE\n"])
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname="localhost").do_handshake()
    hello = sent.read()
    assert b"\nWHO\nWHERE\n" in hello
    with server.client() as client:
        client.send(hello)
        assert client.rest() == b""


@pytest.mark.outer
@pytest.mark.parametrize("text", [b"WHO", b"WHO\n", b"who\r\n"])
def test_nc_with_end_of_input_gets_the_reply_and_exits(server: Running, text: bytes) -> None:
    wait_until_alone(server)
    nc = [program("nc.openbsd"), "-N", "127.0.0.1", str(server.port)]
    done = subprocess.run(nc, check=False, input=text, capture_output=True, timeout=LIMIT)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"1\n", b"")


@pytest.mark.outer
def test_nc_gets_replies_to_lines_with_and_without_a_newline(server: Running) -> None:
    wait_until_alone(server)
    nc = [program("nc.openbsd"), "-N", "127.0.0.1", str(server.port)]
    with subprocess.Popen(nc, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as typing:
        try:
            assert typing.stdin
            assert typing.stdout
            for typed, reply in (
                (b"WHO", b"1\n"),
                (b"\nWHY\n", b"42\n"),
                (b"nope\nwho", b"ERR unknown command\n1\n"),
            ):
                typing.stdin.write(typed)
                assert read_until(typing.stdout.fileno(), reply) == reply
            typing.stdin.close()
            assert typing.wait(LIMIT) == 0
            assert typing.stdout.read() == b""
        finally:
            typing.kill()


@pytest.mark.outer
def test_telnet_on_a_terminal_gets_the_replies(server: Running) -> None:
    telnet = [program("telnet"), "127.0.0.1", str(server.port)]
    wait_until_alone(server)
    keyboard, terminal = pty.openpty()
    try:
        process = subprocess.Popen(telnet, stdin=terminal, stdout=terminal, stderr=terminal)
        try:
            read_until(keyboard, b"Escape character is '^]'.\r\n")
            # telnet sends CRLF. The terminal echoes, and turns the LF of a reply into CRLF.
            os.write(keyboard, b"who\n")
            assert read_until(keyboard, b"1\r\n") == b"who\r\n1\r\n"
            os.write(keyboard, b"nope\n")
            assert read_until(keyboard, b"command\r\n") == b"nope\r\nERR unknown command\r\n"
            os.write(keyboard, b"\x1d")
            read_until(keyboard, b"telnet> ")
            os.write(keyboard, b"quit\n")
            assert process.wait(LIMIT) == 0
        finally:
            process.kill()
            process.wait()
    finally:
        os.close(keyboard)
        os.close(terminal)
