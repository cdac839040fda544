"""`orthogonal`: of the safety update the part that the task update does not reach, added to the task update.

ΔW ← w_f·ΔW_f + w_s·(I - λ·Q·Qᵀ)·ΔW_s, with Q an orthonormal basis of the column space of ΔW_f, by QR, and λ the
strength: 1 takes the whole overlap out, and with less the merge goes that share of the way there from `linear`.
Source: the orthogonal-complement projection of continual learning with LoRA (O-LoRA, Wang et al. 2023,
arXiv:2310.14152, keeps new updates orthogonal to old ones), here applied once, to a finished update. Differs: O-LoRA
is a penalty while training, on the rows of A; this is an exact projection, on the columns of ΔW. The strength is that
of Buffer and Reinforce (arXiv:2605.24550), released with λ = 0.1 and weights (0.5, 0.5). Differs: its basis leaves out
directions of A·Aᵀ below 1 % of the largest, here those of the product ΔW below 1e-6 of the largest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..io.knobs import Knob
from ..ops import LowRank, column_space, refit, weighted_sum
from .registry import Merged, register, unmoved
from .weights import checked_share


def _strength(value: Any, _beside: Mapping[str, Any]) -> float | None:
    return None if value is None else checked_share("orthogonal", value)


STRENGTH = Knob(
    "strength",
    "Share of the safety update's part inside the task update's columns that orthogonal takes out; all if left out.",
    _strength,
    idle="which {kind} {reader!r} has not as a knob of its own",
)


@register(spaces=("delta",), needs=frozenset({"safety_adapter"}), signed=True, knobs=(STRENGTH,))
def orthogonal(
    live: LowRank,
    safety: Sequence[LowRank],
    *,
    weights: Sequence[float],
    strength: float | None = None,
) -> Merged:
    """Return w_f·ΔW_f + w_s·(I - λ·Q·Qᵀ)·ΔW_s, best at the live rank. Shapes as in `Method`; float32 or better.

    `strength`: λ, 1 where it is None. Nothing d_out × d_in is formed. Of several safety updates each is projected on
    the complement of the live one, not of one another. A live update of 0 has no column space, and the safety update is
    added whole. Weights (1, 0, ...) change nothing, to the bit.
    """
    still = unmoved(live, weights)
    if still is not None:
        return still
    basis = column_space(live)
    outside = []
    for update in safety:
        B = whole = update.B.to(basis.dtype)
        # Twice is enough: what rounding leaves inside after the first is of the size of one rounding after the second.
        for _ in range(2):
            B = B - basis @ (basis.mT @ B)
        outside.append(LowRank(update.A, B if strength is None else whole.lerp(B, strength)))
    fitted, residual = refit(live, weighted_sum([live, *outside], weights))
    return Merged(fitted.A, fitted.B, residual)
