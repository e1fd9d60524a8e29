"""What `sedac test` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sedac_hf.cli_load import conditions_line, let_exits_act, load, seed_everything
from sedac_hf.cli_support import Screen, UsageError, check_report_file
from sedac_hf.cli_texts import documents_for
from sedac_hf.evaluation.report import save_report
from sedac_hf.testing.suite import ComprehensiveTestSuite

if TYPE_CHECKING:
    from sedac_hf.calibration.documents import Document
    from sedac_hf.cli_load import Loaded
    from sedac_hf.testing.config import TestConfig

__all__ = ["run_suite"]


def run_suite(
    name: str,
    config: TestConfig,
    *,
    base: str | None,
    uncertified: bool,
    data: Sequence[str],
    only: str | None,
    documents: int,
    output: Path | None,
    device: str,
    dtype: str,
    screen: Screen,
) -> dict[str, Any]:
    """Load a model and test it; see `sedac test --help`."""
    check_report_file(output)
    names = _domain_names(data)
    suite = ComprehensiveTestSuite(config).add_default_tests()
    if only is not None:
        _keep_only(suite, only)
    loaded = load(name, base=base, mode=config.mode, device=device, dtype=dtype, screen=screen)
    if not loaded.model.config.checkpoints:
        raise UsageError(
            f"{name} is a plain base without exits, so there is nothing to test. Fit some: sedac "
            f"fit {name} -o OUT."
        )
    if uncertified:
        screen.note(let_exits_act(loaded))
    seed_everything(config.seed)
    domains, origins = _domains(loaded, data, names, documents, config.seed, screen)
    suite.tokenizer, suite.progress = loaded.tokenizer, screen.status
    results = suite.run_all(None, loaded.model, domains)
    report = {
        "model": name,
        **results.to_dict(),
        "texts": origins,
        "measured_on": conditions_line(loaded),
    }
    if output is not None:
        save_report(report, output)
        screen.note(f"report written to {output}")
    suite.print_report(results, console=screen.out)
    screen.out.print(f"Conditions: {report['measured_on']}.", style="dim", markup=False)
    return report


def _domain_names(data: Sequence[str]) -> list[str]:
    """A name for each of the sources: the file's, without folder and ending."""
    names = [Path(source).stem if Path(source).is_file() else source for source in data]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(
            f"--data: {', '.join(twice)} stands there twice; each file is a domain of its own "
            "and needs a name of its own."
        )
    return names


def _keep_only(suite: ComprehensiveTestSuite, only: str) -> None:
    wanted = [part.strip() for part in only.split(",") if part.strip()]
    known = [test.name for test in suite.tests]
    unknown = [one for one in wanted if one not in known]
    if unknown or not wanted:
        raise UsageError(
            f"--only {only}: expected some of {', '.join(known)}, found "
            f"{', '.join(unknown) or 'none'}."
        )
    suite.tests = [test for test in suite.tests if test.name in wanted]


def _domains(
    loaded: Loaded,
    data: Sequence[str],
    names: Sequence[str],
    count: int,
    seed: int,
    screen: Screen,
) -> tuple[dict[str, list[Document]], dict[str, str]]:
    """Documents by domain, and where they are from."""
    sources: list[str | None] = list(data) or [None]
    found, origins = {}, {}
    for name, source in zip(names or ["texts"], sources, strict=True):
        found[name], origins[name] = documents_for(loaded, source, count, seed=seed, screen=screen)
    return found, origins
