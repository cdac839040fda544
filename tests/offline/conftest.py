"""Adapters that PEFT saved and a subspace, made on the spot."""

import warnings

import pytest
import torch

from safemerge_callback.subspace import build_subspace

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def save_lora():
    """A function: a random adapter of a fresh model, saved by PEFT."""

    def save(make, folder, seed, targets=TARGETS, dtype=None, **lora):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(make(seed=1), LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, **lora}))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad(), warnings.catch_warnings():
            # peft tells that it saves an adapted embedding's base weight as well
            warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
                    parameter.data = parameter.data.to(dtype or parameter.dtype)
            model.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def save_base():
    """A function: two checkpoints, `aligned` and `unaligned`, and their subspace file `s.safetensors` in a folder."""

    def save(make, folder, targets=TARGETS, **how):
        aligned, unaligned = make(seed=1), make(seed=1)
        with torch.no_grad():
            for parameter in unaligned.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        aligned.save_pretrained(folder / "aligned", **how)
        unaligned.save_pretrained(folder / "unaligned")
        build_subspace(
            folder / "s.safetensors",
            aligned=folder / "aligned",
            unaligned=folder / "unaligned",
            target_modules=targets,
            progress=False,
        )
        return folder

    return save


@pytest.fixture
def world(tmp_path, tiny_llama, save_lora, save_base):
    """A folder with `task` (rank 4), `safety` (rank 2), `other` (rank 3), `aligned` and `s.safetensors`."""
    save_lora(tiny_llama, tmp_path / "task", seed=5)
    save_lora(tiny_llama, tmp_path / "safety", seed=6, r=2, lora_alpha=3)
    save_lora(tiny_llama, tmp_path / "other", seed=7, r=3, use_rslora=True)
    return save_base(tiny_llama, tmp_path)
