"""Adapters that PEFT saved and a subspace, made on the spot."""

import pytest

from tests.support import world as support


@pytest.fixture
def save_lora():
    """A function: a random adapter of a fresh model, saved by PEFT."""
    return support.save_lora


@pytest.fixture
def save_base():
    """A function: two checkpoints, `aligned` and `unaligned`, and their subspace file `s.safetensors` in a folder."""

    def save(make, folder, targets=support.ADAPTED, **how):
        support.write_checkpoints(folder, make(seed=1), noise=0.05, **how)
        support.write_subspace(folder, "s.safetensors", targets)
        return folder

    return save


@pytest.fixture
def world(tmp_path, tiny_llama, save_lora, save_base):
    """A folder with `task` (rank 4), `safety` (rank 2), `other` (rank 3), `aligned` and `s.safetensors`."""
    save_lora(tiny_llama, tmp_path / "task", seed=5)
    save_lora(tiny_llama, tmp_path / "safety", seed=6, r=2, lora_alpha=3)
    save_lora(tiny_llama, tmp_path / "other", seed=7, r=3, use_rslora=True)
    return save_base(tiny_llama, tmp_path)
