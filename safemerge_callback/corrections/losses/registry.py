"""The registry of losses on safety rows: what each compares, and how far the reference itself varies in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...signals.reference import Reference, ReferenceRows
from ...signals.row_batch import RowBatch, RowOutputs

Function = Callable[[RowOutputs, RowBatch, ReferenceRows | None], Tensor]


@dataclass(frozen=True)
class RowLoss:
    """A loss on safety rows.

    `function(outputs, batch, reference)` gives the loss of each row, (n,), float32, of which 0, or the reference's own,
    is the least that is wanted. `spread(reference)` gives what a row's loss is where the model is the reference, and
    by how much the reference's own rows differ in it. `hidden`: whether it reads the hidden states; `log_probs`:
    whether it reads the reference's log-probabilities. One that reads neither is given no reference.
    """

    name: str
    function: Function
    spread: Callable[[Reference], tuple[float, float]]
    hidden: bool = False
    log_probs: bool = False

    @property
    def compares(self) -> bool:
        """Whether it reads anything of the reference."""
        return self.hidden or self.log_probs

    def limit(self, reference: Reference, spreads: float) -> float:
        """Return the loss that a model has which is so many spreads from the reference."""
        at_reference, spread = self.spread(reference)
        return at_reference + spreads * spread


LOSSES: dict[str, RowLoss] = {}


def row_loss(
    spread: Callable[[Reference], tuple[float, float]], *, hidden: bool = False, log_probs: bool = False
) -> Callable[[Function], Function]:
    """Enter a loss under its own name."""

    def enter(function: Function) -> Function:
        name = function.__name__
        LOSSES[name] = RowLoss(name, function, spread, hidden, log_probs)
        return function

    return enter
