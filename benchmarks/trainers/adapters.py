"""Cells: adapters and bases of every kind, in transformers' Trainer unless the cell says another."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from . import data
from .cell import Make, Setup, TrainerCell
from .setups import TARGETS, lora, plain, settings, trl
from .world import Base

KINDS = "Adapters"
MANY = "Several adapters, other trained parts"
BASES = "Bases"
LOFTQ = {"loftq_bits": 4, "loftq_iter": 1}
WITH_PEFT_MODEL: dict[str, Any] = {"give": "PeftModel"}
EMBEDDED = [*TARGETS, "embed_tokens"]


def _second(model: Any) -> nn.Module:
    """A second adapter beside the trained one; moved off zero, so that the logits tell whether it is active."""
    model.add_adapter("other", lora())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.other" in name:
                parameter.normal_(std=0.05)
    return model


def _both(model: Any) -> nn.Module:
    _second(model).base_model.set_adapter(["default", "other"])  # type: ignore[union-attr, operator]
    return model


def _trained_second(model: Any) -> nn.Module:
    _second(model).set_adapter("other")  # type: ignore[operator]
    return model


def _of_kind(name: str, **options: Any) -> Make:
    """A PeftModel of another kind than LoRA."""

    def make(base: Base, output: str, callbacks: list[TrainerCallback]) -> Setup:
        import peft
        from transformers import Trainer, TrainingArguments

        config = getattr(peft, name)(task_type="CAUSAL_LM", target_modules=TARGETS, **options)
        model = peft.get_peft_model(base.model(), config)
        args = TrainingArguments(**settings(output))
        return Setup(Trainer(model, args, train_dataset=data.tokens(), callbacks=callbacks), base.model)

    return make


def _mixed(base: Base, output: str, callbacks: list[TrainerCallback]) -> Setup:
    """A base in bf16 under autocast, and factors that PEFT keeps in fp32."""
    loading = {"dtype": torch.bfloat16}
    return plain(data.tokens, loading=loading, options={"bf16": True})(base, output, callbacks)


def _narrow(base: Base, output: str, callbacks: list[TrainerCallback]) -> Setup:
    """Base and factors in bf16."""

    def cast(model: nn.Module) -> nn.Module:
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(torch.bfloat16) if "lora_" in name else parameter.data
        return model

    return plain(data.tokens, loading={"dtype": torch.bfloat16}, change=cast)(base, output, callbacks)


MOVED = "measured against the initial factors; a merge loses most of the safety update, and a warning says how much"
ADAPTERS = [
    TrainerCell(
        KINDS,
        "rank_pattern and alpha_pattern",
        plain(data.tokens, rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 6}),
    ),
    TrainerCell(KINDS, "rsLoRA", plain(data.tokens, use_rslora=True)),
    TrainerCell(KINDS, "init gaussian", plain(data.tokens, init_lora_weights="gaussian")),
    TrainerCell(KINDS, "init orthogonal", plain(data.tokens, init_lora_weights="orthogonal")),
    TrainerCell(
        KINDS, "dropout 0.1, NEFTune", plain(data.tokens, lora_dropout=0.1, options={"neftune_noise_alpha": 5.0})
    ),
    TrainerCell(KINDS, "every linear layer", plain(data.tokens, target_modules="all-linear")),
    TrainerCell(KINDS, "embeddings", plain(data.tokens, target_modules=EMBEDDED)),
    TrainerCell(KINDS, "output head", plain(data.tokens, target_modules=[*TARGETS, "lm_head"])),
    TrainerCell(KINDS, "PiSSA", plain(data.tokens, init_lora_weights="pissa"), note=MOVED, warns="began as a part"),
    TrainerCell(KINDS, "OLoRA", plain(data.tokens, init_lora_weights="olora"), note=MOVED, warns="began as a part"),
    TrainerCell(KINDS, "LoftQ", plain(data.tokens, init_lora_weights="loftq", loftq_config=LOFTQ), needs="a GPU"),
    TrainerCell(KINDS, "DoRA", plain(data.tokens, use_dora=True)),
    TrainerCell(KINDS, "lora_bias", plain(data.tokens, lora_bias=True)),
    TrainerCell(KINDS, "AdaLoRA", _of_kind("AdaLoraConfig", total_step=3)),
    TrainerCell(KINDS, "LoHa", _of_kind("LoHaConfig")),
    TrainerCell(KINDS, "IA3", _of_kind("IA3Config", feedforward_modules=[])),
    TrainerCell(MANY, "a second, frozen adapter", plain(data.tokens, change=_second)),
    TrainerCell(MANY, "the second adapter trained", plain(data.tokens, change=_trained_second)),
    TrainerCell(MANY, "two adapters active", plain(data.tokens, change=_both)),
    TrainerCell(
        MANY, "two active, adapter_name given", plain(data.tokens, change=_both), knobs={"adapter_name": "default"}
    ),
    TrainerCell(
        MANY,
        "DPOTrainer given a PeftModel (adds ref)",
        trl("DPOTrainer", "DPOConfig", data.preferences, **WITH_PEFT_MODEL),
    ),
    TrainerCell(MANY, "KTOTrainer given a PeftModel", trl("KTOTrainer", "KTOConfig", data.judged, **WITH_PEFT_MODEL)),
    TrainerCell(MANY, "modules_to_save: lm_head", plain(data.tokens, modules_to_save=["lm_head"])),
    TrainerCell(MANY, "modules_to_save: embed_tokens", plain(data.tokens, modules_to_save=["embed_tokens"])),
    TrainerCell(MANY, "trainable_token_indices", plain(data.tokens, trainable_token_indices={"embed_tokens": [5, 6]})),
    TrainerCell(MANY, "bias='lora_only'", plain(data.tokens, bias="lora_only")),
    TrainerCell(BASES, "bf16 base, fp32 factors", _mixed),
    TrainerCell(BASES, "bf16 base, bf16 factors", _narrow),
    TrainerCell(
        BASES,
        "GPT-2 (Conv1D)",
        plain(data.tokens, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
        family="gpt2",
    ),
    TrainerCell(BASES, "tied embeddings", plain(data.tokens), family="tied"),
    TrainerCell(
        BASES,
        "tied embeddings, LoRA on both, ensure_weight_tying",
        plain(data.tokens, target_modules=[*EMBEDDED, "lm_head"], ensure_weight_tying=True),
        family="tied",
    ),
    TrainerCell(BASES, "mixture of experts, LoRA on attention", plain(data.tokens), family="moe"),
    TrainerCell(
        BASES,
        "mixture of experts, experts through target_parameters",
        plain(data.tokens, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        family="moe",
    ),
]
