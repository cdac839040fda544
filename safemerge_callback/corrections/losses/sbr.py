"""`sbr`: the last hidden state at the prompt's end stays where the reference has it; no response is needed."""

from __future__ import annotations

import torch
from torch import Tensor

from ...signals.reference import Reference, ReferenceRows
from ...signals.row_batch import RowBatch, RowOutputs
from .registry import row_loss


def _spread(reference: Reference) -> tuple[float, float]:
    """0 where the model is the reference. A state less than halfway to the next row's is still nearest its own row."""
    states = torch.stack([row.hidden for row in reference if row.hidden is not None]).double()
    if len(states) < 2:
        return 0.0, 0.0
    apart = torch.cdist(states, states).square() / states.shape[-1]
    apart.fill_diagonal_(torch.inf)
    return 0.0, float(apart.min(-1).values.mean()) / 4


@row_loss(_spread, hidden=True)
def sbr(outputs: RowOutputs, _batch: RowBatch, reference: ReferenceRows | None) -> Tensor:
    """Return each row's mean squared difference of the last hidden state, (n,), float32, mean over its d numbers.

    Source: SBR, arXiv:2605.05995, whose released weight is 50 by this mean. Differs: its released code finds the
    prompt's end right only in batches padded on the right, and adds the term once a micro-batch; here it counts once an
    optimizer step, and harmless prompts may be among the rows.
    """
    assert outputs.hidden is not None, "this loss asks for hidden states"
    assert reference is not None, "this loss asks for hidden states"
    assert reference.hidden is not None, "this loss asks for hidden states"
    return (outputs.hidden - reference.hidden).square().mean(-1)
