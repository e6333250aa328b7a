"""Commands: how they are defined, what they may reply, and that one that blocks delays nobody but
its asker.
"""

import select
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gserver.commands import BUILT_IN, Command, Service, command
from gserver.errors import UsageError
from gserver.serve.command_module import load_commands
from tests.running import LIMIT, PATIENCE, Running, until

SERVICE = Service("an-id", lambda: 3)

#: What a person would write, and what can go wrong in it. HOLD blocks until the test makes a file.
MODULE = """
import pathlib
import socket
import time

from gserver.commands import command, who as imported_ones_do_not_count


@command("hold")
def hold(service):
    while not pathlib.Path("let-go").exists():
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
    """A server with MODULE, started in the folder where that lies."""
    folder = tmp_path_factory.mktemp("extended")
    (folder / "our_commands.py").write_text(MODULE)
    with Running("--commands", "our_commands", "--server-id", "here", cwd=folder) as running:
        yield running


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], str]]:
    """Write a module, named mine_…, where the test runs; what `load_commands` leaves in this process goes at
    the end.
    """
    monkeypatch.chdir(tmp_path)
    path = sys.path[:]

    def write_module(name: str, text: str) -> str:
        (tmp_path / f"{name}.py").write_text(f"from gserver.commands import command\n{text}\n")
        return name

    yield write_module
    sys.path[:] = path
    for name in [name for name in sys.modules if name.startswith("mine_")]:
        del sys.modules[name]


def _replying(reply: Any) -> Command:
    return Command("X", lambda service: reply)


# The decorator.


def test_the_built_in_commands_answer_with_what_the_service_knows() -> None:
    assert [(item.name, item.answer(SERVICE)) for item in BUILT_IN] == [
        ("WHO", b"3\n"),
        ("WHERE", b"an-id\n"),
        ("WHY", b"42\n"),
    ]
    assert not any(item.may_block for item in BUILT_IN)


def test_a_decorated_function_is_a_command_that_may_block() -> None:
    @command("nap-2_x")
    def nap(service: Service) -> str:
        return service.server_id

    assert (nap.name, nap.may_block, nap.answer(SERVICE)) == ("NAP-2_X", True, b"an-id\n")


def test_a_command_may_say_that_it_never_blocks() -> None:
    assert not command("QUICK", may_block=False)(lambda service: "x").may_block


@pytest.mark.parametrize("name", ["A", "a", "Z9", "A-B_C", "X" * 32])
def test_a_good_name_is_taken_in_capitals(name: str) -> None:
    assert command(name)(lambda service: "x").name == name.upper()


@pytest.mark.parametrize(
    "name", ["", " ", "A B", "A\n", "1A", "-A", "_A", "É", "ß", "A.B", "A:B", "X" * 33]
)
def test_a_name_that_could_not_be_said_or_measured_is_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match="is no name for a command: use letters, digits, - and _, at most 32"
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
def test_one_printable_line_is_a_reply(reply: str | int, line: bytes) -> None:
    assert _replying(reply).answer(SERVICE) == line


@pytest.mark.parametrize(
    "reply", ["a\nb", "a\n", "\r", "a\tb", "\0", "\x7f", "\x1b[31m", "é", "a\u2028b", "\ud800"]
)
def test_what_is_not_one_line_of_printable_ascii_is_no_reply(reply: str) -> None:
    with pytest.raises(ValueError, match=r"a reply is one printable line|can't encode"):
        _replying(reply).answer(SERVICE)


@pytest.mark.parametrize("reply", [None, b"bytes", 1.5, ["a"], ("a", "b"), {"a": 1}, object])
def test_what_is_neither_text_nor_a_whole_number_is_no_reply(reply: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        _replying(reply).answer(SERVICE)


def test_what_a_handler_raises_comes_through() -> None:
    def broken(service: Service) -> str:
        raise LookupError("gone")

    with pytest.raises(LookupError, match="gone"):
        Command("X", broken).answer(SERVICE)


# Loading.


def test_without_a_module_there_are_the_built_in_commands() -> None:
    assert load_commands("") == BUILT_IN


def test_a_module_adds_its_commands_in_the_order_in_which_it_names_them(
    write: Callable[[str, str], str],
) -> None:
    name = write(
        "mine_two",
        '@command("B")\ndef b(service): return "b"\n@command("a")\ndef a(service): return "a"\nagain = b',
    )
    assert [item.name for item in load_commands(name)] == ["WHO", "WHERE", "WHY", "B", "A"]


def test_built_in_commands_that_a_module_imports_are_not_its_own(
    write: Callable[[str, str], str],
) -> None:
    name = write(
        "mine_imports",
        'from gserver.commands import who\n@command("B")\ndef b(service): return "b"',
    )
    assert [item.name for item in load_commands(name)] == ["WHO", "WHERE", "WHY", "B"]


def test_a_module_may_lie_in_a_package(write: Callable[[str, str], str], tmp_path: Path) -> None:
    (tmp_path / "mine_package").mkdir()
    (tmp_path / "mine_package" / "deep.py").write_text(
        'from gserver.commands import command\n@command("DEEP")\ndef deep(service): return 1\n'
    )
    assert load_commands("mine_package.deep")[-1].name == "DEEP"


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("mine_syntax", "def", "cannot import it: SyntaxError: "),
        ("mine_raises", "1 / 0", "cannot import it: ZeroDivisionError: division by zero"),
        ("mine_exits", "raise SystemExit(0)", "cannot import it: SystemExit: 0"),
        (
            "mine_ends",
            "import gevent; raise gevent.GreenletExit",
            "cannot import it: GreenletExit: ",
        ),
        ("mine_stops", "raise KeyboardInterrupt", "cannot import it: KeyboardInterrupt: "),
        (
            "mine_needs",
            "import no_such_thing",
            "cannot import it: ModuleNotFoundError: No module named 'no_such_thing'",
        ),
        ("mine_name", 'command("1")', "cannot import it: ValueError: '1' is no name for a command"),
        (
            "mine_empty",
            "def nap(service): return 1",
            "it defines no command (decorate a function with @command)",
        ),
        (
            "mine_who",
            '@command("who")\ndef f(service): return 1',
            "the command WHO is defined twice",
        ),
        (
            "mine_twice",
            '@command("A")\ndef f(service): return 1\n@command("a")\ndef g(service): return 2',
            "the command A is defined twice",
        ),
    ],
)
def test_a_bad_module_is_refused_with_its_reason(
    name: str, text: str, reason: str, write: Callable[[str, str], str]
) -> None:
    write(name, text)
    with pytest.raises(UsageError) as caught:
        load_commands(name)
    assert str(caught.value).startswith(f"--commands {name}: {reason}")


@pytest.mark.parametrize(
    "name", ["no_such_module", "no_such.module", "mine/x", "mine.py", ".mine", "..", "a b"]
)
def test_what_is_no_module_at_all_is_refused(name: str) -> None:
    path = sys.path[:]
    try:
        with pytest.raises(UsageError, match="cannot import it: "):
            load_commands(name)
    finally:
        sys.path[:] = path


# For real.


def test_a_command_that_blocks_delays_nobody_but_its_asker(extended: Running) -> None:
    with extended.client() as patient, extended.client() as other:
        patient.send(b"WHY\nHOLD\nWHY\n")
        assert patient.line() == b"42\n"  # It does not wait for the reply that is not ready.
        assert other.ask(b"why") == b"42"
        assert other.ask(b"LOOKUP") == b"127.0.0.1"
        assert select.select([patient.sock], [], [], 0)[0] == []
        folder = Path(f"/proc/{extended.pid}/cwd").resolve()
        (folder / "let-go").touch()
        assert patient.line() == b"held\n"
        assert patient.line() == b"42\n"


@pytest.mark.parametrize(
    ("said", "reply"),
    [
        (b"LOOKUP", b"127.0.0.1"),
        (b"nap", b"rested at here"),
        (b" Nap ", b"rested at here"),
        (b"WHOM", b"nobody"),
        (b"TWO-LINES", b"ERR internal"),
        (b"ACCENT", b"ERR internal"),
        (b"NOTHING", b"ERR internal"),
        (b"BROKEN", b"ERR internal"),
        (b"imported_ones_do_not_count", b"ERR unknown command"),
    ],
)
def test_a_command_of_ones_own_is_answered_over_the_wire(
    extended: Running, said: bytes, reply: bytes
) -> None:
    with extended.client() as client:
        assert client.ask(said) == reply
        assert client.ask(b"WHY") == b"42"  # Whatever went wrong, the client stays.


def test_a_handler_that_fails_is_logged_with_its_reason(extended: Running) -> None:
    seen = len(extended.events("command.failed"))
    with extended.client() as client:
        client.ask(b"BROKEN")
    event = extended.wait_for("command.failed", seen + 1)
    assert event["gserver.command"] == "BROKEN"
    assert event["error.message"] == "the database is away"


def test_a_command_that_begins_another_one_waits_for_its_newline(extended: Running) -> None:
    with extended.client() as client, extended.client() as other:
        client.send(b"WHO")
        other.send(b"WHERE")
        assert other.sock.recv(100) == b"here\n"  # Which begins no other one, so silence ends it.
        assert select.select([client.sock], [], [], 0.3)[0] == []
        client.send(b"M")
        assert client.sock.recv(100) == b"nobody\n"
        assert client.ask(b"\nWHO").isdigit()


def test_a_handler_knows_how_many_clients_there_are(extended: Running) -> None:
    with extended.client() as client, extended.client():
        until(lambda: client.who() == 2, "the clients of earlier tests are gone")
        assert client.ask(b"TWICE") == b"4"


def test_files_named_like_packages_in_the_start_folder_harm_nobody(tmp_path: Path) -> None:
    # The last two are not loaded yet when the module of commands is: it gets the true ones all the
    # same.
    for name in (
        "click",
        "gevent",
        "greenlet",
        "json",
        "socket",
        "logging",
        "signal",
        "gserver",
        "statsd",
        "colorsys",
    ):
        (tmp_path / f"{name}.py").write_text(
            "raise SystemExit('this file is not what was meant')\n"
        )
    (tmp_path / "ours.py").write_text(
        "import colorsys, statsd\nfrom gserver.commands import command\n"
        "@command('COLOR')\ndef color(service): return int(colorsys.rgb_to_hsv(0, 0, 7)[2])\n"
    )
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as daemon:
        daemon.bind(("127.0.0.1", 0))
        daemon.settimeout(LIMIT)
        options = (
            "--commands",
            "ours",
            "--statsd-host",
            "127.0.0.1",
            "--statsd-port",
            str(daemon.getsockname()[1]),
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
def print_half_a_line(service):
    print("half a line", end="", flush=True)
    return "printed"

@command("CANCELLED")
def cancelled(service):
    import asyncio
    raise asyncio.CancelledError("and more")
"""


def test_many_commands_of_one_client_that_each_take_a_while_leave_others_their_turns(
    tmp_path: Path,
) -> None:
    (tmp_path / "extra.py").write_text(MISBEHAVING)
    with (
        Running("--commands", "extra", cwd=tmp_path) as server,
        server.client() as busy,
        server.client() as other,
    ):
        busy.send(b"WORK\n" * 400)  # Two seconds of work.
        assert busy.line() == b"done\n"
        began = time.monotonic()
        assert other.ask(b"WHY") == b"42"
        assert time.monotonic() - began < 1 * PATIENCE


def test_what_a_handler_prints_keeps_out_of_the_log_and_what_it_raises_keeps_its_client(
    tmp_path: Path,
) -> None:
    (tmp_path / "extra.py").write_text(MISBEHAVING)
    with Running("--commands", "extra", cwd=tmp_path) as server, server.client() as client:
        assert client.ask(b"PRINT") == b"printed"
        assert client.ask(b"CANCELLED") == b"ERR internal"
        assert client.ask(b"WHY") == b"42"
        server.wait_for("command.failed")
        assert server.stop() == 0
        assert "half a line" in server.stderr
