"""Time exact mode against the plain loop where drafting cannot pay: a model of random weights.

python examples/time_governor.py examples/smollm2-135m-instruct-sedac --dtype bfloat16

The model has the shape of the artefact's base and the artefact's exits, untrained. Its next token
is drawn from an almost even distribution, so no draft comes true and all that is spent on drafts is
lost. The governor has to find out and leave it: its trials cost most in the first calls and become
rare, so that the second half should show 0.98x or more.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from sedac_hf import SedacConfig, SedacForCausalLM


def main() -> None:
    """Print the speed of exact mode as a multiple of plain, by time since the start."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artefact")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each call")
    parser.add_argument("--calls", type=int, default=16, help="calls of each mode")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = SedacConfig.from_pretrained(arguments.artefact)
    model = SedacForCausalLM(config).to(getattr(torch, arguments.dtype)).eval()
    vocabulary = int(model.base.config.vocab_size)
    ratios = []
    for call in range(arguments.calls):
        prompt = torch.randint(3, vocabulary, (arguments.batch, 32))
        # In turns, so that neither mode is always the one that finds warm caches.
        order = ("plain", "exact") if call % 2 else ("exact", "plain")
        taken = {mode: seconds(model, prompt, mode, arguments.tokens, call) for mode in order}
        ratios.append(taken["plain"] / taken["exact"])
        each = 1e3 * taken["plain"] / arguments.tokens
        print(f"call {call + 1:3}  plain {each:6.1f} ms/token  exact {ratios[-1]:5.3f}x of plain")
    half = len(ratios) // 2
    print(f"first half {statistics.median(ratios[:half]):5.3f}x", end="  ")
    print(f"second half {statistics.median(ratios[half:]):5.3f}x of plain (medians)")
    drafts = model.exit_stats.drafts
    print(
        f"runs on {model.exit_stats.runs_on}; {drafts.tokens_per_pass:.3f} tokens per verification"
    )
    for governor in drafts.choices:
        print(
            f"batch {governor['batch']} head {governor['head']}: drafting {governor['drafting']}, "
            f"in {governor['cycles_drafted']} of {governor['cycles']} cycles"
        )


def seconds(
    model: SedacForCausalLM, prompt: torch.Tensor, mode: str, tokens: int, seed: int
) -> float:
    """Time of one call; both modes draw the same text from one seed."""
    torch.manual_seed(seed)
    start = time.perf_counter()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=True,
        top_k=0,
        sedac_mode=mode,
        pad_token_id=0,
    )
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
