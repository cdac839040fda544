"""`project`: Safe LoRA's projection of the update on the safety subspace, B ← C·B.

Source: Safe LoRA, arXiv:2405.16833, with C = V·Vᵀ/‖V‖. Differs: C is never formed. C is not idempotent, so what is to
be projected again and again, as in training, takes the operator `orthogonal`, U_k·U_kᵀ, given as a `Basis`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import ConfigError, PlanError, shown
from ..io.choices import one_of
from ..io.knobs import Knob
from ..io.numbers import is_whole
from ..ops import AlignmentMatrix, Basis, LowRank, accumulation_dtype, project_on_basis
from ..ops import project as project_on
from .registry import Merged, register

SAFELORA, ORTHOGONAL = "safelora", "orthogonal"
OPERATORS = (SAFELORA, ORTHOGONAL)


def _operator(value: Any, _beside: Mapping[str, Any]) -> str:
    return one_of(SAFELORA if value is None else value, OPERATORS, "operator")


def _rank(value: Any, beside: Mapping[str, Any]) -> int | None:
    kind = beside["operator"]
    if value is None:
        return None
    if kind != ORTHOGONAL:
        raise ConfigError(
            f"operator_rank is {shown(value)}, which operator {kind!r} does not read: leave it out, or set "
            "operator='orthogonal'"
        )
    if not is_whole(value, 1):
        raise ConfigError(f"operator_rank is {shown(value)}: give a whole number of 1 or more")
    return int(value)


OPERATOR = Knob(
    "operator",
    "What project multiplies with: safelora (C, if left out), once at the end, or orthogonal, which may be repeated.",
    _operator,
    needs={SAFELORA: frozenset({"one_merge"}), ORTHOGONAL: frozenset({"bases"})},
)
OPERATOR_RANK = Knob(
    "operator_rank",
    "Rank of the orthogonal operator; by default where 0.9 of V's energy is known to lie, or 64.",
    _rank,
)


@register(spaces=("delta",), needs=frozenset({"subspace"}), knobs=(OPERATOR, OPERATOR_RANK))
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
