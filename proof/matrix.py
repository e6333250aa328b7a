"""The tests on other versions: in releases of Debian, with the Python, Redis and Valkey of each.

A release is a folder that debootstrap makes. Everything in it runs in its own namespaces: mounts
are private, and end with the first process, as all other processes do.

All tests run with Redis. With Valkey, only tests that need Redis run: `redis_tests` finds them. A
failed test is repeated alone, and named if it then passes. After a fix, `--again` runs the tests
that still fail, and the row names the commit with which each has passed.
"""

import ast
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn
from xml.etree import ElementTree

import click
import psutil

from lab.machine import commit
from lab.running import ROOT

RESULTS = ROOT / "proof/results/matrix.json"
#: The releases and their engines.
SUITES = {"bookworm": ["redis"], "trixie": ["redis", "valkey"], "sid": ["redis", "valkey"]}
#: Packages that a clone needs before its own scripts install the rest.
PACKAGES = "ca-certificates git python3 python3-venv".split()
#: The checkout, in a release.
CHECKOUT = "srv/gserver"
#: Leftovers of a run that the next one may use.
KEPT = {".venv", ".tools"}
#: A folder in which Valkey's programs have the names of Redis's.
ALIASES = "opt/valkey"
PROGRAMS = ("server", "sentinel", "cli", "benchmark")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Variables of this machine that a release gets: access to registries.
GIVEN = re.compile(
    r"PIP_(?!FIND_LINKS|CONSTRAINT|REQUIRE|CONFIG).*|\w+_proxy|npm_config_registry|TERM", re.I
)
#: pip settings that a release gets: those that name no file of this machine.
PIP = {"index-url", "extra-index-url", "trusted-host", "timeout", "default-timeout", "proxy"}
CERTIFICATES = "usr/local/share/ca-certificates"
BUNDLE = "/etc/ssl/certs/ca-certificates.crt"

#: Arguments: the release, and the command. Its folder becomes the root of the file system, not only
#: of the process, since user namespaces need that. The shell stays, and reaps orphans.
ENTER = """
root=$1
shift
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --bind /dev "$root/dev"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$root/dev/pts"
mount -t tmpfs -o mode=1777 shm "$root/dev/shm"
mount -t tmpfs -o mode=755 run "$root/run"
cd "$root"
pivot_root . .
umount --lazy .
status=0
"$@" || status=$?
exit "$status"
"""
NAMESPACES = "setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child".split()
#: Two processes share the tests, with longer time limits.
PATIENCE = "2"
SHARED = ["-n", "2", "--dist", "loadfile"]
#: Runs failed tests, one after another.
ALONE = ["--last-failed", "--last-failed-no-failures", "none"]
#: Exit codes of pytest for tests that ran: passed, failed, and none that was chosen.
RAN = (0, 1, 5)

Row = dict[str, Any]


def in_namespaces(words: list[str], **options: Any) -> int:
    """Run a command in new namespaces, and return its exit code. It does not outlive this call."""
    with subprocess.Popen([*NAMESPACES, *words], start_new_session=True, **options) as process:
        try:
            return process.wait()
        except BaseException:
            _end(process)
            raise


def _end(unshare: subprocess.Popen[Any]) -> None:
    """Kill the first process of the namespaces. The kernel ends all others before it exits."""
    if unshare.poll() is None:
        process = psutil.Process(unshare.pid)
        for each in process.children() or [process]:
            each.kill()
    unshare.wait()


class Release:
    """A release of Debian in a folder."""

    def __init__(self, folder: Path, suite: str) -> None:
        self.suite = suite
        self._root = folder / suite
        self._commit = ""
        self._environment = {
            **machine_environment(),
            "PATH": PATH,
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "DEBIAN_FRONTEND": "noninteractive",
            "PIP_CERT": BUNDLE,
            "NODE_EXTRA_CA_CERTS": BUNDLE,
            "GSERVER_TEST_PATIENCE": os.environ.get("GSERVER_TEST_PATIENCE", PATIENCE),
        }

    def prepare(self) -> None:
        """Make the release if it is missing, copy the checkout, and install what tests need."""
        if not self._root.exists():
            self._make()
        self._copy_checkout()
        packages = [*PACKAGES]
        if "valkey" in SUITES[self.suite]:
            packages += ["valkey-server", "valkey-sentinel"]
            (self._root / ALIASES).mkdir(parents=True, exist_ok=True)
            for name in PROGRAMS:
                alias = self._root / ALIASES / f"redis-{name}"
                alias.unlink(missing_ok=True)
                alias.symlink_to(f"/usr/bin/valkey-{name}")
        self._must_run(["apt-get", "update", "-q"])
        self._must_run(["apt-get", "install", "-qy", "--no-install-recommends", *packages])
        self._must_run(["update-ca-certificates"])
        self._must_run(["git", "init", "-q"])  # Tests list the files of the repository.
        self._must_run(["bin/setup", "--dev"])
        self._must_run(["bin/programs"])

    def _make(self) -> None:
        unfinished = self._root.with_name(f"{self.suite}.unfinished")
        _remove(unfinished)
        words = ["debootstrap", "--variant=minbase", self.suite, str(unfinished), mirror()]
        if in_namespaces(words, stdout=sys.stderr):
            raise click.ClickException(f"debootstrap could not make {self.suite}")
        settings = said("apt-config", "dump", "Acquire")
        (unfinished / "etc/apt/apt.conf.d/50machine").write_text(settings)
        for path in Path("/", CERTIFICATES).glob("*.crt"):
            (unfinished / CERTIFICATES).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, unfinished / CERTIFICATES)
        # It need not survive a power failure.
        (unfinished / "etc/dpkg/dpkg.cfg.d/unsafe").write_text("force-unsafe-io\n")
        # No package starts a service: it would listen on this machine's network.
        policy = unfinished / "usr/sbin/policy-rc.d"
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
        unfinished.rename(self._root)

    def _copy_checkout(self) -> None:
        self._commit = commit("--dirty")
        checkout = self._root / CHECKOUT
        checkout.mkdir(parents=True, exist_ok=True)
        for path in checkout.iterdir():
            if path.name not in KEPT:
                _remove(path)
        for name in said("git", "-C", str(ROOT), "ls-files", "-z").split("\0"):
            if name and (ROOT / name).is_file():
                (checkout / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, checkout / name)

    def _run(self, words: list[str], **options: Any) -> int:
        inside = ["bash", "-c", f'cd /{CHECKOUT} && exec "$@"', "bash", *words]
        options = {"env": self._environment, "stdout": sys.stderr} | options
        return in_namespaces(["bash", "-euc", ENTER, "enter", str(self._root), *inside], **options)

    def _must_run(self, words: list[str]) -> None:
        if self._run(words):
            raise click.ClickException(f"in {self.suite}, this failed: {shlex.join(words)}")

    def _said(self, words: list[str], environment: dict[str, str]) -> str:
        with tempfile.TemporaryFile("w+") as output:
            self._run(words, env=environment, stdout=output)
            output.seek(0)
            return output.read()

    def test(self, engine: str, arguments: list[str]) -> Row:
        """Run tests, repeat failed ones alone, and return the row of the result."""
        # The seed is in the name of a test, which must be the same when it runs alone.
        seed = {"GSERVER_HISTORY_SEED": str(random.SystemRandom().randrange(1, 1_000_000))}
        environment = self._environment | seed
        if engine == "valkey":
            environment["PATH"] = f"/{ALIASES}:{PATH}"
        name, version = engine_of(self._said(["redis-server", "--version"], environment))
        python = self._said([".venv/bin/python", "--version"], environment).split()[-1]
        if name.lower() != engine:
            raise click.ClickException(f"in {self.suite}, redis-server is {name}")
        began = time.monotonic()
        first = self._outcomes([*SHARED, *arguments], environment)
        alone = {}
        if "failed" in first.values():
            alone = self._outcomes([*ALONE, *arguments], environment)
        return {
            "suite": self.suite,
            "python": python,
            "engine": name,
            "version": version,
            **summary(first, alone),
            "minutes": round((time.monotonic() - began) / 60, 1),
            "date": time.strftime("%Y-%m-%d"),
            "commit": self._commit,
        }

    def test_again(self, row: Row) -> Row:
        """Run the tests that failed in a row, and return the row with those that have passed."""
        found = self.test(row["engine"].lower(), [*map(node, row["failures"])])
        return corrected(row, found)

    def _outcomes(self, arguments: list[str], environment: dict[str, str]) -> dict[str, str]:
        report = self._root / "srv/report.xml"
        report.unlink(missing_ok=True)
        code = self._run(
            ["bin/test", f"--junit-xml=/srv/{report.name}", *arguments], env=environment
        )
        if code not in RAN or not report.exists():
            raise click.ClickException(f"in {self.suite}, pytest ended with exit code {code}")
        return outcomes(report.read_text())


def engine_of(text: str) -> tuple[str, str]:
    """Return name and version from the reply to `redis-server --version`."""
    found = re.match(r"(\w+) server v=([0-9.]+)", text)
    if not found:
        raise click.ClickException(f"redis-server reports no version: {text!r}")
    return found[1], found[2]


def outcomes(report: str) -> dict[str, str]:
    """Return each test's outcome from JUnit's XML: `passed`, `failed`, or `skipped: ` and why."""
    found: dict[str, str] = {}
    for case in ElementTree.fromstring(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            found[name] = "failed"
        elif skip is not None:
            found.setdefault(name, f"skipped: {skip.get('message')}")
        else:
            found.setdefault(name, "passed")
    return found


def summary(first: dict[str, str], alone: dict[str, str]) -> Row:
    """Count outcomes. A test that failed beside others and passed alone counts as passed."""
    final = first | {name: outcome for name, outcome in alone.items() if first[name] == "failed"}
    kinds = Counter(outcome.partition(":")[0] for outcome in final.values())
    return {
        **{kind: kinds[kind] for kind in ("passed", "failed", "skipped")},
        "passed_alone": sorted(
            name for name, outcome in first.items() if outcome == "failed" != final[name]
        ),
        "failures": sorted(name for name, outcome in final.items() if outcome == "failed"),
        "skips": dict(
            Counter(
                sorted(
                    outcome.removeprefix("skipped: ")
                    for outcome in final.values()
                    if outcome.startswith("skipped")
                )
            )
        ),
    }


def node(name: str) -> str:
    """Return the pytest id of a test, from its name in a row."""
    module, _, test = name.partition("::")
    return f"{module.replace('.', '/')}.py::{test}"


def corrected(row: Row, again: Row) -> Row:
    """Return a row that lists failures that have passed since separately."""
    left = [name for name in row["failures"] if name in again["failures"]]
    passed = {name: again["commit"] for name in row["failures"] if name not in left}
    if again["passed"] != len(passed):
        raise click.ClickException("not all tests that failed have run again")
    return {
        **row,
        "passed": row["passed"] + len(passed),
        "failed": len(left),
        "failures": left,
        "passed_since": row.get("passed_since", {}) | passed,
    }


def merged(old: list[Row], new: list[Row]) -> list[Row]:
    """Return the rows with new ones in place of those of the same release and engine."""

    def key(row: Row) -> tuple[int, str]:
        return list(SUITES).index(row["suite"]), row["engine"]

    rows = {key(row): row for row in [*old, *new]}
    return [rows[each] for each in sorted(rows)]


def statement(rows: list[Row]) -> str:
    """Return what was tested, as the README says it."""
    every = versions([row for row in rows if row["engine"] == "Redis"])
    _, _, some = versions([row for row in rows if row["engine"] == "Valkey"]).partition(", ")
    text = f"`bin/matrix` ran all tests with {every}, and those that need Redis also with {some}."
    if any(row["passed_alone"] or row.get("passed_since") for row in rows):
        text += " Some passed only [when repeated](CONTRIBUTING.md#tests)."
    return text


def details(rows: list[Row]) -> str:
    """Return the counts of a matrix, as CONTRIBUTING.md says them."""
    since = [each for row in rows for each in row.get("passed_since", {}).values()]
    counts = [f"{row['passed']:,} with {row['engine']} {row['version']}" for row in rows]
    alone = sum(len(row["passed_alone"]) for row in rows)
    text = f"Tests that passed: {_joined(counts)}."
    if alone:
        text += f" {alone} of these failed beside others and passed when repeated alone."
    if since:
        text += f" {len(since)} passed only with a later commit ({_joined(sorted({*since}))})."
    return text


def versions(rows: list[Row]) -> str:
    """Return the versions of some rows: `Python 3.11 and 3.13, Redis 7.0, ...`."""
    found: dict[str, set[tuple[int, int]]] = {"Python": set()}
    for row in rows:
        for name, version in (("Python", row["python"]), (row["engine"], row["version"])):
            major, minor, *_ = map(int, version.split("."))
            found.setdefault(name, set()).add((major, minor))
    return ", ".join(f"{name} {_listed(each)}" for name, each in found.items())


def _listed(numbers: set[tuple[int, int]]) -> str:
    return _joined([f"{major}.{minor}" for major, minor in sorted(numbers)])


def _joined(words: list[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


def redis_tests() -> list[str]:
    """Return the test files that start a Redis, directly or by their imports."""
    folders = ("lab", "proof", "tests")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    texts = {path.relative_to(ROOT): path.read_text() for path in paths}
    names = {".".join(path.with_suffix("").parts): path for path in texts}
    start = {path for path, text in texts.items() if re.search(r'"redis-(server|sentinel)"', text)}
    while more := {
        path
        for path, text in texts.items()
        if path not in start and start & {names.get(name) for name in _imported(text)}
    }:
        start |= more
    return sorted(str(path) for path in start if path.name.startswith("test_"))


def _imported(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def machine_environment() -> dict[str, str]:
    """Return variables for this machine's access to pip's index and npm's registry."""
    listed = re.findall(
        r"^[\w-]+\.([\w-]+)='(.*)'$", said(sys.executable, "-m", "pip", "config", "list"), re.M
    )
    pip = {f"PIP_{key.upper().replace('-', '_')}": text for key, text in listed if key in PIP}
    return pip | {name: text for name, text in os.environ.items() if GIVEN.fullmatch(name)}


def mirror() -> str:
    """Return the mirror of Debian that this machine's apt is configured with."""
    what = ["Created-By: Packages", "Origin: Debian", "Label: Debian"]
    found = said("apt-get", "indextargets", "--format", "$(REPO_URI)", *what).split()
    if not found:
        raise click.ClickException("apt knows no mirror of Debian: run apt-get update")
    return found[0]


def said(*words: str) -> str:
    """Return the output of a command."""
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def _remove(path: Path) -> None:
    subprocess.run(["rm", "-rf", "--one-file-system", str(path)], check=True)


@contextmanager
def folder_for(keep: Path | None) -> Iterator[Path]:
    """Return the folder of the releases: a permanent one, or one that is removed after the body."""
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()
        return
    folder = Path(tempfile.mkdtemp(prefix="gserver-matrix-"))
    try:
        yield folder
    finally:
        _remove(folder)


def interrupt(*_: object) -> NoReturn:
    """Handle SIGTERM like Ctrl-C: created files are removed."""
    raise KeyboardInterrupt


def saved() -> list[Row]:
    """Return the saved rows."""
    rows: list[Row] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    return rows


def run(release: Release, engine: str, tests: list[str], is_again: bool) -> Row:
    """Run the tests of a row: the named ones, those that failed before, or all."""
    if not is_again:
        return release.test(engine, tests or (redis_tests() if engine == "valkey" else []))
    for row in saved():
        if (row["suite"], row["engine"].lower()) == (release.suite, engine):
            return release.test_again(row) if row["failures"] else row
    raise click.ClickException(f"there is no row of {release.suite} with {engine}")


@click.command(
    context_settings={"help_option_names": ["-h", "--help"], "ignore_unknown_options": True}
)
@click.option("--suite", "suites", multiple=True, type=click.Choice(list(SUITES)))
@click.option("--engine", type=click.Choice(["redis", "valkey"]))
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path))
@click.option("--again", "is_again", is_flag=True)
@click.option("--write", "is_written", is_flag=True)
@click.argument("tests", nargs=-1, type=click.UNPROCESSED)
def main(
    suites: tuple[str, ...],
    engine: str | None,
    keep: Path | None,
    is_again: bool,
    is_written: bool,
    tests: tuple[str, ...],
) -> None:
    """Run the tests in releases of Debian, with the Python, Redis and Valkey of each."""
    if os.geteuid():
        click.echo("matrix: this needs root, to change the root of the file system.", err=True)
        sys.exit(2)
    if tests and (is_written or is_again):
        click.echo("matrix: with --write or --again, tests cannot be chosen.", err=True)
        sys.exit(2)
    signal.signal(signal.SIGTERM, interrupt)
    rows: list[Row] = []
    with folder_for(keep) as folder:
        for suite in suites or SUITES:
            release = Release(folder, suite)
            click.echo(f"== {suite}: installing", err=True)
            release.prepare()
            for each in [name for name in SUITES[suite] if engine in (None, name)]:
                click.echo(f"== {suite}: tests with {each}", err=True)
                rows.append(run(release, each, list(tests), is_again))
                click.echo(json.dumps(rows[-1], indent=1))
                if is_written:
                    RESULTS.write_text(json.dumps(merged(saved(), rows), indent=1) + "\n")
    sys.exit(any(row["failed"] for row in rows))


if __name__ == "__main__":
    main(prog_name="bin/matrix")
