"""bin/*, the Procfile and the package: from a fresh clone to a server, on real copies of this
repository.

A copy has no `.venv` at first. Packages are installed once for the file, and copied from there.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from lab.running import LIMIT, PATIENCE, ROOT, Client, Running, argv, program, until

#: An installation downloads packages and compiles bytecode.
INSTALL_LIMIT = 120 * PATIENCE
SCRIPTS = [*sorted((ROOT / "bin").iterdir()), ROOT / ".ci/run"]
#: The programs that the scripts need besides Python.
TOOLS = argv("bash cat cmp cp dirname env flock id mkdir readlink rm sh")
#: With these, pip finds nothing to install.
NO_PACKAGES = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
OWN_BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class SetUp:
    """A copy in which bin/setup was run, and its output."""

    root: Path
    done: subprocess.CompletedProcess[str]

    @property
    def python(self) -> Path:
        return self.root / ".venv" / "bin" / "python"


def _copy(root: Path) -> Path:
    """Copy the files of the repository, including uncommitted ones, as a clone would."""
    listed = subprocess.run(
        [program("git"), "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().rstrip("\0").split("\0"):
        if (ROOT / name).exists():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    return root


def _clean(*path: Path, **extra: str) -> dict[str, str]:
    """An environment with only a PATH, a home, and the settings that pip needs."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("PIP_") or name == "HOME"
    }
    return {**kept, "PATH": os.pathsep.join(map(str, path)), **extra}


def _run(
    *command: str | Path, env: dict[str, str], cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)),
        env=env,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=INSTALL_LIMIT,
        check=False,
    )


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PATH that has no Python, no pip, no apt-get and no npm."""
    folder = tmp_path_factory.mktemp("tools")
    for name in TOOLS:
        (folder / name).symlink_to(program(name))
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PATH with a `python3` that has no packages, and can make virtualenvs."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "bin"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that is never set up."""
    return _copy(tmp_path_factory.mktemp("clone") / "never set up")


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, bare: Path, tools: Path) -> SetUp:
    """A copy that was set up in a clean environment, in a folder with a blank in its name."""
    root = _copy(tmp_path_factory.mktemp("clone") / "set up")
    return SetUp(root, _run(root / "bin/setup", env=_clean(bare, tools), cwd=root.parent))


@pytest.fixture
def another(ready: SetUp, tmp_path: Path) -> Path:
    """A copy that is set up, for a test that changes it."""
    root = tmp_path / "another one"
    shutil.copytree(ready.root, root, symlinks=True)
    return root


def _serving(
    *command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None
) -> Running:
    """The server that a script starts, without this test's own Python."""
    return Running(
        "--port",
        "0",
        command=list(map(str, command)),
        cwd=cwd,
        env={"PYTHONPATH": "", **(env or {})},
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_executable_valid_bash_that_stops_at_the_first_failure(script: Path) -> None:
    text = script.read_text()
    assert os.access(script, os.X_OK)
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    subprocess.run([program("bash"), "-n", script], check=True)


# The first start.


def test_setup_makes_a_virtualenv_and_reports_it(ready: SetUp) -> None:
    done = ready.done
    assert (done.returncode, done.stdout) == (0, f"{ready.python}\n"), done.stderr
    message = [line for line in done.stderr.splitlines() if line.startswith("gserver: ")]
    venv = ready.root / ".venv"
    assert message == [
        f"gserver: first start: making a virtualenv in {venv} ...",
        f"gserver: installing the packages of requirements.txt into {venv} ...",
        "gserver: installed",
    ]


def test_setup_installs_exactly_the_pinned_packages(ready: SetUp) -> None:
    # Names are compared without case, with - equal to _.
    freeze = (
        _run(ready.python, "-m", "pip", "freeze", env=_clean()).stdout.lower().replace("_", "-")
    )
    wanted = [
        line for line in (ROOT / "requirements.txt").read_text().splitlines() if ";" not in line
    ]
    # A line with a marker applies only to some Pythons.
    assert sorted(
        line for line in freeze.split() if not line.startswith("async-timeout")
    ) == sorted(wanted)


@pytest.mark.parametrize("page", sorted(ROOT.glob("requirements*.txt")), ids=lambda page: page.stem)
def test_a_lock_has_hashes_for_every_pin(page: Path) -> None:
    def spelt(pin: str) -> str:
        name, equal, version = pin.partition("==")
        return (name.replace(".", "-") + equal + version).replace(" ;", ";")

    includes = re.escape("".join(re.findall(r"^-r .*\n", page.read_text(), re.M)))
    includes = includes.replace(r"\.txt", r"\.lock")
    entry = r"\S.* \\\n(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+"
    lock = page.with_suffix(".lock").read_text()
    assert re.fullmatch(f"{includes}({entry})+", lock)
    pins = re.findall(r"^([a-z].*) \\$", lock, re.M)
    wanted = [line for line in page.read_text().splitlines() if not line.startswith("-r ")]
    assert [*map(spelt, pins)] == [*map(spelt, wanted)]


@pytest.mark.parametrize("option", [None, "--dev"])
def test_setup_refuses_a_package_with_another_hash(
    option: str | None, bare: Path, tools: Path, tmp_path: Path
) -> None:
    root = _copy(tmp_path / "copy")
    lock = root / f"requirements{(option or '')[1:]}.lock"
    lock.write_text(re.sub(r"(?<=sha256:)[0-9a-f]{64}", "0" * 64, lock.read_text()))
    done = _run(root / "bin/setup", *([option] if option else []), env=_clean(bare, tools))
    assert (done.returncode, done.stdout) == (1, "")
    assert "DO NOT MATCH THE HASHES" in done.stderr


def test_setup_says_that_a_changed_file_has_no_hashes(
    bare: Path, tools: Path, tmp_path: Path
) -> None:
    """A developer can install a changed pin before `bin/audit --lock` has run."""
    root = _copy(tmp_path / "copy")
    with (root / "requirements-dev.txt").open("a") as file:
        file.write("one-more==1.0\n")
    done = _run(root / "bin/setup", "--dev", env=_clean(bare, tools, **NO_PACKAGES))
    assert done.returncode == 1
    assert (
        "gserver: without their hashes: requirements-dev.lock is not that of requirements-dev.txt "
        "(bin/audit --lock)\n"
    ) in done.stderr


def test_with_locked_a_changed_file_is_an_error(bare: Path, tools: Path, tmp_path: Path) -> None:
    """The image is built with --locked, since nobody reads the messages of a build."""
    root = _copy(tmp_path / "copy")
    with (root / "requirements.txt").open("a") as file:
        file.write("one-more==1.0\n")
    done = _run(root / "bin/setup", "--locked", env=_clean(bare, tools))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith(
        "gserver: requirements.lock is not that of requirements.txt: run bin/audit --lock\n"
    )


def test_files_in_the_start_folder_are_not_imported_by_the_setup(
    copy: Path, tools: Path, tmp_path: Path
) -> None:
    for name in ("csv", "json", "email", "zipfile", "pip", "venv"):
        (tmp_path / f"{name}.py").write_text("open('was imported', 'w'); raise SystemExit(1)\n")
    done = _run(copy / "bin/setup", env=_clean(OWN_BIN, tools, **NO_PACKAGES), cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{OWN_BIN / 'python3'}\n", "")
    assert not (tmp_path / "was imported").exists()


def test_a_second_setup_finishes_at_once_and_needs_no_python(ready: SetUp, tools: Path) -> None:
    began = time.monotonic()
    done = _run(ready.root / "bin/setup", env=_clean(tools))
    assert time.monotonic() - began < PATIENCE
    assert (done.returncode, done.stdout, done.stderr) == (0, ready.done.stdout, "")


def test_git_ignores_what_setup_creates(ready: SetUp) -> None:
    subprocess.run([program("git"), "init", "-q"], cwd=ready.root, check=True)
    untracked = subprocess.run(
        [program("git"), "ls-files", "-o", "--exclude-standard", "--directory"],
        cwd=ready.root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert [name for name in untracked.stdout.split() if "venv" in name] == []


# bin/gserver.


def test_a_symlink_in_another_folder_serves_without_a_child_process(
    ready: SetUp, tmp_path: Path
) -> None:
    (tmp_path / "g").symlink_to(ready.root / "bin/gserver")
    (tmp_path / "click.py").write_text("raise SystemExit('the wrong file was imported')\n")
    (tmp_path / "ours.py").write_text(
        "import gserver\nfrom gserver.commands import command\n"
        "@command('FROM')\ndef whence(request): return gserver.__file__\n"
    )
    with _serving(tmp_path / "g", "--commands", "ours", cwd=tmp_path) as server:
        assert server.wait_for("server.listening")["process.pid"] == server.pid
        with server.client() as client:
            assert client.ask(b"FROM").decode() == f"{ready.root}/gserver/__init__.py"
            server.send_signal(signal.SIGTERM)
            assert client.rest() == b""
        assert server.exit_code() == 0
        assert server.stderr == ""
        assert [event["event.action"] for event in server.events()][-2:] == [
            "server.draining",
            "server.stopped",
        ]


def test_a_relative_path_serves_with_the_options_of_the_environment(ready: SetUp) -> None:
    env = {"PORT": "0", "GSERVER_SERVER_ID": "relative"}
    with Running(
        command=["../bin/gserver"], cwd=ready.root / "docs", env={"PYTHONPATH": "", **env}
    ) as server:
        with server.client() as client:
            assert client.ask(b"WHERE") == b"relative"
        assert server.stop(signal.SIGINT) == 0


def test_arguments_are_passed_through_unchanged(ready: SetUp, tools: Path) -> None:
    done = _run(ready.root / "bin/gserver", "--server-id", "two  words", env=_clean(tools))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "gserver: Invalid value for '--server-id': 'two words' is not one word"
    )


# Which Python.


def test_a_python_with_the_packages_is_used_without_a_virtualenv(copy: Path, tools: Path) -> None:
    env = _clean(OWN_BIN, tools, **NO_PACKAGES)
    for options in ((), ("--dev",)):
        done = _run(copy / "bin/setup", *options, env=env)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{OWN_BIN / 'python3'}\n", "")
    with _serving(copy / "bin/gserver", env={"PATH": env["PATH"], **NO_PACKAGES}) as server:
        assert server.who() == 1
        assert server.stop() == 0
    assert not (copy / ".venv").exists()


def test_an_active_virtualenv_is_used(copy: Path, ready: SetUp, tools: Path) -> None:
    env = _clean(OWN_BIN, tools, VIRTUAL_ENV=str(ready.root / ".venv"), **NO_PACKAGES)
    done = _run(copy / "bin/setup", env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{ready.python}\n", "")
    assert not (copy / ".venv").exists()


def test_a_deleted_active_virtualenv_is_not_used(copy: Path, tools: Path, tmp_path: Path) -> None:
    done = _run(copy / "bin/setup", env=_clean(OWN_BIN, tools, VIRTUAL_ENV=str(tmp_path / "gone")))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{OWN_BIN / 'python3'}\n", "")


def test_packages_are_installed_into_an_active_virtualenv_that_lacks_them(
    copy: Path, bare: Path, tools: Path
) -> None:
    done = _run(
        copy / "bin/gserver", env=_clean(tools, VIRTUAL_ENV=str(bare.parent), **NO_PACKAGES)
    )
    assert (done.returncode, done.stdout) == (1, "")
    message = done.stderr.splitlines()
    assert (
        message[0] == f"gserver: installing the packages of requirements.txt into {bare.parent} ..."
    )
    assert (
        message[-1] == "gserver: the packages could not be installed: see above, and run this again"
    )
    assert not (copy / ".venv").exists()


def test_a_python_with_other_versions_of_the_packages_is_not_used(
    tools: Path, tmp_path: Path
) -> None:
    root = _copy(tmp_path / "copy")
    pins = (root / "requirements.txt").read_text()
    (root / "requirements.txt").write_text(
        re.sub(r"^click==.*$", "click==1.0", pins, flags=re.MULTILINE)
    )
    (root / ".venv.lock").mkdir()  # Makes it stop where it would create a virtualenv.
    done = _run(root / "bin/setup", env=_clean(OWN_BIN, tools))
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr
        == f"gserver: cannot write to {root}, and no Python with the packages was found\n"
    )


def test_a_virtualenv_with_an_inaccessible_python_is_reported_in_one_line(
    tools: Path, tmp_path: Path
) -> None:
    """The virtualenv's Python is in another user's home. The report needs no other Python."""
    root = _copy(tmp_path / "copy")
    python = root / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to(tmp_path / "home/of/another/python3")
    (root / ".venv.lock").mkdir()
    for path in ((tools,), (OWN_BIN, tools)):
        done = _run(root / "bin/gserver", env=_clean(*path))
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            f"gserver: this user cannot execute {python}: as the owner of {root}, remove .venv, "
            "and run bin/setup with a Python that all may execute: PATH=/usr/bin:/bin bin/setup\n"
        )


def test_packages_that_this_user_cannot_update_are_reported_in_one_line(
    another: Path, tools: Path
) -> None:
    (another / ".venv.lock").unlink()
    (another / ".venv.lock").mkdir()
    for options, name in (([], "requirements.txt"), (["--dev"], "requirements-dev.txt")):
        with (another / name).open("a") as file:
            file.write("honcho==2.0.0\n")
        done = _run(another / "bin/setup", *options, env=_clean(tools))
        assert (done.returncode, done.stdout) == (1, "")
        again = " ".join(["bin/setup", *options])
        venv = another / ".venv"
        assert done.stderr == (
            f"gserver: the packages in {venv} are not those of {name}, or its Python has changed: "
            f"run {again} again as the owner of {another}\n"
        )


def test_without_a_python_one_line_gives_advice(copy: Path, tools: Path) -> None:
    for name in ("bin/setup", "bin/gserver"):
        done = _run(copy / name, env=_clean(tools))
        assert (done.returncode, done.stdout) == (1, "")
        message = "Python 3.11 or newer is needed, and none is on the PATH: apt-get install python3"
        assert done.stderr == f"gserver: {message}\n"
    assert not (copy / ".venv").exists()


def test_an_unusable_python3_is_skipped_for_a_newer_one(
    copy: Path, tools: Path, tmp_path: Path
) -> None:
    ours = program(str(OWN_BIN / f"python3.{sys.version_info.minor}"))
    (tmp_path / "python3").symlink_to(program("false"))
    done = _run(copy / "bin/setup", env=_clean(tmp_path, OWN_BIN, tools))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{ours}\n", "")


def test_a_python_that_cannot_make_virtualenvs_is_reported_in_one_line(
    tools: Path, tmp_path: Path
) -> None:
    """As on Debian without python3-venv: the same Python and files, without ensurepip."""
    ours, stdlib = tmp_path / "python", Path(sysconfig.get_path("stdlib"))
    library = ours / stdlib.relative_to(sys.base_prefix)
    library.mkdir(parents=True)
    for entry in stdlib.iterdir():
        if entry.name not in ("ensurepip", "site-packages", "dist-packages"):
            (library / entry.name).symlink_to(entry)
    (ours / "bin").mkdir()
    shutil.copy2(Path(sys.executable).resolve(), ours / "bin" / "python3")
    root = _copy(tmp_path / "copy")
    env = _clean(ours / "bin", tools, LD_LIBRARY_PATH=str(Path(sys.base_prefix) / "lib"))
    done = _run(root / "bin/gserver", env=env)
    assert (done.returncode, done.stdout) == (1, "")
    message = f"{ours}/bin/python3 cannot make a virtualenv: apt-get install python3-venv"
    assert done.stderr == f"gserver: {message}\n"
    assert not (root / ".venv").exists()


# Interruptions, changes and simultaneous runs.


def test_a_killed_setup_is_repaired_by_the_next(bare: Path, tools: Path, tmp_path: Path) -> None:
    root = _copy(tmp_path / "killed")
    first = subprocess.Popen(
        [root / "bin/setup"],
        env=_clean(bare, tools),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    python = root / ".venv/bin/python"
    until(python.exists, "the virtualenv is being created", INSTALL_LIMIT)
    os.killpg(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    done = _run(root / "bin/setup", env=_clean(bare, tools))
    assert (done.returncode, done.stdout) == (0, f"{python}\n"), done.stderr
    assert _run(python, "-c", "import click, gevent, statsd", env=_clean()).returncode == 0


def test_a_killed_installation_is_repaired_by_the_next(
    another: Path, bare: Path, tools: Path
) -> None:
    python = another / ".venv/bin/python"
    (another / ".venv/.requirements").unlink()
    packages = Path(
        _run(python, "-c", "import click; print(click.__path__[0])", env=_clean()).stdout.strip()
    ).parent
    assert packages.is_relative_to(another)
    for entry in packages.glob("click*"):
        shutil.rmtree(entry)
    for expected in ("gserver: installed", ""):  # The second run has nothing to do.
        done = _run(another / "bin/setup", env=_clean(bare, tools))
        assert (done.returncode, done.stdout) == (0, f"{python}\n"), done.stderr
        assert (done.stderr.splitlines() or [""])[-1] == expected
    assert _run(another / "bin/gserver", "--version", env=_clean(tools)).returncode == 0


def test_new_pins_are_installed_into_the_existing_virtualenv(
    another: Path, bare: Path, tools: Path
) -> None:
    with (another / "requirements.txt").open("a") as file:
        file.write("honcho==2.0.0\n")
    done = _run(another / "bin/setup", env=_clean(bare, tools))
    assert done.returncode == 0, done.stderr
    assert "making a virtualenv" not in done.stderr
    assert (another / ".venv/bin/honcho").exists()


def test_packages_for_the_tests_are_added_to_the_installed_ones(
    another: Path, bare: Path, tools: Path
) -> None:
    (another / "requirements-dev.txt").write_text("-r requirements.txt\nhoncho==2.0.0\n")
    done = _run(another / "bin/setup", "--dev", env=_clean(bare, tools))
    assert done.returncode == 0, done.stderr
    assert "installing the packages of requirements-dev.txt" in done.stderr
    assert (another / ".venv/bin/honcho").exists()
    for options in ((), ("--dev",)):
        done = _run(another / "bin/setup", *options, env=_clean(tools))
        expected = (0, f"{another}/.venv/bin/python\n", "")
        assert (done.returncode, done.stdout, done.stderr) == expected


def test_a_failed_setup_is_reported_every_time_and_not_trusted(
    another: Path, bare: Path, tools: Path
) -> None:
    pins = (another / "requirements.txt").read_text()
    (another / "requirements.txt").write_text(pins + "honcho==2.0.0\n")
    for _ in range(2):
        done = _run(another / "bin/gserver", "--version", env=_clean(bare, tools, **NO_PACKAGES))
        assert (done.returncode, done.stdout) == (1, "")
        message = "gserver: the packages could not be installed: see above, and run this again"
        assert done.stderr.splitlines()[-1] == message
    # Back to the old pins: the installed packages may be a mix, so they are checked again.
    (another / "requirements.txt").write_text(pins)
    done = _run(another / "bin/setup", env=_clean(bare, tools))
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "gserver: installed")


def test_a_failed_setup_for_the_tests_does_not_affect_the_server(
    another: Path, bare: Path, tools: Path
) -> None:
    (another / "requirements-dev.txt").write_text("-r requirements.txt\nhoncho==2.0.0\n")
    assert (
        _run(another / "bin/setup", "--dev", env=_clean(bare, tools, **NO_PACKAGES)).returncode == 1
    )
    done = _run(another / "bin/setup", env=_clean(tools))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{another}/.venv/bin/python\n", "")


def test_two_servers_that_start_at_once_on_a_fresh_clone_both_serve(
    bare: Path, tools: Path, tmp_path: Path
) -> None:
    root = _copy(tmp_path / "twice")
    command, env = (
        [str(root / "bin/gserver"), "--port", "0"],
        {"PYTHONPATH": "", "PATH": f"{bare}:{tools}"},
    )
    with (
        Running(command=command, env=env, wait=False) as one,
        Running(command=command, env=env, wait=False) as two,
    ):
        for server in (one, two):
            server.port = server.wait_for("server.listening", limit=INSTALL_LIMIT)["server.port"]
        assert (one.who(), two.who()) == (1, 1)
        assert (one.stop(), two.stop()) == (0, 0)
    assert (one.stderr + two.stderr).count("making a virtualenv") == 1
    assert (one.stderr + two.stderr).count("gserver: installed\n") == 1


# The package.


def test_the_package_installs_as_a_command_that_works_anywhere(
    ready: SetUp, bare: Path, tools: Path, tmp_path: Path
) -> None:
    root, target = _copy(tmp_path / "source"), tmp_path / "target"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", target], check=True)
    pip: list[str | Path] = [ready.python, "-m", "pip", "--python", target / "bin/python"]
    done = _run(*pip, "install", root, env=_clean(bare, tools))
    assert done.returncode == 0, done.stderr
    shutil.rmtree(root)
    with _serving(target / "bin/gserver", cwd=tmp_path) as server:
        asked = _run(
            target / "bin/gserver",
            *argv(f"ask WHY --server 127.0.0.1:{server.port}"),
            env={},
            cwd=tmp_path,
        )
        assert (asked.returncode, asked.stdout, asked.stderr) == (0, "42\n", "")
        assert server.stop() == 0
        assert server.stderr == ""
    assert _run(*pip, "check", env=_clean()).returncode == 0
    files = _run(*pip, "show", "--files", "gserver", env=_clean()).stdout
    assert "gserver/cli/main.py" in files
    assert "tests/" not in files


# Process runners.


def _descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


@pytest.fixture
def honcho(ready: SetUp) -> Iterator[Running]:
    """`honcho start` in a copy that is set up, with a PORT."""
    command = [program(str(OWN_BIN / "honcho")), "start"]
    with Running(
        command=command, cwd=ready.root, env={"PORT": "0", "PYTHONPATH": ""}, wait=False
    ) as running:
        yield running


def test_a_process_runner_serves_on_all_addresses_and_stops_cleanly(
    honcho: Running, ready: SetUp
) -> None:
    def found() -> re.Match[str] | None:
        return re.search(
            r'web\.1 *\| .*"server\.address": "0\.0\.0\.0", "server\.port": (\d+)',
            "".join(honcho.lines),
        )

    port = int(until(found, f"the server listens: {honcho.lines} {honcho.errors}")[1])
    with Client(port) as one, Client(port, host="127.0.0.2") as two:
        assert one.ask(b"WHY") == two.ask(b"WHY") == b"42"
        processes = _descendants(honcho.pid)
        package = str(ready.root / "gserver")
        assert any(package in process.cmdline() for process in processes)
        honcho.send_signal(signal.SIGINT)
        assert one.rest() == two.rest() == b""
    assert honcho.exit_code() == 130  # honcho's exit code for Ctrl-C, whatever its programs return.
    assert any(line.rstrip().endswith("web.1 stopped (rc=0)") for line in honcho.lines), (
        honcho.lines
    )
    assert psutil.wait_procs(processes, timeout=LIMIT)[1] == []


# bin/test, bin/check and bin/coverage.


ONE_TEST = '''"""One test."""

from gserver.errors import UsageError


def test_one() -> None:
    assert UsageError.exit_code == 2
'''


@pytest.fixture
def tested(tmp_path: Path) -> Path:
    """A copy with one test, which passes. Modules that import tests are removed too."""
    root = _copy(tmp_path / "tested")
    shutil.rmtree(root / "tests")
    (root / "tests").mkdir()
    for path in (root / "proof").glob("[!_]*.py"):
        path.unlink()
    (root / "tests/test_one.py").write_text(ONE_TEST)
    return root


def _started(
    name: str, root: Path, tools: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Run a script with this Python and its packages, from another folder."""
    return _run(root / name, *arguments, env=_clean(OWN_BIN, tools, **NO_PACKAGES), cwd=root.parent)


def test_bin_test_passes_arguments_to_pytest_and_returns_its_exit_code(
    tested: Path, tools: Path
) -> None:
    done = _started("bin/test", tested, tools, "-q", "tests/test_one.py")
    assert (done.returncode, done.stdout.splitlines()[-1][:9]) == (0, "1 passed ")
    assert _started("bin/test", tested, tools, "-q", "no/such/file").returncode == 4


def test_bin_test_runs_the_inner_ring_and_names_what_it_skips(tested: Path, tools: Path) -> None:
    (tested / "tests/test_two.py").write_text(
        "import pytest\n\n\n@pytest.mark.outer\ndef test_two() -> None:\n    pytest.fail('outer')\n"
    )
    done = _started("bin/test", tested, tools)
    *_, summary, last = done.stdout.splitlines()
    assert "1 passed" in summary
    assert last.startswith("Not run: the outer ring")
    assert done.returncode == 0
    (tested / "tests/test_one.py").write_text(ONE_TEST.replace("2", "3"))
    assert _started("bin/test", tested, tools).returncode == 1


def test_bin_check_checks_and_then_tests(tested: Path, tools: Path) -> None:
    done = _started("bin/check", tested, tools, "-q")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no issues found" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("1 passed ")
    assert (
        "missing, so some tests are skipped: apt-get install netcat-openbsd telnet curl nodejs npm"
        in done.stderr
    )


def test_bin_coverage_reports_on_the_package_and_returns_the_tests_result(
    tested: Path, tools: Path
) -> None:
    done = _started("bin/coverage", tested, tools, "-q")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^gserver/cli/main\.py ", done.stdout, re.MULTILINE)
    assert re.search(r"^TOTAL ", done.stdout, re.MULTILINE)
    (tested / "tests/test_one.py").write_text(ONE_TEST.replace("2", "3"))
    done = _started("bin/coverage", tested, tools, "-q")
    assert done.returncode == 1
    assert re.search(r"^TOTAL ", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("    import os\n", "F401"),
        ("    assert  True\n", "would be reformatted"),
        ('    _x: int = "x"\n', "[assignment]"),
    ],
)
def test_bin_check_stops_at_the_first_failure(
    line: str, message: str, tested: Path, tools: Path
) -> None:
    with (tested / "tests/test_one.py").open("a") as file:
        file.write(line)
    done = _started("bin/check", tested, tools, "-q")
    assert done.returncode != 0
    assert message in done.stdout
    assert "1 passed" not in done.stdout


NAMES = sorted(path.name for path in (ROOT / "bin").iterdir() if path.name != "gserver")


@pytest.mark.parametrize("script", NAMES)
def test_each_script_has_help_that_does_nothing_else(script: str, tmp_path: Path) -> None:
    """In a copy without a virtualenv."""
    (tmp_path / "bin").mkdir()
    shutil.copy(ROOT / "bin" / script, tmp_path / "bin")
    for arguments in (["--help"], ["-h"]):
        done = subprocess.run(
            [tmp_path / "bin" / script, *arguments],
            env={"PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert 1 <= len(done.stdout.splitlines()) < 30
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]
    called = re.search(r"-m (proof\.\w+|bench) ", (ROOT / "bin" / script).read_text())
    if called:
        stem = ROOT / called[1].replace(".", "/")
        module = stem / "__main__.py" if stem.is_dir() else stem.with_suffix(".py")
        options = set(re.findall(r'click\.option\(\s*"(--[a-z-]+)"', module.read_text()))
        assert options
        assert options <= set(re.findall(r"--[a-z-]+", done.stdout))


def test_programs_that_cannot_be_installed_are_named(copy: Path, tools: Path) -> None:
    for names, code, said in (
        (["bash", "id"], 0, ""),
        (["bash", "redis-server"], 1, "gserver: missing: apt-get install redis-server\n"),
    ):
        done = _run(copy / "bin/programs", *names, env=_clean(tools))
        assert (done.returncode, done.stdout, done.stderr) == (code, "", said)


def test_setup_refuses_unknown_arguments() -> None:
    for words, code, said in (
        (["--devel"], 2, "see bin/setup --help"),
        (["--help"], 0, "Which Python: "),
    ):
        done = subprocess.run(
            [ROOT / "bin/setup", *words], capture_output=True, text=True, check=False
        )
        assert (done.returncode, said in done.stdout + done.stderr) == (code, True)
