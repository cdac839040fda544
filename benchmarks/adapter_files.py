"""Two LoRA adapters and a subspace file of random numbers, at a model's size, as the verbs on files read them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from safemerge_callback.subspace import ModuleHeader
from safemerge_callback.subspace.header import FileHeader
from safemerge_callback.subspace.stream import SafetensorsStream, reserve_for

LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def names_of(modules):
    """Names of as many modules, seven a layer."""
    return [f"layers.{i // 7}.self_attn.{LEAVES[i % 7]}" for i in range(modules)]


def write_subspace(path, modules, size, seed=0):
    """A dense bfloat16 V a module, size x size; the null cosine is that of a flat spectrum."""
    torch.manual_seed(seed)
    header = FileHeader({"source": "aligned"}, {"source": "unaligned"})
    for name in names_of(modules):
        header.modules[name] = ModuleHeader((size, size), "dense", None, "bfloat16", float(size), math.sqrt(0.5))
    metadata = header.to_metadata()
    with SafetensorsStream(path, reserve_for(metadata, [f"{name}.V" for name in header.modules])) as stream:
        for name in header.modules:
            stream.append(f"{name}.V", torch.randn(size, size).bfloat16())
        stream.finish(metadata)


def write_adapter(folder, modules, size, rank, seed):
    """A float32 adapter of `rank` with random factors on the same modules."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    tensors = {}
    for name in names_of(modules):
        key = f"base_model.model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, size) / size**0.5
        tensors[f"{key}.lora_B.weight"] = torch.randn(size, rank) / size**0.5
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(LEAVES), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_world(folder, modules, size, rank):
    """Write `subspace.safetensors`, `task` and `safety` into `folder`, unless a finished set of that size is there."""
    folder, wanted = Path(folder), f"{modules} {size} {rank}"
    mark = folder / "made"
    if mark.exists() and mark.read_text() == wanted:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    write_subspace(folder / "subspace.safetensors", modules, size)
    write_adapter(folder / "task", modules, size, rank, 1)
    write_adapter(folder / "safety", modules, size, rank, 2)
    mark.write_text(wanted)
    return folder
