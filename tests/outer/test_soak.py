"""A soak finds what is wrong, a short one finds nothing, and its page matches its report."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import psutil
import pytest

from lab.census import CENSUS, clients
from lab.load import KINDS, Load
from lab.running import LIMIT, ROOT, environment, left_over, program, until
from lab.site import SEED
from proof.soak_judge import MAX_GROWTH, Report, lives, problems, render, written
from proof.soak_world import SoakedMember

BIN = ROOT / "bin/soak"
REPORT = ROOT / "proof/results/soak.json"


def report(held: Callable[[int], list[int]], count: int = 40) -> Report:
    """A report of `count` censuses, in which one process held `held(number)`."""
    censuses = [
        {"at": n, "clients": 6, "who": {"one": 6, "two": 6}, "held": {"one": held(n)}}
        for n in range(count)
    ]
    numbers = {"right": 1, "wrong": 0, "excused": 0, "lost": 0}
    errors = {
        "command": "bin/soak",
        "machine": {},
        "seconds": 1.0,
        "is_interrupted": False,
        "kinds": {"stays": 1},
    }
    return {**errors, "censuses": censuses, "failures": [], "faults": {}, "replies": numbers}


def test_constant_figures_are_not_a_leak() -> None:
    steady = report(lambda n: [30_000_000 + n % 7 * 4096, 12, 5])
    assert not list(problems(steady))
    assert "Nothing was wrong." in render(steady)


def test_growth_during_warm_up_or_in_a_new_process_is_not_a_leak() -> None:
    assert not list(
        problems(report(lambda n: [min(30_000_000 + n * 200_000, 31_600_000), 12 - (n == 0), 5]))
    )
    late = report(lambda n: [30_000_000, 12, 5])
    late["censuses"][20]["held"]["two"] = [20_000_000, 9, 0]
    for census in late["censuses"][21:]:
        census["held"]["two"] = [30_000_000, 12, 5]
    assert not list(problems(late))
    assert [len(life.resident) for life in lives(late)] == [32, 19]


@pytest.mark.parametrize(
    ("held", "errors"),
    [
        (lambda n: [30_000_000, 12 + n // 39, 5], "descriptors were 12, 13"),
        (lambda n: [30_000_000, 12, 5 + n // 20], "greenlets were 5, 6"),
        (lambda n: [30_000_000 + n * 30_000, 12, 5], "memory grew by 2.4%"),
    ],
)
def test_a_leak_is_found(held: Callable[[int], list[int]], errors: str) -> None:
    leaking = report(held)
    assert list(problems(leaking)) == [f"one: {errors}"]
    assert f"**Wrong:**\n- one: {errors}\n" in render(leaking)


def test_memory_may_grow_up_to_a_limit() -> None:
    for growth, count in ((MAX_GROWTH * 0.9, 0), (MAX_GROWTH * 1.1, 1)):
        late = report(lambda n, growth=growth: [round(30_000_000 * (1 + growth * (n > 30))), 12, 5])  # type: ignore[misc]
        assert len(list(problems(late))) == count


def test_figures_that_were_not_judged_are_not_reported_as_good() -> None:
    for count, verdict in (
        (40, "Nothing was wrong."),
        (8, "Memory was not judged: the soak was too short."),
    ):
        assert verdict in render(report(lambda n: [30_000_000, 12, 5], count))


def test_a_report_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    process = soak(folder=tmp_path / "none")
    page, errors = process.communicate(timeout=4 * LIMIT)
    assert (process.returncode, page) == (2, "")
    assert errors.endswith(f"soak: --report {tmp_path}/none/soak.json: there is no such folder\n")


def test_a_wrong_count_between_faults_is_found() -> None:
    for who in ({"one": 6, "two": 5}, {"one": 5, "two": 5}):
        wrong = report(lambda n: [30_000_000, 12, 5])
        wrong["censuses"][3]["who"] = who
        assert list(problems(wrong)) == [f"at 3 s, with 6 clients, WHO replied {who}"]


def test_wrong_replies_lost_connections_and_deaths_are_found(tmp_path: Path, pems: Path) -> None:
    folder = copytree(pems, tmp_path / "here")
    (folder / "census.py").write_text(CENSUS)
    member = SoakedMember("here", folder)
    load = Load([member], SEED)
    try:
        until(lambda: {*clients(member.server).values()} == {0}, "its first crowd has left")
        load.may_call.set()
        load.are_served()
        assert not load.problems()
        assert not member.problems()
        assert {*load.kinds} == {*KINDS}
        for worker in member.server.workers():  # A single worker may have no clients.
            worker.kill()
        until(lambda: load.replies["lost"], "a lost connection is counted")
        load.are_served()
        assert any("lost: " in text for text in load.problems()), SEED
        assert member.problems() == ["here: 2 processes died by themselves"]
        load.park()
        load.problems()
        member.name = "elsewhere"
        load.may_call.set()
        errors = until(load.problems, "a wrong reply is reported")
        assert any("b'WHERE' was answered b'here'" in text for text in errors), errors
    finally:
        load.stop()
        member.server.kill()


def soak(*words: str, folder: Path) -> "subprocess.Popen[str]":
    program("redis-sentinel")
    env = environment(MARK=str(folder), TMPDIR=str(folder), VIRTUAL_ENV=sys.prefix)
    return subprocess.Popen(
        [BIN, *words, "--report", folder / "soak.json"],
        env=env,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_short_soak_finds_nothing(tmp_path: Path) -> None:
    only = ["--only", "worker killed", "--only", "FLUSHALL"]
    process = soak("--hours", "0.003", "--seed", str(SEED), *only, folder=tmp_path)
    page, errors = process.communicate(timeout=8 * LIMIT)
    assert process.returncode == 0, errors + page
    found = json.loads(text := (tmp_path / "soak.json").read_text())
    assert text == written(found)
    assert {*found["faults"]} == {"worker killed", "FLUSHALL"}
    assert found["replies"]["right"] > 1000
    assert len(found["censuses"]) >= 2
    assert (tmp_path / "soak.md").read_text() == render(found)
    assert page == render(found) + "\n"
    assert not left_over(tmp_path)


def test_an_interrupted_run_reports_its_findings_and_leaves_nothing_behind(tmp_path: Path) -> None:
    process = soak("--seed", str(SEED), folder=tmp_path)
    assert process.stderr
    lines: list[str] = []
    while "census" not in (line := process.stderr.readline()):
        assert line, lines
        lines.append(line)
    process.send_signal(signal.SIGINT)
    page, errors = process.communicate(timeout=4 * LIMIT)
    assert process.returncode == 0, errors + page
    assert "and was interrupted" in page
    assert json.loads((tmp_path / "soak.json").read_text())["is_interrupted"]
    psutil.wait_procs(left_over(tmp_path), LIMIT)
    assert not left_over(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"soak.json", "soak.md"}


def test_the_page_matches_the_report_and_nothing_was_wrong() -> None:
    found = json.loads(REPORT.read_text())
    assert REPORT.with_suffix(".md").read_text() == render(found)
    assert not list(problems(found))
    assert found["seconds"] >= 3600
