"""One process of a fit that several share: `python -m tests.calibration.fit_worker OUTPUT`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import LlamaConfig, LlamaForCausalLM

from sedac_hf.calibration.fit_settings import FitSettings
from sedac_hf.calibration.fit_stages import FitRun
from sedac_hf.calibration.fitting import fit
from sedac_hf.config import CheckpointSpec
from tests.micro_model import MicroLanguage


def main(output: Path) -> None:
    """Fit a tiny random model on the texts that it writes itself."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    language = MicroLanguage()
    config = LlamaConfig(
        vocab_size=len(language.words), hidden_size=16, intermediate_size=32,
        num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=256,
    )  # fmt: skip
    base = LlamaForCausalLM(config).eval()
    settings = FitSettings(
        checkpoints=(CheckpointSpec(0), CheckpointSpec(1)), budget_seconds=120, epochs=0.5,
        text_tokens=24_000, draft_words=40, probe_rank=4,
    )  # fmt: skip
    threads = {}
    for stage in ("heads", "thresholds", "certificate"):
        run = getattr(FitRun, stage)

        def noted(self: FitRun, *args: Any, stage: str = stage, run: Any = run) -> Any:
            threads[stage] = torch.get_num_threads()
            return run(self, *args)

        setattr(FitRun, stage, noted)
    _, report = fit(
        base, tokenizer=language.tokenizer(), output_dir=output, settings=settings, progress=False
    )
    rank = PartialState().process_index
    found = {"heads": report.to_dict()["heads"], "threads": threads}
    output.with_name(f"report-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
