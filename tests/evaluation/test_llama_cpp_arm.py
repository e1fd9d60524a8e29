from __future__ import annotations

import sys
from itertools import count
from types import ModuleType

import pytest

from sedac_hf.errors import ConfigError
from sedac_hf.evaluation.arms import Arm, make_batches
from sedac_hf.evaluation.llama_cpp_arm import llama_cpp_arm


@pytest.fixture
def gguf(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return path


@pytest.fixture
def engine(monkeypatch):
    """A module in place of llama_cpp that counts upwards for ever; gives what it was asked."""
    asked = {"read": []}

    class Llama:
        def __init__(self, **options):
            asked["options"] = options
            self.kept = None

        def reset(self):
            self.kept = None

        def generate(self, tokens, **options):
            asked["read"].append(None if tokens == self.kept else list(tokens))
            asked["sampling"] = options
            self.kept = list(tokens)
            return count(100)

    module = ModuleType("llama_cpp")
    module.Llama = Llama
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    return asked


def test_it_writes_as_many_tokens_from_the_same_ids_and_reads_every_prompt_anew(gguf, engine):
    arm = llama_cpp_arm(gguf, tokens=3, threads=2, context=64)
    assert isinstance(arm, Arm)
    (batch,) = make_batches([[5, 6]], 1, pad=0)
    arm(batch)
    arm(batch)
    assert arm.texts[0].tolist() == [[5, 6, 100, 101, 102]]
    assert engine["read"] == [[5, 6], [5, 6]]
    assert engine["sampling"]["temp"] == 0.0
    assert (engine["options"]["n_threads"], engine["options"]["n_ctx"]) == (2, 64)
    assert engine["options"]["model_path"] == str(gguf)


def test_without_the_package_it_says_so(gguf, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert "not installed" in str(llama_cpp_arm(gguf, tokens=3, threads=1, context=64))


def test_a_missing_file_is_refused(tmp_path, engine):
    with pytest.raises(ConfigError, match="no GGUF file"):
        llama_cpp_arm(tmp_path / "gone.gguf", tokens=3, threads=1, context=64)
