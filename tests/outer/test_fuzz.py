"""The fuzzers: a few thousand inputs find nothing, and a deliberate bug is found."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from types import ModuleType

import psutil
import pytest

from gserver import config, logs, protocol, redis_url
from gserver.serve import fastpath, proxy_header, tls
from lab.running import LIMIT, ROOT, environment, until
from lab.seed import draw
from proof import fuzz_core, fuzz_sockets
from proof.fuzz_report import section

SEED = draw("GSERVER_FUZZ_SEED")
NO_MATCH = "not found exactly once: the code has changed, so move the bug"


@pytest.mark.parametrize("name", fuzz_core.TARGETS)
def test_the_pure_modules_accept_any_input(name: str) -> None:
    count = {"status": 50, "tls": 500, "parser": 3000}.get(name, 1000)
    assert fuzz_core.run_batch(name, SEED, 0, count) == "", f"GSERVER_FUZZ_SEED={SEED}"


def _mutant(module: ModuleType, old: str, new: str) -> ModuleType:
    """The module with a bug."""
    text = Path(str(module.__file__)).read_text()
    assert text.count(old) == 1, NO_MATCH
    mutant = ModuleType(module.__name__)
    exec(compile(text.replace(old, new), str(module.__file__), "exec"), vars(mutant))
    return mutant


@pytest.mark.parametrize(
    ("target", "module", "old", "new"),
    [
        ("parser", protocol, 'line.removesuffix(b"\\r")', "line"),
        ("parser", protocol, "words = line.strip()", 'words = line.strip(b" \\t\\r")'),
        ("parser", protocol, "if words.isascii()", "if True"),
        ("parser", protocol, "len(parts) > 2", "len(parts) > 1"),
        (
            "parser",
            protocol,
            "            self._is_first = False\n        if",
            "            pass\n        if",
        ),
        ("parser", protocol, "return not words or words in", "return words in"),
        ("parser", protocol, "other != name and other.startswith(name)", "False"),
        ("parser", protocol, "self._is_closed = True\n        self._data", "self._data"),
        (
            "parser",
            protocol,
            "if self._grammar.is_too_long(self.unread):",
            "if len(self.unread) > 1000:",
        ),
        ("fastpath", fastpath, "cells[cell] += number", "cells[cell] += 1"),
        ("fastpath", fastpath, "if has_errors and not has_spoken:", "if False:"),
        ("fastpath", fastpath, "4 * (whos + whys) + 6 * wheres != len(data)", "False"),
        ("fastpath", fastpath, "cells[self._why_cell] += whys", "cells[self._why_cell] += whos"),
        ("fastpath", fastpath, 'not data.endswith(b"\\n")', "False"),
        (
            "url",
            redis_url,
            'return f"unix://{self.path}"',
            'return f"unix://{self.password}@{self.path}"',
        ),
        ("proxy", proxy_header, "command == _LOCAL", "False"),
        ("proxy", proxy_header, "crc32c(without) !=", "0 !="),
        ("proxy", proxy_header, "at + length > len(header)", "False"),
        ("proxy", proxy_header, 'data.find(b"\\n", 0, MAX_V1_BYTES)', 'data.find(b"\\n")'),
        ("proxy", proxy_header, "return str(mapped or host)", "return str(host)"),
        ("proxy", proxy_header, "0|[1-9][0-9]{0,4}", "[0-9]{1,5}"),
        ("url", redis_url, '"rediss" if self.has_tls else "redis"', '"redis"'),
        ("url", redis_url, 'db = f"/{self.db}" if self.db else ""', 'db = ""'),
        ("option", config, "[!-~]{1,128}", "[ -~]{1,128}"),
        ("log", logs, "char if char.isprintable() else ascii(char)[1:-1] for char in text", "text"),
        ("log", logs, "if room < 0:", "if room < -9999:"),
        ("tls", tls, "if after > len(data):", "if after >= len(data):"),
        ("tls", tls, "return bool(self._part)", "return False"),
        ("tls", tls, "parts.append(part)", "parts[:] = [part]"),
    ],
)
def test_a_bug_in_a_pure_module_is_found(
    target: str, module: ModuleType, old: str, new: str
) -> None:
    kind: Callable[[Random], fuzz_core.Target] = fuzz_core.TARGETS[target][0]
    mutant = type("Mutant", (kind,), {"code": _mutant(module, old, new)})  # type: ignore[arg-type]
    assert fuzz_core.run_batch(target, 1, 0, 4000, mutant), "the bug was not found"


def _broken(folder: Path, module: str, old: str, new: str) -> dict[str, str]:
    """The environment of a gserver with a bug."""
    shutil.copytree(
        ROOT / "gserver", folder / "gserver", ignore=shutil.ignore_patterns("__pycache__")
    )
    path = folder / "gserver" / module
    assert path.read_text().count(old) == 1, NO_MATCH
    path.write_text(path.read_text().replace(old, new))
    return {"PYTHONPATH": f"{folder}:{ROOT}"}


def _fuzz(name: str, count: int, env: dict[str, str] | None = None) -> str:
    """The findings of random clients of one server."""
    with fuzz_sockets.servers([name], env=env) as sites:
        found, outcomes = fuzz_sockets.run_batch(
            name, sites[name].server.port, str(sites[name].pems), SEED, 0, count
        )
        return found or "".join(wrong for _, wrong in fuzz_sockets.judge(sites, outcomes))


@pytest.mark.parametrize("name", ["plain", "tls"])
def test_servers_accept_any_input(name: str) -> None:
    assert _fuzz(name, 250) == "", f"GSERVER_FUZZ_SEED={SEED}"


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("serve/conversation.py", "ready.append(reply)", "ready.insert(0, reply)"),
        ("serve/conversation.py", "else parser.end()", "else parser.end()[:0]"),
    ],
)
def test_a_bug_in_a_server_is_found(tmp_path: Path, module: str, old: str, new: str) -> None:
    assert _fuzz("plain", 150, _broken(tmp_path, module, old, new)), "the bug was not found"


def test_the_command_finds_reports_and_reproduces(tmp_path: Path) -> None:
    def run(words: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "proof.fuzz", *words.split()]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=environment(**env),
            capture_output=True,
            text=True,
            timeout=4 * LIMIT,
            check=False,
        )

    report = tmp_path / "report.json"
    done = run(f"core --inputs 2000 --seed 3 --only parser --report {report}", {})
    assert done.returncode == 0, done.stderr
    results = json.loads(report.read_text())
    assert results["core"]["targets"] == {"parser": 2000}
    assert "guided" in results["core"]
    assert done.stdout.strip() == section(results)
    broken = _broken(tmp_path, "protocol.py", "len(parts) > 2", "len(parts) > 1")
    done = run("core --inputs 2000 --seed 3 --only parser", broken)
    assert done.returncode == 1, done.stderr
    (path,) = tmp_path.glob("fuzz-core-parser-3-*.txt")
    again = path.read_text().splitlines()[0].removeprefix("bin/fuzz ")
    found = path.read_text()
    path.unlink()
    assert run(again, broken).returncode == 1
    assert path.read_text() == found


@pytest.mark.parametrize("kind", ["core", "sockets"])
def test_an_interrupted_run_reports_its_findings_and_leaves_nothing_behind(
    tmp_path: Path, kind: str
) -> None:
    """Ctrl-C at a terminal goes to all processes."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "proof.fuzz",
        kind,
        "--inputs",
        "9000000",
        "--seconds",
        "60",
    ]
    command += ["--report", "report.json"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    started: list[psutil.Process] = []

    def are_at_work() -> bool:
        started[:] = psutil.Process(process.pid).children(recursive=True)
        with suppress(psutil.NoSuchProcess, FileNotFoundError):
            fuzzers = [each.pid for each in started if "spawn_main" in str(each.cmdline())]
            ignored = [
                re.findall(r"SigIgn:\s(\w+)", Path(f"/proc/{pid}/status").read_text())
                for pid in fuzzers
            ]
            return bool(fuzzers) and all(
                int(mask, 16) & 1 << signal.SIGINT - 1 for (mask,) in ignored
            )
        return False

    until(are_at_work, "all processes are working", 4 * LIMIT)
    os.killpg(process.pid, signal.SIGINT)
    page, results = process.communicate(timeout=4 * LIMIT)
    assert process.returncode == 0, results
    assert "It was interrupted." in page
    assert "Traceback" not in results
    assert json.loads((tmp_path / "report.json").read_text())[kind]["note"]
    assert not psutil.wait_procs(started, LIMIT)[1]
