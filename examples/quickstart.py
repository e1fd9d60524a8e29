"""Chat with the reference model, easy tokens leaving early.

    python examples/quickstart.py "Why is the sky blue?"

Run `make setup` first: it makes the base model. `sedac generate --trace` shows the same in colour.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoTokenizer, TextStreamer

from sedac_hf import SedacForCausalLM

ARTEFACT = Path(__file__).resolve().parent / "smollm2-135m-instruct-sedac"


def main(question: str, artefact: str = str(ARTEFACT)) -> None:
    """Answer one question, streaming, and print where tokens left."""
    tokenizer = AutoTokenizer.from_pretrained(artefact)
    model = SedacForCausalLM.from_pretrained(artefact)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=128, do_sample=False, streamer=streamer)
    print(model.exit_stats)


if __name__ == "__main__":
    main(*sys.argv[1:] or ["Write a Python function that reverses a string."])
