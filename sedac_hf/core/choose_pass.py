"""Which `RowPass` serves a model, and whether one does at all."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from sedac_hf.core.chain_pass import ChainPass
from sedac_hf.core.decoder_loop import LayerPass
from sedac_hf.core.module_pass import ModulePass
from sedac_hf.core.native_model import NativeModel
from sedac_hf.core.native_pass import NativePass
from sedac_hf.core.pass_checks import attention_reason, chain_reason, tree_reason
from sedac_hf.core.row_pass import IntArray, RowPass
from sedac_hf.errors import NotNativeError

if TYPE_CHECKING:
    from sedac_hf.core.decoder_loop import ExitParts

__all__ = ["PassChoice", "choose_pass", "load_into"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassChoice:
    """What runs the layers for loops that draft, settle or verify.

    Attributes:
        name: `"native"`, `"modules"`, or `"none"` when nothing can.
        reason: Why nothing better serves this model; empty when nothing is to be said. Where the
            pass holds chains only, why it holds no trees.
        build: Makes a pass for one call of `generate` from the parts as they are for that call;
            None when nothing can.
    """

    name: str
    reason: str
    build: Callable[[ExitParts], RowPass] | None


def load_into(run: RowPass, parts: ExitParts, cache: Any) -> tuple[RowPass, IntArray]:
    """Let a pass take over a cache, or another one where it cannot.

    Args:
        run: The pass of a call.
        parts: What exits are made of, as they are for the call.
        cache: A transformers cache after the prompt.

    Returns:
        The pass, and the slots of each row that hold something, `[rows]`.

    Raises:
        CacheError: If nothing can read the cache.
    """
    try:
        return run, run.load(cache)
    except NotNativeError as error:
        logger.info("This call runs on the base's own modules: %s", error)
        modules = ModulePass(parts)
        return modules, modules.load(cache)


def choose_pass(parts: ExitParts) -> PassChoice:
    """Pick the pass for a model; runs a few tokens through it to find out.

    With `SEDAC_PASS=modules` in the environment it is never the native one.

    Args:
        parts: What exits are made of, brought up to date.
    """
    native = NativeModel(parts.shell, parts.heads)
    wanted = os.environ.get("SEDAC_PASS", "auto") != "modules"
    reason = native.reason if wanted else "SEDAC_PASS=modules is set"
    if reason is None:
        return PassChoice("native", "", partial(_native_or_modules, native))
    if (attention := attention_reason(parts)) is not None:
        return PassChoice("none", attention, None)
    if (trees := tree_reason(parts)) is None:
        return PassChoice("modules", reason, ModulePass)
    if (chains := chain_reason(parts)) is None:
        return PassChoice("modules", trees, ChainPass)
    return PassChoice("none", f"{trees} {chains} It runs without drafts.", None)


def _native_or_modules(native: NativeModel, parts: ExitParts) -> RowPass:
    """The native pass, unless the base has changed (an adapter, a hook) since it was admitted."""
    try:
        narrow = parts.passes.narrow if isinstance(parts.passes, LayerPass) else None
        return NativePass(native, parts.draft.linear, narrow)
    except NotNativeError as error:
        if attention_reason(parts) is not None or tree_reason(parts) is not None:
            raise
        logger.warning("This call runs on the base's own modules: %s", error)
        return ModulePass(parts)
