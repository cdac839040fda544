"""A proximal step in closed form, of updates: between the present one and an anchor, at the live rank."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapters import LoraFactors
from ..decision.batches import split, stacked
from ..live.faults import Fault, attempt
from ..live.ranks import everyones
from ..ops import LowRank, full_precision, refit, weighted_sum
from ..record.log import Log
from .protocol import Proximal, RunPoint


class ProximalPoint(NamedTuple):
    """The new factors by module, in the live adapter's units, and the largest relative residual of any, a scalar."""

    new: dict[str, LowRank]
    residual: Tensor


@full_precision()
def proximal_point(factors: Mapping[str, LoraFactors], anchor: Mapping[str, LowRank], share: float) -> ProximalPoint:
    """Return argmin over X of ½·‖X - ΔW‖² + s/2·‖X - ΔW_anchor‖²: (ΔW + s·ΔW_anchor)/(1 + s), share = s/(1 + s).

    The sum has twice the live rank; the best approximation at the live one is taken, in the live factors' gauge, so
    that an optimizer's moments go on meaning what they meant. Exact where the two share column or row space, and where
    `share` is 0 or 1. Computed where the factors live, modules of one shape together; no wait for the device.
    """
    groups: dict[tuple[torch.device, tuple[int, int], int], list[str]] = {}
    for name, module in factors.items():
        groups.setdefault((module.A.device, module.shape, module.rank), []).append(name)
    new: dict[str, LowRank] = {}
    residuals = []
    for (device, (d_out, d_in), rank), names in groups.items():
        for part in split(names, 4 * 8 * 2 * rank * (d_out + d_in)):
            live = stacked([factors[name].update for name in part], device)
            there = stacked([anchor[name] for name in part], device)
            pair, residual = refit(live, weighted_sum([live, there], [1.0 - share, share]))
            new |= {name: LowRank(pair.A[i], pair.B[i]) for i, name in enumerate(part)}
            residuals.append(residual.max())
    return ProximalPoint(new, torch.stack([one.to(residuals[0].device) for one in residuals]).max())


def take_proximal_step(one: Proximal, at: RunPoint, log: Log) -> None:
    """Write what a correction draws the weights to, as a part of the optimizer's step that was just made. Collective.

    After a fault, on any rank, the weights are the optimizer's, and it is told once. Moments are left as they are.
    """
    new = attempt(one.name, lambda: one.proximal(at))
    faults = [fault for fault in everyones(new if isinstance(new, Fault) else None) if fault is not None]
    if not faults and new and not isinstance(new, Fault):
        done = attempt(one.name, partial(at.writer.write, new))
        faults = [done] if isinstance(done, Fault) else []
    if faults:
        words = f"{one.name} could not make its proximal step at step {at.step}, training goes on: {faults[0].error}"
        log.fault(at.step, faults[0], words, kind=f"{one.name} proximal", alert="a proximal step failed")
