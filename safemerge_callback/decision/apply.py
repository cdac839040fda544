"""A plan through a writer: compute everything, check everything, then write everything; or write nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adapters import Adapter, LoraFactors, Writer
from ..adapters.processes import agree, from_first, together
from ..errors import PlanError
from ..methods import Merged, get_method
from ..ops import AlignmentMatrix, LowRank, accumulation_dtype, full_precision, squared_norm, weighted_sum, wide_dtype
from ..subspace import Subspace
from .fit import all_finite, check_plan, needed_safety, needed_subspace
from .measure import Batch, batches, split, stacked
from .plan import MergePlan


@dataclass(frozen=True)
class Edit:
    """What a merge did to a module.

    `residual`: ‖dropped‖/‖target‖, what truncation to the live rank lost. `change`: the Frobenius norm of new - old
    over that of old, before the cast to the parameter's dtype; infinite where only the old update was zero. Both are
    of updates: what a PiSSA adapter's factors hold of the base weight is left out.
    """

    name: str
    residual: float
    change: float


def apply(
    plan: MergePlan,
    writer: Writer,
    safety: Adapter | None = None,
    subspace: Subspace | None = None,
    *,
    device: torch.device | str | None = None,
) -> tuple[Edit, ...]:
    """Merge the plan's modules into the live adapter, all of them or none, and return one `Edit` a module.

    Factors are computed in float32 or better, in the live adapter's units, and written once. A plan that selects
    nothing touches nothing. `device` None computes where the factors live. Raises PlanError for a plan that does not
    fit the model, a method that changes the rank, or a result that is not finite, and AdapterError for a safety adapter
    that does not fit; nothing is written then.

    With many processes every rank calls this with the same plan, each computes, and rank 0's factors and edits count.
    What one rank raises, all raise; ProcessesError where the plans decide differently.
    """
    agree("the merge plan", _decisions(plan))
    if not plan.selected:
        return ()
    if not get_method(plan.method).keeps_rank:
        raise PlanError(
            f"method {plan.method!r} changes the rank, which a live adapter keeps: use it offline, or 'linear'"
        )
    factors = writer.gather()
    new, edits = together(lambda: merged_factors(plan, factors, safety, subspace, device))
    writer.write(new)
    return from_first(edits)


@torch.no_grad()
@full_precision()
def merged_factors(
    plan: MergePlan,
    factors: Mapping[str, LoraFactors],
    safety: Adapter | None = None,
    subspace: Subspace | None = None,
    device: torch.device | str | None = None,
) -> tuple[dict[str, LowRank], tuple[Edit, ...]]:
    """Return the new factors of the plan's modules, in their own scaling's units, and the edits; nothing is written.

    Every method is allowed, `cat` too. The host waits once for the device (the device's own linear algebra may check
    its convergence besides). Raises as `apply` does.
    """
    if not plan.selected:
        return {}, ()
    needs = get_method(plan.method).needs
    check_plan(plan, factors)
    source = needed_safety(plan, safety, factors) if "safety_adapter" in needs else None
    todo = _batches(plan, factors, source, needed_subspace(plan, subspace) if "subspace" in needs else None, device)
    done = [(batch.names, _merge_batch(batch, matrix, plan, factors, source)) for batch, matrix in todo]
    # One row a module: residual, change, finite. Results of several devices meet on the first.
    rows = torch.cat([result.to(done[0][1][1].device) for _, (_, result) in done]).tolist()
    names = [name for batch, _ in done for name in batch]
    broken = [name for name, (_, _, finite) in zip(names, rows, strict=True) if not finite]
    if broken:
        raise _not_finite(broken)
    edits = {name: Edit(name, residual, change) for name, (residual, change, _) in zip(names, rows, strict=True)}
    new = {name: LowRank(m.A[i], m.B[i]) for batch, (m, _) in done for i, name in enumerate(batch)}
    return {name: new[name] for name in plan.selected}, tuple(edits[name] for name in plan.selected)


def _decisions(plan: MergePlan) -> str:
    """What ranks must agree on; not the readings, whose last bits may differ between machines."""
    mark = hashlib.blake2b("\n".join(plan.selected).encode(), digest_size=4).hexdigest()
    soft = ", soft" if plan.rule.soft else ""
    return f"{len(plan.selected)} modules (digest {mark}), {plan.method}, {plan.space}, weights {plan.weights}{soft}"


def _batches(
    plan: MergePlan,
    factors: Mapping[str, LoraFactors],
    safety: Adapter | None,
    subspace: Subspace | None,
    device: torch.device | str | None,
) -> Iterable[tuple[Batch, AlignmentMatrix | None]]:
    """The selected modules in batches of one shape, with their alignment matrices if a subspace is given."""
    if subspace is not None:
        subspace.check(factors)
        # Of a compressed file only the exact one may be multiplied with.
        subspace = subspace.exact()
        return _projected_batches(set(plan.selected), batches(factors, subspace, device), subspace)
    groups: dict[tuple[torch.device, tuple[int, int], int, int], list[str]] = {}
    for name in plan.selected:
        module = factors[name]
        where = module.A.device if device is None else torch.device(device)
        rank = safety.factors[name].rank if safety else 0
        groups.setdefault((where, module.shape, module.rank, rank), []).append(name)
    return [
        (Batch(part, where, transposed=False, comparable=False), None)
        for (where, (d_out, d_in), rank, other), names in groups.items()
        # Four bytes an entry, for the factors of both, their sum and its decomposition.
        for part in split(names, 4 * 4 * (rank + other) * (d_out + d_in))
    ]


def _projected_batches(
    selected: set[str], whole: Sequence[Batch], subspace: Subspace
) -> Iterable[tuple[Batch, AlignmentMatrix]]:
    """Ask for the very stacks that `measure` asks for, and take views of them, so that no V is kept twice or copied."""
    for batch in whole:
        picked = [i for i, name in enumerate(batch.names) if name in selected]
        if picked:
            V = subspace.stack(batch.names, device=batch.device, transposed=batch.transposed)
            for run in _runs(picked):
                part = type(V)(*(t[run] for t in V)) if isinstance(V, tuple) else V[run]
                yield batch._replace(names=batch.names[run]), part


def _runs(indices: Sequence[int]) -> Iterator[slice]:
    """Consecutive indices as slices: what a slice picks is a view, what a list picks is a copy."""
    start = 0
    for i in range(1, len(indices) + 1):
        if i == len(indices) or indices[i] != indices[i - 1] + 1:
            yield slice(indices[start], indices[i - 1] + 1)
            start = i


def _merge_batch(
    batch: Batch,
    V: AlignmentMatrix | None,
    plan: MergePlan,
    factors: Mapping[str, LoraFactors],
    safety: Adapter | None,
) -> tuple[Merged, Tensor]:
    """The new factors of a batch and its (n, 3): residual, change, and 1 where all of it is finite."""
    modules = [factors[name] for name in batch.names]
    live = stacked([LowRank(module.A, module.B) for module in modules], batch.device)
    others = []
    if safety is not None:
        units = [_in_units_of(module, safety.factors[module.name], batch.device) for module in modules]
        others = [stacked(units, batch.device)]
    initial = [module.initial for module in modules if module.initial is not None]
    weights = _weights(plan, batch)
    if initial:
        # Not w·B·A but B₀·A₀ + w·(B·A - B₀·A₀) is what keeps the share w of the update.
        others, weights = [*others, stacked(initial, batch.device)], (*weights, 1.0 - weights[0])
    try:
        merged = get_method(plan.method).merge(live, others, weights=weights, space=plan.space, alignment_matrix=V)
    except torch.linalg.LinAlgError as error:
        # The decompositions refuse NaN by raising for the whole batch: find the modules that hold it.
        raise _not_finite(_broken(batch.names, [live, *others]) or batch.names) from error
    finite = torch.isfinite(merged.A).flatten(1).all(-1) & torch.isfinite(merged.B).flatten(1).all(-1)
    change, residual = _change(LowRank(merged.A, merged.B), live), merged.residual
    if initial:
        total = weighted_sum([live, *others], weights)
        residual = _relative_to(weighted_sum([total, others[-1]], (1.0, -1.0)), residual, total)
        change = _relative_to(stacked([module.update for module in modules], batch.device), change, live)
    return merged, torch.stack([residual.to(change.dtype), change, finite.to(change.dtype)], dim=-1)


def _weights(plan: MergePlan, batch: Batch) -> tuple[float | Tensor, ...]:
    """Those of the plan, or where its rule is soft one number a module, (n)."""
    if not plan.rule.soft:
        return plan.weights
    rows = [plan.weights_of(name) for name in batch.names]
    return tuple(torch.tensor(rows, dtype=torch.float64).to(batch.device, wide_dtype(batch.device)).unbind(-1))


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


def _not_finite(names: Sequence[str]) -> PlanError:
    return PlanError(
        f"merging gives values that are not finite in {len(names)} modules, the first is {names[0]!r}; nothing was "
        "written: look at the safety adapter's weights there, and at the learning rate"
    )
