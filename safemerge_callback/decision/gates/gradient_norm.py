"""`gradient_norm`: the modules in which the loss of refusals has the largest gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError, shown
from ...io.knobs import Knob
from ...io.numbers import is_number
from ..reading import Reading, Readings
from .common import Verdict, not_finite
from .quantile import share_of
from .registry import gate, never


def _share(value: Any, _beside: Mapping[str, Any]) -> float:
    if not is_number(value) or not 0 < value <= 1:
        raise ConfigError(f"gradient_share is {shown(value)}: give a share of the modules, above 0 and up to 1")
    return float(value)


GRADIENT_SHARE = Knob(
    "gradient_share",
    "Share of the modules, those of largest safety gradient, that gate gradient_norm merges.",
    _share,
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
    norms = {name: _norm(reading) for name, reading in readings.items()}
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


def _norm(reading: Reading) -> float:
    if "gradient_norm" not in reading.signals:
        raise ConfigError(
            "gate 'gradient_norm' reads 'gradient_norm' of each module, which the live model is asked for, and module "
            f"{reading.name!r} has none: use it in training, or give `Readings.with_signals` the norms"
        )
    return reading.signals["gradient_norm"]
