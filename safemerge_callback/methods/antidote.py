"""`antidote`: of each row of the update the entries that harmful rows excite most are set to 0.

ΔW ← (1 - M)∘ΔW, M the largest ⌊share·d_in⌋ scores |ΔW_ij|·‖x_j‖₂ of each row i, x_j the j-th input of the module on
harmful rows: Wanda's score (Sun et al. 2023, arXiv:2306.11695).
Source: Antidote, Huang et al., arXiv:2408.09600. Differs: the release masks the entries of A and of B, which depend on
the gauge that the training ended in, and where a zero in B takes a whole row of A; here it is ΔW that is masked, and
its best approximation at the live rank is kept. Inputs are the aligned model's, from each harmful prompt's end on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError, PlanError, shown
from ..io.knobs import Knob
from ..io.numbers import is_number
from ..ops import Grams, LowRank, PrunedRows, refit_products
from .registry import Merged, register, unmoved


def _share(value: Any, _beside: Mapping[str, Any]) -> float:
    if not is_number(value) or not 0 <= value < 1:
        raise ConfigError(
            f"prune_share is {shown(value)}: give the share of each row's entries to remove, 0 to below 1"
        )
    return float(value)


# That of the released script.
PRUNE_SHARE = Knob("prune_share", "Share of the entries of each row of the update that antidote removes.", _share, 0.05)


@register(spaces=("delta",), needs=frozenset({"grams"}), knobs=(PRUNE_SHARE,))
def antidote(
    live: LowRank,
    safety: Sequence[LowRank],
    *,
    grams: Grams | None = None,
    prune_share: float = PRUNE_SHARE.default,
) -> Merged:
    """Return the pruned update at the live rank, in the live gauge. Shapes as in `Method`; float32 or better.

    ΔW is formed a block of rows at a time. At share 0 nothing changes, to the bit. PlanError without `grams`, of which
    the safety rows' factor is read.
    """
    if grams is None:
        raise PlanError("method 'antidote' goes by the inputs of the modules on harmful rows, got none: give grams")
    still = unmoved(live, (1.0, prune_share))
    if still is not None:
        return still
    pruned = PrunedRows(live, grams.safety.square().sum(-2).sqrt(), prune_share)
    fitted, residual = refit_products(live, pruned, pruned.norm())
    return Merged(fitted.A, fitted.B, residual)
