"""Fixtures that several files share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.redises import make_certificates
from tests.running import Running


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """One server for the tests of a file that leave it as it was."""
    with Running() as running:
        yield running


@pytest.fixture(scope="session")
def pems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what `make_certificates` makes."""
    folder = tmp_path_factory.mktemp("pems")
    make_certificates(folder)
    return folder
