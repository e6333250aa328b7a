"""Fixtures of the outer ring."""

from collections.abc import Iterator

import pytest

from lab.redises import Redis
from lab.statsd import Daemon, statsd_daemon


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    """One Redis for the tests that leave it intact; each uses its own cluster name."""
    with Redis(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for all tests of the file; each test uses its own prefix."""
    with statsd_daemon(tmp_path_factory.mktemp("statsd")) as running:
        yield running
