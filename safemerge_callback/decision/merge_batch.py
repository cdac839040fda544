"""One batch merged, apart from who batches and writes: the method's arithmetic in the live adapter's units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..adapters import Adapter, LoraFactors
from ..errors import PlanError
from ..methods import Merged
from ..ops import (
    AlignmentMatrix,
    Basis,
    Grams,
    LowRank,
    accumulation_dtype,
    all_finite,
    mask_seed,
    output_ratio,
    squared_norm,
    weighted_sum,
    wide_dtype,
)
from .batches import Batch, stacked
from .plan import MergePlan


def merge_batch(
    batch: Batch,
    V: AlignmentMatrix | Basis | None,
    plan: MergePlan,
    factors: Mapping[str, LoraFactors],
    sources: Sequence[Adapter],
    grams: Mapping[str, Grams],
) -> tuple[Merged, Tensor]:
    """Return the new factors of a batch and its (n, 3): residual, change, and 1 where all of it is finite.

    With `grams` its (n, 5): how large the update's outputs are on task inputs and on safety inputs, against before.
    Where the plan's weights differ by module, those of a batch are equal, unless a rule gives each module its own,
    or V is asked for. PlanError where a decomposition refuses the values.
    """
    modules = [factors[name] for name in batch.names]
    live = stacked([LowRank(module.A, module.B) for module in modules], batch.device)
    units = [[_in_units_of(m, source.factors[m.name], batch.device) for m in modules] for source in sources]
    others = [stacked(updates, batch.device) for updates in units]
    initial = [module.initial for module in modules if module.initial is not None]
    weights = _weights(plan, batch)
    if plan.how.kind.strength is not None:
        # With nothing to go to but the aligned model, whose update is 0, the second weight has no update.
        weights = weights[: 1 + len(others)]
    if initial:
        # Not w·B·A but B₀·A₀ + w·(B·A - B₀·A₀) is what keeps the share w of the update.
        others, weights = [*others, stacked(initial, batch.device)], (*weights, 1.0 - weights[0])
    inputs = _grams(batch, grams)
    try:
        merged = _merged(batch, plan, live, others, weights, V, inputs)
    except torch.linalg.LinAlgError as error:
        # The decompositions refuse NaN by raising for the whole batch: find the modules that hold it.
        raise not_finite(_broken(batch.names, [live, *others]) or batch.names) from error
    finite = torch.isfinite(merged.A).flatten(1).all(-1) & torch.isfinite(merged.B).flatten(1).all(-1)
    change, residual = _change(LowRank(merged.A, merged.B), live), merged.residual
    if initial:
        total = weighted_sum([live, *others], weights)
        residual = _relative_to(weighted_sum([total, others[-1]], (1.0, -1.0)), residual, total)
        change = _relative_to(stacked([module.update for module in modules], batch.device), change, live)
    columns = [residual, change, finite]
    if inputs is not None:
        new = LowRank(merged.A, merged.B)
        columns += [output_ratio(new, live, factor, centred=False) for factor in inputs]
    return merged, torch.stack([column.to(change.dtype) for column in columns], dim=-1)


def _weights(plan: MergePlan, batch: Batch) -> tuple[float | Tensor, ...]:
    """Those that the batch's modules share, or where each has its own one number a module, (n)."""
    rows = [plan.weights[name] for name in batch.names]
    if plan.grouped and len(set(rows)) == 1:
        return rows[0]
    return tuple(torch.tensor(rows, dtype=torch.float64).to(batch.device, wide_dtype(batch.device)).unbind(-1))


def _merged(
    batch: Batch,
    plan: MergePlan,
    live: LowRank,
    others: Sequence[LowRank],
    weights: Sequence[float | Tensor],
    V: AlignmentMatrix | Basis | None,
    grams: Grams | None,
) -> Merged:
    """The plan's method on a batch; a random one module by module, so that masks do not depend on the batch."""
    if not plan.how.kind.random:
        return plan.how.merge(live, others, weights=weights, alignment_matrix=V, grams=grams)
    done = []
    for i, name in enumerate(batch.names):
        task, *rest = (LowRank(update.A[i], update.B[i]) for update in (live, *others))
        source = torch.Generator().manual_seed(mask_seed(plan.seed, plan.step, name))
        done.append(plan.how.merge(task, rest, weights=weights, alignment_matrix=V, generator=source))
    return Merged(*(torch.stack(parts) for parts in zip(*done, strict=True)))


def _grams(batch: Batch, grams: Mapping[str, Grams]) -> Grams | None:
    """The factors of the batch's modules, on its device; None where no method reads any. Zeros fill up the rows."""
    if not grams:
        return None
    pairs = [grams[name] for name in batch.names]
    return Grams(_stacked([p.task for p in pairs], batch.device), _stacked([p.safety for p in pairs], batch.device))


def _stacked(factors: Sequence[Tensor], device: torch.device) -> Tensor:
    rows = max(len(factor) for factor in factors)
    filled = [torch.nn.functional.pad(factor.to(device), (0, 0, 0, rows - len(factor))) for factor in factors]
    return torch.stack(filled)


def _relative_to(update: LowRank, ratio: Tensor, whole: LowRank) -> Tensor:
    """A ratio to the norm of `whole`, (n), as one to that of `update`; 0 stays 0."""
    scaled = ratio * (squared_norm(whole) / squared_norm(update)).sqrt()
    return torch.where(ratio > 0, scaled, torch.zeros_like(scaled))


def _in_units_of(live: LoraFactors, module: LoraFactors, device: torch.device) -> LowRank:
    """The safety update divided by the live scaling; widened first, so that the division does not round."""
    dtype = accumulation_dtype(module.A, module.B)
    return replace(module, A=module.A.to(device, dtype), B=module.B.to(device, dtype)).low_rank(unit=live.scaling)


def _change(new: LowRank, old: LowRank) -> Tensor:
    """‖new - old‖/‖old‖, (n): 0 where the factors are equal, infinite where only the old update is zero."""
    before = squared_norm(old)
    moved = squared_norm(weighted_sum([new, old], [1.0, -1.0]))
    if new.A.shape == old.A.shape:
        same = (new.A == old.A).flatten(1).all(-1) & (new.B == old.B).flatten(1).all(-1)
        moved = torch.where(same, torch.zeros_like(moved), moved)
    return torch.where(moved > 0, (moved / before).sqrt(), moved)


def _broken(names: Sequence[str], updates: Sequence[LowRank]) -> list[str]:
    """The modules that hold NaN or infinities in any of the batched updates."""
    return [name for i, name in enumerate(names) if not all_finite(*(t[i] for update in updates for t in update))]


def not_finite(names: Sequence[str]) -> PlanError:
    """Return the error for modules whose merge is not finite."""
    return PlanError(
        f"merging gives values that are not finite in {len(names)} modules, the first is {names[0]!r}; nothing was "
        "written: look at the safety adapter's weights there, and at the learning rate"
    )
