"""The keywords of `SafeMergeCallback` apart, since no type checker reads them off a dataclass.

The fields of `SafeMergeConfig`, and two aliases, a second time; a test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, TypedDict


class Settings(TypedDict, total=False):
    """Every setting by name; what each is, `SafeMergeConfig` says. `preset` and `combination_type` are aliases."""

    preset: str
    combination_type: str
    subspace: str | PathLike[str] | None
    safety_adapter: str | PathLike[str] | Sequence[str | PathLike[str]] | None
    gate: str
    threshold: float
    num_layers: int | None
    z_threshold: float
    reference_fraction: float
    quantile: float | None
    seed: int
    rearm: float | None
    min_task_weight: float
    soft: bool
    spread_weights: bool
    method: str
    space: str
    weights: Sequence[float] | None
    module_weights: Mapping[str, Sequence[float]] | str | None
    strength: float | None
    operator: str | None
    operator_rank: int | None
    ema_decay: float | None
    ema_every: int | None
    density: float | None
    majority_sign_method: str
    knobs: Mapping[str, object] | str | None
    every: float
    from_step: int
    until_step: int | None
    cooldown: int
    at_train_end: bool
    optimizer_state: str
    adapter_name: str | None
    placement: str
    asynchronous: bool
    journal: str | PathLike[str] | None
    quiet: bool
    wandb_chart: str | None
    data: Mapping[str, object] | str | None
    corrections: Sequence[Mapping[str, Mapping[str, Any] | None]] | str | None
