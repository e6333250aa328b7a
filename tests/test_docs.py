"""The documents match the code: they have every name that a user may see, and no outdated one."""

import ast
import re
import signal
import subprocess
import sys
import tomllib
from dataclasses import fields
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

from gserver import errors
from gserver.agent.statsd import COUNTERS, GAUGES, TIMINGS
from gserver.config import OPTIONS, Config, environment_names, flag
from gserver.protocol import ERROR_REPLIES
from gserver.supervise.phases import Phase
from gserver.supervise.systemd import VARIABLES
from lab.documents import DEPLOYING, OPERATIONS, PROTOCOL, README, rows, section, statsd_metrics
from lab.running import ROOT, Running, environment


def test_the_options_table_has_all_options_defaults_and_variables() -> None:
    table = rows("Options")
    assert list(table) == [flag(name) for name in OPTIONS]
    for item in fields(Config):
        default, meaning = table[flag(item.name)]
        if item.default == "":
            assert default in ("none", "a new UUID")
        else:
            shown = f"{item.default:g}" if isinstance(item.default, float) else str(item.default)
            assert default == (OPTIONS[item.name].shown_default or shown), item.name
        for runner_name in environment_names(item.name)[1:]:
            assert f"`{runner_name}`" in meaning, item.name


def test_the_metrics_table_lists_exactly_the_metrics() -> None:
    documented = {name for name in statsd_metrics() if not name.endswith(".NAME")}
    assert documented == {*GAUGES, *COUNTERS, *TIMINGS}


def test_the_events_table_lists_exactly_the_events() -> None:
    assert set(rows("Logs")) == set(logged_events())


def logged_events() -> dict[str, str]:
    """Each action that the code logs, with its level or `warn_ratelimited`."""
    events = {}
    for path in (ROOT / "gserver").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = (
                getattr(node.func, "attr", getattr(node.func, "id", ""))
                if isinstance(node, ast.Call)
                else ""
            )
            if not isinstance(node, ast.Call) or name not in (
                "event",
                "warn_ratelimited",
                "log_client",
            ):
                continue
            where = 1 if name == "event" else 0
            level = ast.unparse(node.args[0]).removeprefix("logging.").lower() if where else name
            action = node.args[where]
            if isinstance(action, ast.Constant):
                events[str(action.value)] = "debug" if name == "log_client" else level
            elif isinstance(action, ast.JoinedStr):
                tail = action.values[-1]
                assert isinstance(tail, ast.Constant)
                events |= {f"{role}{tail.value!s}": level for role in ("worker", "agent")}
    return events


def test_the_events_table_has_the_right_levels_and_rate_limit_marks() -> None:
    table = rows("Logs")
    for action, level in logged_events().items():
        line = next(
            line
            for line in section("Logs").splitlines()
            if line.startswith("| `") and f"`{action}`" in line
        )
        assert table[action][0] == ("warning" if level == "warn_ratelimited" else level), action
        assert (" * |" in line) == (level == "warn_ratelimited"), action


def test_the_signals_table_lists_what_the_supervisor_handles() -> None:
    handled = set(
        re.findall(
            r"signal\.(SIG(?:TERM|INT|HUP|USR1|USR2|QUIT))\b",
            (ROOT / "gserver/supervise/supervisor.py").read_text(),
        )
    )
    assert set(rows("Signals")) == handled
    assert all(hasattr(signal, name) for name in handled)


def test_the_table_of_service_manager_variables_is_complete() -> None:
    assert set(rows("systemd", DEPLOYING)) == set(VARIABLES)


def test_the_exit_codes_table_matches_the_code() -> None:
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", section("Exit codes"), re.M)}
    assert documented == {value for name, value in vars(errors).items() if name.startswith("EXIT_")}


def test_every_error_reply_is_documented_with_its_consequence() -> None:
    documented = dict(
        re.findall(r"^\| `(ERR [^`:]+)(?:: [^`]+)?` \|.*\| ([a-z ]+) \|$", PROTOCOL, re.M)
    )
    replies = {error.reply.decode().strip(): error for error in ERROR_REPLIES if error.reply}
    assert set(documented) == set(replies)
    for reply, follows in documented.items():
        assert follows == ("closed" if replies[reply].closes else "the connection stays"), reply


def test_the_pages_name_every_script() -> None:
    pages = README + (ROOT / "CONTRIBUTING.md").read_text()
    assert {path.name for path in (ROOT / "bin").iterdir()} == set(
        re.findall(r"(?<!venv/)bin/([a-z-]+)", pages)
    )


def test_ci_runs_the_commands_of_the_readme() -> None:
    assert "bin/check" in (ROOT / ".ci/run").read_text()
    assert "bin/test" in (ROOT / "bin/check").read_text()
    assert "`bin/check` is what CI runs" in README


def test_links_between_pages_have_targets() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_links_to_chapters_for_operators_and_deployers_have_targets() -> None:
    for name, text in (("operations", OPERATIONS), ("deploying", DEPLOYING)):
        titles = {
            re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")
            for title in re.findall(r"^##+ (.*)$", text, re.M)
        }
        assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= titles, name
        for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
            linked = set(re.findall(rf"{name}\.md#([\w-]+)", page.read_text()))
            assert linked <= titles, page.name


def test_the_readmes_commands_work_as_printed(tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.S)
    assert code
    (tmp_path / "tools.py").write_text(code[1])
    with Running("--commands", "tools", cwd=tmp_path) as server, server.client() as client:
        assert client.ask(b"RESOLVE localhost") == b"127.0.0.1"
        assert client.ask(b"RESOLVE") == b"ERR usage: RESOLVE name"
        assert client.ask(b"NAP 0.01") == b"rested among 1"


def test_the_diagram_of_the_architecture_shows_every_phase() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    found = re.search(r"<!-- phases -->(.*?)<!-- end of phases -->", page, re.S)
    assert found
    edges = re.findall(r"^ +(\S+) --> ([^\s:]+)", found[1], re.M)
    assert {name for edge in edges for name in edge} - {"[*]"} == {item.name for item in Phase}


def test_the_version_has_an_entry_in_the_changelog() -> None:
    version = subprocess.run(
        [sys.executable, "-P", "-m", "gserver", "--version"],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    ).stdout.split()[-1]
    chapter = (
        rf"^## (\[{re.escape(version)}\] - \d{{4}}-|\[Unreleased\]\n\n.*\b{re.escape(version)}\b)"
    )
    assert re.search(chapter, (ROOT / "CHANGELOG.md").read_text(), re.M)


def test_the_security_page_names_existing_tests_options_and_limits() -> None:
    page = (ROOT / "docs/security.md").read_text()
    there = {name for path in (ROOT / "tests").rglob("test_*.py") for name in functions(path)}
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 40
    assert named <= there
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page)) <= {flag(name) for name in OPTIONS}
    for name, shown in re.findall(r"^\| `([^`]+)` \| ([0-9,]+) \|", page, re.M):
        module, _, constant = name.rpartition(".")
        if module:
            found = re.search(
                rf"^{constant} = (\S+)$",
                (ROOT / f"gserver/{module.replace(chr(46), chr(47))}.py").read_text(),
                re.M,
            )
            value = found and int(found[1])
        else:
            value = next(getattr(Config(), option) for option in OPTIONS if flag(option) == name)
        assert f"{value:,}" == shown, name


def functions(path: Path) -> set[str]:
    return {
        node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)
    }


def test_pins_are_exact_and_name_no_index() -> None:
    for page in (path.name for path in ROOT.glob("requirements*.txt")):
        for line in (ROOT / page).read_text().splitlines():
            pin = r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*"
            marker = r"; python_full_version < \"[0-9.]+\""
            allowed = rf"-r requirements(-\w+)?\.txt|{pin}({marker})?"
            assert re.fullmatch(allowed, line), line
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert all("==" in requirement for requirement in build)


def pinned(page: str) -> set[NormalizedName]:
    """The packages that a file pins, with those of the files that it includes."""
    lines = (ROOT / page).read_text().splitlines()
    others = [pinned(line.removeprefix("-r ")) for line in lines if line.startswith("-r ")]
    return {
        canonicalize_name(Requirement(line).name) for line in lines if not line.startswith("-r ")
    }.union(*others)


def test_dependencies_of_pinned_packages_are_pinned_too() -> None:
    needs = {
        canonicalize_name(package.name): [Requirement(need) for need in package.requires or ()]
        for package in distributions()
    }
    for page in (path.name for path in ROOT.glob("requirements*.txt")):
        pins = pinned(page)
        for name in pins & needs.keys():
            for need in needs[name]:
                if not need.marker or need.marker.evaluate({"extra": ""}):
                    assert canonicalize_name(need.name) in pins, f"{page}: {name} needs {need}"
