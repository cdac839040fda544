"""H3Fusion without its router: how much of each expert every module takes, learned on rows of the experts' own types.

Cost: a forward and a backward pass of a batch of each type a step, and two forward passes of all rows besides.

λ_m = softmax(g_m) over the K experts of a module m, and the merge W + Σ_k λ_mk·ΔW_mk. Minimised over g:
mean over types of the rows' cross-entropy + τ·CE(share of the types' rows, mean_m λ_m) + Σ_k η_k·mean_m λ_mk·‖ΔW_mk‖.
Source: H3Fusion, arXiv:2411.17792: experts for helpful, harmless and honest answers, a gate that is to know the type of
a prompt (τ = 0.01), a penalty η on the experts' norms. Differs: there λ is a router's of each token, top 2 of 3, and
the experts go on being trained; here it is one number a module and expert, and the experts stay, so that the result is
one plain LoRA. What that loses: no prompt is answered by its own expert, every one by the same mixture. The released
router is random and frozen, its experts share one tensor, and its gate's loss takes a softmax of probabilities.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, shown
from ..io.numbers import is_number, is_whole
from ..live.modules import live_factors
from ..ops import LowRank, squared_norm
from .merge_problem import MergedModel, SearchRows
from .objectives import get_objective
from .rows import RowTokens

# By how much of its size the objective must fall, or the even mixture stays.
_GAIN = 1e-6


@dataclass(frozen=True)
class ExpertSettings:
    """How the weights of experts are learned; ConfigError for what cannot be.

    `steps` of Adam at `rate`, each on `batch_size` rows of every type in turn. `type_weight`: τ. `norm_weights`: η, one
    an expert, or none.
    """

    steps: int = 40
    rate: float = 0.1
    batch_size: int = 8
    type_weight: float = 0.01
    norm_weights: Sequence[float] = field(default=())

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if not is_whole(getattr(self, name), 1):
                raise ConfigError(f"{name} is {shown(getattr(self, name))}: give a whole number, 1 or more")
        for name, value in [("rate", self.rate), ("type_weight", self.type_weight)]:
            if not is_number(value) or value < 0:
                raise ConfigError(f"{name} is {shown(value)}: give a number of 0 or more")
        if not all(is_number(value) and value >= 0 for value in self.norm_weights):
            raise ConfigError(f"norm_weights are {shown(self.norm_weights)}: give one number of 0 or more an expert")


class ExpertWeights(NamedTuple):
    """What was learned: module -> (λ_live, λ_1, ...), the objective of the even mixture and of this, seconds taken.

    Where nothing was below the even mixture it is that.
    """

    weights: dict[str, tuple[float, ...]]
    before: float
    after: float
    seconds: float


def learn_expert_weights(
    model: Any,
    others: Sequence[Mapping[str, LowRank]],
    rows: Mapping[str, Sequence[RowTokens]],
    settings: ExpertSettings | None = None,
    adapter_name: str | None = None,
) -> ExpertWeights:
    """Return the weights of the live adapter and of `others` in each of its modules, λ_m1 + ... + λ_mK = 1.

    `others`: as `merged_forward`. `rows`: type -> its rows, a type an expert in their order, the live adapter's first.
    The model is as it was afterwards. ConfigError for another number of types than of experts, and a type without rows.
    """
    chosen, began = settings or ExpertSettings(), time.perf_counter()
    _check(len(others) + 1, rows, chosen)
    live = {name: one.low_rank(unit=1.0) for name, one in live_factors(model, adapter_name).items()}
    norms = torch.stack([_norms(live, expert) for expert in (live, *others)], dim=1)
    objective = _Objective(model, others, list(live), rows, norms, chosen, adapter_name)
    logits = torch.zeros_like(norms)
    before, best = objective.value(logits), logits
    adam = torch.optim.Adam([logits.requires_grad_()], lr=chosen.rate)
    for step in range(chosen.steps):
        logits.grad = objective.slope(logits.detach(), step)
        if not bool(torch.isfinite(logits.grad).all()):
            break
        adam.step()
    after = objective.value(logits.detach())
    if after < before - _GAIN * abs(before):
        best = logits.detach()
    lambdas = best.detach().softmax(-1).tolist()
    weights = {name: tuple(row) for name, row in zip(live, lambdas, strict=True)}
    return ExpertWeights(weights, before, min(before, after), time.perf_counter() - began)


def mixture_penalty(lambdas: Tensor, norms: Tensor, types: Tensor, settings: ExpertSettings) -> Tensor:
    """Return τ·CE(types, mean_m λ_m) + Σ_k η_k·mean_m λ_mk·‖ΔW_mk‖, a number.

    `lambdas` and `norms` are (modules, experts), `types` (experts) the share of each type among the rows.
    """
    spread = -(types * lambdas.mean(0).log()).sum()
    gammas = torch.tensor(settings.norm_weights or [0.0] * lambdas.shape[1], dtype=lambdas.dtype, device=lambdas.device)
    return settings.type_weight * spread + ((lambdas * norms).mean(0) * gammas).sum()


@dataclass
class _Objective:
    """The objective at logits (modules, experts), whole or with its gradient on a batch of each type."""

    model: Any
    others: Sequence[Mapping[str, LowRank]]
    names: list[str]
    rows: Mapping[str, Sequence[RowTokens]]
    norms: Tensor
    settings: ExpertSettings
    adapter_name: str | None

    def value(self, logits: Tensor) -> float:
        lambdas = logits.softmax(-1)
        losses = [merged.losses(lambdas)[0] for merged in self._by_type()]
        value = sum(losses) / len(losses) + float(self._penalty(lambdas))
        return value if math.isfinite(value) else math.inf

    def slope(self, logits: Tensor, batch: int) -> Tensor:
        # Enabled for one's self: a caller may compute without gradients.
        with torch.enable_grad():
            leaf = logits.clone().requires_grad_()
            lambdas = leaf.softmax(-1)
            through = lambdas.detach().requires_grad_()
            for merged in self._by_type():
                merged.losses(through, batch)
            assert through.grad is not None, "the model was run with a gradient of the weights"
            (self._penalty(lambdas) + (lambdas * (through.grad / len(self.rows))).sum()).backward()
        assert leaf.grad is not None, "every logit moves some weight"
        return leaf.grad

    def _by_type(self) -> list[MergedModel]:
        objective, none = get_objective("cross_entropy"), SearchRows([], None)
        common = (self.model, self.others, self.names, objective)
        size = self.settings.batch_size
        return [
            MergedModel(*common, SearchRows(rows, None), none, 1.0, size, self.adapter_name)
            for rows in self.rows.values()
        ]

    def _penalty(self, lambdas: Tensor) -> Tensor:
        counts = torch.tensor([len(rows) for rows in self.rows.values()], dtype=lambdas.dtype, device=lambdas.device)
        return mixture_penalty(lambdas, self.norms, counts / counts.sum(), self.settings)


def _norms(live: Mapping[str, LowRank], expert: Mapping[str, LowRank]) -> Tensor:
    """‖ΔW‖ of an expert in every module of the live adapter, float64 on its device."""
    return torch.stack([squared_norm(expert[name]).sqrt() for name in live]).double()


def _check(experts: int, rows: Mapping[str, Sequence[RowTokens]], settings: ExpertSettings) -> None:
    if len(rows) != experts or experts < 2:
        raise ConfigError(
            f"rows are of {len(rows)} types, {[*rows]}, and there are {experts} experts: give two or more of each, in "
            "one order"
        )
    if empty := [name for name, some in rows.items() if not some]:
        raise ConfigError(f"type {empty[0]!r} has no rows: give some")
    if settings.norm_weights and len(settings.norm_weights) != experts:
        raise ConfigError(
            f"norm_weights are {len(settings.norm_weights)} numbers for {experts} experts: give one an expert"
        )
