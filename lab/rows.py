"""Rows of the fault matrix: the name of a fault, its variants, and its notes."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import pytest

Test = TypeVar("Test", bound=Callable[..., Any])


class Variant(NamedTuple):
    """The kind of server under a fault."""

    workers: int = 1
    is_tls: bool = False

    def __str__(self) -> str:
        return f"{self.workers} worker{'s' * (self.workers > 1)}{', TLS' * self.is_tls}"


ALL = Variant(1), Variant(3), Variant(1, True), Variant(3, True)
PLAIN = ALL[:2]
SEVERAL = ALL[1::2]


def row(
    fault: str,
    *variants: Variant,
    quick: Variant | None = ALL[0],
    values: dict[str, Any] | None = None,
) -> Callable[[Test], Test]:
    """Mark a test as one of this fault, to run in these variants (default: all).

    `bin/check` runs only the variant `quick`, and skips a fault that has none. `values` are kinds
    of the fault by name, for the test's argument `kind`. `bin/check` runs all kinds.
    """

    def mark(test: Test) -> Test:
        chosen = variants or ALL
        is_quick = quick if quick is None or quick in chosen else chosen[0]
        params = [
            pytest.param(
                variant, id=str(variant), marks=() if variant == is_quick else pytest.mark.long
            )
            for variant in chosen
        ]
        test = pytest.mark.parametrize("variant", params)(test)
        if values:
            test = pytest.mark.parametrize("kind", values.values(), ids=values)(test)
        marked: Test = pytest.mark.fault(fault)(test)
        return marked

    return mark


class Notes:
    """The notes of a test of the matrix: proof that its fault happened, and measurements.

    Without the proof the test fails.
    """

    def __init__(self, properties: list[tuple[str, object]]) -> None:
        self._properties = properties

    def happened(self, what: str) -> None:
        """Note in words what proved the fault."""
        self._properties.append(("happened", what))

    def measured(self, name: str, value: float, unit: str) -> None:
        """Note a figure."""
        self._properties.append(("measured", (name, value, unit)))

    @property
    def is_proven(self) -> bool:
        return any(name == "happened" for name, _ in self._properties)


def seedless(test: str) -> str:
    """The name of a test without a seed that was drawn: a row replaces that of another seed."""
    return re.sub(r"_SEED=\d+", "", test)
