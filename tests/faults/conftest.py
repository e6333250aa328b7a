"""Fixtures of the fault matrix."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lab.rows import Variant
from lab.site import Site


@pytest.fixture
def start(variant: Variant, tmp_path: Path, pems: Path) -> Iterator[Callable[..., Site]]:
    """Start a server of the test's variant: `site = start("--max-clients", "9")`."""
    with ExitStack() as stack:
        yield lambda *options, **more: stack.enter_context(
            Site(tmp_path, pems, variant, *options, **more)
        )
