"""The error line and the exit code when gserver cannot continue."""

import ast
import socket
from pathlib import Path

from gserver import errors
from lab.running import error_line, gserver


def test_a_usage_error_is_a_fatal_error_with_its_own_exit_code() -> None:
    assert (errors.EXIT_CLEAN, errors.FatalError.exit_code, errors.UsageError.exit_code) == (
        0,
        1,
        2,
    )
    assert issubclass(errors.UsageError, errors.FatalError)


def test_an_environment_error_exits_with_1() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = gserver("serve", "--port", str(port))
    reason = "it is in use by another program: stop that one, or choose another --port"
    assert error_line(done, 1) == f"cannot listen on 127.0.0.1:{port}: {reason}"


def test_a_usage_error_found_by_a_worker_exits_with_2() -> None:
    line = error_line(gserver("serve", "--port", "0", "--commands", "no_such_module"))
    assert line.startswith("--commands no_such_module: cannot import it: ModuleNotFoundError")


def test_the_errors_module_imports_nothing() -> None:
    tree = ast.parse(Path(errors.__file__).read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
