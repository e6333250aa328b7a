"""Reading the TLS files, and the errors for unusable ones."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from gserver.certificates import MAX_FILE_BYTES, Certificates, read
from gserver.config import Config
from gserver.errors import UsageError


def test_without_the_options_no_file_is_read() -> None:
    assert read(Config()) == Certificates("", "", "")


def test_the_key_has_its_own_file_or_is_in_the_certificate_file(tmp_path: Path) -> None:
    chain, key = tmp_path / "chain", tmp_path / "key"
    chain.write_text("a chain")
    key.write_text("a key")
    assert read(Config(tls_cert=str(chain))) == Certificates("a chain", "a chain", "")
    assert read(Config(tls_cert=str(chain), tls_key=str(key))) == Certificates(
        "a chain", "a key", ""
    )
    assert read(Config(tls_cert=str(chain), tls_client_ca=str(key))).client_ca == "a key"


def open_files() -> set[Path]:
    """The files that this process has open.

    A count would include files that other tests left to the garbage collector.
    """
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the descriptor of the listing itself
            found.add(descriptor.readlink())
    return found


@pytest.mark.parametrize("option", ["tls_cert", "tls_key", "tls_client_ca"])
def test_a_file_that_cannot_be_read_is_named_with_its_option(option: str, tmp_path: Path) -> None:
    good, none, empty, large, pipe = (
        tmp_path / name for name in ("good", "none", "empty", "large", "pipe")
    )
    good.write_bytes(b"\xff no text")
    empty.write_text(" \n")
    large.write_text("x" * (MAX_FILE_BYTES + 1))
    os.mkfifo(pipe)
    for path, words in (
        (none, "cannot be read: No such file or directory"),
        (tmp_path, "cannot be read: Is a directory"),
        (pipe, "is not a regular file"),
        (Path("/dev/zero"), "is not a regular file"),
        (empty, "is empty: name a file in PEM"),
        (large, "is too large: name a file in PEM"),
    ):
        files: dict[str, Any] = {"tls_cert": str(good), option: str(path)}
        with pytest.raises(UsageError, match=f"^--{option.replace('_', '-')} {path} {words}$"):
            read(Config(**files))
        assert path not in open_files()
