"""Cells: what changes how the model runs: compilers, checkpointing, packing, fused kernels, quantised bases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from . import data
from .cell import Setup, TrainerCell
from .setups import plain, trl
from .world import Base

RUN = "How it runs"
QUANTISED = "Quantised bases"
PARTS = {"activation_checkpointing": True}


def _nf4() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def _int8() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def _torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def _of_compiled_model(base: Base, output: str, callbacks: list[TrainerCallback]) -> Setup:
    setup = plain(data.tokens, change=_compiled, options={"remove_unused_columns": False})(base, output, callbacks)
    return replace(setup, save=_save_inside)


def _save_inside(trainer: Any, folder: str) -> None:
    """The trainer itself saves an empty adapter of such a model: see that it does, and save what is inside."""
    from safetensors import safe_open

    trainer.save_model(folder)
    with safe_open(f"{folder}/adapter_model.safetensors", framework="pt") as file:
        assert not list(file.keys()), "the trainer saves such a model now: drop this way around"
    trainer.model._orig_mod.save_pretrained(folder)


def _compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def _quantised(make_config: Any, **changed: Any) -> Any:
    def make(base: Base, output: str, callbacks: list[TrainerCallback]) -> Setup:
        return plain(data.tokens, loading={"quantization_config": make_config()}, **changed)(base, output, callbacks)

    return make


def _sft_4bit(base: Base, output: str, callbacks: list[TrainerCallback]) -> Setup:
    loading = {"quantization_config": _nf4()}
    return trl("SFTTrainer", "SFTConfig", data.text, loading=loading)(base, output, callbacks)


def _prepared(model: Any) -> Any:
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(model)


def _sft(name: str, rows: Any = data.text, *, needs: str = "", **options: Any) -> TrainerCell:
    return TrainerCell(RUN, name, trl("SFTTrainer", "SFTConfig", rows, **options), needs=needs)


def _trainer(name: str, change: Any = None, **options: Any) -> TrainerCell:
    return TrainerCell(RUN, name, plain(data.tokens, change=change, options=options))


ENGINES = [
    _trainer("gradient checkpointing, reentrant", **PARTS, activation_checkpointing_kwargs={"use_reentrant": True}),
    _trainer(
        "gradient checkpointing, not reentrant", **PARTS, activation_checkpointing_kwargs={"use_reentrant": False}
    ),
    _trainer("gradient accumulation of 2", gradient_accumulation_steps=2),
    _trainer("torch_compile=True (inductor)", torch_compile=True),
    _trainer("torch_compile=True (eager)", torch_compile=True, torch_compile_backend="eager"),
    TrainerCell(
        RUN,
        "torch.compile(model) given to the trainer",
        _of_compiled_model,
        note="needs remove_unused_columns=False, and the trainer by itself saves an empty adapter: "
        "save model._orig_mod, or use torch_compile=True",
    ),
    _trainer("model.compile() before the trainer", _compiled_in_place),
    _sft("SFTTrainer, packing (bfd)", packing=True, max_length=24),
    _sft("SFTTrainer, packing (wrapped)", packing=True, packing_strategy="wrapped", max_length=24),
    _sft("SFTTrainer, padding-free", padding_free=True, max_length=None),
    _sft("SFTTrainer, chat", data.chat),
    _sft("SFTTrainer, Liger kernels", needs="liger-kernel, which needs triton and a GPU", use_liger_kernel=True),
    TrainerCell(QUANTISED, "bitsandbytes nf4, SFTTrainer", _sft_4bit, family="wide"),
    TrainerCell(QUANTISED, "bitsandbytes nf4, Trainer", _quantised(_nf4), family="wide"),
    TrainerCell(QUANTISED, "bitsandbytes int8, Trainer", _quantised(_int8), family="wide"),
    TrainerCell(QUANTISED, "torchao int8 weights, Trainer", _quantised(_torchao), family="wide"),
]
