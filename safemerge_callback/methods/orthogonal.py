"""`orthogonal`: of the safety update the part that the task update does not reach, added to the task update.

ΔW ← w_f·ΔW_f + w_s·(I - Q·Qᵀ)·ΔW_s, with Q an orthonormal basis of the column space of ΔW_f, by QR.
Source: the orthogonal-complement projection of continual learning with LoRA (O-LoRA, Wang et al. 2023,
arXiv:2310.14152, keeps new updates orthogonal to old ones), here applied once, to a finished update. Differs: O-LoRA
is a penalty while training, on the rows of A; this is an exact projection, on the columns of ΔW.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..ops import LowRank, column_space, refit, weighted_sum
from .registry import Merged, register, unmoved


@register(spaces=("delta",), needs=frozenset({"safety_adapter"}), signed=True)
def orthogonal(
    live: LowRank,
    safety: Sequence[LowRank],
    *,
    weights: Sequence[float],
) -> Merged:
    """Return w_f·ΔW_f + w_s·(I - Q·Qᵀ)·ΔW_s, best at the live rank. Shapes as in `Method`; float32 or better.

    Nothing d_out × d_in is formed. Of several safety updates each is projected on the complement of the live one, not
    of one another. A live update of 0 has no column space, and the safety update is added whole. Weights (1, 0, ...)
    change nothing, to the bit.
    """
    still = unmoved(live, weights)
    if still is not None:
        return still
    basis = column_space(live)
    outside = []
    for update in safety:
        B = update.B.to(basis.dtype)
        # Twice is enough: what rounding leaves inside after the first is of the size of one rounding after the second.
        for _ in range(2):
            B = B - basis @ (basis.mT @ B)
        outside.append(LowRank(update.A, B))
    fitted, residual = refit(live, weighted_sum([live, *outside], weights))
    return Merged(fitted.A, fitted.B, residual)
