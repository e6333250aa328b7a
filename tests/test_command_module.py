"""Loading the module of --commands: which modules are accepted, and the errors for the others."""

import queue
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gserver.commands import BUILT_IN
from gserver.errors import UsageError
from gserver.serve.command_module import load_commands
from lab.running import Running, left_over

Write = Callable[..., str]

IMPORT = "from gserver.commands import command\n"
GOOD = f"{IMPORT}@command('NAP')\ndef nap(request): return 'good'\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write a module into the current folder. Undo the effects of `load_commands` afterwards."""
    monkeypatch.chdir(tmp_path)
    path = sys.path[:]

    def write_module(name: str, text: str = GOOD) -> str:
        file = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        return name

    yield write_module
    sys.path[:] = path
    for name in [name for name in sys.modules if name.startswith("mine")]:
        del sys.modules[name]


def names(module_name: str) -> list[str]:
    return [item.name for item in load_commands(module_name)]


def error_of(module_name: str) -> str:
    """The error line for a module, without the prefix that names the option."""
    with pytest.raises(UsageError) as caught:
        load_commands(module_name)
    message = str(caught.value)
    beginning = f"--commands {module_name}: "
    assert message.startswith(beginning)
    assert message.isprintable()
    return message.removeprefix(beginning)


# Modules that are accepted.


def test_without_a_module_there_are_the_built_in_commands() -> None:
    assert load_commands("") == BUILT_IN


def test_a_module_adds_its_commands_in_the_order_of_their_definition(write: Write) -> None:
    text = "@command('B')\ndef b(request): return 'b'\n@command('a')\ndef a(request): return 'a'\n"
    assert names(write("mine", f"{IMPORT}{text}again = b\n")) == ["WHO", "WHERE", "WHY", "B", "A"]


def test_a_module_may_import_built_in_commands(write: Write) -> None:
    module = write("mine", f"from gserver.commands import who\n{GOOD}")
    assert names(module) == ["WHO", "WHERE", "WHY", "NAP"]


@pytest.mark.parametrize("name", ["mine.deep", "mine-dashed"])
def test_a_module_may_be_in_a_package_and_have_any_importable_name(write: Write, name: str) -> None:
    assert names(write(name))[-1] == "NAP"


ACCEPTED = {
    "a default": "def f(request, more=1): return 1",
    "any arguments": "def f(*arguments): return 1",
    "a partial": "import functools\ndef g(request, x): return 1\nf = functools.partial(g, x=1)",
    "a method": "class C:\n    def m(self, request): return 1\nf = C().m",
    "a callable object": "class C:\n    def __call__(self, request): return 1\nf = C()",
    "a decorator that adds an argument": (
        "import functools\ndef g(request, extra): return 1\n"
        "@functools.wraps(g)\ndef f(request): return g(request, 1)"
    ),
    "a wrapped async function": (
        "import asyncio, functools\nasync def g(request): return 1\n"
        "@functools.wraps(g)\ndef f(request): return asyncio.run(g(request))"
    ),
}


@pytest.mark.parametrize("text", ACCEPTED.values(), ids=ACCEPTED)
def test_a_handler_may_be_any_callable_with_one_argument(write: Write, text: str) -> None:
    assert names(write("mine", f"{IMPORT}{text}\nx = command('X')(f)\n"))[-1] == "X"


# Modules that are refused.

IMPORT_ERRORS = {
    "a syntax error": ("def", "SyntaxError: invalid syntax (mine.py, line 2)"),
    "an error": ("1 / 0", "ZeroDivisionError: division by zero (mine.py, line 2)"),
    "an exit": ("raise SystemExit(0)", "SystemExit: 0 (mine.py, line 2)"),
    "a greenlet exit": (
        "import gevent; raise gevent.GreenletExit",
        "GreenletExit (mine.py, line 2)",
    ),
    "an interrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt (mine.py, line 2)"),
    "an error in a function": (
        "def f():\n    raise OSError('away')\n\n\nf()",
        "OSError: away (mine.py, line 3)",
    ),
    "a missing import": (
        "import no_such_thing",
        "ModuleNotFoundError: No module named 'no_such_thing' (mine.py, line 2)",
    ),
    "an error of several lines": (
        "raise OSError('one\\ntwo')",
        "OSError: one two (mine.py, line 2)",
    ),
    "an error that cannot be printed": (
        "class E(Exception):\n    def __str__(self): raise SystemExit(1)\nraise E",
        "E: (its text cannot be shown) (mine.py, line 4)",
    ),
    "a bad command name": (
        "command('1')",
        "ValueError: '1' is not a command name: use letters, digits, - and _, a letter first, at"
        " most 32 (mine.py, line 2)",
    ),
    "a bad timeout": (
        "command('NAP', timeout=-1)",
        "ValueError: the timeout of NAP must be a number of seconds, or 0 for no limit (mine.py,"
        " line 2)",
    ),
    "a timeout without end": (
        "command('NAP', timeout=float('inf'))",
        "ValueError: the timeout of NAP must be a number of seconds, or 0 for no limit (mine.py,"
        " line 2)",
    ),
    "a bad at_once": (
        "command('NAP', at_once=1.5)",
        "ValueError: at_once of NAP must be a whole number, or 0 for no limit (mine.py, line 2)",
    ),
    "at_once that is a truth value": (
        "command('NAP', at_once=True)",
        "ValueError: at_once of NAP must be a whole number, or 0 for no limit (mine.py, line 2)",
    ),
}


@pytest.mark.parametrize(("text", "error"), IMPORT_ERRORS.values(), ids=IMPORT_ERRORS)
def test_an_error_on_import_is_reported_with_its_line(write: Write, text: str, error: str) -> None:
    assert error_of(write("mine", IMPORT + text)) == f"cannot import it: {error}"


NO_REQUEST = "the handler of NAP must take the request first, as in def handler(request)"
ASYNC = "the handler of NAP is an async function: use def, and calls that block"
GENERATOR = "the handler of NAP is a generator: use return, not yield"
NO_NAME = 'the decorator needs a name: @command("NAP")'
HANDLER_ERRORS = {
    "no argument": ("@command('NAP')\ndef nap(): return 1", NO_REQUEST),
    "only keyword arguments": ("@command('NAP')\ndef nap(**more): return 1", NO_REQUEST),
    "a keyword-only argument": ("@command('NAP')\ndef nap(*, request): return 1", NO_REQUEST),
    "a keyword-only second argument": (
        "@command('NAP')\ndef nap(request, *, x): return 1",
        "the handler of NAP has the keyword-only parameter x: no word can set it",
    ),
    "a type that no word can have": (
        "@command('NAP')\ndef nap(request, names: list): return 1",
        "the handler of NAP has the parameter names of the type list: use str, int or float",
    ),
    "a union": (
        "@command('NAP')\ndef nap(request, port: int | None = None): return 1",
        "the handler of NAP has the parameter port of the type int | None: use str, int or float",
    ),
    "a parameter that clients cannot read": (
        "@command('NAP')\ndef nap(request, größe): return 1",
        "the handler of NAP has the parameter größe: use ASCII, since clients read it",
    ),
    "limits without blocking": (
        "@command('NAP', may_block=False, timeout=1)\ndef nap(request): return 1",
        "NAP cannot have timeout or at_once with may_block=False",
    ),
    "async def": ("@command('NAP')\nasync def nap(request): return 1", ASYNC),
    "an async generator": ("@command('NAP')\nasync def nap(request): yield 1", ASYNC),
    "an object with an async call": (
        "class C:\n    async def __call__(self, request): return 1\nnap = command('NAP')(C())",
        ASYNC,
    ),
    "a generator": ("@command('NAP')\ndef nap(request): yield 1", GENERATOR),
    "a class": (
        "@command('NAP')\nclass Nap:\n    def __init__(self, request): pass",
        "the handler of NAP must be a function, not a class",
    ),
    "not a function": (
        "nap = command('NAP')('nap')",
        "the handler of NAP must be a function, not a str",
    ),
    "two decorators": (
        "@command('NAP')\n@command('REST')\ndef nap(request): return 1",
        "the handler of NAP must be a function, not a Command",
    ),
    "a decorator without parentheses": ("@command\ndef nap(request): return 1", NO_NAME),
}


@pytest.mark.parametrize(("text", "error"), HANDLER_ERRORS.values(), ids=HANDLER_ERRORS)
def test_an_unusable_handler_is_refused(write: Write, text: str, error: str) -> None:
    message = error_of(write("mine", IMPORT + text))
    assert message.startswith(f"cannot import it: TypeError: {error}")
    assert " (mine.py, line " in message


def test_a_module_without_commands_is_refused_with_its_file(write: Write, tmp_path: Path) -> None:
    advice = 'defines no command: decorate a function with @command("NAME")'
    assert error_of(write("mine", "def nap(request): return 1")) == f"{tmp_path}/mine.py {advice}"
    assert error_of("queue") == f"{queue.__file__} {advice}"
    assert error_of("time") == f"Python's built-in module time {advice}"
    (tmp_path / "mine_folder").mkdir()
    assert error_of("mine_folder") == f"the folder {tmp_path}/mine_folder {advice}"


def test_a_command_name_may_be_used_once(write: Write) -> None:
    one = "@command('a')\ndef f(request): return 1\n"
    other = "@command('A')\ndef g(request): return 2\n"
    assert error_of(write("mine_two", IMPORT + one + other)) == "the command A is defined twice"
    who = "@command('who')\ndef f(request): return 1\n"
    reason = "the command WHO is built in: choose another name"
    assert error_of(write("mine_who", IMPORT + who)) == reason


@pytest.mark.parametrize(
    ("path", "advice"),
    [
        ("mine.py", "--commands mine"),
        ("./mine.py", "--commands mine"),
        ("lib/mine.py", "--commands lib.mine"),
        ("lib/mine", "--commands lib.mine"),
        ("/srv/app/mine.py", "--commands mine, and start gserver in /srv/app"),
        ("../mine.py", "--commands mine, and start gserver in .."),
    ],
)
def test_a_path_is_refused_with_the_name_to_use(write: Write, path: str, advice: str) -> None:
    write("mine")
    assert error_of(path) == f"it must be the name of a module, not a path: use {advice}"


@pytest.mark.parametrize("name", [".mine", "..", "."])
def test_a_relative_name_is_refused(write: Write, name: str) -> None:
    write("mine")
    assert error_of(name) == "it must be the full name of a module, without a leading dot"


@pytest.mark.parametrize("name", ["mine", "mine.deep", "a b", "mine.", "no_such_module"])
def test_a_module_that_does_not_exist_is_refused_with_the_folder_that_was_searched(
    write: Write, tmp_path: Path, name: str
) -> None:
    message = error_of(name)
    assert message.startswith("cannot import it: ModuleNotFoundError: No module named ")
    assert message.endswith(f": it is neither in {tmp_path} nor installed")


@pytest.mark.parametrize("name", ["queue", "queue.mine", "time", "click", "tests.mine_hidden"])
def test_a_file_hidden_by_an_installed_module_is_refused_with_both_paths(
    write: Write, tmp_path: Path, name: str
) -> None:
    write(name)
    message = error_of(name)
    own = f"{tmp_path}/{name.replace('.', '/')}.py"
    assert message.endswith(f" is loaded instead of {own}: rename your file")
    other = message.split(" is loaded")[0].rpartition(": ")[2]
    assert other == "Python's built-in module time" or Path(other).is_file()


def test_a_hidden_file_is_named_if_the_other_module_cannot_be_imported(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "site-packages"
    installed.mkdir()
    (installed / "mine.py").write_text("import no_such_thing\n")
    monkeypatch.syspath_prepend(str(installed))
    assert error_of(write("mine")) == (
        "cannot import it: ModuleNotFoundError: No module named 'no_such_thing' (mine.py, line 1):"
        f" {installed}/mine.py is loaded instead of {tmp_path}/mine.py: rename your file"
    )


# The real program.


@pytest.mark.outer
@pytest.mark.parametrize(
    ("option", "file", "text", "error"),
    [
        ("extra", "extra.py", HANDLER_ERRORS["no argument"][0], "must take the request first"),
        ("extra", "extra.py", HANDLER_ERRORS["async def"][0], "async function"),
        ("extra.py", "extra.py", GOOD, "use --commands extra\n"),
        ("./extra.py", "extra.py", GOOD, "use --commands extra\n"),
        ("queue", "queue.py", GOOD, "/queue.py: rename your file\n"),
    ],
)
def test_a_start_with_an_unusable_module_exits_with_2_and_one_line(
    tmp_path: Path, option: str, file: str, text: str, error: str
) -> None:
    (tmp_path / file).write_text(text if text == GOOD else IMPORT + text)
    words = ["--commands", option, "--workers", "2"]
    with Running(*words, cwd=tmp_path, env={"MARK": str(tmp_path)}, wait=False) as server:
        assert server.exit_code() == 2
        assert server.stderr.startswith(f"gserver: --commands {option}: ")
        assert error in server.stderr
        assert len(server.errors) == 1
        assert server.lines == []
    assert left_over(tmp_path) == []
