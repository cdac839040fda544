"""The tiny world of a run: two checkpoints, the subspace between them, adapters, and a way to train on the aligned one.

Nothing heavier than torch is imported before it is asked for.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from safemerge_callback import SafeMergeCallback

# What the trainings adapt, and what the merges of adapters on disk do.
TARGETS = ["q_proj", "v_proj"]
ADAPTED = [*TARGETS, "down_proj"]
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **IDS,
}


@dataclass
class World:
    """Two checkpoints, their subspace, a safety adapter, and a way to train on the aligned one."""

    folder: Path
    aligned: nn.Module

    @classmethod
    def load(cls, folder: str | Path) -> World:
        """The world that another process made in a folder."""
        from transformers import LlamaForCausalLM

        return cls(Path(folder), LlamaForCausalLM.from_pretrained(Path(folder) / "aligned"))

    @property
    def subspace(self) -> str:
        """The subspace's file."""
        return str(self.folder / "subspace.safetensors")

    @property
    def safety(self) -> str:
        """The safety adapter's folder."""
        return str(self.folder / "safety")

    def model(self, seed: int = 1, targets: Sequence[str] = TARGETS, **lora: Any) -> Any:
        """The aligned model with a fresh adapter, which PEFT initialises."""
        torch.manual_seed(seed)
        return with_lora(copy.deepcopy(self.aligned), targets, task_type="CAUSAL_LM", **lora)

    def knobs(self, **changed: Any) -> dict[str, Any]:
        """Settings of a callback that merges every module every 2 steps; `None` leaves a default in place."""
        knobs = {"subspace": self.subspace, "safety_adapter": self.safety, "gate": "all", "every": 2, **changed}
        return {key: value for key, value in knobs.items() if value is not None}

    def guard(self, **changed: Any) -> SafeMergeCallback:
        """The callback with these settings."""
        from safemerge_callback import SafeMergeCallback

        return SafeMergeCallback(**self.knobs(**changed))

    def trainer(
        self, output: str | Path, *callbacks: Any, model: Any = None, tokenizer: Any = None, **changed: Any
    ) -> Any:
        """The real Trainer of a model, if none is given a fresh one, on sixteen rows of random tokens."""
        from transformers import Trainer, default_data_collator

        from tests.support.trainer import tokens

        settings = self.settings(output, **changed)
        data = tokens()
        model = model if model is not None else self.model()
        rows = {"train_dataset": data, "eval_dataset": data[:2], "data_collator": default_data_collator}
        return Trainer(model, settings, processing_class=tokenizer, callbacks=list(callbacks), **rows)

    def settings(self, output: str | Path, **changed: Any) -> Any:
        """The arguments of `trainer`."""
        from transformers import TrainingArguments

        from tests.support.trainer import defaults

        return TrainingArguments(**{**defaults(output), **changed})


def make_world(folder: Path) -> World:
    """Write the world of the trainings: a Llama of two layers and all that a run on it needs."""
    aligned = grouped_llama()
    write_checkpoints(folder, aligned)
    write_subspace(folder)
    write_safety(folder, aligned, task_type="CAUSAL_LM")
    return World(folder, aligned)


def grouped_llama() -> nn.Module:
    """A Llama of two layers with grouped-query attention, always the same; the random numbers after it are, too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def write_checkpoints(folder: Path, aligned: Any, noise: float = 0.02, tokenizer: Any = None, **how: Any) -> None:
    """Save a model as `aligned` (with `how`), and with noise on every weight as `unaligned`; a tokenizer with both."""
    unaligned = copy.deepcopy(aligned)
    with torch.no_grad():
        for parameter in unaligned.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    aligned.save_pretrained(folder / "aligned", **how)
    unaligned.save_pretrained(folder / "unaligned")
    if tokenizer is not None:
        for name in ("aligned", "unaligned"):
            tokenizer.save_pretrained(folder / name)


def write_subspace(folder: Path, name: str = "subspace.safetensors", targets: Sequence[str] | None = None) -> Path:
    """Build the subspace between a folder's two checkpoints into the folder."""
    from safemerge_callback import build_subspace

    aligned, unaligned = folder / "aligned", folder / "unaligned"
    build_subspace(folder / name, aligned=aligned, unaligned=unaligned, target_modules=targets, progress=False)
    return folder / name


def write_safety(
    folder: Path, aligned: nn.Module, targets: Sequence[str] = TARGETS, rank: int = 3, **lora: Any
) -> None:
    """Save a safety adapter of a model as `safety`: random also in the factor that PEFT begins with zeros."""
    safety = with_lora(copy.deepcopy(aligned), targets, r=rank, lora_alpha=2 * rank, **lora)
    with torch.no_grad():
        for name, parameter in safety.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(std=0.05)
    safety.save_pretrained(folder / "safety", save_embedding_layers=False)


def save_lora(
    make: Callable[..., Any],
    folder: Path,
    seed: int,
    targets: Sequence[str] = ADAPTED,
    dtype: torch.dtype | None = None,
    **lora: Any,
) -> Path:
    """Save an adapter of `make(seed=1)` whose two factors are random, and return its folder."""
    model = with_lora(make(seed=1), targets, **lora)
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


def odd_model(rank: int = 3, **lora: Any) -> Any:
    """Two linear maps whose sizes two ranks cannot share evenly, under a random LoRA; alike on all ranks."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(7, 5, bias=False), nn.Linear(5, 3, bias=False))
    return with_lora(layers, ["0", "1"], r=rank, init_lora_weights=False, **lora)


def with_lora(model: nn.Module, targets: Sequence[str], **lora: Any) -> Any:
    """A model with a LoRA of rank 4 on these modules, as PEFT initialises it."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": list(targets), **lora}))
