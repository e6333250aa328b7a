"""Fixtures that several files share."""

import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import HealthCheck, settings

from lab.certificates import make_certificates
from lab.rows import Notes
from lab.running import Running

# A busy machine may take long for one example, or to draw it.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_sessionstart(session: pytest.Session) -> None:
    """SIGTERM interrupts a run as Ctrl-C does: processes that the tests started end with it.

    The run also ends if a test fails in its teardown meanwhile, which hides the interruption.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        session.shouldstop = f"{signal.Signals(number).name} received"
        signal.default_int_handler(number, frame)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """One server for the tests of a file that do not change it."""
    with Running() as running:
        yield running


@pytest.fixture(scope="session")
def pems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of `make_certificates`."""
    folder = tmp_path_factory.mktemp("pems")
    make_certificates(folder)
    return folder


@pytest.fixture
def notes(request: pytest.FixtureRequest) -> Notes:
    """The notes of a test of the fault matrix."""
    return Notes(request.node.user_properties)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of `tests/outer` and of the fault matrix belong to the outer ring."""
    folders = [Path(__file__).parent / name for name in ("outer", "faults")]
    for item in items:
        if any(item.path.is_relative_to(folder) for folder in folders):
            item.add_marker(pytest.mark.outer)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test of the fault matrix fails without a note that proves that its fault happened."""
    yield
    if item.get_closest_marker("fault") and not Notes(item.user_properties).is_proven:
        pytest.fail("no note proves that the fault happened")
