"""Whether replayed rows are needed: how far above the aligned model's own loss they have been the last times."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..signals.reference import Reference
from .losses import RowLoss

# Times of which the mean decides: a single row says little, and harmless ones differ tenfold from one to the next.
WINDOW = 5


def spreads_by_kind(reference: Reference, kinds: Sequence[str], loss: RowLoss) -> dict[str, tuple[float, float]]:
    """Return, for each kind of row, the loss of a model that is the reference, and the reference's spread in it.

    Apart, since what a model refuses is said in the same words, and what it answers is not: their losses differ
    threefold. Where a kind's rows do not differ, being one, the spread is that of all rows.
    """
    by_kind = {kind: [row for row, one in zip(reference, kinds, strict=True) if one == kind] for kind in set(kinds)}
    _, all_rows = loss.spread(reference)
    spreads = {kind: loss.spread(Reference(rows)) for kind, rows in by_kind.items()}
    return {kind: (at, spread or all_rows) for kind, (at, spread) in spreads.items()}


def mean_rise(losses: Tensor, kinds: Sequence[str], spreads: Mapping[str, tuple[float, float]]) -> Tensor:
    """Return by how many of the reference's spreads the losses (n,) are above its own, on average; a scalar.

    Infinite where there is no spread, since nothing then says how much is little.
    """
    at, spread = torch.tensor([spreads[kind] for kind in kinds], device=losses.device, dtype=losses.dtype).unbind(-1)
    return torch.where(spread > 0, (losses - at) / spread, math.inf).mean()


@dataclass
class Need:
    """Rows are needed until they came `WINDOW` times, and while their mean rise over the last is above `tolerance`.

    `recent`: these rises, in spreads, the latest last; a checkpoint holds them. One that is no number is a need.
    """

    tolerance: float
    recent: list[float] = field(default_factory=list)

    def observe(self, rise: float) -> bool:
        """Take note of the rows' rise at one more time; return whether they are needed soon again."""
        self.recent = [*self.recent, rise][-WINDOW:]
        return len(self.recent) < WINDOW or not statistics.fmean(self.recent) <= self.tolerance
