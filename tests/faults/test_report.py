"""The report of bin/faults, also after an interruption, and that nothing is left behind."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lab.rows import seedless
from lab.running import LIMIT, ROOT, argv, environment, until

ROW = """
import signal
import pytest
from lab.running import Running

@pytest.mark.fault("A test waits endlessly")
@pytest.mark.parametrize("number", range(2))
def test_it(number: int) -> None:
    try:
        with Running():
            signal.pause()
    finally:
        assert not CONTENT, "the server under the fault is not as it was before"
"""


def faults(
    folder: Path, *words: str, report: str = "report.json", fails: bool = False
) -> "subprocess.Popen[str]":
    """Run the tests like bin/faults, with a matrix of one row."""
    (folder / "test_row.py").write_text(ROW.replace("not CONTENT", str(not fails)))
    command = [
        sys.executable,
        *argv(f"-m pytest -p tests.conftest -p tests.faults.report -m fault --timeout {4 * LIMIT}"),
    ]
    return subprocess.Popen(
        [
            *command,
            "-c",
            ROOT / "pyproject.toml",
            "--report",
            folder / report,
            folder / "test_row.py",
            *words,
        ],
        env=environment(),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_report_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    process = faults(tmp_path, report="none/report.json")
    output, _ = process.communicate(timeout=4 * LIMIT)
    assert process.returncode == 4, output
    assert (
        output == f"ERROR: --report {tmp_path}/none/report.json: no file can be written there\n\n"
    )


def test_an_existing_report_does_not_change_the_root_of_the_tests(tmp_path: Path) -> None:
    (there := tmp_path / "report.json").write_text("{}")
    command = argv(f"{ROOT / 'bin/faults'} --report {there} --collect-only -k short_timeline")
    output = subprocess.check_output(
        command, env=environment(VIRTUAL_ENV=sys.prefix), text=True, timeout=4 * LIMIT
    )
    assert f"\nrootdir: {ROOT}\nconfigfile: pyproject.toml\n" in output
    assert there.read_text() == "{}"


def test_a_row_replaces_that_of_another_seed() -> None:
    first, second, other = (f"test_it[{name}]" for name in ("A_SEED=1", "A_SEED=23", "one"))
    assert seedless(first) == seedless(second) != seedless(other) == other


def test_a_run_without_cases_writes_no_report(tmp_path: Path) -> None:
    process = faults(tmp_path, "-k", "zzz")
    output, _ = process.communicate(timeout=4 * LIMIT)
    assert process.returncode == 5, output
    assert "Faults" not in output
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize("fails", [False, True], ids=["ends well", "fails when it ends"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_all_processes_and_reports_open_cases(
    tmp_path: Path, number: signal.Signals, *, fails: bool
) -> None:
    process = faults(tmp_path, fails=fails)
    started: list[psutil.Process] = []

    def are_there() -> bool:
        assert process.poll() is None
        started[:] = psutil.Process(process.pid).children(recursive=True)
        return len(started) > 1  # the supervisor, and its worker

    until(are_there, "a server runs", 4 * LIMIT)
    process.send_signal(number)
    output, _ = process.communicate(timeout=4 * LIMIT)
    assert process.returncode == 2, output
    assert "1 fault, 1 case: 1 not ended" in output
    (case,) = json.loads((tmp_path / "report.json").read_text())["cases"]
    assert case["outcome"] == "not ended"
    assert not psutil.wait_procs(started, LIMIT)[1]
