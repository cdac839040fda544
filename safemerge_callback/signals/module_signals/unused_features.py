"""`unused_features`: inputs of a module that no kept row of the task used, of which only the ridge says anything."""

from __future__ import annotations

import torch

from ...ops import unused_features as unused
from ..check_data import GRAMS, CheckData
from .registry import module_signal


@module_signal(needs={GRAMS}, cost="none beside the Grams")
def unused_features(data: CheckData) -> dict[str, float]:
    """Return how many of each module's d_in inputs are 0 in every row of the task's factor."""
    grams = data.grams or {}
    counts = torch.stack([unused(pair.task) for pair in grams.values()]).tolist() if grams else []
    return dict(zip(grams, counts, strict=True))
