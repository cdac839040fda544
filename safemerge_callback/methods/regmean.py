"""`regmean`: the update that does on the task's inputs what it did, and on safety inputs what the aligned model does.

ΔW ← argmin_X ‖(X - ΔW)·X_fᵀ‖² + μ·‖(X - ΔW_s)·X_sᵀ‖², per input, whose minimum is (ΔW·G_f + μ·ΔW_s·G_s)·(G_f + μ·G_s)⁻¹
with the Grams G of the inputs. With the aligned model as the second expert, ΔW_s = 0, only A is changed:
A ← A·G_f·(G_f + μ·G_s)⁻¹: the update is forgotten along what safety rows excite and spared along what the task alone
does. Where the Grams agree it is `pull` of strength μ/(1 + μ).
Source: RegMean, Jin et al., Dataless Knowledge Fusion, arXiv:2212.09849. Differs: experts are updates and not weights,
since the base cancels; Grams are means over inputs, and not sums, where the model with more rows wins; a ridge, without
which a feature that no row used has no answer; and the Grams are factors, so that nothing d_in × d_in is formed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import ConfigError, PlanError, shown
from ..io.knobs import Knob
from ..io.numbers import is_number
from ..ops import Grams, LowRank, accumulation_dtype, refit, regression
from .registry import Merged, register


def _above_0(name: str, what: str) -> Any:
    def check(value: Any, _beside: Mapping[str, Any]) -> float:
        if not is_number(value) or not value > 0:
            raise ConfigError(f"{name} is {shown(value)}: give {what}, above 0")
        return float(value)

    return check


def _share(value: Any, _beside: Mapping[str, Any]) -> float:
    if not is_number(value) or not 0 <= value <= 1:
        raise ConfigError(f"off_diagonal is {shown(value)}: give what the Grams' off-diagonals are scaled by, 0 to 1")
    return float(value)


# Chosen on the validation split of film reviews, one seed, once after training (docs/methods/regmean.md).
MU = Knob("mu", "How much safety inputs count in regmean beside the task's.", _above_0("mu", "a weight"), 3.0)
RIDGE = Knob(
    "ridge",
    "What regmean adds to the task's Gram, in means of its diagonal.",
    _above_0("ridge", "a share of the mean diagonal"),
    0.3,
)
OFF_DIAGONAL = Knob("off_diagonal", "What regmean scales the Grams' off-diagonals by.", _share, 1.0)


@register(
    spaces=("delta",),
    needs=frozenset({"grams", "gram_cosine", "unused_features"}),
    optional=frozenset({"safety_adapter"}),
    several=False,
    knobs=(MU, RIDGE, OFF_DIAGONAL),
)
def regmean(
    live: LowRank,
    safety: Sequence[LowRank],
    *,
    grams: Grams | None = None,
    mu: float = MU.default,
    ridge: float = RIDGE.default,
    off_diagonal: float = OFF_DIAGONAL.default,
) -> Merged:
    """Return the regression of the update and of the aligned model's, 0, or of a safety update. Shapes as in `Method`.

    Computed in float64 and rounded once. Without a safety update B is untouched and the residual 0; with one the sum of
    both parts is refitted at the live rank. PlanError without `grams`, and for more than one safety update.
    """
    if grams is None:
        raise PlanError("method 'regmean' merges by the Grams of the modules' inputs, got none: give grams")
    if len(safety) > 1:
        raise PlanError(f"method 'regmean' has one second expert, got {len(safety)}: give one safety adapter, or none")
    solved = regression(grams, mu=mu, ridge=ridge, alpha=off_diagonal)
    dtype, A = accumulation_dtype(*live), solved.task_part(live.A)
    if not safety:
        return Merged(A.to(dtype), live.B.to(dtype), A.new_zeros(A.shape[:-2], dtype=torch.float64))
    both = LowRank(
        torch.cat([A, solved.safety_part(safety[0].A)], dim=-2),
        torch.cat([live.B.to(A.dtype), safety[0].B.to(A.dtype)], dim=-1),
    )
    fitted, residual = refit(live, both)
    return Merged(fitted.A, fitted.B, residual)
