"""The command line of the fuzzers: see `bin/fuzz --help`."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, NamedTuple

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lab.machine import source
from lab.seed import draw
from proof import fuzz_core, fuzz_sockets
from proof.fuzz_report import section

ROOT = Path(__file__).parent.parent
#: The run stops after this many findings.
ENOUGH = 5
console = Console(stderr=True, highlight=False)


@contextmanager
def _killing() -> Iterator[None]:
    """If the body is interrupted, kill the child processes."""
    try:
        yield
    except KeyboardInterrupt:
        for each in active_children():
            each.kill()
        raise


class Job(NamedTuple):
    """A batch of one target.

    `work(seed, batch, inputs)` returns the first finding ("" for none) and the number of inputs by
    outcome.
    """

    target: str
    batch: int
    inputs: int
    work: Callable[[int, int, int], tuple[str, Counter[str]]]


def _core(target: str, seed: int, batch: int, count: int) -> tuple[str, Counter[str]]:
    return fuzz_core.run_batch(target, seed, batch, count), Counter()


def _batches(target: str, inputs: int, size: int, work: Callable[..., Any]) -> Iterator[Job]:
    return (Job(target, at // size, min(size, inputs - at), work) for at in range(0, inputs, size))


def _in_turn(queues: list[Iterator[Job]]) -> Iterator[Job]:
    """Take from each queue in turn: a shortened run has tried all targets."""
    while queues:
        for queue in list(queues):
            if (job := next(queue, None)) is None:
                queues.remove(queue)
            else:
                yield job


def _leave_interrupts() -> None:
    """Ignore Ctrl-C: the parent handles it, and ends this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Run:
    """A run of one command: its options, findings and figures."""

    def __init__(
        self, kind: str, inputs: int, seed: int, seconds: float, report: Path | None
    ) -> None:
        self.kind, self.inputs, self.seconds, self._report = kind, inputs, seconds, report
        self.seed = seed or draw()
        self.done: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.findings: list[str] = []
        self.more: dict[str, Any] = {}
        self._began = time.monotonic()
        console.print(f"bin/fuzz {kind} --inputs {inputs} --seed {self.seed}")

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Report after the body. Ctrl-C and SIGTERM end it early, and the report is partial."""
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            yield
        except KeyboardInterrupt:
            self.more["note"] = "It was interrupted."
        self._end()

    def drive(self, jobs: Iterator[Job], processes: int) -> None:
        """Do the jobs in several processes, and show the progress."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with (
            Progress(*columns, console=console) as progress,
            ProcessPoolExecutor(processes, get_context("spawn"), _leave_interrupts) as pool,
            _killing(),
        ):
            task = progress.add_task(self.kind, total=self.inputs)
            under_way: dict[Future[tuple[str, Counter[str]]], Job] = {}
            while True:
                is_over = len(self.findings) >= ENOUGH or (
                    self.seconds and self._elapsed() > self.seconds
                )
                while not is_over and len(under_way) < 2 * processes and (job := next(jobs, None)):
                    under_way[pool.submit(job.work, self.seed, job.batch, job.inputs)] = job
                if not under_way:
                    return
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    job = under_way.pop(future)
                    found, outcomes = future.result()
                    self.outcomes += outcomes
                    self.done[job.target] += job.inputs
                    progress.advance(task, job.inputs)
                    if found:
                        self.find(
                            job.target,
                            found,
                            f"--only {job.target} --batch {job.batch} --inputs {job.inputs}",
                        )

    def find(self, target: str, found: str, again: str) -> None:
        """Write a finding to a file, with the command that reproduces it."""
        command = f"bin/fuzz {self.kind} --seed {self.seed} {again}"
        path = Path(f"fuzz-{self.kind}-{target}-{self.seed}-{len(self.findings)}.txt")
        path.write_text(f"{command}\n{found}\n", errors="backslashreplace")
        self.findings.append(
            f"{target}: {ascii(found)[1:500]}\n  full text: {path}; to reproduce: {command}"
        )

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _end(self) -> None:
        """Print the summary, write the report, and exit."""
        results = {
            "inputs": sum(self.done.values()),
            "seconds": round(self._elapsed(), 1),
            "seed": self.seed,
            **source(),
            "findings": len(self.findings),
            "targets": dict(self.done),
            "outcomes": dict(sorted(self.outcomes.items())),
            **self.more,
        }
        if self._report:
            kept = json.loads(self._report.read_text()) if self._report.exists() else {}
            self._report.write_text(json.dumps(kept | {self.kind: results}, indent=1) + "\n")
        click.echo(section({self.kind: results}))
        for finding in self.findings:
            click.echo(finding, err=True)
        sys.exit(bool(self.findings))


def _options(inputs: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in (
            click.option(
                "--inputs",
                type=click.IntRange(1),
                default=inputs,
                show_default=True,
                help="Number of inputs.",
            ),
            click.option(
                "--seed",
                type=int,
                default=0,
                help="Seed, to repeat the same inputs [default: a new one].",
            ),
            click.option(
                "--seconds", type=float, default=0, help="Start no batch after this time."
            ),
            click.option(
                "--report",
                type=click.Path(path_type=Path),
                help="Write the figures to this file, as JSON.",
            ),
            click.option("--only", default="", metavar="TARGET", help="Only this target."),
            click.option("--batch", type=int, default=-1, help="With --only: only this batch."),
        ):
            command = option(command)
        return command

    return decorate


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Try hostile inputs and compare the outcomes with docs/protocol.md.

    Exits with 1 if there is a finding. Ctrl-C ends the run early and reports the findings so far.
    """


@main.command()
@_options(100_000)
@click.option(
    "--guided",
    type=int,
    default=-1,
    help="Number of coverage-guided inputs [default: a twentieth of --inputs].",
)
def core(inputs: int, only: str, batch: int, guided: int, **rest: Any) -> None:
    """Fuzz the pure modules: parser, fast path, PROXY headers, URLs, options, logs, TLS, status."""
    run = Run("core", inputs, **rest)
    with run.reporting():
        if batch >= 0:
            run.drive(iter([Job(only, batch, inputs, partial(_core, only))]), 1)
            return
        shares = {
            name: share for name, (_, share) in fuzz_core.TARGETS.items() if only in ("", name)
        }
        total, queues = sum(shares.values()), []
        for name, share in shares.items():
            count = max(1, inputs * share // total)
            queues.append(
                _batches(name, count, 200 if name == "status" else 2000, partial(_core, name))
            )
        run.drive(_in_turn(queues), os.cpu_count() or 1)
        _guide(run, inputs // 20 if guided < 0 else guided)


def _guide(run: Run, inputs: int) -> None:
    """Run Atheris, which is guided by coverage, with `inputs` inputs."""
    if not inputs or run.findings:
        return
    words = [sys.executable, "-P", "-m", "proof.fuzz_guided", str(inputs), str(run.seed)]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
    if "No module named 'atheris'" in done.stderr:
        run.more["guided"] = "SKIPPED: Atheris is not installed"
    elif done.returncode:
        run.find("guided", done.stderr[-4000:], f"--guided {inputs} --only guided --inputs 1")
    found = re.search(r"#(\d+)\s+DONE\s+cov: (\d+) ft: (\d+) corp: (\d+)", done.stderr)
    if found:
        run.more["guided"] = dict(
            zip(("inputs", "branches", "features", "corpus"), map(int, found.groups()), strict=True)
        )


@main.command()
@_options(5_000)
def sockets(inputs: int, only: str, batch: int, **rest: Any) -> None:
    """Fuzz real servers with small limits, plain and over TLS, with hundreds of clients at once."""
    run = Run("sockets", inputs, **rest)
    with (
        run.reporting(),
        fuzz_sockets.servers([only] if only else list(fuzz_sockets.VARIANTS)) as sites,
    ):
        work = {
            name: partial(fuzz_sockets.run_batch, name, site.server.port, str(site.pems))
            for name, site in sites.items()
        }
        if batch >= 0:
            run.drive(iter([Job(only, batch, inputs, work[only])]), 1)
        else:
            shares = [
                inputs * (n + 1) // len(work) - inputs * n // len(work) for n in range(len(work))
            ]
            queues = [
                _batches(name, share, fuzz_sockets.BATCH, each)
                for share, (name, each) in zip(shares, work.items(), strict=True)
            ]
            run.drive(_in_turn(queues), len(work))
        for name, wrong in fuzz_sockets.judge(sites, run.outcomes):
            run.find(name, f"after the run: {wrong}", f"--inputs {inputs}")


if __name__ == "__main__":
    main(prog_name="bin/fuzz")
