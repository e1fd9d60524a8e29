"""What every test is given: both models, the texts by domain, the limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from transformers import AutoTokenizer

from sedac_hf.calibration.documents import Document
from sedac_hf.calibration.texts import answer_prompts
from sedac_hf.core.support import unwrap_adapter
from sedac_hf.errors import CalibrationError, ConfigError, ModeError
from sedac_hf.evaluation.perplexity import (
    PerplexityResult,
    as_documents,
    exits_act,
    generation_prompt,
    paired_perplexity,
)
from sedac_hf.evaluation.prompts import encode_prompt, load_prompts
from sedac_hf.modeling import SedacForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sedac_hf.testing.config import TestConfig

__all__ = ["SuiteInput", "TestData"]

Texts: TypeAlias = Sequence[str] | Sequence[Document]
TestData: TypeAlias = Texts | Mapping[str, Texts]

ONE_DOMAIN = "texts"


class SuiteInput:
    """What every test is given.

    Attributes:
        model: The model with exits.
        baseline: The model that it is compared with, without exits.
        config: The limits.
        mode: The mode that is tested.
        given: Documents of each domain that the user gave.
    """

    def __init__(
        self,
        baseline: PreTrainedModel | SedacForCausalLM | None,
        model: SedacForCausalLM,
        test_data: TestData | None,
        config: TestConfig,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Bring models and texts into one form.

        Args:
            baseline: What to compare with; None, or a wrapper, stands for the base in it.
            model: The model with exits.
            test_data: Texts or documents, of one domain or by domain; None takes the prompts of the
                package, answered by the baseline.
            config: The limits.
            tokenizer: Turns texts into documents; None takes that of the artefact or its base.

        Raises:
            ConfigError: If a model has no checkpoints, the vocabularies differ, or texts are no
                texts.
            ModeError: If the mode is refused for this model.
            CalibrationError: If a domain has no text of at least two tokens.
        """
        if not isinstance(model, SedacForCausalLM) or not model.config.checkpoints:
            raise ConfigError(
                "the model under test must be a SedacForCausalLM with checkpoints, found "
                f"{type(model).__name__}. Fit one with sedac_hf.fit, or load an artefact."
            )
        self.model = model
        self.config = config
        self.tokenizer = tokenizer or _tokenizer_of(model)
        self.mode = _mode(model, config)
        own: PreTrainedModel = model.base_lm
        other: Any = baseline.base_lm if isinstance(baseline, SedacForCausalLM) else baseline
        other = own if other is None else unwrap_adapter(other)
        self.baseline: PreTrainedModel = other
        self._wrapped = None if other is own else _wrapped(other, model)
        self._shipped: dict[str, tuple[Document, ...]] | None = None
        self._results: dict[tuple[str, ...], PerplexityResult] = {}
        self._rows: dict[str, dict[str, Any]] = {}
        self.given = self.shipped() if test_data is None else _by_domain(test_data, self.tokenizer)

    @property
    def exits_act(self) -> bool:
        """Whether exits are final in this mode, so that they change what the model says."""
        return exits_act(self.model, self.mode)

    @property
    def why_no_exits(self) -> str:
        """Why exits are not final; empty where they are."""
        if self.exits_act:
            return ""
        if self.mode != "certified":
            return f"exits are not final in {self.mode} mode"
        return self.model.exits_off_reason or "this model has no thresholds, so nothing leaves"

    @property
    def wrapped_baseline(self) -> SedacForCausalLM:
        """A wrapper whose `exits="off"` is the baseline."""
        return self._wrapped or self.model

    @property
    def documents(self) -> tuple[Document, ...]:
        """The documents of all domains that the user gave, one domain after the other."""
        return tuple(document for some in self.given.values() for document in some)

    def prompts(self) -> list[list[int]]:
        """What generation starts from, for each document; see `generation_prompt`."""
        return [generation_prompt(document) for document in self.documents]

    def domains(self) -> dict[str, tuple[Document, ...]]:
        """At least two domains: the user's, and the shipped ones where these are fewer.

        Raises:
            CalibrationError: If there are fewer than two all the same, or one has fewer than two
                documents.
        """
        found = dict(self.given)
        if len(found) < 2:
            found |= {name: some for name, some in self.shipped().items() if name not in found}
        if len(found) < 2:
            raise CalibrationError(
                f"comparing domains needs at least two, found {list(found)}: pass a dict of "
                "domains, or name shipped_domains."
            )
        for name, some in found.items():
            if len(some) < 2:
                raise CalibrationError(
                    f"domain {name!r} has {len(some)} documents; give at least 2 to tell domains "
                    "from documents."
                )
        return found

    def shipped(self) -> dict[str, tuple[Document, ...]]:
        """The prompts of the package by domain, answered by the baseline when first asked for.

        Raises:
            CalibrationError: If there is no tokenizer.
        """
        if self._shipped is None:
            self._shipped = {
                name: tuple(self._answered(name)) for name in self.config.shipped_domains
            }
        return self._shipped

    def _answered(self, group: str) -> list[Document]:
        if self.tokenizer is None:
            raise CalibrationError(
                "the prompts of the package are texts and there is no tokenizer: pass "
                "tokenizer=..., or a dict of at least two domains of Document objects."
            )
        config = self.config
        texts = load_prompts(group, config.domain_documents)
        prompts = [encode_prompt(self.tokenizer, text) for text in texts]
        return answer_prompts(
            self.baseline,
            [prompt for prompt in prompts if prompt],
            max_answer=config.answer_tokens,
            seed=config.seed,
        )

    def perplexity(self, documents: Sequence[Document]) -> PerplexityResult:
        """Perplexity of baseline and model on documents, exits acting as the mode says.

        A set of documents is scored once, whichever tests ask.

        Args:
            documents: The documents.

        Raises:
            CalibrationError: If the baseline cannot score any of them.
        """
        key = tuple(document.hash for document in documents)
        if key not in self._results:
            result = paired_perplexity(
                self.model,
                documents,
                exits=self.exits_act,
                baseline=self._wrapped,
                batch_tokens=self.config.batch_tokens,
                seed=self.config.seed,
            )
            self._results[key] = result
            self._rows |= {str(row["hash"]): row for row in result.per_document}
        return self._results[key]

    def scored(self, documents: Sequence[Document]) -> list[dict[str, Any]]:
        """One row for each document, as `PerplexityResult.per_document` has them.

        Args:
            documents: The documents; those that were scored before are not scored again.
        """
        new = {d.hash: d for d in documents if d.hash not in self._rows}
        if new:
            self.perplexity(list(new.values()))
        return [self._rows[document.hash] for document in documents]


def _mode(model: SedacForCausalLM, config: TestConfig) -> str:
    mode = config.mode
    if mode is None:
        mode = "certified" if "certified" not in model.refused_modes else model.config.mode
    if mode in model.refused_modes:
        raise ModeError(f"mode {mode!r} is refused: {model.refused_modes[mode]}")
    return mode


def _wrapped(baseline: PreTrainedModel, model: SedacForCausalLM) -> SedacForCausalLM:
    """A wrapper without checkpoints, so that one function scores both models."""
    wrapper = SedacForCausalLM.from_base(baseline, self_check=False)
    sizes = [int(one.config.get_text_config().vocab_size) for one in (model, wrapper)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"the baseline knows {sizes[1]} tokens and the model under test {sizes[0]}: their "
            "perplexities cannot be compared. Pass the base that the artefact was made for."
        )
    return wrapper


def _by_domain(
    data: TestData, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, tuple[Document, ...]]:
    if isinstance(data, str):
        raise ConfigError(
            "test_data must be a list of texts or documents, or a dict of domains; found one "
            "string. Put it into a list."
        )
    domains = dict(data) if isinstance(data, Mapping) else {ONE_DOMAIN: data}
    if not domains:
        raise ConfigError("test_data holds no domain; pass texts, or None for the shipped prompts.")
    found = {}
    for name, texts in domains.items():
        kinds = {type(text).__name__ for text in texts if not isinstance(text, (str, Document))}
        if isinstance(texts, str) or kinds:
            raise ConfigError(
                f"domain {name!r} must be a list of texts (str) or Documents, found "
                f"{sorted(kinds) or 'one string'}."
            )
        found[str(name)] = tuple(as_documents(texts, tokenizer))
    return found


def _tokenizer_of(model: SedacForCausalLM) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies with the artefact or its base on this machine, or None."""
    places = [model.origin.directory] if model.origin else []
    if name := model.base_lm.config.name_or_path:
        places.append(Path(name))
    auto: Any = AutoTokenizer
    for place in places:
        if (place / "tokenizer_config.json").is_file():
            return cast("PreTrainedTokenizerBase", auto.from_pretrained(place))
    return None
