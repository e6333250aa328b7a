"""Packages of requirements-dev.txt that some tests need."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from lab.running import unavailable


def package(name: str) -> Any:
    """Import a package; skip, or fail where CI is set, if it is not installed."""
    if find_spec(name) is None:
        unavailable(f"{name} is not installed: bin/setup --dev does it")
    return import_module(name)
