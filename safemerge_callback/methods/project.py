"""`project`: Safe LoRA's projection of the update on the safety subspace, B ← C·B.

Source: Safe LoRA, arXiv:2405.16833, with C = V·Vᵀ/‖V‖. Differs: C is never formed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import PlanError
from ..ops import AlignmentMatrix, LowRank, accumulation_dtype
from ..ops import project as project_on
from .registry import Merged, register


@register(spaces=("delta",), needs=frozenset({"subspace"}))
def project(
    live: LowRank,
    safety: Sequence[LowRank],
    *,
    weights: Sequence[float],
    space: str = "delta",
    alignment_matrix: AlignmentMatrix | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    generator: torch.Generator | None = None,
) -> Merged:
    """Return (A, C·B); A untouched, weights and safety adapters unused. Shapes as in `Method`; residual 0."""
    if alignment_matrix is None:
        raise PlanError("method 'project' got no alignment matrix: give the subspace it should project on")
    dtype = accumulation_dtype(*live)
    A = live.A.to(dtype)
    return Merged(A, project_on(live.B.to(dtype), alignment_matrix), A.new_zeros(A.shape[:-2], dtype=torch.float64))
