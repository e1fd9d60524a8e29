"""Which `RowPass` serves a model, and what takes over where it does not serve a call."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from transformers.utils import logging

from sedac_hf.core.chain_pass import ChainPass
from sedac_hf.core.decoder_loop import LayerPass
from sedac_hf.core.module_pass import ModulePass
from sedac_hf.core.native_model import NativeModel
from sedac_hf.core.native_pass import NativePass
from sedac_hf.core.pass_checks import attention_reason, chain_reason, tree_reason
from sedac_hf.core.row_pass import RowPass
from sedac_hf.errors import NotNativeError
from sedac_hf.generation.exit_governor import ExitGovernors
from sedac_hf.generation.governors import Governors

if TYPE_CHECKING:
    from sedac_hf.core.decoder_loop import ExitParts

__all__ = ["CallPass", "PassChoice", "PassChoices"]

logger = logging.get_logger(__name__)

Found = TypeVar("Found")


@dataclass(frozen=True)
class PassChoice:
    """What runs the layers for loops that draft, settle or verify.

    Attributes:
        name: `"native"`, `"modules"`, or `"none"` when nothing can.
        reason: Why nothing better serves this model; empty when nothing is to be said. Where the
            pass holds chains only, why it holds no trees.
        build: Makes a pass for one call of `generate` from the parts as they are for that call;
            None when nothing can.
        governors: What is known of the speed of drafting over it.
        exit_governors: What is known of the speed of final exits over it.
    """

    name: str
    reason: str
    build: Callable[[ExitParts], RowPass] | None
    governors: Governors = field(default_factory=Governors, compare=False)
    exit_governors: ExitGovernors = field(default_factory=ExitGovernors, compare=False)


class PassChoices:
    """The passes that serve one model: found out at first use, by running a few tokens."""

    def __init__(self, parts: ExitParts) -> None:
        """Look at nothing yet.

        Args:
            parts: What exits are made of; brought up to date before a pass is asked for.
        """
        self._parts = parts
        self._best: PassChoice | None = None
        self._modules: PassChoice | None = None

    def best(self) -> PassChoice:
        """The fastest; never the native one with `SEDAC_PASS=modules` in the environment."""
        if self._best is None:
            native = NativeModel(self._parts.shell, self._parts.heads)
            wanted = os.environ.get("SEDAC_PASS", "auto") != "modules"
            reason = native.reason if wanted else "SEDAC_PASS=modules is set"
            if reason is None:
                self._best = PassChoice("native", "", partial(_native, native))
            else:
                self._best = self.modules(reason)
        return self._best

    def modules(self, reason: str) -> PassChoice:
        """The base's own modules.

        Args:
            reason: Why they are asked for, where trees run over them; else why trees do not.
        """
        if self._modules is None:
            self._modules = _over_modules(self._parts)
        return replace(self._modules, reason=self._modules.reason or reason)


class CallPass:
    """The pass of one call; where the native one does not serve it, the base's modules do.

    Attributes:
        choice: What runs the layers by now.
    """

    def __init__(self, choices: PassChoices, choice: PassChoice, parts: ExitParts) -> None:
        """Make nothing yet.

        Args:
            choices: The passes of the model.
            choice: The one to begin with.
            parts: What exits are made of, as they are for the call.
        """
        self.choice = choice
        self._choices = choices
        self._parts = parts
        self._run: RowPass | None = None

    def begin(self, task: Callable[[RowPass], Found]) -> tuple[RowPass, Found]:
        """Let the pass take something over.

        Args:
            task: Does it; it is done again, with the modules, where the native pass refuses.

        Returns:
            The pass, and what came of it.

        Raises:
            NotNativeError: If the native pass refuses and the modules can hold no drafts either.
            CacheError: If nothing can read the call's cache.
        """
        try:
            return self._with(task)
        except NotNativeError as error:
            # The base has changed since it was admitted (an adapter, a hook), or the cache is of a
            # kind that cannot be read in place.
            found = self._choices.modules(str(error))
            if found.build is None or self.choice.name != "native":
                raise
            logger.warning_once(f"This call runs on the base's own modules: {error}")
            self.choice, self._run = found, None
            return self._with(task)

    def _with(self, task: Callable[[RowPass], Found]) -> tuple[RowPass, Found]:
        if self._run is None:
            assert self.choice.build is not None
            self._run = self.choice.build(self._parts)
        return self._run, task(self._run)


def _over_modules(parts: ExitParts) -> PassChoice:
    if (attention := attention_reason(parts)) is not None:
        return PassChoice("none", attention, None)
    if (trees := tree_reason(parts)) is None:
        return PassChoice("modules", "", ModulePass)
    if (chains := chain_reason(parts)) is None:
        return PassChoice("modules", trees, ChainPass)
    return PassChoice("none", f"{trees} {chains} It runs without drafts.", None)


def _native(native: NativeModel, parts: ExitParts) -> RowPass:
    narrow = parts.passes.narrow if isinstance(parts.passes, LayerPass) else None
    return NativePass(native, parts.draft.linear, narrow)
