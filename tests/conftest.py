"""Fixtures that several files share."""

from collections.abc import Iterator

import pytest

from tests.running import Running


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """One server for the tests of a file that leave it as it was."""
    with Running() as running:
        yield running
