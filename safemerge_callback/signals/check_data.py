"""What gates, methods and weights rules may ask a live model about at a check: the model, and rows of two kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from ..adapters import Adapter, LoraFactors
from ..live.modules import LoraModule, lora_modules
from ..ops import Grams
from .rows import RowTokens

SAFETY_BATCH, TASK_BATCH, GRAMS = "safety_batch", "task_batch", "grams"
# Need -> what it is made of. These are opened for whoever needs them, once a run or once a check.
DATA_NEEDS: Mapping[str, frozenset[str]] = {
    SAFETY_BATCH: frozenset(),
    TASK_BATCH: frozenset(),
    GRAMS: frozenset({SAFETY_BATCH}),
}


@dataclass(frozen=True)
class CheckData:
    """A live model and the rows that it may be asked about at a check; the same on every rank.

    `model`: what a forward pass calls, its adapter on. `safety_batch`: rows in the aligned model's own words, kind
    `harm` or `benign`; `task_batch`: the last rows that the run was trained on, of all ranks, kind `task`. Each is
    empty where nobody needs it. `factors`: the live ones, whole; `safety`: the safety adapters; `knobs`: those of gate,
    method and rules, by name. `grams`: of each module's inputs, on what was trained on last and on the harmful rows.
    """

    model: nn.Module
    safety_batch: tuple[RowTokens, ...] = ()
    task_batch: tuple[RowTokens, ...] = ()
    factors: Mapping[str, LoraFactors] = field(default_factory=dict)
    safety: Sequence[Adapter] = ()
    knobs: Mapping[str, Any] = field(default_factory=dict)
    grams: Mapping[str, Grams] | None = None
    adapter_name: str | None = None

    @cached_property
    def modules(self) -> dict[str, LoraModule]:
        """Where each module's factors are in the model."""
        return lora_modules(self.model, self.adapter_name, moved_base=True)

    @property
    def harmful(self) -> tuple[RowTokens, ...]:
        """The safety rows that are refused."""
        return tuple(row for row in self.safety_batch if row.kind == "harm")
