"""Tests for users: whether a model with exits holds up on their own texts and machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sedac_hf.lazy_names import lazy_names

if TYPE_CHECKING:
    from sedac_hf.testing.config import TestConfig
    from sedac_hf.testing.distribution_shift import DistributionShiftTest
    from sedac_hf.testing.outcome import SuiteResults, TestOutcome
    from sedac_hf.testing.performance import PerformanceTest
    from sedac_hf.testing.quality import QualityTest
    from sedac_hf.testing.robustness import RobustnessTest
    from sedac_hf.testing.suite import ComprehensiveTestSuite, SuiteTest
    from sedac_hf.testing.suite_input import SuiteInput

__all__ = [
    "ComprehensiveTestSuite",
    "DistributionShiftTest",
    "PerformanceTest",
    "QualityTest",
    "RobustnessTest",
    "SuiteInput",
    "SuiteResults",
    "SuiteTest",
    "TestConfig",
    "TestOutcome",
]

_HOMES = {
    "ComprehensiveTestSuite": "suite",
    "DistributionShiftTest": "distribution_shift",
    "PerformanceTest": "performance",
    "QualityTest": "quality",
    "RobustnessTest": "robustness",
    "SuiteInput": "suite_input",
    "SuiteResults": "outcome",
    "SuiteTest": "suite",
    "TestConfig": "config",
    "TestOutcome": "outcome",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
