"""bin/verify-release: the wheel is the same bit for bit whenever it is built."""

import os
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

from lab.running import LIMIT, ROOT, environment

SCRIPT = ROOT / "bin/verify-release"


def verified(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = environment(VIRTUAL_ENV=sys.prefix)
    return subprocess.run(
        [str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env=env,
        timeout=5 * LIMIT,
        check=False,
    )


def git(*words: str) -> bytes:
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True).stdout


def built(folder: Path) -> Path:
    """The wheel of HEAD, built as anyone would, in another place and at another time."""
    source = folder / "source"
    with tarfile.open(fileobj=BytesIO(git("archive", "HEAD"))) as archive:
        archive.extractall(source, filter="data")
    epoch = git("log", "-1", "--format=%ct").decode().strip()
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(folder)]
    subprocess.run(
        [*command, str(source)],
        check=True,
        capture_output=True,
        env={**os.environ, "SOURCE_DATE_EPOCH": epoch},
        umask=0o022,
    )
    [wheel] = folder.glob("*.whl")
    return wheel


def test_a_wheel_of_the_commit_is_known_and_a_changed_one_is_not(tmp_path: Path) -> None:
    wheel = built(tmp_path)
    left = ROOT / "dist" / wheel.name
    left.unlink(missing_ok=True)
    assert verified().returncode == 0
    assert left.read_bytes() == wheel.read_bytes()
    done = verified("HEAD", str(wheel))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(
        f"{wheel.name}  (commit {git('rev-parse', 'HEAD').decode()[:-1]})\n"
    )
    data = bytearray(wheel.read_bytes())
    data[len(data) // 2] ^= 1
    wheel.write_bytes(data)
    done = verified("HEAD", str(wheel))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{wheel} is not the wheel of" in done.stderr


def test_what_is_not_there_is_a_clear_error() -> None:
    done = verified("no-such-commit")
    assert (done.returncode, done.stderr) == (2, "gserver: there is no commit no-such-commit\n")
