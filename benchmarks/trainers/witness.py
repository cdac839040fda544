"""What the callback did in a run, seen from outside: the whole model just before it and just after it, every step.

Apart from the cells: it knows of no trainer and no setup.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from safemerge_callback.adapters.names import canonical_name


@dataclass
class ModelWitness:
    """Step -> every tensor of the model, before our callback and after it."""

    before: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    after: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def around(self, guard: TrainerCallback | None) -> list[TrainerCallback]:
        """The callbacks for a trainer: one that looks, ours, one that looks again."""
        return [_Look(self.before), *([guard] if guard else []), _LookAgain(self.after)]


class _Look(TrainerCallback):
    def __init__(self, kept: dict[int, dict[str, Tensor]]) -> None:
        self.kept = kept

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.kept[state.global_step] = {n: t.detach().clone() for n, t in everything(model).items()}


class _LookAgain(_Look):
    """Of another class, because trainers warn of two callbacks of one."""


def everything(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def same(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are equal bit for bit; quantised ones are compared as they store themselves."""
    if hasattr(x, "tensor_data_names"):
        return all(same(getattr(x, name), getattr(y, name)) for name in x.tensor_data_names)
    return torch.equal(x, y)


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that differ."""
    assert before.keys() == after.keys(), "the model got or lost tensors between two callbacks"
    return [name for name in before if not same(before[name], after[name])]


def factor_names(tensors: dict[str, Tensor], adapter: str) -> dict[str, tuple[str, str]]:
    """Module -> names of its A and B in one adapter, found by PEFT's spelling alone."""
    spelled = [
        (f"lora_A.{adapter}", f"lora_B.{adapter}"),
        (f"lora_embedding_A.{adapter}", f"lora_embedding_B.{adapter}"),
    ]
    factors = {}
    for name in tensors:
        for letter_A, letter_B in spelled:
            path, mark, rest = name.partition(f".{letter_A}")
            if mark and rest in ("", ".weight"):
                factors[canonical_name(path)] = (name, f"{path}.{letter_B}{rest}")
    return factors


def dense(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """The update s·B·A in float64."""
    return scaling * B.double() @ A.double()


def best_of_rank(matrix: Tensor, rank: int) -> Tensor:
    """The nearest matrix of that rank, by the dense decomposition."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]
