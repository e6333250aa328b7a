"""The results on other versions: how they are counted, and which tests need Redis."""

import click
import pytest

from lab.documents import README
from lab.running import ROOT
from proof.matrix import (
    corrected,
    details,
    engine_of,
    merged,
    node,
    outcomes,
    redis_tests,
    saved,
    statement,
    summary,
    versions,
)

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_one[x]" />
<testcase classname="tests.test_a" name="test_two"><failure message="no" /></testcase>
<testcase classname="tests.test_a" name="test_three"><failure message="no" /></testcase>
<testcase classname="tests.test_a" name="test_four"><skipped message="no root" /></testcase>
<testcase classname="tests.test_a" name="test_five" />
<testcase classname="tests.test_a" name="test_five"><error message="in its teardown" /></testcase>
</testsuite></testsuites>"""


def test_a_test_that_fails_in_its_teardown_has_failed() -> None:
    assert outcomes(REPORT) == {
        "tests.test_a::test_one[x]": "passed",
        "tests.test_a::test_two": "failed",
        "tests.test_a::test_three": "failed",
        "tests.test_a::test_four": "skipped: no root",
        "tests.test_a::test_five": "failed",
    }


def test_a_test_that_passes_alone_counts_as_passed_and_is_named() -> None:
    alone = {"tests.test_a::test_two": "passed", "tests.test_a::test_three": "failed"}
    assert summary(outcomes(REPORT), alone) == {
        "passed": 2,
        "failed": 2,
        "skipped": 1,
        "passed_alone": ["tests.test_a::test_two"],
        "failures": ["tests.test_a::test_five", "tests.test_a::test_three"],
        "skips": {"no root": 1},
    }


def test_a_failure_that_passes_with_a_later_commit_is_named_with_it() -> None:
    row = {"passed": 7, "failed": 2, "failures": ["tests.test_a::test_b", "tests.test_a::test_c"]}
    again = {"passed": 1, "failures": ["tests.test_a::test_c"], "commit": "abc"}
    assert corrected(row, again) == {
        "passed": 8,
        "failed": 1,
        "failures": ["tests.test_a::test_c"],
        "passed_since": {"tests.test_a::test_b": "abc"},
    }
    with pytest.raises(click.ClickException, match="not all"):
        corrected(row, again | {"passed": 0})


def test_a_row_names_tests_by_their_pytest_id() -> None:
    name = "tests.outer.test_a::test_b[/a/b.c]"
    assert node(name) == "tests/outer/test_a.py::test_b[/a/b.c]"


def test_a_new_row_replaces_that_of_the_same_release_and_engine() -> None:
    old = [
        {"suite": "trixie", "engine": "Redis", "passed": 1},
        {"suite": "sid", "engine": "Valkey", "passed": 2},
    ]
    new = [
        {"suite": "sid", "engine": "Valkey", "passed": 3},
        {"suite": "bookworm", "engine": "Redis", "passed": 4},
    ]
    assert [row["passed"] for row in merged(old, new)] == [4, 1, 3]


def test_the_engine_is_read_from_the_programs_version() -> None:
    assert engine_of("Redis server v=8.0.6 sha=00000000:0 malloc=...") == ("Redis", "8.0.6")
    assert engine_of("Valkey server v=9.1.2 sha=00000000:0 malloc=...") == ("Valkey", "9.1.2")


def test_tests_that_need_redis_are_found_by_their_imports() -> None:
    found = redis_tests()
    assert "tests/outer/test_redis_link.py" in found
    assert "tests/outer/test_heartbeats.py" in found  # by a name, not an import
    assert "tests/outer/test_cluster_partition.py" in found  # by lab/nodes.py
    assert "tests/test_protocol.py" not in found


def test_versions_are_listed_without_the_patch_number() -> None:
    rows = [
        {"python": "3.14.10", "engine": "Redis", "version": "8.0.6"},
        {"python": "3.13.5", "engine": "Redis", "version": "8.0.2"},
        {"python": "3.11.2", "engine": "Redis", "version": "7.0.15"},
        {"python": "3.14.10", "engine": "Valkey", "version": "9.1.2"},
    ]
    assert versions(rows) == "Python 3.11, 3.13 and 3.14, Redis 7.0 and 8.0, Valkey 9.1"


def test_the_readme_names_the_versions_without_failures() -> None:
    rows = saved()
    assert {row["engine"] for row in rows} == {"Redis", "Valkey"}
    assert [row["failures"] for row in rows] == [[]] * len(rows)
    assert statement(rows) in " ".join(README.split())


def test_the_contributing_page_has_the_counts_of_the_results() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    assert details(saved()) in " ".join(page.split())


def test_repeated_tests_are_mentioned_only_if_there_are_any() -> None:
    row = {"python": "3.13.5", "engine": "Redis", "version": "8.0.2", "passed": 1200}
    clean = [row | {"passed_alone": []}, row | {"engine": "Valkey", "passed_alone": []}]
    assert statement(clean) == (
        "`bin/matrix` ran all tests with Python 3.13, Redis 8.0, "
        "and those that need Redis also with Valkey 8.0."
    )
    assert (
        details(clean) == "Tests that passed: 1,200 with Redis 8.0.2 and 1,200 with Valkey 8.0.2."
    )
    flaky = [row | {"passed_alone": ["a", "b"], "passed_since": {"c": "abc", "d": "abc"}}, clean[1]]
    assert "Some passed only [when repeated]" in statement(flaky)
    assert details(flaky).endswith(
        "2 of these failed beside others and passed when repeated alone. "
        "2 passed only with a later commit (abc)."
    )
