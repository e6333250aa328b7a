"""Commands: definition, valid replies, and that a blocking command delays only its own client."""

import select
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from gserver.commands import BUILT_IN, Command, Request, command
from lab.running import LIMIT, PATIENCE, Running, argv, until

REQUEST = Request("an-id", lambda: 3)

#: Typical handlers and typical mistakes. HOLD blocks until the test creates a file.
MODULE = """
import pathlib
import socket
import time
from math import inf

import gevent

from gserver.commands import command, who as imported_who


@command("hold")
def hold(request):
    while not pathlib.Path("released").exists():
        time.sleep(0.01)
    return "held"


@command("LOOKUP")
def lookup(request):
    return socket.getaddrinfo("localhost", 80, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]


@command("NAP")
def nap(request):
    time.sleep(0.05)
    return "rested at " + request.server_id


@command("TWICE")
def twice(request):
    return 2 * request.clients()


@command("WHOM")
def whom(request):
    return "nobody"


@command("TWO-LINES")
def two_lines(request):
    return "one\\ntwo"


@command("ACCENT")
def accent(request):
    return "caf\\u00e9"


@command("NOTHING")
def nothing(request):
    pass


@command("BROKEN")
def broken(request):
    raise OSError("the database is away")


@command("ADD")
def add(request, first: int, second: float = 0.5, *others: int):
    return str(first + second + sum(others))


@command("JOIN", may_block=False)
def join(request, *words):
    return "-".join(words)


@command("SLEEP", timeout=0.3)
def sleep(request, seconds: float):
    left = request.deadline - time.monotonic()
    try:
        time.sleep(seconds)
    finally:
        pathlib.Path("cleaned up").touch()
    return f"slept, {0 < left <= 0.3}"


@command("STUBBORN", timeout=0.1)
def stubborn(request):
    try:
        time.sleep(60)
    except BaseException:
        return "interrupted"


@command("OWN-TIMEOUT")
def own_timeout(request):
    with gevent.Timeout(0.01):
        time.sleep(60)


@command("FEW", at_once=2)
def few(request):
    while not pathlib.Path("let go").exists():
        time.sleep(0.01)
    return "ended"


@command("FROM")
def from_(request):
    time.sleep(0.2)  # Until the client may have gone.
    return f"{request.address} {request.port} {request.tls_name!r} {request.deadline == inf}"


@command("QUICK-FROM", may_block=False)
def quick_from(request):
    return f"{request.address} {request.port}"


also_hold = hold
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with MODULE, started in the folder of that module."""
    folder = tmp_path_factory.mktemp("extended")
    (folder / "our_commands.py").write_text(MODULE)
    options = "--commands", "our_commands", "--server-id", "here", "--command-timeout", "0"
    with Running(*options, cwd=folder) as running:
        yield running


def _replying(reply: Any) -> Command:
    return Command("X", lambda request: reply)


# The decorator.


def test_the_built_in_commands_reply_with_values_of_the_request() -> None:
    expected = [("WHO", b"3\n"), ("WHERE", b"an-id\n"), ("WHY", b"42\n")]
    assert [(item.name, item.answer(REQUEST)) for item in BUILT_IN] == expected
    assert not any(item.may_block for item in BUILT_IN)


def test_a_decorated_function_is_a_command_that_may_block() -> None:
    @command("nap-2_x")
    def nap(request: Request) -> str:
        return request.server_id

    assert (nap.name, nap.may_block, nap.answer(REQUEST)) == ("NAP-2_X", True, b"an-id\n")


def test_a_command_can_be_declared_as_one_that_never_blocks() -> None:
    assert not command("QUICK", may_block=False)(lambda request: "x").may_block


@pytest.mark.parametrize("name", ["A", "a", "Z9", "A-B_C", "X" * 32])
def test_a_command_name_is_stored_in_upper_case(name: str) -> None:
    assert command(name)(lambda request: "x").name == name.upper()


@pytest.mark.parametrize(
    "name", ["", " ", "A B", "A\n", "1A", "-A", "_A", "É", "ß", "A.B", "A:B", "X" * 33]
)
def test_a_bad_command_name_is_refused(name: str) -> None:
    with pytest.raises(
        ValueError,
        match="is not a command name: use letters, digits, - and _, a letter first, at most 32",
    ):
        command(name)


# Replies.


@pytest.mark.parametrize(
    ("reply", "line"),
    [
        ("a b", b"a b\n"),
        (0, b"0\n"),
        (-7, b"-7\n"),
        ("~ !", b"~ !\n"),
        ("x" * 5000, b"x" * 5000 + b"\n"),
    ],
)
def test_a_printable_line_is_a_valid_reply(reply: str | int, line: bytes) -> None:
    assert _replying(reply).answer(REQUEST) == line


@pytest.mark.parametrize(
    "reply", ["a\nb", "a\n", "\r", "a\tb", "\0", "\x7f", "\x1b[31m", "é", "a\u2028b", "\ud800"]
)
def test_a_reply_must_be_one_line_of_printable_ascii(reply: str) -> None:
    with pytest.raises(ValueError, match=r"a reply must be one line of printable ASCII"):
        _replying(reply).answer(REQUEST)


@pytest.mark.parametrize("reply", [None, b"bytes", 1.5, ["a"], ("a", "b"), {"a": 1}, object])
def test_a_reply_must_be_a_str_or_an_int(reply: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        _replying(reply).answer(REQUEST)


def test_a_handlers_exception_is_raised() -> None:
    def broken(request: Request) -> str:
        raise LookupError("gone")

    with pytest.raises(LookupError, match="gone"):
        Command("X", broken).answer(REQUEST)


# The real program.


def test_a_blocking_command_delays_only_its_own_client(extended: Running) -> None:
    with extended.client() as patient, extended.client() as other:
        patient.send(b"WHY\nHOLD\nWHY\n")
        assert patient.line() == b"42\n"  # This arrives before HOLD has ended.
        assert other.ask(b"why") == b"42"
        assert other.ask(b"LOOKUP") == b"127.0.0.1"
        assert select.select([patient.sock], [], [], 0)[0] == []
        folder = Path(f"/proc/{extended.pid}/cwd").resolve()
        (folder / "released").touch()
        assert patient.line() == b"held\n"
        assert patient.line() == b"42\n"


@pytest.mark.parametrize(
    ("sent", "reply"),
    [
        (b"LOOKUP", b"127.0.0.1"),
        (b"nap", b"rested at here"),
        (b" Nap ", b"rested at here"),
        (b"WHOM", b"nobody"),
        (b"TWO-LINES", b"ERR internal"),
        (b"ACCENT", b"ERR internal"),
        (b"NOTHING", b"ERR internal"),
        (b"BROKEN", b"ERR internal"),
        (b"imported_who", b"ERR unknown command"),
        (b"ADD 1", b"1.5"),
        (b" add\t-1  1e1 ", b"9.0"),
        (b"ADD 1 2 3 4", b"10.0"),
        (b"ADD", b"ERR usage: ADD first [second] [others ...]"),
        (b"ADD x", b"ERR usage: ADD first [second] [others ...]"),
        (b"ADD 1 2 3.5", b"ERR usage: ADD first [second] [others ...]"),
        (b"ADD \xc3\xa9", b"ERR not ASCII"),
        (b"JOIN", b""),
        (b"JOIN a  b\tc", b"a-b-c"),
        (b"JOIN a\0", b"ERR usage: JOIN [words ...]"),
        (b"WHOM else", b"ERR usage: WHOM"),
        (b"WHO else", b"ERR usage: WHO"),
        (b"SLEEP 0.001", b"slept, True"),
        (b"SLEEP 60", b"ERR timeout"),
        (b"STUBBORN", b"interrupted"),
        (b"OWN-TIMEOUT", b"ERR internal"),
    ],
)
def test_a_custom_command_is_answered_over_the_wire(
    extended: Running, sent: bytes, reply: bytes
) -> None:
    with extended.client() as client:
        assert client.ask(sent) == reply
        assert client.ask(b"WHY") == b"42"  # The client stays connected after each error.


def test_an_interrupted_handler_cleans_up_and_is_logged(extended: Running) -> None:
    file = Path(f"/proc/{extended.pid}/cwd").resolve() / "cleaned up"
    file.unlink(missing_ok=True)
    with extended.client() as client:
        assert client.ask(b"SLEEP 60") == b"ERR timeout"
        assert client.ask(b"WHY") == b"42"
    assert file.exists()

    def is_logged() -> bool:
        messages = [event["message"] for event in extended.events("command.failed")]
        return "the handler of SLEEP was interrupted after 0.3 s" in messages

    until(is_logged, "the log says so")


def test_more_runs_at_once_than_allowed_get_an_error(extended: Running) -> None:
    folder = Path(f"/proc/{extended.pid}/cwd").resolve()
    with ExitStack() as stack:
        clients = [stack.enter_context(extended.client()) for _ in range(3)]
        for client in clients[:2]:
            client.send(b"FEW\n")
        until(lambda: clients[2].ask(b"FEW") == b"ERR busy", "both runs have begun")
        # Others are not affected, nor is what this client sends later.
        assert clients[2].ask(b"WHY\nFEW\nADD 1") == b"42"
        assert [clients[2].line(), clients[2].line()] == [b"ERR busy\n", b"1.5\n"]
        (folder / "let go").touch()
        assert [client.line() for client in clients[:2]] == [b"ended\n"] * 2
        assert clients[2].ask(b"FEW") == b"ended"


def test_a_handler_knows_its_client(extended: Running) -> None:
    with extended.client() as client:
        host, port = client.sock.getsockname()
        assert client.ask(b"FROM") == f"{host} {port} '' True".encode()
        assert client.ask(b"QUICK-FROM") == f"{host} {port}".encode()


def test_the_options_limit_commands_without_limits_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "extra.py").write_text(
        "import time\nfrom gserver.commands import command\n"
        "@command('NAP')\ndef nap(request, seconds: float):\n    time.sleep(seconds)\n"
        "    return 'rested'\n"
        "unlimited = command('REST', timeout=0, at_once=0)(nap.handler)\n"
    )
    options = argv(f"--command-timeout {2 * PATIENCE} --command-at-once 1 --slow-command 0.2")
    with (
        Running("--commands", "extra", *options, cwd=tmp_path) as server,
        server.client() as one,
        server.client() as other,
    ):
        one.send(b"NAP 60\n")
        until(lambda: other.ask(b"NAP 0") == b"ERR busy", "the nap has begun")
        assert one.line() == b"ERR timeout\n"
        assert other.ask(b"NAP 0") == b"rested"
        one.send(b"REST 1\n")
        other.send(b"REST 1\n")
        assert one.line() == other.line() == b"rested\n"
        server.wait_for("command.slow", 3)
        slow = server.events("command.slow")
    assert {event["gserver.command"] for event in slow} == {"NAP", "REST"}
    assert all(0.2 <= event["gserver.seconds"] < 60 for event in slow)
    assert {event["client.address"] for event in slow} == {"127.0.0.1"}


def test_a_command_with_words_needs_its_newline(extended: Running) -> None:
    with extended.client() as client:
        client.send(b"JOIN a")
        assert select.select([client.sock], [], [], 0.3)[0] == []
        client.send(b"b\nJOIN")
        assert client.line() == b"ab\n"
        assert select.select([client.sock], [], [], 0.3)[0] == []
        client.sock.shutdown(socket.SHUT_WR)
        assert client.line() == b"\n"


def test_a_command_that_is_a_prefix_of_another_needs_its_newline(extended: Running) -> None:
    with extended.client() as client, extended.client() as other:
        client.send(b"WHO")
        other.send(b"WHERE")
        # No other command begins with WHERE, so a pause ends it.
        assert other.sock.recv(100) == b"here\n"
        assert select.select([client.sock], [], [], 0.3)[0] == []
        client.send(b"M")
        assert client.sock.recv(100) == b"nobody\n"
        assert client.ask(b"\nWHO").isdigit()


def test_a_handler_can_count_the_clients(extended: Running) -> None:
    with extended.client() as client, extended.client():
        until(lambda: client.who() == 2, "the clients of earlier tests have left")
        assert client.ask(b"TWICE") == b"4"


@pytest.mark.outer
def test_files_named_like_packages_in_the_start_folder_are_not_imported(tmp_path: Path) -> None:
    # The command module is the first to import the last two. It must get the installed ones.
    for name in argv("click gevent greenlet json socket logging signal gserver statsd colorsys"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong file was imported')\n")
    (tmp_path / "ours.py").write_text(
        "import colorsys, statsd\nfrom gserver.commands import command\n"
        "@command('COLOR')\ndef color(request): return int(colorsys.rgb_to_hsv(0, 0, 7)[2])\n"
    )
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as daemon:
        daemon.bind(("127.0.0.1", 0))
        daemon.settimeout(LIMIT)
        options = argv(
            f"--commands ours --statsd-host 127.0.0.1 --statsd-port {daemon.getsockname()[1]}"
        )
        with Running(*options, cwd=tmp_path) as server:
            with server.client() as client:
                assert client.ask(b"COLOR") == b"7"
            assert daemon.recv(512).startswith(b"gserver.")
            assert server.stop() == 0
            assert server.stderr == ""


MISBEHAVING = """
import time
from gserver.commands import command

@command("WORK")
def work(request):
    until = time.perf_counter() + 0.005
    while time.perf_counter() < until:
        pass
    return "done"

@command("PRINT")
def print_a_line(request):
    print("a line")
    return "printed"

@command("PRINT-PART")
def print_part_of_a_line(request):
    print("half a line", end="", flush=True)
    return "printed"
"""


def test_other_clients_are_served_between_the_slow_commands_of_one_client(tmp_path: Path) -> None:
    (tmp_path / "extra.py").write_text(MISBEHAVING)
    with (
        Running("--commands", "extra", cwd=tmp_path) as server,
        server.client() as busy,
        server.client() as other,
    ):
        busy.send(b"WORK\n" * 4000)  # Twenty seconds of work.
        assert busy.line() == b"done\n"
        began = time.monotonic()
        assert other.ask(b"WHY") == b"42"
        assert time.monotonic() - began < 10


@pytest.mark.outer
def test_a_printed_line_appears_at_once_on_stderr(tmp_path: Path) -> None:
    (tmp_path / "extra.py").write_text(MISBEHAVING)
    # The usual case: Python buffers stdout unless this variable is set.
    env = {"PYTHONUNBUFFERED": ""}
    with Running("--commands", "extra", cwd=tmp_path, env=env) as server, server.client() as client:
        assert client.ask(b"PRINT") == b"printed"
        until(lambda: "a line\n" in server.errors, "the printed line")
        assert client.ask(b"PRINT-PART") == b"printed"
        assert server.stop() == 0
        assert server.errors == ["a line\n", "half a line"]
        server.events()  # stdout has only JSON.
