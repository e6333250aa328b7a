"""bin/audit with given reports: a real run needs an installation and PyPI."""

import json
import os
import subprocess
import sys
from pathlib import Path

from lab.running import ROOT


def test_an_audit_distinguishes_vulnerable_from_unknown_packages(tmp_path: Path) -> None:
    good = {"name": "click", "version": "8.5.1", "vulns": []}
    flaw = {
        "id": "PYSEC-2021-66",
        "fix_versions": ["2.11.3"],
        "aliases": ["CVE-2020-28493"],
        "description": "...",
    }
    bad = {
        "name": "jinja2",
        "version": "2.11.2",
        "vulns": [flaw, {**flaw, "id": "X-1", "fix_versions": []}],
    }
    skipped = {
        "name": "redis",
        "skip_reason": "Dependency not found on PyPI and could not be audited: redis (8.1.0)",
    }
    flaws = (
        "jinja2 2.11.2: PYSEC-2021-66, fixed in 2.11.3\njinja2 2.11.2: X-1, fixed in nothing yet\n"
    )
    unknown = "gserver: not known: PyPI, or a mirror of it, tells nothing of "
    for packages, code, out, err in (
        ([good], 0, "1 packages, 0 known vulnerabilities\n", ""),
        ([good, bad], 1, flaws + "2 packages, 2 known vulnerabilities\n", ""),
        ([bad, skipped], 1, flaws + "2 packages, 2 known vulnerabilities\n", unknown + "redis\n"),
        ([good, skipped], 2, "2 packages, 0 known vulnerabilities\n", unknown + "redis\n"),
        (
            [skipped],
            2,
            "",
            "gserver: not known: 0 of 1 packages are known to PyPI, or to its mirror\n",
        ),
        ([], 2, "0 packages, 0 known vulnerabilities\n", unknown + "any\n"),
    ):
        report = tmp_path / "report"
        report.write_text(json.dumps({"dependencies": packages, "fixes": []}))
        assert _audit(report) == (code, out, err)
    report.write_text("")
    assert _audit(report)[:2] == (2, "")


def test_an_audit_has_help() -> None:
    code, out, err = _audit("--help")
    assert (code, err) == (0, "")
    assert out.startswith("Asks PyPI")


def _audit(report: Path | str) -> tuple[int, str, str]:
    env = {**os.environ, "VIRTUAL_ENV": sys.prefix}
    done = subprocess.run(
        [ROOT / "bin/audit", report], capture_output=True, text=True, env=env, check=False
    )
    return done.returncode, done.stdout, done.stderr
