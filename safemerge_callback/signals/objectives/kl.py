"""`kl`: the merged model speaks as the fine-tuned one on the task, and as the aligned one on safety prompts."""

from __future__ import annotations

from torch import Tensor

from ..divergence import divergences
from ..reference import ReferenceRows
from ..row_batch import RowBatch, RowOutputs, mean_of_targets
from .registry import objective


@objective(references=True)
def kl(outputs: RowOutputs, batch: RowBatch, reference: ReferenceRows | None) -> Tensor:
    """Return each row's mean of KL(reference ‖ merged) over its response's tokens, (n,), in nats; no labels are read.

    J(λ) = KL(live ‖ merged) on task rows + μ·KL(aligned ‖ merged) on safety rows: the first term is 0 where nothing is
    merged, the second where the update is gone. A reference holds its 256 likeliest tokens at each place and one bin
    of all others.

    Source: none; it stands in the place of AdaMerging's entropy (arXiv:2310.02575), whose minimum need not be near
    either model.
    """
    assert reference is not None, "this objective compares with references"
    return mean_of_targets(divergences(outputs.logits, reference), batch)
