"""Fit exits to a base model, look at what they do, and share them.

    python examples/fit_and_push.py .models/smollm2-135m-instruct my-sedac
    python examples/fit_and_push.py org/base my-sedac --budget 3600 --push you/base-sedac

The base writes its own texts; pass texts=[...] to `fit` to use yours. An interrupted run goes on
where it was when it is started again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from sedac_hf import SedacForCausalLM, fit
from sedac_hf.calibration.fit_stages import FitSettings


def main(
    base_name: Annotated[str, typer.Argument(help="Folder or Hub name of the base.")],
    output: Annotated[Path, typer.Argument(help="Folder of the artefact.")],
    budget: Annotated[float, typer.Option(help="Seconds for everything.")] = 1200.0,
    push: Annotated[str | None, typer.Option(help="Repository on the Hub to push to.")] = None,
) -> None:
    """Fit, load what was saved, and push it if asked."""
    tokenizer = AutoTokenizer.from_pretrained(base_name)
    base = AutoModelForCausalLM.from_pretrained(base_name, dtype=torch.float32).eval()
    _, report = fit(
        base,
        tokenizer=tokenizer,
        output_dir=output,
        settings=FitSettings(budget_seconds=budget),
    )
    for head in report.heads:
        print(
            f"after layer {head.layer_idx}: agrees with the base on {head.agreement:.1%} of tokens"
        )
    print((report.certificate or {}).get("statement", "nothing could be certified"))

    model = SedacForCausalLM.from_pretrained(output, base_model=base)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32, do_sample=False)[0]))
    print(model.exit_stats)
    if push is not None:
        print(model.push_to_hub(push, tokenizer=tokenizer))


if __name__ == "__main__":
    typer.run(main)
