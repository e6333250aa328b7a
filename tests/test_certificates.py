"""What is read of the files of TLS, and what is said when that cannot be."""

from pathlib import Path
from typing import Any

import pytest

from gserver.certificates import Certificates, read
from gserver.config import Config
from gserver.errors import Misuse


def test_without_the_options_there_is_nothing() -> None:
    assert read(Config()) == Certificates("", "", "")


def test_the_key_is_in_a_file_of_its_own_or_in_that_of_the_certificate(tmp_path: Path) -> None:
    chain, key = tmp_path / "chain", tmp_path / "key"
    chain.write_text("a chain")
    key.write_text("a key")
    assert read(Config(tls_cert=str(chain))) == Certificates("a chain", "a chain", "")
    assert read(Config(tls_cert=str(chain), tls_key=str(key))) == Certificates("a chain", "a key", "")
    assert read(Config(tls_cert=str(chain), tls_client_ca=str(key))).client_ca == "a key"


@pytest.mark.parametrize("option", ["tls_cert", "tls_key", "tls_client_ca"])
def test_a_file_that_cannot_be_read_is_named_with_its_option(option: str, tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.write_bytes(b"\xff no text")
    files: dict[str, Any] = {"tls_cert": str(good), option: str(tmp_path)}
    with pytest.raises(Misuse, match=f"^--{option.replace('_', '-')} {tmp_path} cannot be read: Is a directory$"):
        read(Config(**files))
