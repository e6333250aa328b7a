"""Container images: built, started and inspected with podman and runc, on a file system in memory.

This needs root. The base image is made from Debian's packages, so no image registry is needed. It
resembles the official image of Python: Debian's Python, with pip installed beside it.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from lab.host import Host
from lab.running import ROOT, Running, program, unavailable

#: The Debian release of the official image of this Python.
SUITE = "trixie"
BASE = "localhost/python-base"
#: The pip settings that a build needs, if this machine has them. Others name local files.
PIP_SETTINGS = ("index-url", "proxy", "trusted-host", "timeout", "default-timeout", "cert")
#: Argument: the root of the base. Debian has pip as a wheel, and forbids installing from it.
INSTALL_PIP = """
rm "$1"/usr/lib/python3*/EXTERNALLY-MANAGED
chroot "$1" sh -euc '
wheel=$(echo /usr/share/python-wheels/pip-*.whl)
python3 "$wheel/pip" install --quiet --no-index --root-user-action ignore "$wheel"'
"""
#: On some machines root has fewer capabilities than podman grants by default.
LIMITS = ("--ulimit", "nofile=1024:4096", "--ulimit", "nproc=1024:1024")
BUILD_SECONDS = 600


class Engine:
    """A podman with an empty store; `with Engine() as engine:` removes the store at the end.

    The store is in memory, since every layer is synced to disk, which may be busy. It takes less
    than a gigabyte. If it is impossible, the test is skipped, or fails if CI is set.
    """

    def __init__(self) -> None:
        if os.geteuid() != 0:
            unavailable("a container needs root")
        # The path must be short: podman refuses a `--runroot` of more than 50 characters.
        folder = self._folder = Path(tempfile.mkdtemp(prefix="gserver-"))
        self.command = [
            program("podman"),
            *("--root", str(folder / "store")),
            *("--runroot", str(folder / "run")),
            *("--runtime", program("runc")),
            *("--cgroup-manager", "cgroupfs"),
            *("--events-backend", "none"),
        ]
        # Health checks run on request, not by systemd timers.
        self.environment = {"DISABLE_HC_SYSTEMD": "true", "PODMAN_IGNORE_CGROUPSV1_WARNING": "1"}

    def __enter__(self) -> Self:
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", self._folder], check=True)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.run("rm", "--all", "--force", "--time", "0")
        finally:
            # Includes the mounts that podman made in it.
            subprocess.run(["umount", "--recursive", "--lazy", self._folder], check=True)
            self._folder.rmdir()

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*self.command, *words],
            env={**os.environ, **self.environment, "TMPDIR": str(self._folder)},
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{words}: {done.stdout}{done.stderr}"
        return done

    def make_base(self) -> None:
        """Make the image BASE."""
        archive = self._folder / "base.tar"
        # An interrupted mmdebstrap leaves its children behind; a pid namespace ends them too.
        whole = [program("unshare"), "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = [
            *whole,
            program("mmdebstrap"),
            "--quiet",
            "--variant=apt",
            "--dpkgopt=force-unsafe-io",
            "--include=python3,python3-venv",
            *(f"--customize-hook={hook}" for hook in (*self._copied_settings(), INSTALL_PIP)),
            SUITE,
            str(archive),
            *_mirrors(),
        ]
        done = subprocess.run(
            command,
            env={**os.environ, "TMPDIR": str(self._folder)},
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS,
            check=False,
        )
        if done.returncode != 0:
            unavailable(f"the base image cannot be made: {done.stderr[-2000:]}")
        self.run("import", str(archive), BASE)
        archive.unlink()

    def _copied_settings(self) -> list[str]:
        """Hooks that copy this machine's pip settings and their certificates into the base."""
        settings = _pip_settings()
        lines = [f"{name} = {value}\n" for name, value in settings.items()]
        (self._folder / "pip.conf").write_text("".join(["[global]\n", *lines]))
        copied = {str(self._folder / "pip.conf"): "/etc/pip.conf"}
        if "cert" in settings:
            copied[settings["cert"]] = settings["cert"]
        return [f"upload {source} {target}" for source, target in copied.items()]

    def build(
        self, context: Path, tag: str, *options: str, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Build the Dockerfile of the repository on BASE, from the files in `context`."""
        dockerfile = ROOT / "deploy/docker/Dockerfile"
        words = ["--format", "docker", "--network", "host", "--build-arg", f"BASE={BASE}"]
        words += ["--file", str(dockerfile), "--tag", tag, *LIMITS, *options, str(context)]
        return self.run("build", *words, check=check)

    def inspect(self, image: str) -> dict[str, Any]:
        found: list[dict[str, Any]] = json.loads(self.run("image", "inspect", image).stdout)
        return found[0]

    def inside(self, image: str, *command: str) -> str:
        """The output of a command that runs as root in a new container."""
        entry, *arguments = command
        words = ["--rm", "--network", "none", *LIMITS, "--user", "0", "--entrypoint", entry]
        return self.run("run", *words, image, *arguments).stdout

    @contextmanager
    def serving(self, image: str, host: Host, *options: str) -> Iterator["Container"]:
        """A container on that host, started with the image's own command."""
        words = ["run", "--name", host.name, "--network", f"ns:/run/netns/{host.name}", *LIMITS]
        command = [*self.command, *words, *options, image]
        try:
            with Running(command=command, env=self.environment) as server:
                yield Container(self, host.name, server)
        finally:
            self.run("rm", "--force", "--time", "0", "--ignore", host.name)


class Container:
    """A running container and its output."""

    def __init__(self, engine: Engine, name: str, server: Running) -> None:
        self._engine = engine
        self._name = name
        self.server = server

    def first_process(self) -> int:
        """The pid of its process 1, as seen from outside."""
        words = ["container", "inspect", "--format", "{{.State.Pid}}", self._name]
        return int(self._engine.run(*words).stdout)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return self._engine.run("exec", self._name, *command, check=False)

    def is_healthy(self) -> bool:
        """Run the image's health check."""
        return self._engine.run("healthcheck", "run", self._name, check=False).returncode == 0

    def stop(self) -> int:
        """Send the image's stop signal. Return the exit code, with all output read."""
        self._engine.run("stop", "--time", "30", self._name)
        return self.server.exit_code()


def copy_context(folder: Path) -> None:
    """Copy the files of a build as in a checkout with umask 077, with leftovers of a run."""
    for name in ("bin", "gserver"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("requirements.txt", "requirements.lock", ".dockerignore"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "gserver/__pycache__").mkdir()
    (folder / "gserver/__pycache__/removed.cpython-313.pyc").write_bytes(b"")
    for path in folder.rglob("*"):
        path.chmod(path.stat().st_mode & 0o700)


def _pip_settings() -> dict[str, str]:
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    found = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        setting = name.rpartition(".")[2]
        if setting in PIP_SETTINGS:
            found[setting] = value.strip("'")
    return found


def _mirrors() -> list[str]:
    """This machine's mirrors of Debian's packages; empty if unknown."""
    listed = subprocess.run(
        [
            program("apt-get"),
            "indextargets",
            *("--format", "$(REPO_URI)"),
            *("Created-By: Packages", "Origin: Debian", "Label: Debian"),
        ],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.splitlines()
    return listed[:1]
