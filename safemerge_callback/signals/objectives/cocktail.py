"""`cocktail`: each update weighs by how well it does alone, in closed form: LM-Cocktail."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ...errors import ConfigError, shown
from ..reference import ReferenceRows
from ..row_batch import RowBatch, RowOutputs
from .cross_entropy import cross_entropy
from .registry import objective


def cocktail_weights(losses: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Return softmax(-L/T) of the losses of the updates, each alone; they sum to 1.

    Equal losses, and T → ∞, give equal weights, T → 0 all to the least loss; what has no finite loss weighs nothing.
    ConfigError for a temperature that is not above 0, and where no loss is finite.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature is {shown(temperature)}: give a number above 0, 1.0 as the paper has it")
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite:
        raise ConfigError("objective 'cocktail': no model has a finite loss on these rows, so none can be weighed")
    least = min(finite)
    shares = [math.exp((least - loss) / temperature) if math.isfinite(loss) else 0.0 for loss in losses]
    return [share / sum(shares) for share in shares]


@objective(responses=True, closed_form=cocktail_weights)
def cocktail(outputs: RowOutputs, batch: RowBatch, reference: ReferenceRows | None) -> Tensor:
    """Return each row's cross-entropy, (n,), in nats, of which `cocktail_weights` makes the weights.

    Source: LM-Cocktail, arXiv:2311.13534, as One Bad Model (arXiv:2406.14563) takes it for a baseline, at T = 1.
    Differs: L = (task + μ·safety)/(1 + μ), each a mean; the release pools the rows, of which it caps those of the task
    alone, so that the share of safety is an accident of a file's length. Its own T is 5, near uniform.
    """
    return cross_entropy(outputs, batch, reference)
