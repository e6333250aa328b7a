"""The command line of the measurements: see `bin/bench --help`."""

import json
import os
import platform
import resource
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import capacity, goals, page, peers, plots, report
from bench.measure import CORES, LOAD_CORE, Failed, Sample
from bench.scenarios import FULL, QUICK, Scenario
from lab.machine import commit, processor
from lab.machine import version as program_version
from lab.running import ROOT

RESULTS = ROOT / "bench/results.json"
BASELINE = ROOT / "bench/baseline.json"
#: Limit of open files, for 15,000 clients.
LEAST_FILES = 16_000
NAMES = list(dict.fromkeys(scenario.name for scenario in FULL))

Run = tuple[Scenario, int, dict[str, Any]]


HELP = f"""Measure gserver beside its peers.

Write bench/results.json, and from it the tables in docs/ and the plots in docs/plots.

NAME is one of: {", ".join(NAMES)}. Without a NAME, all are measured, which takes half an hour.
Run nothing else on the machine meanwhile.

\b
The speed of every spelling of the gserver in another folder, in a minute:
    BENCH_CHECKOUT=/path/to/gserver bin/bench spellings --rounds 1

With --rounds or BENCH_CHECKOUT the figures are only printed; no file is written."""


@click.command(help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, type=click.Choice(NAMES), metavar="[NAME]...")
@click.option(
    "--quick",
    is_flag=True,
    help="A short measurement of the main ratios, compared with bench/baseline.json.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    help="With NAME: rounds of each scenario. Only prints the figures.",
)
@click.option("--save", is_flag=True, help="With --quick: make its figures the new baseline.")
@click.option(
    "--render", is_flag=True, help="Write tables and plots from the results, without measuring."
)
def main(names: tuple[str, ...], quick: bool, rounds: int | None, save: bool, render: bool) -> None:
    """Run the command line."""
    if sum((bool(names), quick, render)) > 1 or (save and not quick):
        raise click.UsageError("choose one of NAME, --quick and --render; --save needs --quick")
    if rounds and not names:
        raise click.UsageError("--rounds needs NAME")
    if save and peers.CHECKOUT != ROOT:
        raise click.UsageError("--save is for the gserver of this folder: unset BENCH_CHECKOUT")
    if quick:
        _quick(save)
        return
    if render:
        _render(_kept())
        return
    chosen = [scenario for scenario in FULL if not names or scenario.name in names]
    if rounds or peers.CHECKOUT != ROOT:
        failures = _try_out([replace(each, rounds=rounds or each.rounds) for each in chosen])
    else:
        failures = _measure(chosen, _keep)
        results = _kept()
        _render(results)
        _show(results, names or NAMES)
    _end(failures)


def _try_out(scenarios: Sequence[Scenario]) -> list[str]:
    """Measure and print the figures without writing a file. Return the failures."""
    results: report.Results = {}
    failures = _measure(scenarios, results.__setitem__)
    _show(results, results)
    return failures


def _render(results: report.Results) -> None:
    page.render(results)
    capacity.render(results)
    plots.draw(results)


def _show(results: report.Results, names: Iterable[str]) -> None:
    for name, text in page.tables(results, names).items():
        click.echo(f"\n{name}\n\n{text}")


def _kept() -> report.Results:
    try:
        results: report.Results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    except ValueError as error:
        raise click.ClickException(f"{RESULTS} cannot be read: {error}") from error
    return results


def _keep(name: str, result: dict[str, Any]) -> None:
    """Replace the results of a scenario."""
    new = RESULTS.with_suffix(".new")
    _write(new, _kept() | {name: result})
    new.rename(RESULTS)


def _quick(save: bool) -> None:
    """Run the short measurement and report the changes."""
    results: report.Results = {}
    failures = _measure(QUICK, results.__setitem__)
    now, machine = goals.goal_figures(results), _machine()
    was: dict[str, Any] = (
        json.loads(BASELINE.read_text()) if BASELINE.exists() else {"machine": {}, "figures": {}}
    )
    if not was["figures"] and not save:
        click.echo("There is no baseline yet: --save makes these figures the baseline.")
    click.echo(
        goals.comparison(
            {what: report.Figure(*numbers) for what, numbers in was["figures"].items()}, now
        )
    )
    changes = [
        f"{text}, not {machine.get(key)}"
        for key, text in was["machine"].items()
        if text != machine.get(key)
    ]
    click.echo("".join(f"\nThe baseline was made with {change}." for change in changes))
    if save and not failures:
        BASELINE.write_text(json.dumps({"machine": machine, "figures": now}, indent=1) + "\n")
        click.echo(f"\nThis is the new {BASELINE.relative_to(ROOT)}.")
    _end(failures)


def _end(failures: list[str]) -> None:
    for failure in failures:
        _warn(f"FAILED: {failure}")
    sys.exit(1 if failures else 0)


def _measure(
    scenarios: Sequence[Scenario], keep: Callable[[str, dict[str, Any]], None]
) -> list[str]:
    """Run scenarios, pass on the samples of each that succeeded, and return the failures."""
    peers.build(peers.PEERS)
    _warn_of_a_poor_machine()
    os.sched_setaffinity(0, LOAD_CORE)  # Children inherit it; servers run on other cores.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.default_int_handler)
    machine = _machine()
    samples: dict[str, list[Sample]] = {scenario.name: [] for scenario in scenarios}
    runs = [
        (each, number, case)
        for each in scenarios
        for number in range(each.rounds)
        for case in each.cases
    ]
    failures: dict[str, list[str]] = {}
    with closing(_shown(runs)) as shown:
        for at, (scenario, number, case) in enumerate(shown, 1):
            name = scenario.name
            try:
                samples[name] += [
                    {"round": number, **case, **sample}
                    for sample in scenario.run(scenario.seconds, **case)
                ]
            except (Failed, RuntimeError, OSError, AssertionError, psutil.Error) as error:
                failures.setdefault(name, []).append(
                    f"{_label(scenario, number, case)}: {error or type(error).__name__}"
                )
                _warn(f"FAILED: {failures[name][-1]}")
            if name not in failures and name not in {each.name for each, *_ in runs[at:]}:
                keep(name, {"machine": machine, "samples": samples[name]})
    return [failure for found in failures.values() for failure in found]


def _warn_of_a_poor_machine() -> None:
    """Warn of everything about this machine that distorts the figures."""
    if len(CORES) < 2:
        _warn("servers and load generator share one core: the figures mean little")
    busy = os.getloadavg()[0]
    if busy > 0.5:
        _warn(f"other programs run on this machine (load {busy:.1f}): the figures will be worse")
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < LEAST_FILES:
        _warn(f"ulimit -Hn is below {LEAST_FILES:,}: scenarios with many clients will fail")


def _warn(text: str) -> None:
    click.secho(f"bench: {text}", err=True, fg="red", bold=True)


def _label(scenario: Scenario, number: int, case: dict[str, Any]) -> str:
    values = ", ".join(
        f"{value} {key}" if isinstance(value, int) else str(value) for key, value in case.items()
    )
    return f"{scenario.name}: {values}, round {number + 1} of {scenario.rounds}"


def _shown(runs: list[Run]) -> Generator[Run]:
    """Yield the runs, and show the progress: a bar on a terminal, lines elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        started = time.monotonic()
        for number, run in enumerate(runs, 1):
            click.echo(
                f"{time.monotonic() - started:6.0f} s  {number}/{len(runs)}  {_label(*run)}",
                err=True,
            )
            yield run
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True, refresh_per_second=2) as progress:
        task = progress.add_task("", total=len(runs))
        for run in runs:
            progress.update(task, description=_label(*run))
            yield run
            progress.advance(task)


def _machine() -> dict[str, str]:
    """The machine and the versions that the figures depend on, as text."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": processor(len(CORES)),
        "commit": f"gserver {commit('--dirty', folder=peers.CHECKOUT)}",
        "kernel": f"Linux {platform.release()}",
        "Python": f"Python {platform.python_version()}",
        **{name: f"{name} {version(name)}" for name in ("gevent", "uvloop")},
        **{
            words[0]: f"{words[0]} {program_version(*words)}"
            for words in (
                ("go", "version"),
                ("gcc", "--version"),
                ("redis-server", "--version"),
                ("haproxy", "-v"),
                ("stunnel", "-version"),
                ("openssl", "version"),
            )
        },
    }


def _write(path: Path, results: report.Results) -> None:
    """Write results with one sample per line, so that diffs are readable."""
    parts = []
    for name, result in sorted(results.items()):
        samples = ",\n".join(f"  {json.dumps(_rounded(sample))}" for sample in result["samples"])
        machine = json.dumps(result["machine"])
        parts.append(f'"{name}": {{"machine": {machine}, "samples": [\n{samples}\n]}}')
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def _rounded(sample: Sample) -> Sample:
    return {
        key: float(f"{value:.5g}") if isinstance(value, float) else value
        for key, value in sample.items()
    }


if __name__ == "__main__":
    main(prog_name="bin/bench")
