"""`gram_cosine`: how alike a module's inputs are on the task and on safety rows: where they are, data tells nothing."""

from __future__ import annotations

import torch

from ...errors import AdapterError
from ...ops import Grams
from ...ops import gram_cosine as cosine_of
from ..check_data import GRAMS, CheckData
from .registry import module_signal


@module_signal(needs={GRAMS}, cost="none beside the Grams: products of rows × rows")
def gram_cosine(data: CheckData) -> dict[str, float]:
    """Return each module's cosine between the Gram of its inputs on the task and on harmful rows, in [0, 1]."""
    grams = data.grams or {}
    # Modules that are given one tensor share their factors.
    firsts: dict[tuple[int, int], str] = {}
    for name, pair in grams.items():
        firsts.setdefault((id(pair.task), id(pair.safety)), name)
    cosines = torch.stack([cosine_of(Grams(*grams[name])) for name in firsts.values()]).tolist() if grams else []
    by_pair = dict(zip(firsts, cosines, strict=True))
    values = {name: by_pair[id(pair.task), id(pair.safety)] for name, pair in grams.items()}
    if broken := [name for name, value in values.items() if value != value]:
        raise AdapterError(
            f"the inputs of module {broken[0]!r} are 0 or not finite in all rows that were kept, of the task or of the "
            "safety rows, so they have no Gram: leave it out of the adapter, or choose a method that needs none"
        )
    return values
