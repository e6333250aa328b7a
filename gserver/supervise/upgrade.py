"""An upgrade: the supervisor replaces its own program, and keeps everything else.

It does that by exec, so the process id, the children, the ports and the scoreboard stay. What the
new program must know is JSON in a memfd, whose number is in the environment. Before that, the new
version is tried in a process of its own (`Trial`). If it cannot be imported, or cannot use the
state, nothing has happened.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from time import monotonic
from typing import Any

from gserver import __version__
from gserver.boot import file_in_memory
from gserver.certificates import Certificates
from gserver.config import UPGRADE_VARIABLE, Config, flag
from gserver.errors import UsageError
from gserver.redis_url import parse_urls
from gserver.supervise.child import PACKAGE, child_environment
from gserver.supervise.phases import Generation

#: Version of the state. A change that an older or newer program cannot read gets another one.
FORMAT = 2
#: How long the trial of a new version may take.
TRIAL_SECONDS = 30.0
MAX_REASON_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class State:
    """What a supervisor hands over to its new program."""

    config: Config
    version: str
    #: Of the installed files, at a moment before the new program reads them.
    code_version: str
    slots: int
    scoreboard_fd: int
    #: Of the endpoints, in the order of the configuration.
    endpoint_fds: list[int]
    #: For each of them, the socket file that gserver has made: its path, device and inode.
    endpoint_files: list[Any]
    #: Of the admin port, if there is one.
    admin_fds: list[int]
    manager: dict[str, Any]
    generations: dict[int, Generation]
    lifecycle: dict[str, Any]
    children: list[dict[str, Any]]

    @property
    def fds(self) -> list[int]:
        """All descriptors that the new program needs."""
        found = [self.scoreboard_fd, *self.endpoint_fds, *self.admin_fds]
        for child in self.children:
            found += [child["control_fd"], child.get("stack_fd", -1)]
        return [fd for fd in found if fd >= 0]

    def encode(self) -> str:
        """Return it as JSON. Options with their default values are left out."""
        options = {
            field.name: value
            for field in fields(Config)
            if (value := getattr(self.config, field.name)) != field.default
        }
        rest = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in ("config", "generations")
        }
        generations = [_encode_generation(each) for each in self.generations.values()]
        return json.dumps(
            {"format": FORMAT, "options": options, "generations": generations, **rest}
        )

    @classmethod
    def decode(cls, text: str) -> "State":
        """Return the state that a supervisor has written; raise `UsageError` if that is impossible.

        The other program may be older or newer than this one.
        """
        saved = json.loads(text)
        if saved.pop("format") != FORMAT:
            raise UsageError("the two versions do not understand each other: restart the server")
        config = _decode_config(saved.pop("options"))
        generations = _decode_generations(saved.pop("generations"))
        return cls(config=config, generations=generations, **saved)


def with_previous(generations: Iterable[Generation]) -> dict[int, Generation]:
    """Return these generations, and all that they may go back to, by their numbers."""
    found: dict[int, Generation] = {}
    for generation in generations:
        each: Generation | None = generation
        while each:
            found[each.number] = each
            each = each.previous
    return found


def _encode_generation(generation: Generation) -> dict[str, Any]:
    previous = generation.previous
    return {
        "number": generation.number,
        "certificates": asdict(generation.certificates),
        "is_proven": generation.is_proven,
        "is_complete": generation.is_complete,
        "previous": previous.number if previous else None,
    }


def _decode_generations(saved: Iterable[dict[str, Any]]) -> dict[int, Generation]:
    found: dict[int, Generation] = {}
    previous: dict[int, int | None] = {}
    for each in saved:
        previous[each["number"]] = each.pop("previous")
        certificates = Certificates(**each.pop("certificates"))
        found[each["number"]] = Generation(**each, certificates=certificates)
    for number, other in previous.items():
        found[number].previous = None if other is None else found[other]
    return found


def _decode_config(options: Mapping[str, Any]) -> Config:
    known = {field.name for field in fields(Config)}
    for name in options:
        if name not in known:
            raise UsageError(f"the new version has no option {flag(name)}")
    config = Config(**options)
    if config.redis_url:
        try:
            parse_urls(config.redis_url)
        except ValueError as error:
            raise UsageError(f"--redis-url: {error}") from error
    if config.contradiction:
        raise UsageError(config.contradiction)
    return config


def read_state() -> State:
    """Return the state written by the previous program.

    Raises `UsageError` if it cannot be used.
    """
    number = os.environ.pop(UPGRADE_VARIABLE)
    try:
        with open(int(number), "rb") as file:
            return State.decode(file.read().decode())
    except (OSError, ValueError) as error:
        raise UsageError(f"{UPGRADE_VARIABLE} is internal: unset it") from error


def execute(state: State) -> None:
    """Replace this program by the installed one. Returns only by raising OSError."""
    with file_in_memory("gserver-upgrade", state.encode()) as file:
        inherited = [file.fileno(), *state.fds]
        for fd in inherited:
            os.set_inheritable(fd, True)
        try:
            # With the same options, although they are not read again, so that `ps` shows them.
            words = [sys.executable, "-P", PACKAGE, *sys.argv[1:]]
            environment = {**os.environ, UPGRADE_VARIABLE: str(file.fileno())}
            os.execve(sys.executable, words, environment)  # noqa: S606 - the arguments are ours
        finally:
            for fd in inherited:
                os.set_inheritable(fd, False)


def code_version() -> str:
    """Return a value that changes when the files of the installed package change."""
    digest = hashlib.blake2b()
    with suppress(OSError):  # Files are being replaced at this moment.
        for path in sorted(Path(PACKAGE).rglob("*")):
            if path.suffix in (".py", ".lua", ".html"):
                stat = path.stat()
                digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}\n".encode())
    return digest.hexdigest()


class Trial:
    """The installed version, started to see whether it could take over."""

    def __init__(self, state: State) -> None:
        """Start it; raise OSError if the system cannot."""
        #: Of the files that are tried.
        self.code_version = code_version()
        self._output_fd, theirs = os.pipe()
        os.set_blocking(self._output_fd, False)
        try:
            with file_in_memory("gserver-upgrade", state.encode()) as stdin:
                self._process = subprocess.Popen(  # noqa: S603 - the arguments are ours
                    [sys.executable, "-P", PACKAGE, "child", "trial"],
                    stdin=stdin,
                    stdout=theirs,
                    stderr=subprocess.STDOUT,
                    pass_fds=[state.scoreboard_fd],
                    process_group=0,
                    env=child_environment(),
                )
        except OSError:
            os.close(self._output_fd)
            raise
        finally:
            os.close(theirs)
        self._said = b""
        self.give_up_at = monotonic() + TRIAL_SECONDS

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def result(self, now: float) -> str | None:
        """Return why the new version cannot take over, "" if it can; None if it is not known yet.

        A trial that takes too long has failed.
        """
        code = self._process.poll()
        with suppress(BlockingIOError):
            self._said = (self._said + os.read(self._output_fd, 65_536))[-MAX_REASON_BYTES:]
        if code is None and now < self.give_up_at:
            return None
        if code == 0:
            return ""
        if code is None:
            return f"it was not ready within {TRIAL_SECONDS:.0f} s"
        lines = self._said.decode("ascii", "backslashreplace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), f"exit code {code}")

    def end(self) -> None:
        """End it, whether it runs or not. It is not waited for: a disk may hold it up."""
        self._process.kill()
        self._process.poll()
        os.close(self._output_fd)


def describe_versions(old: str) -> str:
    """Return which version has taken over from which."""
    if old == __version__:
        return f"version {__version__} with changed files"
    return f"version {__version__}, before: {old}"
