"""The conditions of a report's figures, as text: the machine and the versions of programs."""

import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from lab.running import ROOT


def processor(cores: int) -> str:
    """The processor, its cores and the memory."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = psutil.virtual_memory().total / 2**30
    return f"{model[1] if model else platform.machine()}, {cores} cores, {memory:.0f} GB"


def commit(*options: str, folder: Path = ROOT) -> str:
    """The commit of a folder, from `git describe` with these options."""
    done = _run("git", "-C", str(folder), "describe", "--always", *options)
    return "of no commit" if done.returncode else done.stdout.strip()


def source() -> dict[str, str]:
    """The date of today, and the commit of gserver."""
    return {"date": datetime.now(UTC).date().isoformat(), "gserver": f"gserver {commit('--dirty')}"}


def shown_source(report: Mapping[str, Any]) -> list[str]:
    """The commit and the date of a report, if it has them: older reports do not."""
    return [report[key] for key in ("gserver", "date") if key in report]


def version(*words: str) -> str:
    """The version that a program reports."""
    found = re.search(r"[0-9]+\.[0-9.]+", _run(*words).stdout)
    return found[0] if found else "of no version"


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
