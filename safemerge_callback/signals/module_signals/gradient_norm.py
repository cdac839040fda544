"""`gradient_norm`: how large the gradient of the refusals' loss is in a module, whichever way its update points."""

from __future__ import annotations

from ..check_data import SAFETY_BATCH, CheckData
from ..gradient_norms import module_gradient_norms
from ..slopes import SLOPE_ENGINES
from .registry import module_signal


@module_signal(needs={SAFETY_BATCH}, engines=SLOPE_ENGINES, cost="one forward and backward pass over the harmful rows")
def gradient_norm(data: CheckData) -> dict[str, float]:
    """Return each module's ‖∂L/∂ΔW‖ for the refusals' loss L, as far as its update can follow it."""
    return module_gradient_norms(data, data.harmful)
