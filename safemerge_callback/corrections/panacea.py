"""`panacea`: at the end one step up the loss of harmful answers, or as a control as far in a random direction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..adapters import LoraFactors
from ..decision import Edit
from ..errors import PlanError, shown
from ..io.choices import one_of
from ..live.modules import lora_modules
from ..ops import LowRank, full_precision, inner_product, mask_seed, squared_norm, wide_dtype
from ..record.entries import change_entry
from ..signals.model_state import preserve_state
from ..signals.responses import alike_lengths
from ..signals.rows import RowTokens
from ..signals.slopes import SLOPE_ENGINES
from .harmful_rows import HarmfulRowSettings, harmful_rows, mean_loss
from .perturbation import check_size
from .protocol import Change, RunPoint, RunStart
from .registry import correction

GRADIENT, RANDOM = "gradient", "random"
DIRECTIONS = (GRADIENT, RANDOM)
# Of the update's norm; half of what `pull` takes away by itself. Not chosen by any measurement.
SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class PanaceaSettings(HarmfulRowSettings):
    """What `panacea` reads of its entry in the list of corrections.

    Made once, at the end, unless `every` says otherwise. `direction`: `gradient`, of the mean loss of all `rows`, or
    `random`, normal by `seed`, its control. The step changes the updates of all modules together by `share` of their
    norm (0.1 if neither is given); or `rho` is its norm among the factors, the paper's own. `batch_size` rows go
    through the model at a time.
    """

    every: float = 0
    at_train_end: bool = True
    batch_size: int = 8
    direction: str = GRADIENT
    share: float | None = None
    rho: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.direction, DIRECTIONS, "direction")
        object.__setattr__(self, "share", check_size("rho", self.rho, self.share, SHARE, of="the update"))


class Panacea:
    """The change; `prepare` reads the rows."""

    name = "panacea"

    def __init__(self, settings: PanaceaSettings) -> None:
        self.settings = self.schedule = settings
        self.rows: tuple[RowTokens, ...] = ()
        self.start: RunStart | None = None

    def prepare(self, start: RunStart) -> None:
        """Read the rows. Collective. Raises ConfigError as `harmful_rows`."""
        self.rows, self.start = harmful_rows(self.name, self.settings, start).tokens, start

    def change(self, at: RunPoint) -> Change:
        """Return the factors after the step. Raises PlanError for a direction that is 0 or not finite."""
        assert self.start is not None, "prepare comes before the first step"
        factors, settings = at.factors(), self.settings
        if settings.direction == RANDOM:
            way = random_direction(factors, settings.seed, at.step)
        else:
            way = harmful_gradient(self.start.model, at.writer.adapter_name, self.rows, settings.batch_size)
        new, edits = moved(factors, way, share=settings.share, norm=settings.rho)
        return Change(new, edits, dict.fromkeys(new, 1.0), partial(change_entry, at.step, self.name, edits))


def harmful_gradient(
    model: Any, adapter_name: str | None, rows: tuple[RowTokens, ...], batch_size: int
) -> dict[str, LowRank]:
    """Return module -> ∂h/∂A and ∂h/∂B of the mean loss h of rows, float32: a forward and a backward pass over them.

    The model is evaluated, so nothing is dropped out, and left as it was; no `.grad` hears of it.
    """
    modules = lora_modules(model, adapter_name, moved_base=True)
    flat = [factor.tensor for module in modules.values() for factor in (module.A, module.B)]
    total = [torch.zeros_like(factor, dtype=torch.float32) for factor in flat]
    for places in alike_lengths([len(row.prompt) + len(row.response) for row in rows], batch_size):
        with preserve_state(model, gradients=True):
            for factor in flat:
                factor.requires_grad_(True)
            share = len(places) / len(rows)
            gradients = torch.autograd.grad(share * mean_loss(model, [rows[i] for i in places]), flat)
            total = [one + gradient for one, gradient in zip(total, gradients, strict=True)]
    pairs = iter(total)
    return {name: LowRank(next(pairs), next(pairs)) for name in modules}


def random_direction(factors: Mapping[str, LoraFactors], seed: int, step: int) -> dict[str, LowRank]:
    """Return normal numbers in the factors' shapes, float32, the same on every machine."""

    def normal(like: Tensor, name: str) -> Tensor:
        source = torch.Generator().manual_seed(mask_seed(seed, step, name))
        return torch.randn(like.shape, generator=source).to(like.device)

    return {name: LowRank(normal(f.A, f"{name}.A"), normal(f.B, f"{name}.B")) for name, f in factors.items()}


@full_precision()
def moved(
    factors: Mapping[str, LoraFactors], way: Mapping[str, LowRank], *, share: float | None = None, norm: float | None
) -> tuple[dict[str, LowRank], tuple[Edit, ...]]:
    """Return the factors after a step along `way`, (A + c·W_A, B + c·W_B), float32 or better, and what it did to each.

    c makes the norm of the step among the factors `norm`, or ‖ΔW' - ΔW‖ over all modules `share` of ‖ΔW‖. What that
    changes is c·(B·W_A + W_B·A) + c²·W_B·W_A, so c is the root of a polynomial in four sums. One wait for the device.

    Source: Panacea, arXiv:2501.18100, w + ε with ε = ρ·∇h/‖∇h‖ over all factors. PlanError where `way` is 0 or not
    finite, and for a share of an update of 0.
    """
    sums = torch.stack([_sums(factors[name], one) for name, one in way.items()]).tolist()
    whole = [sum(column) for column in zip(*sums, strict=True)]
    size, old, first, cross, second = whole
    if not all(map(math.isfinite, whole)) or size == 0:
        raise PlanError(f"the norm of its direction is {math.sqrt(size) if size >= 0 else size}: look at its rows")
    if norm is None and old == 0:
        raise PlanError(f"share {shown(share)} of an update of norm 0 is no step: train before, or give rho")
    c = norm / math.sqrt(size) if norm is not None else _root(share or 0.0, old, first, cross, second)
    new, edits = {}, []
    for (name, one), (_, before, linear, mixed, square) in zip(way.items(), sums, strict=True):
        A, B = factors[name].A.detach(), factors[name].B.detach()
        wide = torch.promote_types(A.dtype, torch.float32)
        new[name] = LowRank(A.to(wide) + c * one.A.to(wide), B.to(wide) + c * one.B.to(wide))
        change = max(0.0, _changed(c, linear, mixed, square))
        edits.append(Edit(name, 0.0, math.sqrt(change / before) if before else math.inf))
    return new, tuple(edits)


def _sums(module: LoraFactors, way: LowRank) -> Tensor:
    """‖W‖² among the factors, ‖ΔW‖², and of the change its ‖linear‖², ⟨linear, quadratic⟩, ‖quadratic‖², less s²."""
    wide = wide_dtype(module.A.device)
    A, B, WA, WB = (t.detach().to(wide) for t in (module.A, module.B, way.A, way.B))
    linear = LowRank(torch.cat([WA, A], dim=-2), torch.cat([B, WB], dim=-1))
    quadratic = LowRank(WA, WB)
    s2 = module.scaling**2
    products = (squared_norm(linear), inner_product(linear, quadratic), squared_norm(quadratic))
    values = (WA.square().sum() + WB.square().sum(), s2 * squared_norm(module.update), *(s2 * p for p in products))
    return torch.stack(values)


def _changed(c: float, linear: float, mixed: float, square: float) -> float:
    return c * c * (linear + 2 * c * mixed + c * c * square)


def _root(share: float, old: float, linear: float, mixed: float, square: float) -> float:
    """The c at which ‖c·linear + c²·quadratic‖ is first `share` of √old: doubled until it is beyond, then halved."""
    wanted, low, high = share * share * old, 0.0, 1e-30
    while _changed(high, linear, mixed, square) < wanted:
        low, high = high, 2 * high
        if not math.isfinite(high):
            raise PlanError("its direction leaves the update as it is: look at its rows")
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if _changed(middle, linear, mixed, square) >= wanted else (middle, high)
    return high


@correction(
    PanaceaSettings,
    cost="one forward and backward pass over its rows, once",
    deed="a step up the loss of harmful answers was made",
    engines=SLOPE_ENGINES,
)
def panacea(settings: PanaceaSettings) -> Panacea:
    """Return the change of one run."""
    return Panacea(settings)
