"""Commands: definition, valid replies, and that a blocking command delays only its own client."""

import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gserver.commands import BUILT_IN, Command, Service, command
from lab.running import LIMIT, Running, argv, until

SERVICE = Service("an-id", lambda: 3)

#: Typical handlers and typical mistakes. HOLD blocks until the test creates a file.
MODULE = """
import pathlib
import socket
import time

from gserver.commands import command, who as imported_who


@command("hold")
def hold(service):
    while not pathlib.Path("released").exists():
        time.sleep(0.01)
    return "held"


@command("LOOKUP")
def lookup(service):
    return socket.getaddrinfo("localhost", 80, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]


@command("NAP")
def nap(service):
    time.sleep(0.05)
    return "rested at " + service.server_id


@command("TWICE")
def twice(service):
    return 2 * service.clients()


@command("WHOM")
def whom(service):
    return "nobody"


@command("TWO-LINES")
def two_lines(service):
    return "one\\ntwo"


@command("ACCENT")
def accent(service):
    return "caf\\u00e9"


@command("NOTHING")
def nothing(service):
    pass


@command("BROKEN")
def broken(service):
    raise OSError("the database is away")


also_hold = hold
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with MODULE, started in the folder of that module."""
    folder = tmp_path_factory.mktemp("extended")
    (folder / "our_commands.py").write_text(MODULE)
    with Running("--commands", "our_commands", "--server-id", "here", cwd=folder) as running:
        yield running


def _replying(reply: Any) -> Command:
    return Command("X", lambda service: reply)


# The decorator.


def test_the_built_in_commands_reply_with_values_of_the_service() -> None:
    expected = [("WHO", b"3\n"), ("WHERE", b"an-id\n"), ("WHY", b"42\n")]
    assert [(item.name, item.answer(SERVICE)) for item in BUILT_IN] == expected
    assert not any(item.may_block for item in BUILT_IN)


def test_a_decorated_function_is_a_command_that_may_block() -> None:
    @command("nap-2_x")
    def nap(service: Service) -> str:
        return service.server_id

    assert (nap.name, nap.may_block, nap.answer(SERVICE)) == ("NAP-2_X", True, b"an-id\n")


def test_a_command_can_be_declared_as_one_that_never_blocks() -> None:
    assert not command("QUICK", may_block=False)(lambda service: "x").may_block


@pytest.mark.parametrize("name", ["A", "a", "Z9", "A-B_C", "X" * 32])
def test_a_command_name_is_stored_in_upper_case(name: str) -> None:
    assert command(name)(lambda service: "x").name == name.upper()


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
    assert _replying(reply).answer(SERVICE) == line


@pytest.mark.parametrize(
    "reply", ["a\nb", "a\n", "\r", "a\tb", "\0", "\x7f", "\x1b[31m", "é", "a\u2028b", "\ud800"]
)
def test_a_reply_must_be_one_line_of_printable_ascii(reply: str) -> None:
    with pytest.raises(ValueError, match=r"a reply must be one line of printable ASCII"):
        _replying(reply).answer(SERVICE)


@pytest.mark.parametrize("reply", [None, b"bytes", 1.5, ["a"], ("a", "b"), {"a": 1}, object])
def test_a_reply_must_be_a_str_or_an_int(reply: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        _replying(reply).answer(SERVICE)


def test_a_handlers_exception_is_raised() -> None:
    def broken(service: Service) -> str:
        raise LookupError("gone")

    with pytest.raises(LookupError, match="gone"):
        Command("X", broken).answer(SERVICE)


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
    ],
)
def test_a_custom_command_is_answered_over_the_wire(
    extended: Running, sent: bytes, reply: bytes
) -> None:
    with extended.client() as client:
        assert client.ask(sent) == reply
        assert client.ask(b"WHY") == b"42"  # The client stays connected after each error.


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
        "@command('COLOR')\ndef color(service): return int(colorsys.rgb_to_hsv(0, 0, 7)[2])\n"
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
def work(service):
    until = time.perf_counter() + 0.005
    while time.perf_counter() < until:
        pass
    return "done"

@command("PRINT")
def print_a_line(service):
    print("a line")
    return "printed"

@command("PRINT-PART")
def print_part_of_a_line(service):
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
