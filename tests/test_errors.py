"""What a person is told when gserver cannot go on, and with which exit code."""

import ast
import socket
from pathlib import Path

from gserver import errors
from lab.running import gserver, told


def test_a_misuse_is_a_failure_with_an_exit_code_of_its_own() -> None:
    assert (errors.EXIT_CLEAN, errors.FatalError.exit_code, errors.UsageError.exit_code) == (
        0,
        1,
        2,
    )
    assert issubclass(errors.UsageError, errors.FatalError)


def test_what_is_in_the_way_outside_ends_with_1() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = gserver("serve", "--port", str(port))
    reason = "it is in use by another program: stop that one, or choose another --port"
    assert told(done, 1) == f"cannot listen on 127.0.0.1:{port}: {reason}"


def test_what_a_worker_finds_that_cannot_be_done_ends_with_2() -> None:
    said = told(gserver("serve", "--port", "0", "--commands", "no_such_module"))
    assert said.startswith("--commands no_such_module: cannot import it: ModuleNotFoundError")


def test_the_module_imports_nothing_so_that_all_may_import_it() -> None:
    tree = ast.parse(Path(errors.__file__).read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
