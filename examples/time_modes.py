"""Time the modes of an artefact on a few prompts: a first look; `sedac bench` is the measurement.

python examples/time_modes.py examples/smollm2-135m-instruct-sedac --dtype float32
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import AutoTokenizer

from sedac_hf import SedacForCausalLM
from sedac_hf.evaluation.prompts import load_prompts


def main() -> None:
    """Print milliseconds per token of each mode, and their ratio to `generate()` of the base."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artefact")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--groups", nargs="*", default=["chat", "code"])
    parser.add_argument("--modes", nargs="*", default=["off", "plain", "exact", "certified"])
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=40)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.artefact)
    dtype = getattr(torch, arguments.dtype)
    model = SedacForCausalLM.from_pretrained(arguments.artefact, dtype=dtype)
    for group in arguments.groups:
        taken: dict[str, list[float]] = {mode: [] for mode in arguments.modes}
        for place, prompt in enumerate(load_prompts(group)[: arguments.prompts + 1]):
            chat = [{"role": "user", "content": prompt}]
            inputs: Any = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            length = {"max_new_tokens": arguments.tokens, "min_new_tokens": arguments.tokens}
            for mode in arguments.modes:
                start = time.perf_counter()
                model.generate(**inputs, **length, do_sample=False, sedac_mode=mode)
                if place:  # the first prompt warms up
                    taken[mode].append(time.perf_counter() - start)
        for mode, seconds in taken.items():
            ratios = [off / own for off, own in zip(taken["off"], seconds, strict=True)]
            each = statistics.median(seconds) / arguments.tokens * 1e3
            print(f"{group:10} {mode:10} {each:6.1f} ms/token {statistics.median(ratios):5.2f}x")


if __name__ == "__main__":
    main()
