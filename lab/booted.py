"""systemd in its own namespaces, with only the units of this repository.

This needs root. The network is this machine's; mounts, processes and cgroups are private, and
removed at the end.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import sysconfig
from functools import partial
from pathlib import Path

import psutil
import pytest

from lab.running import ROOT, Event, program, unavailable, until

SYSTEMD = "/lib/systemd/systemd"
UNITS = ROOT / "deploy/systemd"
#: Units of systemd itself, without their dependencies.
TARGETS = (
    "basic",
    "default",
    "multi-user",
    "network-online",
    "shutdown",
    "sockets",
    "sysinit",
    "umount",
)

#: Fills the folder for /opt: the repository, and a complete virtualenv. Only root may read the
#: originals.
INSTALL = """
site=venv/lib/$(basename "$(dirname "$packages")")/site-packages
mkdir -p gserver python venv/bin "$site"
mount --bind "$base" python
mount --bind "$repository" gserver
mount --bind "$packages" "$site"
ln -s /opt/python/bin/python3 venv/bin/python
printf 'home = /opt/python/bin\\n' >venv/pyvenv.cfg
"""
#: Its arguments, in this order: base, packages, repository.
INSTALLED = [sys.base_prefix, sysconfig.get_path("purelib"), str(ROOT)]

#: Arguments: a working folder, the name of the cgroup, the installed folders, systemd. The
#: installed folders may be where ProtectHome and PrivateTmp hide them.
BOOT = (
    """
set -eu
folder=$1 cgroup=$2 base=$3 packages=$4 repository=$5
mount --make-rprivate /
mount --bind /proc/sys /proc/sys && mount -o remount,ro,bind /proc/sys
mount -t tmpfs tmpfs /sys/fs/cgroup
mkdir /sys/fs/cgroup/all && mount -t cgroup2 none /sys/fs/cgroup/all
mkdir "/sys/fs/cgroup/all/$cgroup" && echo $$ >"/sys/fs/cgroup/all/$cgroup/cgroup.procs"
mkdir "$folder/opt" && mount -t tmpfs tmpfs "$folder/opt" && cd "$folder/opt"
"""
    + INSTALL
    + """
mount --rbind . /opt && cd /
exec unshare --cgroup sh -euc '
mount -t tmpfs tmpfs /run
mkdir /run/systemd
mount -t cgroup2 none /sys/fs/cgroup
mount --make-rshared /  # As on a host: systemd passes credentials this way.
exec env -i container=lxc PATH=/usr/sbin:/usr/bin:/sbin:/bin "SYSTEMD_UNIT_PATH=$1/units" \\
    '"$6"' --system --unit=basic.target --log-target=console --show-status=0' sh "$folder"
"""
)


class Booted:
    """A systemd; `with Booted(folder, variables) as machine:` for a gserver.service with variables.

    `changes` are lines for drop-ins of the two units, by the suffixes of the units.
    """

    def __init__(self, folder: Path, variables: dict[str, str], **changes: str) -> None:
        if os.geteuid() != 0 or not Path(SYSTEMD).exists():
            unavailable("booting systemd in namespaces needs root and systemd")
        self._folder = folder
        self._variables = variables
        self._changes = changes
        self._cgroup = f"gserver-{secrets.token_hex(4)}"
        self.output, self.errors = folder / "output", folder / "errors"

    def __enter__(self) -> "Booted":
        self._write_units()
        namespaces = [
            "--mount",
            "--pid",
            "--ipc",
            "--uts",
            "--fork",
            "--mount-proc",
            "--kill-child",
        ]
        places = [self._folder, self._cgroup, *INSTALLED, SYSTEMD]
        command = [
            program("unshare"),
            *namespaces,
            program("bash"),
            "-c",
            BOOT,
            "boot",
            *map(str, places),
        ]
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            until(self._is_up, "systemd is up, or has failed")
        except BaseException:
            self.__exit__()
            raise
        if self._process.poll() is not None:
            self.__exit__()
            pytest.skip(
                f"systemd cannot be booted here: {(self._folder / 'log').read_text()[-500:]}"
            )
        return self

    def __exit__(self, *_: object) -> None:
        # --kill-child ends the first process, and with it all others of the namespace.
        self._process.kill()
        self._process.wait()
        mounted = self._folder / "cgroups"
        mounted.mkdir()
        subprocess.run(["mount", "-t", "cgroup2", "none", mounted], check=True)
        try:
            for path in sorted((mounted / self._cgroup).glob("**/"), reverse=True):
                until(partial(is_removed, path), "no process is left in the cgroup")
        finally:
            subprocess.run(["umount", mounted], check=True)

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in the machine."""
        inside = [program("nsenter"), "-m", "-p", "-C", "-i", "-u", "-t", str(self._first())]
        return subprocess.run(
            [*inside, *command], check=check, capture_output=True, text=True, timeout=60
        )

    def events(self, action: str) -> list[Event]:
        """The events of this action that the service has logged so far."""
        lines = self.output.read_text().splitlines() if self.output.exists() else []
        return [event for event in map(json.loads, lines) if event["event.action"] == action]

    def show(self, unit: str, name: str) -> str:
        """A property of a unit, from systemd."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).stdout.strip()

    def main_process(self) -> psutil.Process:
        """The main process of the service, as seen from outside."""
        inside = int(self.show("gserver.service", "MainPID"))
        for process in psutil.Process(self._first()).children(recursive=True):
            status = Path(f"/proc/{process.pid}/status").read_text()
            if f"\nNSpid:\t{process.pid}\t{inside}\n" in status:
                return process
        raise AssertionError(f"no process has the inner id {inside}")

    def _first(self) -> int:
        return psutil.Process(self._process.pid).children()[0].pid

    def _is_up(self) -> bool:
        return self._process.poll() is not None or (
            bool(psutil.Process(self._process.pid).children())
            and self.run("systemctl", "is-system-running", check=False).stdout.strip()
            in ("running", "degraded")
        )

    def _write_units(self) -> None:
        units = self._folder / "units"
        shutil.copytree(UNITS, units)
        for name in TARGETS:
            text = Path(f"/lib/systemd/system/{name}.target").read_text().splitlines()
            kept = [line for line in text if not line.startswith(("Wants=", "Requires="))]
            (units / f"{name}.target").write_text("\n".join(kept))
        variables = {
            "VIRTUAL_ENV": "/opt/venv",
            "LD_LIBRARY_PATH": "/opt/python/lib",
            **self._variables,
        }
        lines = [f"Environment={name}={value}" for name, value in variables.items()]
        lines += [f"StandardOutput=append:{self.output}", f"StandardError=append:{self.errors}"]
        changes = {"service": "", **self._changes}
        changes["service"] += "\n" + "\n".join(lines)
        for kind, change in changes.items():
            (units / f"gserver.{kind}.d").mkdir()
            (units / f"gserver.{kind}.d/test.conf").write_text(f"[{kind.title()}]\n{change}\n")


def is_removed(folder: Path) -> bool:
    """Remove an empty folder, if possible."""
    try:
        folder.rmdir()
    except OSError:
        return False
    return True
