"""`gradient_norm`: the modules in which the loss of refusals has the largest gradient."""

from __future__ import annotations

import math

from ...io.knobs import Knob
from ..reading import Readings
from .common import Verdict, not_finite, share_above_zero, signal_of
from .quantile import share_of
from .registry import gate, never

GRADIENT_SHARE = Knob(
    "gradient_share",
    "Share of the modules, those of largest safety gradient, that gate gradient_norm merges.",
    share_above_zero("gradient_share"),
    0.5,
)


@gate(knob=GRADIENT_SHARE, needs=frozenset({"gradient_norm"}), ranked=True, asks=never)
def gradient_norm(readings: Readings, *, gradient_share: float) -> dict[str, Verdict]:
    """Merge the share of the moved modules in which the loss of refusals has the largest gradient ‖∂L/∂ΔW‖.

    Modules without a gradient, or with one of 0, are left alone.

    Source: T-Vaccine, arXiv:2410.09760, its choice of layers. Differs: the largest are taken, where it draws layers
    with odds by the norm; of each LoRA module's update, where it has the attention block's output; the loss is that of
    the aligned model's own refusals, on all rows, where the released code asks one harmful answer. ConfigError for
    readings without norms: they are taken in training, and offline where rows are given.
    """
    norms = {name: signal_of(reading, "gradient_norm", "gradient_norm", "norms") for name, reading in readings.items()}
    moved = [name for name, reading in readings.items() if reading.update_norm != 0 and math.isfinite(norms[name])]
    order = sorted((name for name in moved if norms[name] > 0), key=lambda name: (-norms[name], name))
    count = share_of(gradient_share, len(moved))
    rank = {name: place for place, name in enumerate(order, 1)}

    def verdict(name: str) -> Verdict:
        if name not in moved:
            return Verdict(False, "has not moved, or has no gradient")
        sentence = f"safety gradient {norms[name]:.3g}"
        if name not in rank:
            return Verdict(False, f"{sentence}: nothing hangs on it")
        chosen = rank[name] <= count
        words = f"{'among' if chosen else 'not among'} the largest {gradient_share:g} ({count})"
        return Verdict(chosen, f"{sentence}, number {rank[name]} of {len(order)}, {words}")

    return {name: not_finite(reading) or verdict(name) for name, reading in readings.items()}
