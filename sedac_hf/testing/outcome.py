"""What a test found, and what the suite found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from sedac_hf.evaluation.report import plain_values

__all__ = ["SuiteResults", "TestOutcome", "verdict"]


@dataclass(frozen=True, kw_only=True)
class TestOutcome:
    """What one test found. The tests of the package have outcomes with further fields.

    Attributes:
        name: Name of the test.
        passed: Whether the criterion was met; None where there was nothing to test.
        criterion: What had to hold, in words.
        found: What was found, in words; where nothing was tested, why.
        notes: What a reader must know to judge it.
        seconds: Time that the test took.
    """

    __test__: ClassVar[bool] = False  # the name begins as those that pytest collects

    name: str
    passed: bool | None
    criterion: str
    found: str
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def details(self) -> list[tuple[str, str]]:
        """Further lines for the report: a name and a value each."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values; numbers that are not finite are None."""
        values: dict[str, Any] = plain_values(asdict(self))
        return values


def verdict(outcome: TestOutcome) -> str:
    """`passed`, `failed` or `skipped`.

    Args:
        outcome: What a test found.
    """
    if outcome.passed is None:
        return "skipped"
    return "passed" if outcome.passed else "failed"


@dataclass(frozen=True)
class SuiteResults:
    """What all tests found.

    Attributes:
        outcomes: One for each test, in the order they ran.
        mode: Mode that was tested.
        domains: Documents of each domain that the user gave.
        conditions: Model, configuration of the tests, versions and machine, as JSON values.
    """

    outcomes: tuple[TestOutcome, ...]
    mode: str
    domains: dict[str, int]
    conditions: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Whether no test failed and at least one passed."""
        found = [outcome.passed for outcome in self.outcomes]
        return True in found and False not in found

    def __iter__(self) -> Iterator[TestOutcome]:
        """The outcomes in order."""
        return iter(self.outcomes)

    def __getitem__(self, name: str) -> TestOutcome:
        """The outcome of a test by its name.

        Raises:
            KeyError: If no test has that name.
        """
        for outcome in self.outcomes:
            if outcome.name == name:
                return outcome
        raise KeyError(f"{name!r}; tests were {[outcome.name for outcome in self.outcomes]}")

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "passed": self.passed,
            "mode": self.mode,
            "domains": dict(self.domains),
            "tests": {one.name: {"verdict": verdict(one), **one.to_dict()} for one in self},
            "conditions": plain_values(self.conditions),
        }
