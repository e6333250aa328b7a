"""The structure of the package: which module may import which, read from the source."""

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.running import LIMIT, ROOT, argv, environment

PACKAGE = ROOT / "gserver"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
#: The import rule. A package imports itself, the packages named here, and the shared modules
#: directly in `gserver/`. Shared modules import only each other.
MAY_IMPORT: dict[str, set[str]] = {
    "cli": {"supervise"},
    "supervise": set(),
    "serve": set(),
    "agent": {"cluster"},
    "cluster": set(),
}
#: Packages and shared modules that import gevent. All others are ordinary Python.
GEVENT = {"serve", "agent", "cluster", "__main__"}


def _package(module: str) -> str:
    """The package of a module, or its own name if it is shared."""
    return module.split(".")[1] if module.count(".") else "__init__"


def _imports(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, at the top or later, except for annotations."""
    tree = ast.parse(path.read_text())
    for_annotations = {
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in branch.body
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node not in for_annotations:
            assert node.level == 0, f"{path.name}: imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)


def _own(path: Path) -> set[str]:
    return {name for name in _imports(path) if name.split(".")[0] == "gserver"}


def _loaded_after(statement: str) -> set[str]:
    """The modules that a new interpreter has loaded after an import."""
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-c",
            f"{statement}\nimport json, sys\nprint(json.dumps(list(sys.modules)))",
        ],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env={
            # Coverage would load gevent.
            key: value
            for key, value in environment().items()
            if not key.startswith("COVERAGE_")
        },
        check=True,
    )
    return set(json.loads(done.stdout))


def _packages_in(modules: set[str]) -> set[str]:
    return {_package(name) for name in modules if name.startswith("gserver.")}


def test_the_import_rule_names_every_package() -> None:
    folders = {path.parent.name for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE}
    assert folders == set(MAY_IMPORT)


# Every process begins in `gserver.__main__`, which imports the requested role.
@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"gserver.__main__"}))
def test_a_module_imports_only_what_the_rule_allows(name: str) -> None:
    package = _package(name)
    allowed = {package, *MAY_IMPORT.get(package, ())}
    forbidden = {
        other
        for other in _own(MODULES[name])
        if _package(other) in MAY_IMPORT and _package(other) not in allowed
    }
    assert forbidden == set()


def test_there_are_no_circular_imports() -> None:
    left = {name: _own(path) & MODULES.keys() - {name} for name, path in MODULES.items()}
    while left:
        free = {name for name, needs in left.items() if not needs & left.keys()}
        assert free, f"circular imports within {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in free}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_says_what_it_owns_and_where_to_start(package: str) -> None:
    tree = ast.parse((PACKAGE / package / "__init__.py").read_text())
    text = " ".join((ast.get_docstring(tree) or "").split())
    assert "owns" in text
    assert "must never" in text
    assert "Start reading in" in text


def test_ask_imports_the_protocol_but_nothing_of_the_server() -> None:
    assert _own(PACKAGE / "cli/ask.py") == {"gserver.errors"}


@pytest.mark.parametrize(
    "name",
    argv(
        "protocol config metrics cluster.membership cluster.duplicate_id"
        " supervise.phases redis_url redis_errors errors"
    ),
)
def test_a_pure_module_imports_neither_sockets_nor_clocks(name: str) -> None:
    theirs = {found.split(".")[0] for found in _imports(MODULES[f"gserver.{name}"])}
    impure = {"socket", "_socket", "time", "os", "select", "gevent", "threading", "redis", "random"}
    assert theirs & impure == set()


def test_only_networking_code_imports_gevent() -> None:
    users = {
        _package(name)
        for name, path in MODULES.items()
        if any(found.split(".")[0] == "gevent" for found in _imports(path))
    }
    assert users == GEVENT


def test_the_supervisor_loads_no_networking_code() -> None:
    loaded = _loaded_after(
        "import gserver.__main__, gserver.cli.main, gserver.supervise.supervisor"
    )
    assert {"gserver.supervise.supervisor", "gserver.scoreboard"} <= loaded
    theirs = {"gevent", "greenlet", "statsd", "redis", "asyncio", "ssl", "rich"}
    assert loaded & (theirs | {"prometheus_client", "gserver.cli.ask"}) == set()
    assert _packages_in(loaded) & {"serve", "agent", "cluster"} == set()


def test_a_worker_loads_neither_metrics_nor_the_command_line() -> None:
    loaded = _loaded_after("import gserver.serve.worker")
    assert "gevent" in loaded
    assert loaded & {"statsd", "redis", "click"} == set()
    assert _packages_in(loaded) & {"agent", "cli", "cluster", "supervise"} == set()


def test_ask_starts_without_loading_a_server() -> None:
    loaded = _loaded_after("import gserver.cli.main, gserver.cli.ask")
    assert {"gserver.cli.ask", "click"} <= loaded
    assert loaded & {"gevent", "statsd", "gserver.scoreboard"} == set()
    assert _packages_in(loaded) & {"agent", "serve", "cluster", "supervise"} == set()


def test_data_files_are_installed_with_the_package() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert {ROOT / name.replace(".", "/") for name in setuptools["packages"]} == {
        path.parent for path in PACKAGE.rglob("__init__.py")
    }
    others = {p for p in PACKAGE.rglob("*") if p.suffix not in (".py", ".pyc") and p.is_file()}
    installed = {
        path
        for package, patterns in setuptools["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    assert others
    assert others == installed


def test_nothing_imports_tests_and_gserver_imports_neither_lab_nor_proof() -> None:
    for folder, forbidden in (
        ("gserver", {"lab", "tests", "proof", "bench"}),
        ("lab", {"tests", "proof", "bench"}),
        ("proof", {"tests"}),
        ("bench", {"tests"}),
        ("tests", {"tests"}),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            names = {name.split(".")[0] for name in _imports(path)}
            assert not names & forbidden, f"{path.relative_to(ROOT)} imports {names & forbidden}"
