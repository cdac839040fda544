"""`learned_share`: how far each module is to go to its target, the safety adapter or the aligned model, by rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...adapters import LoraFactors
from ...errors import ConfigError
from ...live.merged_forward import whole_updates
from ...live.modules import base_moved, live_factors
from ..check_data import SAFETY_BATCH, TASK_BATCH, CheckData
from ..coefficients import SearchSettings, learn_weights, search_rows
from ..slopes import SLOPE_ENGINES
from .registry import module_signal


@module_signal(
    needs={SAFETY_BATCH, TASK_BATCH},
    engines=SLOPE_ENGINES,
    cost="about 10 forward passes over all rows, and for blocks and modules 10 steps on batches of them",
)
def learned_share(data: CheckData) -> dict[str, float]:
    """Return each module's λ of (1 - λ)·ΔW + λ·ΔW_target with the least objective; 0 where nothing is better.

    `learn_weights` with the settings of the knob `learned`. An adapter that has not moved has nothing to give away: 0.
    ConfigError for settings that cannot be, several safety adapters, and factors that began as a part of the base.
    """
    settings = SearchSettings(**data.knobs.get("learned") or {})
    if len(data.safety) > 1:
        raise ConfigError(
            f"learned: there are {len(data.safety)} safety adapters, and at a check one coefficient a module is "
            "learned: give one, or none for a pull; `safemerge search` takes several"
        )
    if base_moved(data.model, data.adapter_name):
        raise ConfigError(
            "learned: the adapter began as a part of the base weight (PiSSA, OLoRA), so its factors cannot be weighed "
            "in a forward pass: train a LoRA with init_lora_weights=True"
        )
    names = list(data.modules)
    live = live_factors(data.model, data.adapter_name)
    if not _moved(live):
        return dict.fromkeys(names, 0.0)
    others = {adapter.source: whole_updates(adapter.factors, live) for adapter in data.safety}
    rows = search_rows(data.model, data.task_batch, data.safety_batch, settings)
    learned = learn_weights(data.model, others, rows, settings, names=names, adapter_name=data.adapter_name)
    return {name: weights[1] for name, weights in learned.weights.items()}


def _moved(factors: Mapping[str, LoraFactors]) -> bool:
    """Whether any update is more than zero; waits for the device once."""
    sizes = [one.A.detach().abs().amax() * one.B.detach().abs().amax() for one in factors.values()]
    return bool(torch.stack([size.float() for size in sizes]).any())
