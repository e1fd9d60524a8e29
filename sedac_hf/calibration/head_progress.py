"""How far the training of a head has come, kept on disk so that an interrupted one goes on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sedac_hf.errors import CalibrationError
from sedac_hf.files import replacing

if TYPE_CHECKING:
    from sedac_hf.core.exit_heads import ExitHead

__all__ = ["HeadProgress", "HeadProgressFile"]

_EVERY = 300.0


@dataclass
class HeadProgress:
    """What has been done so far.

    Attributes:
        losses: Loss of each step, nats.
        tokens: Tokens seen, repetitions counted.
        seconds: Time taken.
    """

    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0


class HeadProgressFile:
    """One file with a head's weights, what the optimiser knows of them, and the progress.

    Attributes:
        every: Seconds between two times that it is written.
    """

    def __init__(self, path: Path, seed: int, every: float = _EVERY) -> None:
        """Name the file; it need not exist.

        Args:
            path: The file.
            seed: Seed of the training. What was kept of a training with another is not taken up.
            every: Seconds between two times that it is written.
        """
        self.every = every
        self._path = path
        self._seed = seed

    def save(
        self, head: ExitHead, optimiser: torch.optim.Optimizer, progress: HeadProgress
    ) -> None:
        """Write all of it, in place of what was there.

        Args:
            head: The head.
            optimiser: Has made at least one step.
            progress: How far the training has come.
        """
        tensors: dict[str, Tensor] = {}
        for name, parameter in head.named_parameters():
            tensors[name] = parameter.detach()
            for key, value in optimiser.state[parameter].items():
                tensors[f"{name}:{key}"] = value
        values = {"seed": self._seed, **asdict(progress)}
        whole = {name: value.cpu().contiguous() for name, value in tensors.items()}
        with replacing(self._path) as draft:
            save_file(whole, draft, metadata={"progress": json.dumps(values)})

    def load(self, head: ExitHead, optimiser: torch.optim.Optimizer) -> HeadProgress:
        """Put in place what was kept; all stays as it is where nothing was.

        Args:
            head: The head.
            optimiser: Fresh, over its parameters.

        Returns:
            How far the training had come.

        Raises:
            CalibrationError: If the file cannot be read.
        """
        if not self._path.exists():
            return HeadProgress()
        try:
            return self._read(head, optimiser)
        except (SafetensorError, KeyError, TypeError) as error:
            raise CalibrationError(
                f"{self._path} does not hold the training of this head ({error}); remove it, and "
                "the head is trained from its beginning"
            ) from error

    def _read(self, head: ExitHead, optimiser: torch.optim.Optimizer) -> HeadProgress:
        with safe_open(self._path, "pt") as file:
            values = json.loads(file.metadata()["progress"])
            if values.pop("seed") != self._seed:
                return HeadProgress()
            named = dict(head.named_parameters())
            for name, parameter in named.items():
                parameter.data.copy_(file.get_tensor(name))
            for key in file.keys():  # noqa: SIM118 - the file is no mapping
                name, _, state = key.partition(":")
                if state:
                    # The count of steps stays on the CPU, as the optimiser itself keeps it.
                    device = "cpu" if state == "step" else named[name].device
                    optimiser.state[named[name]][state] = file.get_tensor(key).to(device)
        return HeadProgress(**values)

    def remove(self) -> None:
        """Remove the file: the training has come to its end."""
        self._path.unlink(missing_ok=True)
