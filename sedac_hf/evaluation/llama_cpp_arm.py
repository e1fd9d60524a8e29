"""llama.cpp as an arm of a benchmark, where its Python package is installed."""

from __future__ import annotations

from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sedac_hf.errors import ConfigError
from sedac_hf.evaluation.arms import Arm, Batch

__all__ = ["llama_cpp_arm"]


def llama_cpp_arm(path: Path, *, tokens: int, threads: int, context: int) -> Arm | str:
    """Greedy text of the same length, from the same token ids, by llama.cpp.

    Args:
        path: The model as a GGUF file; its vocabulary must be that of the measured model.
        tokens: Tokens to write, whether or not the text has ended.
        threads: Threads to compute with.
        context: Most tokens of a text.

    Returns:
        The arm, for batches of one row; where the package is not installed, that as a reason.

    Raises:
        ConfigError: If there is no such file.
    """
    if not path.is_file():
        raise ConfigError(f"there is no GGUF file {path}; give the path of one.")
    try:
        module: Any = import_module("llama_cpp")
    except ImportError:
        return "the package llama_cpp is not installed (pip install llama-cpp-python)"
    model: Any = module.Llama(
        model_path=str(path),
        n_ctx=context,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )

    def write(batch: Batch) -> Tensor:
        prompt = batch.row(batch.ids, 0, batch.ids.shape[1])[0].tolist()
        # Without this, a prompt that was read before would not be read again.
        model.reset()
        stream = model.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0)
        new = torch.tensor([list(islice(stream, tokens))], device=batch.device)
        return torch.cat([batch.ids, new], dim=1)

    return Arm(write)
