"""`project`: Safe LoRA's projection of the update on the safety subspace, B ← C·B.

Source: Safe LoRA, arXiv:2405.16833, with C = V·Vᵀ/‖V‖. Differs: C is never formed. C is not idempotent, so what is to
be projected again and again, as in training, takes the operator `orthogonal`, U_k·U_kᵀ, given as a `Basis`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import PlanError
from ..ops import AlignmentMatrix, Basis, LowRank, accumulation_dtype, project_on_basis
from ..ops import project as project_on
from .registry import Merged, register


@register(spaces=("delta",), needs=frozenset({"subspace"}))
def project(
    live: LowRank,
    safety: Sequence[LowRank],
    *,
    alignment_matrix: AlignmentMatrix | Basis | None = None,
) -> Merged:
    """Return (A, C·B), or (A, U·Uᵀ·B) for a basis U; A untouched, weights and safety adapters unused; residual 0."""
    if alignment_matrix is None:
        raise PlanError("method 'project' got no alignment matrix: give the subspace it should project on")
    dtype = accumulation_dtype(*live)
    A = live.A.to(dtype)
    B = live.B.to(dtype)
    done = (
        project_on_basis(B, alignment_matrix)
        if isinstance(alignment_matrix, Basis)
        else project_on(B, alignment_matrix)
    )
    return Merged(A, done, A.new_zeros(A.shape[:-2], dtype=torch.float64))
