"""The stages of `fit`, in the order in which they run."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState

from sedac_hf.calibration.attention_price import attention_prices
from sedac_hf.calibration.bounds import RiskTarget
from sedac_hf.calibration.certificate import Certificate
from sedac_hf.calibration.certify import certify
from sedac_hf.calibration.cost_measurement import measure_costs
from sedac_hf.calibration.costs import CostModel
from sedac_hf.calibration.documents import Document, encode_texts, read_documents
from sedac_hf.calibration.drift import RiskHistograms
from sedac_hf.calibration.fit_settings import FitReport, FitSettings, default_checkpoints
from sedac_hf.calibration.fit_splits import Splits
from sedac_hf.calibration.gate_choice import choose_gates
from sedac_hf.calibration.head_stage import train_heads
from sedac_hf.calibration.head_storage import choose_storage
from sedac_hf.calibration.measurement import fit_temperatures
from sedac_hf.calibration.policy_search import choose_policies
from sedac_hf.calibration.probe_training import fit_probes
from sedac_hf.calibration.progress import say
from sedac_hf.calibration.states import BaseStates
from sedac_hf.calibration.texts import write_texts
from sedac_hf.calibration.work_sizes import WorkSizes
from sedac_hf.calibration.workspace import Workspace
from sedac_hf.core.base_shell import BaseShell
from sedac_hf.core.channel_order import measure_order
from sedac_hf.errors import CalibrationError, UnsupportedModelError
from sedac_hf.fingerprint import fingerprint
from sedac_hf.modeling import SedacForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sedac_hf.core.exit_heads import ExitHead

logger = logging.getLogger(__name__)

# Share of the time budget up to the end of the stage; what a stage leaves goes to the next.
_TEXTS_UNTIL = 0.30
# Steps of the walk. With `propagate` each costs true forwards over all documents; settled exits
# share one.
_RUNGS = {"propagate": 4, "settle": 12}
_SEARCH_DOCUMENTS = {"propagate": 32, "settle": 160}
_MIN_DOCUMENTS = 40


class FitRun:
    """The stages of one `fit`, in the order in which they run."""

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: FitSettings,
        output: Path,
        self_written: bool,
        progress: bool,
        started: float,
    ) -> None:
        """Place the base and open the working folder; see `fit` for the arguments."""
        self.base = base
        self.tokenizer = tokenizer
        self.settings = settings
        self.started = started
        # Processes wait for the slowest head: hours, not the ten minutes a group allows by default.
        self.process = PartialState(cpu=base.device.type == "cpu", timeout=timedelta(days=2))
        self.progress = progress and self.process.is_main_process
        self.sizes = WorkSizes.of(base)
        self.shell = BaseShell(base)
        self.specs = tuple(settings.checkpoints or default_checkpoints(self.shell.num_layers))
        for spec in self.specs:
            spec.resolved(self.shell.num_layers)  # refuses one too deep before any work is done
        self.report = FitReport(self_written=self_written)
        self.policies: list[Any] = []
        self._clock = started
        keyed = {k: v for k, v in asdict(settings).items() if k not in ("budget_seconds", "epochs")}
        keyed |= {"base": fingerprint(base), "self_written": self_written}
        self.workspace = Workspace(output.with_name(output.name + ".work"), keyed)

    def deadline(self, share: float) -> float:
        """Moment at which `share` of the budget is used up."""
        return self.started + share * self.settings.budget_seconds

    def documents(self, texts: Iterable[str] | None) -> list[Document]:
        """Documents given by the user or written by the base."""
        if texts is not None:
            given = self.workspace.given_documents(
                lambda: list(
                    encode_texts(texts, self.tokenizer, max_length=self.settings.max_length)
                )
            )
            documents = list({d.hash: d for d in given}.values())
        else:
            # Documents that came later would move others from training into the test.
            if not self.workspace.texts_are_final:
                self._write_texts()
            self.process.wait_for_everyone()
            found = [d for path in self.workspace.text_files() for d in read_documents(path)]
            documents = list({d.hash: d for d in found}.values())
        if len(documents) < _MIN_DOCUMENTS:
            raise CalibrationError(
                f"found {len(documents)} usable documents, expected at least {_MIN_DOCUMENTS}; "
                "give more texts or a larger budget"
            )
        self._stage("texts")
        self.report.written_tokens = sum(map(len, documents)) if texts is None else 0
        return documents

    def _write_texts(self) -> None:
        """Let the base write this process's share of the documents."""
        rank, ranks = self.process.process_index, self.process.num_processes
        write_texts(
            self.base,
            self.tokenizer,
            self.workspace.texts_path(rank),
            tokens=self.settings.text_tokens // ranks,
            seed=self.settings.seed * ranks + rank,
            rows=self.sizes.rows,
            deadline=self.deadline(_TEXTS_UNTIL),
            progress=self.progress,
        )

    def states(self, splits: Splits) -> BaseStates:
        """The base's states over every document that heads, probes and search need."""
        self.report.tokens = sum(map(len, splits.documents))
        self.report.train_tokens = sum(map(len, splits.of(splits.train)))
        self.report.documents = {
            name: len(getattr(splits, name))
            for name in ("train", "probe", "search", "certify", "held_out")
        }
        width = int(self.base.config.get_text_config().hidden_size)
        layers = [spec.layer_idx for spec in self.specs]
        # Certification documents come last and are never recorded: nothing may see them.
        documents = splits.documents[: splits.certify[0]]
        directory = self.workspace.directory / "states"
        with self.process.main_process_first():
            states = BaseStates(
                directory, documents, layers, width, cache_bytes=self.sizes.cache_bytes
            )
        # Heads that are there already need no states of the texts that heads are trained on.
        budget = self.settings.budget_seconds
        trained = all(self.workspace.has_head(spec, budget) for spec in self.specs)
        states.record(
            self.shell,
            part=(self.process.process_index, self.process.num_processes),
            rows=[*splits.probe, *splits.search] if trained else None,
            batch_tokens=self.sizes.record_tokens,
            progress=self.progress,
        )
        self.process.wait_for_everyone()
        self._stage("states")
        return states

    def heads(self, states: BaseStates, splits: Splits) -> list[ExitHead]:
        """Train the heads, each process its share, and load them all."""
        heads, self.draft = train_heads(self, states, splits)
        self._stage("heads")
        return heads

    def thresholds(
        self, states: BaseStates, splits: Splits, heads: list[ExitHead]
    ) -> SedacForCausalLM:
        """Store the heads, train the probes, and search the policies."""
        specs, heads, self.report.storage = choose_storage(
            heads, self.shell, states, splits.search, self.settings.storage
        )
        temperatures = fit_temperatures(heads, self.shell, states, splits.probe, self.draft)
        self.report.temperatures = temperatures
        fitted = fit_probes(
            heads,
            self.shell,
            states,
            splits.probe,
            splits.search,
            self.draft,
            rank=self.settings.probe_rank,
            epsilon=self.settings.epsilon,
            temperatures=temperatures,
            seed=self.settings.seed,
        )
        self.report.probe_target = fitted.target
        self._stage("probes")
        model = SedacForCausalLM.from_base(
            self.base,
            checkpoints=specs,
            heads=heads,
            probes=fitted.probes,
            draft_vocabulary=self.draft,
            mode="certified",
            probe_target=fitted.target,
            probe_rank=self.settings.probe_rank,
            kv_mode=self.settings.kv_mode,
            fingerprint=fingerprint(self.base),
            head_hits=[[head.agreement, *head.top.values()] for head in self.report.heads],
        )
        self._channels(model, splits)
        costs = self._costs(model, splits)
        self.report.costs = costs.to_dict()
        gates = choose_gates(
            heads, fitted, self.shell, states, splits.probe, splits.search, self.tokenizer, costs,
            epsilon=self.settings.epsilon,
            attention=attention_prices(model, splits.of(splits.search), costs),
            seed=self.settings.seed,
        )  # fmt: skip
        model.set_gates(gates.parts)
        model.risk_histograms = RiskHistograms.from_traces(gates.traces)
        fitted.traces.save(self.workspace.directory / "traces.safetensors")
        self._stage("gates")
        self.policies = choose_policies(
            model, gates.traces,
            splits.of(splits.search[: _SEARCH_DOCUMENTS[self.settings.kv_mode]]), costs,
            rungs=_RUNGS[self.settings.kv_mode], temperatures=temperatures,
            epsilon=self.settings.epsilon, seed=self.settings.seed, front=gates.front,
        )  # fmt: skip
        self.report.gates = [*fitted.gates, *gates.fusion.gates]
        self.report.modalities = gates.fusion.modalities
        self.report.ablation = gates.found.table(self.policies, temperatures, self.settings.epsilon)
        self._stage("search")
        return model

    @contextmanager
    def threads_of_all(self) -> Iterator[None]:
        """Inside the block the main process has the threads of those that wait beside it."""
        own = torch.get_num_threads()
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        try:
            if self.base.device.type == "cpu":
                torch.set_num_threads(max(own, min(own * beside, os.cpu_count() or 1)))
            yield
        finally:
            torch.set_num_threads(own)

    def taken_over(self, output: Path) -> tuple[SedacForCausalLM, FitReport]:
        """What the main process made, once it has; the others have nothing to add behind heads.

        Args:
            output: Where it saves the artefact.
        """
        self.process.wait_for_everyone()
        model = SedacForCausalLM.from_pretrained(output, base_model=self.base)
        return model, self.workspace.load_report()

    def _channels(self, model: SedacForCausalLM, splits: Splits) -> None:
        """The order of channels, by which soft exits can be used later without another fit."""
        try:
            order = measure_order(self.shell, splits.of(splits.train))
        except UnsupportedModelError as error:
            logger.info("no order of channels, so no soft exits: %s", error)
            return
        model.set_channel_order(order)

    def _costs(self, model: SedacForCausalLM, splits: Splits) -> CostModel:
        """What probes, tries and exits cost."""
        if self.settings.costs == "measured":
            prompts = _prompts(splits.of(splits.search))
            return self.workspace.costs(lambda: measure_costs(model, prompts))
        return CostModel.from_base(
            self.base,
            model.config.checkpoint_specs(),
            probe_rank=self.settings.probe_rank,
            draft_vocabulary=len(self.draft),
        )

    def certificate(
        self, model: SedacForCausalLM, splits: Splits, target: RiskTarget
    ) -> Certificate:
        """Walk the policies on fresh documents and set the model to the last that passed."""
        certificate = certify(
            model,
            splits.of(splits.certify),
            self.policies,
            target=target,
            held_out=splits.of(splits.held_out),
            other_splits={
                name: splits.of(getattr(splits, name)) for name in ("train", "probe", "search")
            },
            # Late or not, the walk gets its share: without a certificate all else was for nothing.
            deadline=max(
                self.deadline(1.0), time.monotonic() + 0.15 * self.settings.budget_seconds
            ),
            progress=self.progress,
        )
        model.set_cascade(certificate.policy.cascade if certificate.policy else None)
        model.certificate = certificate
        self.report.certificate = certificate.to_dict()
        self._stage("certify")
        return certificate

    def _stage(self, name: str) -> None:
        now = time.monotonic()
        if self.process.is_main_process:
            self.report.seconds = self.workspace.add_seconds(name, now - self._clock)
        if self.progress:
            say(f"{name}: done in {(now - self._clock) / 60:.1f} min")
        self._clock = now


def _prompts(documents: Sequence[Document]) -> list[list[int]]:
    """Beginnings of documents to time generation on, longest first."""
    begin = sorted((d.ids[: max(d.prompt_length, 8)].tolist() for d in documents), key=len)
    return begin[::-1]
