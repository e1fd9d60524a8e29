"""Runs tests on a model with exits and its baseline, and reports."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from sedac_hf.errors import ConfigError, SedacError
from sedac_hf.evaluation.environment import machine, software_versions
from sedac_hf.evaluation.report import model_settings
from sedac_hf.testing.config import TestConfig
from sedac_hf.testing.distribution_shift import DistributionShiftTest
from sedac_hf.testing.outcome import SuiteResults, TestOutcome
from sedac_hf.testing.performance import PerformanceTest
from sedac_hf.testing.quality import QualityTest
from sedac_hf.testing.report import print_results
from sedac_hf.testing.robustness import RobustnessTest
from sedac_hf.testing.suite_input import SuiteInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sedac_hf.modeling import SedacForCausalLM
    from sedac_hf.testing.suite_input import TestData

__all__ = ["ComprehensiveTestSuite", "SuiteTest"]


class SuiteTest(Protocol):
    """What a test of one's own must have.

    Attributes:
        name: Its name in the results.
    """

    name: str

    def run(self, given: SuiteInput) -> TestOutcome:
        """Measure and judge.

        Args:
            given: Models, texts and limits. `given.perplexity` and `given.scored` share what was
                scored already.

        Returns:
            What was found. A `SedacError` counts as failed.
        """
        ...


class ComprehensiveTestSuite:
    """Quality, robustness, performance and shift of domains on the user's own texts.

    Example:
        ```python
        suite = ComprehensiveTestSuite(config=TestConfig(latency_slo_ms=50))
        suite.add_default_tests()
        results = suite.run_all(baseline_model, sedac_model, {"mail": mails, "code": programs})
        suite.print_report(results)
        ```

    Attributes:
        config: The limits.
        tests: The tests, in the order they run.
        tokenizer: Turns texts into tokens; None for the artefact's own.
        progress: Gives a context in which a line of text is shown.
    """

    def __init__(
        self,
        config: TestConfig | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        progress: Callable[[str], Any] | None = None,
    ) -> None:
        """Begin without tests.

        Args:
            config: The limits; None for the usual ones.
            tokenizer: Turns texts into tokens; None takes that of the artefact or of its base when
                it is needed.
            progress: Gives a context in which a line of text is shown; None shows nothing.
        """
        self.config = config or TestConfig()
        self.tests: list[SuiteTest] = []
        self.tokenizer = tokenizer
        self.progress = progress or (lambda text: nullcontext())

    def add_test(self, test: SuiteTest) -> ComprehensiveTestSuite:
        """Add a test.

        Args:
            test: The test.

        Returns:
            The suite.

        Raises:
            ConfigError: If there is a test of that name.
        """
        if test.name in [known.name for known in self.tests]:
            raise ConfigError(f"there is a test named {test.name!r} already; give it another name.")
        self.tests.append(test)
        return self

    def add_default_tests(self) -> ComprehensiveTestSuite:
        """Add the four tests of the package, and return the suite."""
        defaults = (QualityTest(), RobustnessTest(), PerformanceTest(), DistributionShiftTest())
        for test in defaults:
            self.add_test(test)
        return self

    def run_all(
        self,
        baseline_model: PreTrainedModel | SedacForCausalLM | None,
        sedac_model: SedacForCausalLM,
        test_data: TestData | None = None,
    ) -> SuiteResults:
        """Run every test.

        Args:
            baseline_model: What the model is compared with, loaded in the data type to compare in;
                None for the model's own base.
            sedac_model: The model with exits.
            test_data: What to test on: a list of texts or of `Document` objects, or a dict from the
                name of a domain to such a list, none of them texts that exits were fitted on. Where
                fewer than two domains are given, the shift of domains is tested on the prompts of
                the package as well, which the baseline answers; None takes these alone.

        Returns:
            What was found. A test that ends in a `SedacError` counts as failed, and its outcome
            holds the message.

        Raises:
            ConfigError: If there are no tests, or models and texts are of the wrong kind.
            ModeError: If the mode is refused for this model.
            CalibrationError: If a domain has no text of at least two tokens.
        """
        if not self.tests:
            raise ConfigError("the suite has no tests: call add_default_tests() or add_test(...).")
        with self.progress("reading the texts"):
            given = SuiteInput(
                baseline_model,
                sedac_model,
                test_data,
                self.config,
                tokenizer=self.tokenizer,
            )
        outcomes = []
        for test in self.tests:
            with self.progress(f"{test.name} test"):
                outcomes.append(_outcome(test, given))
        return SuiteResults(
            outcomes=tuple(outcomes),
            mode=given.mode,
            domains={name: len(some) for name, some in given.given.items()},
            conditions={
                "tests": self.config.to_dict(),
                "model": model_settings(sedac_model),
                "baseline": str(given.baseline.config.name_or_path) or None,
                "versions": software_versions(),
                "machine": machine(),
            },
        )

    def print_report(self, results: SuiteResults, *, console: Console | None = None) -> None:
        """Print verdicts, figures and notes.

        Args:
            results: What `run_all` returned.
            console: Where to; None for standard output.
        """
        print_results(results, console or Console(highlight=False))


def _outcome(test: SuiteTest, given: SuiteInput) -> TestOutcome:
    begun = time.monotonic()
    try:
        outcome = test.run(given)
    except SedacError as error:
        outcome = TestOutcome(
            name=test.name, passed=False, criterion="the test can run", found=str(error)
        )
    return replace(outcome, seconds=time.monotonic() - begun)
