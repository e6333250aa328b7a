"""Mutants: small bugs in the pure modules, which the tests must find.

Each mutant is tried in a copy of the checkout: first with the tests of its module, then, if it
survives, with the whole inner ring. `EQUIVALENT` names those that change nothing. They are not
tried.
"""

import ast
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import click

from lab.running import ROOT

#: The modules, with the tests of each.
TESTS = {
    "gserver/protocol.py": ["tests/test_protocol.py", "tests/test_fastpath.py"],
    "gserver/addresses.py": ["tests/test_addresses.py"],
    "gserver/redis_url.py": ["tests/test_redis_url.py"],
    "gserver/metrics.py": ["tests/test_metrics.py", "tests/test_scoreboard.py"],
    "gserver/serve/fastpath.py": ["tests/test_fastpath.py"],
    "gserver/serve/limits.py": ["tests/test_limits.py"],
    "gserver/supervise/phases.py": ["tests/test_phases.py"],
    "gserver/cluster/membership.py": ["tests/test_membership.py"],
    "gserver/cluster/clock_history.py": ["tests/test_clock_history.py", "tests/test_membership.py"],
    "gserver/cluster/union.py": ["tests/test_union.py"],
    "gserver/cluster/duplicate_id.py": ["tests/test_duplicate_id.py"],
    "gserver/cluster/heartbeat.lua": [
        "tests/outer/test_cluster_script.py",
        "tests/outer/test_heartbeats.py",
    ],
}
#: Runs the tests of one module, up to the first failure.
PYTEST = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
FAILED = re.compile(r"^(?:FAILED|ERROR) (.*?)(?: - |$)", re.MULTILINE)
#: A mutant that runs longer counts as found: it waits endlessly.
LIMIT_SECONDS = 600
#: Of 100 mutants, at least this many must be found.
WANTED_PERCENT = 95
#: Mutants without an observable effect: the original line, the mutation, and the reason.
EQUIVALENT = {
    (
        "if others and any(kind in others for kind in lines.own):",
        "others and any(kind in others for kind in lines.own)"
        " -> (others or any((kind in others for kind in lines.own)))",
    ): "calls give the same replies and counts, only slower",
    ("target += 1", "1 -> 2"): "the limit on running workers allows one more, too",
    ("self.since = -math.inf", "self.since = -math.inf -> pass"): (
        "it is read only in a stop, which sets it"
    ),
    (
        "self._phase_after_delay = Phase.DRAINING",
        "self._phase_after_delay = Phase.DRAINING -> pass",
    ): ("it is read only after a delay, which sets it"),
    ("self._last_number = 0", "0 -> 1"): "the numbers of generations are only compared",
    ("self._last_number += 1", "1 -> 2"): "the numbers of generations are only compared",
    (
        "if generation.number >= self._proven.number:",
        "generation.number >= self._proven.number -> (generation.number > self._proven.number)",
    ): "generations with the same number are the same one",
    ('self._key = scoreboard.get("address_key").to_bytes(8)', "8 -> 9"): (
        "a leading zero makes another key, which is as random"
    ),
    ("super().__init__()", "super().__init__() -> pass"): "an empty dict needs no set-up",
    (
        "if self._count_clients() < self._max_clients:",
        "self._count_clients() < self._max_clients -> (self._count_clients() <= self._max_clients)",
    ): "the second comparison also rejects the client",
    ("acked_sequence: int = 0", "0 -> 1"): "a default for tests: the agent always passes a value",
    ("last_clock: int = 0", "0 -> 1"): "a default for tests: the agent always passes a value",
    ("self._lease_end = 0", "0 -> 1"): "it is set with the holder, before it is read",
    ("self._lease_end = 0", "self._lease_end = 0 -> pass"): (
        "it is set with the holder, before it is read"
    ),
    ("self._renewed_at = 0", "0 -> 1"): "it is set with the holder, before it is read",
    ("self._renewed_at = 0", "self._renewed_at = 0 -> pass"): (
        "it is set with the holder, before it is read"
    ),
    ("self._renewals = 0", "self._renewals = 0 -> pass"): (
        "it is set with the holder, before it is read"
    ),
    ("self._renewals = 0", "0 -> 1"): "it is set with the holder, before it is read",
    (
        "local function is_valid(number) return number and number >= 0 and number < 1e15 end",
        "< -> <=",
    ): "no clock and no count comes near the limit",
    (
        'if not (math.abs(now - recount_at) < 60000) then -- "not <": recount_at may be NaN.',
        "< -> <=",
    ): "a recount one millisecond later",
    ("local is_entry_lost = not holder and acked_sequence > 0", "> -> >="): (
        "a server without an acknowledged heartbeat sends the lease clock 0, before any loss"
    ),
    ("local is_outdated = (is_entry_lost and elapsed > interval)", "> -> >="): (
        "the interval is approximate: one millisecond decides nothing"
    ),
    (
        "local recount_at = entry_count > 0 and not is_entry_lost and tonumber(stored[6]) or 0",
        "> -> >=",
    ): "a recount of no entries is not needed",
    ("if not is_valid(last_clock) then last_clock = 0 end", "0 -> 7"): "7 is before any loss, too",
    (
        "if entry_count ~= 0 or lease_count ~= 0 or stored.err or stored[2] then",
        "0 -> 7",
    ): "the deletion of keys that do not exist does nothing",
    ("entry_count, elapsed = 0, 0", "0 -> 7"): (
        "a recount of no entries is not needed, and the clock after a loss may be any later one"
    ),
    ("and (entry_count > 0 or total == 0)", "> -> >="): (
        "a total without entries is recounted by the same heartbeat"
    ),
    ("return self.servers > 0 and reply.lost_at != self.lost_at", "0 -> 1"): (
        "a server that knows only itself waits for no other: its own report ends the hold"
    ),
    (
        "return self.servers > 0 and reply.lost_at != self.lost_at",
        "self.servers > 0 -> (self.servers >= 0)",
    ): "a server that was never a member waits for no other",
    ("return self.servers > 0 and reply.was_missing > 0", "0 -> 1"): (
        "a server that knows only itself waits for no other: its own report ends the hold"
    ),
    (
        "return self.servers > 0 and reply.was_missing > 0",
        "self.servers > 0 -> (self.servers >= 0)",
    ): "a server that was never a member waits for no other",
}

COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
CALCULATED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
}
#: The same for Lua, as patterns and replacements.
LUA = (
    (r" < ", " <= "),
    (r" <= ", " < "),
    (r" > ", " >= "),
    (r" >= ", " > "),
    (r" == ", " ~= "),
    (r" ~= ", " == "),
    (r" and ", " or "),
    (r" or ", " and "),
    (r" \+ ", " - "),
    (r" - ", " + "),
    (r"\bnot ", ""),
    (r"\bmin\(", "max("),
    (r"\bmax\(", "min("),
    (r"(?<=[ ,(])(\d+)(?=[ ,)])", "7"),
)


@dataclass(frozen=True)
class Mutant:
    """One bug: the module, the position in its bytes, and the replacement."""

    path: str
    start: int
    end: int
    text: str

    def apply(self, source: bytes) -> bytes:
        """Return the module with the bug."""
        return source[: self.start] + self.text.encode() + source[self.end :]

    def show(self, source: bytes) -> tuple[str, str]:
        """Return the changed line, and the change."""
        begin = source.rfind(b"\n", 0, self.start) + 1
        line = source[begin : source.find(b"\n", self.start)].decode().strip()
        old = " ".join(source[self.start : self.end].decode().split())
        return line, f"{old} -> {' '.join(self.text.split())}"


def mutants(path: str) -> Iterator[Mutant]:
    """Yield all mutants of a module."""
    source = (ROOT / path).read_bytes()
    if path.endswith(".lua"):
        yield from _mutants_of_lua(path, source.decode("ascii"))
        return
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node in _mutable_nodes(ast.parse(source)):
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
        for text in _replacements(node):
            yield Mutant(path, start, end, text)


def _mutants_of_lua(path: str, source: str) -> Iterator[Mutant]:
    for pattern, text in LUA:
        for found in re.finditer(pattern, source):
            line = source[source.rfind("\n", 0, found.start()) + 1 : found.start()]
            if "--" not in line and found[0] != text:
                yield Mutant(path, found.start(), found.end(), text)


def _mutable_nodes(tree: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """Yield expressions and statements that run.

    Excluded: annotations, class decorators, and the values of constants and `__slots__`, which may
    vary.
    """
    for node in tree.body if isinstance(tree, ast.ClassDef) else ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom | ast.JoinedStr) or _is_constant(node):
            continue
        if isinstance(node, ast.expr | ast.stmt):
            yield node
        if isinstance(node, ast.FunctionDef):
            for child in (*node.args.defaults, *node.body):
                if isinstance(child, ast.expr | ast.stmt):
                    yield child
                yield from _mutable_nodes(child)
        elif isinstance(node, ast.AnnAssign):
            if node.value is not None:
                yield node.value
                yield from _mutable_nodes(node.value)
        else:
            yield from _mutable_nodes(node)


def _is_constant(node: ast.AST) -> bool:
    return isinstance(node, ast.Assign) and bool(
        re.fullmatch(r"[(]?_*[A-Z][A-Z_0-9, ]*[)]?|__slots__", ast.unparse(node.targets[0]))
    )


def _replacements(node: ast.expr | ast.stmt) -> Iterator[str]:
    """Yield the replacements of a node."""
    match node:
        case ast.Compare(left=left, ops=[op], comparators=comparators):
            yield f"({ast.unparse(ast.Compare(left, [COMPARED[type(op)]()], comparators))})"
        case ast.BoolOp(op=op, values=values):
            other = ast.Or() if isinstance(op, ast.And) else ast.And()
            yield f"({ast.unparse(ast.BoolOp(other, values))})"
        case ast.BinOp(left=left, op=op, right=right) if type(op) in CALCULATED:
            yield f"({ast.unparse(ast.BinOp(left, CALCULATED[type(op)](), right))})"
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield f"({ast.unparse(operand)})"
        case ast.Constant(value=bool(value)):
            yield str(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield str(value + 1)
        case ast.AugAssign(target=target, op=op, value=value) if type(op) in CALCULATED:
            yield ast.unparse(ast.AugAssign(target, CALCULATED[type(op)](), value))
            yield "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]) | ast.Expr(value=ast.Call()):
            yield "pass"
        case ast.Break() | ast.Continue():
            yield "continue" if isinstance(node, ast.Break) else "break"


class Trial:
    """Copies of the checkout, one for each test process."""

    def __init__(self, folder: Path, jobs: int) -> None:
        self._free: SimpleQueue[Path] = SimpleQueue()
        listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
        names = [name for name in listed.split("\0") if name and (ROOT / name).is_file()]
        for number in range(jobs):
            copy = folder / str(number)
            for name in names:
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, copy / name)
            self._free.put(copy)

    def check(self) -> None:
        """Fail if the tests fail without a mutant: they would find every mutant."""
        copy = self._free.get()
        for command in dict.fromkeys(tuple(one) for path in TESTS for one in _commands(path)):
            if failed := self._failure(copy, command):
                raise click.ClickException(f"without a mutant, this fails: {failed}")
        self._free.put(copy)

    def find(self, mutant: Mutant) -> str:
        """Return the test that fails with a mutant in the module, or "" if none does."""
        copy = self._free.get()
        path = copy / mutant.path
        source = path.read_bytes()
        try:
            path.write_bytes(mutant.apply(source))
            failures = (self._failure(copy, command) for command in _commands(mutant.path))
            return next(filter(None, failures), "")
        finally:
            path.write_bytes(source)
            self._free.put(copy)

    @staticmethod
    def _failure(copy: Path, command: Sequence[str]) -> str:
        # The bytecode of a mutant must not be reused.
        environment = os.environ | {"VIRTUAL_ENV": sys.prefix, "PYTHONDONTWRITEBYTECODE": "1"}
        with (
            tempfile.TemporaryFile("w+") as output,
            subprocess.Popen(
                command,
                cwd=copy,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            ) as process,
        ):
            try:
                if process.wait(LIMIT_SECONDS) == 0:
                    return ""
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                return f"{' '.join(command)}: no end after {LIMIT_SECONDS} s"
            output.seek(0)
            failed = FAILED.search(output.read())
            return failed[1] if failed else " ".join(command)


def _commands(path: str) -> list[list[str]]:
    """Return the commands to find a mutant: the tests of the module, then the whole inner ring.

    The script runs inside Redis, so the inner ring does not cover it.
    """
    if path.endswith(".lua"):
        return [[*PYTEST, *TESTS[path]]]
    return [[*PYTEST, "-m", "not outer and not long", *TESTS[path]], ["bin/test"]]


def _shown(mutant: Mutant) -> tuple[str, str]:
    return mutant.show((ROOT / mutant.path).read_bytes())


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--count", type=click.IntRange(1), help="Number of mutants, chosen at random [default: all]."
)
@click.option("--seed", type=int, help="Seed, to repeat the same choice [default: a new one].")
@click.option("--only", default="", help="Only modules whose paths contain this.")
@click.option("--jobs", type=click.IntRange(1), default=2, help="Number of parallel processes.")
def main(count: int | None, seed: int | None, only: str, jobs: int) -> None:
    """Put bugs into the pure modules, and check that the tests find them."""
    chosen = [mutant for path in TESTS if only in path for mutant in mutants(path)]
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    if count is not None and count < len(chosen):
        chosen = random.Random(seed).sample(chosen, count)
    tried = [mutant for mutant in chosen if _shown(mutant) not in EQUIVALENT]
    equivalent = len(chosen) - len(tried)
    click.echo(f"seed {seed}: {len(tried)} mutants, and {equivalent} that change nothing")
    found, started = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        trial = Trial(Path(folder), jobs)
        trial.check()
        for number, (mutant, failed) in enumerate(
            zip(tried, pool.map(trial.find, tried), strict=True), 1
        ):
            line, change = _shown(mutant)
            found += bool(failed)
            if not failed:
                click.echo(f"survived: {mutant.path}: {line}\n    {change}")
            elif not any(test in failed for test in TESTS[mutant.path]):
                click.echo(f"found by {failed}: {mutant.path}: {line}\n    {change}")
            if number % 20 == 0:
                click.echo(f"{time.monotonic() - started:5.0f} s  {number}: {found} found")
    percent = 100 * found / max(1, len(tried))
    click.echo(f"{found} of {len(tried)} found, {percent:.1f} %")
    sys.exit(percent < WANTED_PERCENT)


if __name__ == "__main__":
    main(prog_name="bin/mutate")
