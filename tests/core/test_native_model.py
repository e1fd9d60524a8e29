"""Which bases the native pass takes, how it notices changes, and threads and forks around it."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sedac_hf import _core
from sedac_hf.core.base_shell import BaseShell
from sedac_hf.core.native_model import NativeModel
from sedac_hf.core.native_pass import NativePass
from sedac_hf.errors import NotNativeError
from tests.native import behind, by_the_base, logits_of, prompted, started
from tests.tiny_models import build_tiny, prompt


def test_weights_changed_in_place_or_replaced_are_noticed(llama: PreTrainedModel) -> None:
    run, at, ids = started(llama), behind([0], 4), prompt(1, 4)
    run.begin(1)
    before = logits_of(run, ids, at)
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight.mul_(1.5)
        llama.model.norm.weight.add_(0.3)
    changed = logits_of(run, ids, at)
    assert not torch.allclose(changed, before)
    torch.testing.assert_close(changed, by_the_base(llama, ids), rtol=1e-4, atol=1e-4)
    fresh = build_tiny("llama", seed=5)
    llama.model.layers[0].self_attn.q_proj = fresh.model.layers[0].self_attn.q_proj
    run.load(prompted(llama, ids))
    found = logits_of(run, ids[:, :1], behind([4], 1))
    expected = by_the_base(llama, torch.cat([ids, ids[:, :1]], 1))[:, -1:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_other_models_are_refused_with_a_reason() -> None:
    def reason(base: PreTrainedModel) -> str:
        found = NativeModel(BaseShell(base)).reason
        assert found is not None
        return found

    assert "rotary" in reason(build_tiny("gpt2"))
    assert "self_attn" in reason(build_tiny("gpt_neox"))
    assert "experts" in reason(build_tiny("mixtral"))
    assert "float64" in reason(build_tiny("llama", dtype=torch.float64))
    assert "training" in reason(build_tiny("llama").train())
    assert "meta" in reason(build_tiny("llama").to("meta"))


def test_hooks_and_adapters_are_refused_and_admitted_again_when_gone(
    llama: PreTrainedModel,
) -> None:
    peft = pytest.importorskip("peft")
    model = NativeModel(BaseShell(llama))
    run = NativePass(model)
    hook = llama.model.layers[2].mlp.register_forward_hook(lambda *_: None)
    assert "hook" in str(model.reason)
    with pytest.raises(NotNativeError, match="hook"):
        run.load(prompted(llama, prompt(1, 3)))
    hook.remove()
    assert model.reason is None
    adapted = peft.get_peft_model(llama, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert "q_proj is a Linear" in str(model.reason)
    adapted.unload()
    assert model.reason is None


def test_idle_hooks_that_transformers_leaves_behind_are_none(llama: PreTrainedModel) -> None:
    model = NativeModel(BaseShell(llama))
    llama(prompt(1, 3), output_hidden_states=True, output_attentions=True)
    assert any(layer._forward_hooks for layer in llama.model.layers), "transformers has left some"
    assert model.reason is None


def test_a_base_that_computes_something_else_is_found_out_by_numbers(
    llama: PreTrainedModel,
) -> None:
    class Other(type(llama.model.layers[1].mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    llama.model.layers[1].mlp.__class__ = Other
    assert "layer 1 computes something else" in str(NativeModel(BaseShell(llama)).reason)


def test_an_unknown_kernel_is_an_error(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEDAC_KERNEL", "mmx")
    with pytest.raises(ValueError, match=r'"mmx", which is not known; expected one of scalar'):
        NativePass(NativeModel(BaseShell(llama)))


@pytest.mark.parametrize("kernel", ["avx2", "avx512", "avx512bf16", "neon"])
def test_a_kernel_that_the_processor_lacks_is_an_error_that_says_so(
    kernel: str, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel in _core.pass_kernels():
        pytest.skip(f"this processor can run {kernel}")
    monkeypatch.setenv("SEDAC_KERNEL", kernel)
    with pytest.raises(ValueError, match=f'"{kernel}", which this processor cannot run; .*scalar'):
        NativePass(NativeModel(BaseShell(llama)))


def test_sixteen_threads_at_once_each_get_their_own_result(llama: PreTrainedModel) -> None:
    model = NativeModel(BaseShell(llama))
    found: dict[int, Tensor] = {}

    def work(seed: int) -> None:
        # Thread counts are per thread of torch's caller; three make the pool work.
        torch.set_num_threads(3)
        run = NativePass(model)
        run.begin(1)
        found[seed] = logits_of(run, prompt(1, 9, seed), behind([0], 9))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    torch.set_num_threads(1)
    for seed in range(16):
        run = NativePass(model)
        run.begin(1)
        assert torch.equal(found[seed], logits_of(run, prompt(1, 9, seed), behind([0], 9)))


# In a process of its own: torch's OpenMP threads, which other tests have started, do not survive a
# fork either, and would hang the child before it comes to ours.
_FORKS = """
import multiprocessing, torch
from tests.core.test_native_model import behind, logits_of, prompt, started
from tests.tiny_models import build_tiny

def answer(base):
    torch.set_num_threads(1)  # for what torch itself computes
    run = started(base)
    run.begin(1)
    torch.set_num_threads(2)
    return logits_of(run, prompt(1, 4), behind([0], 4)).flatten().tolist()

base = build_tiny("llama")
expected = answer(base)
context = multiprocessing.get_context("fork")
receiver, sender = context.Pipe(duplex=False)
child = context.Process(target=lambda: sender.send(answer(base)), daemon=True)
child.start()
assert receiver.poll(60), "the child never answered"
assert receiver.recv() == expected
child.join(timeout=60)
assert child.exitcode == 0
"""


def test_a_forked_child_works_although_the_parents_threads_are_not_there() -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", _FORKS]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
