"""The shape of the package: which module may import which, read from the source, and how big they may become."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.running import LIMIT, ROOT, environment

ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()
#: From the top down. A module imports only what stands on a lower line, wherever in it the import is written.
LADDER = [
    re.findall(r"`(\w+)`", row.split(" | ")[0])
    for row in ARCHITECTURE.partition("## The ladder")[2].partition("\n## ")[0].splitlines()
    if row.startswith("| `")
]
#: Who may know gevent; all others are ordinary Python.
GEVENT = {
    "__main__",
    "worker",
    "agent",
    "dispatcher",
    "conversation",
    "cluster",
    "receiver",
    "admin",
    "handshakes",
    "roster",
    "statsd",
}
MAX_MODULE_LINES = 250
MAX_PACKAGE_LINES = 5740

MODULES = {path.stem: path for path in sorted((ROOT / "gserver").glob("*.py"))}


def _imports(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, at its top or later; `gserver.x` for a module of the package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            for alias in node.names:
                is_package = node.module == "gserver"
                yield (
                    f"gserver.{alias.name if alias.name in MODULES else '__init__'}" if is_package else str(node.module)
                )


def _own(path: Path) -> set[str]:
    return {name.split(".")[1] for name in _imports(path) if name.startswith("gserver.")}


def _loaded_after(statement: str) -> set[str]:
    """The modules that a new interpreter has loaded after an import."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"{statement}\nimport json, sys\nprint(json.dumps(list(sys.modules)))"],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env={key: value for key, value in environment().items() if not key.startswith("COVERAGE_")},  # it loads gevent
        check=True,
    )
    return set(json.loads(done.stdout))


def test_every_module_has_its_place_on_the_ladder() -> None:
    assert sorted(name for names in LADDER for name in names) == sorted(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_what_stands_below_it(name: str) -> None:
    height = {module: -line for line, names in enumerate(LADDER) for module in names}
    not_below = {other for other in _own(MODULES[name]) if height[other] >= height[name]}
    assert not_below == set()


def test_ask_knows_the_wire_and_nothing_of_the_server() -> None:
    assert _own(MODULES["ask"]) == {"errors"}


@pytest.mark.parametrize("name", ["protocol", "config", "membership", "redis_url"])
def test_a_pure_module_imports_neither_sockets_nor_clocks(name: str) -> None:
    pure = {
        "collections.abc",
        "contextlib",
        "dataclasses",
        "ipaddress",
        "re",
        "typing",
        "urllib.parse",
        "gserver.redis_url",
    }
    assert set(_imports(MODULES[name])) <= pure


def test_only_who_serves_clients_or_sends_metrics_knows_gevent() -> None:
    users = {name for name, path in MODULES.items() if any(i.split(".")[0] == "gevent" for i in _imports(path))}
    assert users == GEVENT


def test_the_supervisor_loads_nothing_that_serves_or_talks_to_a_network() -> None:
    loaded = _loaded_after("import gserver.__main__, gserver.cli, gserver.process, gserver.supervisor")
    assert {"gserver.supervisor", "gserver.board"} <= loaded
    theirs = {"gevent", "greenlet", "statsd", "redis", "asyncio", "ssl", "rich", "prometheus_client"}
    own = {
        f"gserver.{name}"
        for name in ("worker", "dispatcher", "conversation", "clientele", "receiver", "commands", "agent", "statsd")
    }
    own.add("gserver.ask")
    assert loaded & (theirs | own) == set()


def test_a_worker_loads_neither_metrics_nor_the_command_line() -> None:
    loaded = _loaded_after("import gserver.worker")
    assert {"gserver.conversation", "gevent"} <= loaded
    assert loaded & {"statsd", "redis", "click", "gserver.statsd", "gserver.cli", "gserver.supervisor"} == set()


def test_ask_starts_without_loading_a_server() -> None:
    loaded = _loaded_after("import gserver.cli, gserver.ask")
    assert {"gserver.ask", "click"} <= loaded
    assert loaded & {"gevent", "statsd", "gserver.supervisor", "gserver.board", "gserver.worker"} == set()


@pytest.mark.parametrize("name", [name for name in MODULES if name != "__init__"])
def test_every_module_has_its_test_file(name: str) -> None:
    assert (ROOT / "tests" / f"test_{name.strip('_')}.py").is_file()


@pytest.mark.parametrize("name", MODULES)
def test_a_module_can_be_read_in_one_sitting(name: str) -> None:
    assert len(MODULES[name].read_text().splitlines()) <= MAX_MODULE_LINES


def test_what_is_no_python_is_installed_with_the_package() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["gserver"]
    others = {path for path in (ROOT / "gserver").iterdir() if path.is_file() and path.suffix != ".py"}
    assert others
    assert others == {path for pattern in patterns for path in (ROOT / "gserver").glob(pattern)}


def test_the_package_stays_small() -> None:
    lines = sum(len(path.read_text().splitlines()) for path in MODULES.values())
    assert lines <= MAX_PACKAGE_LINES
