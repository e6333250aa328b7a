"""Hours of load and faults, and a report: see `bin/soak --help`."""

import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from http.client import HTTPException
from pathlib import Path
from types import FrameType
from typing import Any

import click
import psutil
import pytest
from redis import RedisError
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lab.load import Load
from lab.machine import commit
from lab.redises import FAILOVER_LIMIT
from lab.seed import draw
from proof.soak_faults import FAULTS
from proof.soak_judge import Report, problems, render, written
from proof.soak_world import CALLERS, CEILING, NAMES, World, settle

#: Errors that are reported as failures.
EXPECTED = (
    *(AssertionError, OSError, ValueError, KeyError, HTTPException, RedisError, psutil.Error),
    *(subprocess.SubprocessError, pytest.fail.Exception, pytest.skip.Exception),
)


class Soak:
    """A soak. The report grows during the run."""

    def __init__(
        self, hours: float, pace: float, seed: int, names: list[str], progress: Progress
    ) -> None:
        self._seconds, self._names, self._random, self._progress = (
            hours * 3600,
            names,
            random.Random(seed),
            progress,
        )
        self._seed = seed
        self._pace = min(pace, hours * 900)
        self._task: TaskID = progress.add_task("starting", total=self._seconds)
        self._began = time.monotonic()
        command = f"bin/soak --hours {hours:g} --every {pace:g} --seed {seed}"
        self.report: Report = {"command": command, "machine": _machine(), "seconds": 0.0}
        self.report |= {"is_interrupted": False, "failures": [], "faults": {}, "censuses": []}

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: end the soak early."""
        self.report["is_interrupted"] = True
        signal.default_int_handler(number, frame)

    @property
    def elapsed(self) -> float:
        """Seconds since the load began."""
        return time.monotonic() - self._began

    def run(self, folder: Path) -> None:
        """Run the soak to its end."""
        with World(folder, self._seed) as world:
            self._load = Load(world.members, self._seed, CALLERS, CEILING)
            self._began = time.monotonic()
            try:
                self._go_on(world)
            except KeyboardInterrupt:
                self._say("interrupted")
            finally:
                self._keep(world, "at the end")
                self._load.stop()

    def _go_on(self, world: World) -> None:
        """Run faults one after another, with regular censuses, each when due or later."""
        next_fault = self._pace / 2
        drawn = self._draw()
        settle(partial(world.are_well, 0), "all servers are well, and the crowds are uncounted")
        self._load.may_call.set()
        self._settle(world)
        self._census(world)
        while self.elapsed < self._seconds:
            self._progress.update(self._task, completed=self.elapsed)
            if self.elapsed >= next_fault:
                self._happen(world, next(drawn))
                next_fault = max(next_fault + self._pace, self.elapsed + 1)
            if self.elapsed >= len(self.report["censuses"]) * 6 * self._pace:
                self._census(world)
            time.sleep(0.1)
        self._census(world)

    def _draw(self) -> Iterator[str]:
        """Yield all faults in a new order, repeatedly."""
        while True:
            yield from self._random.sample(self._names, len(self._names))

    def _happen(self, world: World, name: str) -> None:
        fault, load = FAULTS[name], self._load
        # First on the server whose processes survive: permanent allocations then happen during the
        # warm-up.
        victim = (
            self._random.choice(fault.victims)
            if name in self.report["faults"]
            else fault.victims[-1]
        )
        member = world.members[NAMES.index(victim)]
        noted = self.report["faults"].setdefault(name, {"seconds": [], "happened": ""})
        member.excuse, load.ceiling = fault.excuse, CEILING + fault.crowd
        try:
            try:
                noted["happened"] = fault.act(world, member)
            finally:
                world.heal()
            ended = time.monotonic()
            self._settle(world)
            noted["seconds"].append(round(time.monotonic() - ended, 2))
            recovery = f"well after {noted['seconds'][-1]:.1f} s"
            self._say(f"{name}, {member.name}: {noted['happened']}; {recovery}")
        except EXPECTED as error:
            self._failed(f"{name}, {member.name}", error)
        # Not after an interruption: the fault is still in effect.
        member.excuse, load.ceiling = "", CEILING
        self._keep(world, f"{name}, {member.name}")
        with suppress(*EXPECTED):  # The next fault of Redis waits for it and reports it.
            settle(world.redises.is_whole, "Redis has two replicas again", limit=FAILOVER_LIMIT)

    def _settle(self, world: World) -> None:
        """Wait until all servers are well, and every client is served again."""
        self._load.are_served()
        are_well = partial(world.are_well, CEILING)
        settle(
            are_well,
            lambda: f"all servers are well: {[member.status() for member in world.members]}",
        )

    def _census(self, world: World) -> None:
        self._load.park()
        try:
            census = world.census(self.elapsed)
            self.report["censuses"].append(census)
            megabytes = sum(each[0] for each in census["held"].values()) / 1e6
            self._say(f"census: WHO {census['who']}, {megabytes:.1f} MB")
        except EXPECTED as error:
            self._failed("census", error)
        self._load.may_call.set()
        self._keep(world, "census")

    def _keep(self, world: World, during: str) -> None:
        """Bring the report up to date."""
        for source in (self._load.problems, *(member.problems for member in world.members)):
            for text in source():
                self._fail(f"{during}: {text}")
        self.report |= {"seconds": round(self.elapsed, 1), "kinds": dict(self._load.kinds)}
        self.report |= {"replies": dict(self._load.replies)}

    def _failed(self, what: str, error: BaseException) -> None:
        if self.report["is_interrupted"]:  # An error in a teardown has hidden the interruption.
            raise KeyboardInterrupt from error
        self._fail(f"{what}: {error!r}")

    def _fail(self, text: str) -> None:
        self.report["failures"].append(f"{self.elapsed:.0f} s, {text}"[:2000])
        self._say(f"WRONG: {self.report['failures'][-1]}")

    def _say(self, text: str) -> None:
        shown = f"{self.elapsed:7.1f} s  {text}"
        if self._progress.disable:
            click.echo(shown, err=True)
        else:
            self._progress.console.print(shown, markup=False, highlight=False)
            self._progress.update(self._task, description=text[:60])


def _machine() -> dict[str, Any]:
    """The machine."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "gserver": commit("--dirty"),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "Python": platform.python_version(),
    }


@contextmanager
def _shown() -> Iterator[Progress]:
    """Show the progress: a bar on a terminal, lines elsewhere."""
    console = Console(stderr=True)
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        refresh_per_second=2,
    ) as progress:
        yield progress


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--hours",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Duration.",
)
@click.option(
    "--every",
    type=click.FloatRange(1),
    default=20.0,
    show_default=True,
    help="Seconds between faults; a census follows every sixth.",
)
@click.option("--seed", type=int, default=None, help="Seed of the faults, their times and targets.")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(sorted(FAULTS)),
    metavar="FAULT",
    help="Only these faults [default: all].",
)
@click.option(
    "--report",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the report to this file, as JSON, and a page beside it.",
)
def main(
    hours: float, every: float, seed: int | None, only: tuple[str, ...], path: Path | None
) -> None:
    """Run three servers, Redis and Sentinels under load and faults for hours.

    Exits with 0 if nothing was wrong, 1 if something was, and 2 if the soak could not run.
    Ctrl-C ends it early and reports the findings so far.
    """
    if path and not path.parent.is_dir():
        click.echo(f"soak: --report {path}: there is no such folder", err=True)
        sys.exit(2)
    seed = draw() if seed is None else seed
    click.echo(f"seed {seed}", err=True)
    with _shown() as progress, tempfile.TemporaryDirectory(prefix="gserver-soak-") as folder:
        soak = Soak(hours, every, seed, list(only or FAULTS), progress)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, soak.interrupt)
        try:
            soak.run(Path(folder))
        except (*EXPECTED, KeyboardInterrupt) as error:
            if not soak.report["censuses"]:
                click.echo(f"soak: {str(error) or 'interrupted before it started'}", err=True)
                sys.exit(2)
            soak.report["failures"].append(f"the soak ended early: {error!r}")
    if path:
        path.write_text(written(soak.report))
        path.with_suffix(".md").write_text(render(soak.report))
    click.echo(render(soak.report))
    sys.exit(1 if list(problems(soak.report)) else 0)


if __name__ == "__main__":
    main(prog_name="bin/soak")
