"""A plan through a writer: compute everything, check everything, then write everything; or write nothing.

The bases that method `project` multiplies with where its operator is the orthogonal one are found once, and kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..adapters import Adapter, LoraFactors
from ..errors import PlanError
from ..live import Writer
from ..live.ranks import agree, all_or_none, from_first
from ..ops import AlignmentMatrix, Basis, Grams, LowRank, full_precision, leading_basis
from ..subspace import Subspace
from ..subspace.header import ModuleHeader
from .batches import Batch, batches, split
from .fit import check_plan, needed_grams, needed_sources, needed_subspace
from .merge_batch import merge_batch, not_finite
from .plan import MergePlan
from .weights import rules_in_force

# The share of V's energy that a basis holds, where the user names no rank and the header tells the spectrum so far.
_ENERGY = 0.9
_DEFAULT_RANK = 64
# Bases on the host, (d_out, k), by module, orientation and rank, for as long as the subspace is open.
_BASES: WeakKeyDictionary[Subspace, dict[tuple[str, bool, int], Tensor]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Edit:
    """What a merge did to a module.

    `residual`: ‖dropped‖/‖target‖, what truncation to the live rank lost. `change`: the Frobenius norm of new - old
    over that of old, before the cast to the parameter's dtype; infinite where only the old update was zero. Both are
    of updates: what a PiSSA adapter's factors hold of the base weight is left out. `task_outputs`, `safety_outputs`:
    ‖new outputs‖/‖old outputs‖ of the update on the inputs of task rows and of safety rows, where the method has them.
    """

    name: str
    residual: float
    change: float
    task_outputs: float | None = field(default=None, repr=False)
    safety_outputs: float | None = field(default=None, repr=False)


def apply(
    plan: MergePlan,
    writer: Writer,
    safety: Adapter | Sequence[Adapter] | None = None,
    subspace: Subspace | None = None,
    *,
    grams: Mapping[str, Grams] | None = None,
    device: torch.device | str | None = None,
) -> tuple[Edit, ...]:
    """Merge the plan's modules into the live adapter, all of them or none, and return one `Edit` a module.

    Factors are computed in float32 or better, in the live adapter's units, and written once. A plan that selects
    nothing touches nothing. `safety`: one adapter or several, as the plan has weights for. `grams`: of each module's
    inputs, for a method that needs them. `device` None computes where the factors live. Raises PlanError for a plan
    that does not fit the model, a method that changes the rank, or a result that is not finite, and AdapterError for a
    safety adapter that does not fit; nothing is written then.

    With many processes every rank calls this with the same plan, each computes, and rank 0's factors and edits count.
    What one rank raises, all raise; ProcessesError where the plans decide differently.
    """
    new, edits = agreed_factors(plan, writer, safety, subspace, grams=grams, device=device)
    if not new:
        return ()
    writer.write(new)
    return from_first(edits)


def agreed_factors(
    plan: MergePlan,
    writer: Writer,
    safety: Adapter | Sequence[Adapter] | None = None,
    subspace: Subspace | None = None,
    *,
    grams: Mapping[str, Grams] | None = None,
    device: torch.device | str | None = None,
) -> tuple[dict[str, LowRank], tuple[Edit, ...]]:
    """Return what `apply` would write into the live adapter, and the edits; nothing is written. Raises as it does."""
    agree("the merge plan", _decisions(plan))
    if not plan.selected:
        return {}, ()
    if not plan.how.kind.keeps_rank:
        raise PlanError(
            f"method {plan.how.method!r} changes the rank, which a live adapter keeps: use it offline, or 'linear'"
        )
    factors = writer.gather()
    return all_or_none(lambda: merged_factors(plan, factors, safety, subspace, device, grams))


@full_precision()
def merged_factors(
    plan: MergePlan,
    factors: Mapping[str, LoraFactors],
    safety: Adapter | Sequence[Adapter] | None = None,
    subspace: Subspace | None = None,
    device: torch.device | str | None = None,
    grams: Mapping[str, Grams] | None = None,
) -> tuple[dict[str, LowRank], tuple[Edit, ...]]:
    """Return the new factors of the plan's modules, in their own scaling's units, and the edits; nothing is written.

    Every method is allowed, `cat` too. The host waits once for the device (the device's own linear algebra may check
    its convergence besides). Raises as `apply` does.
    """
    if not plan.selected:
        return {}, ()
    check_plan(plan, factors)
    sources = needed_sources(plan, safety, factors)
    projecting = "subspace" in plan.how.needs
    inputs = needed_grams(plan, grams)
    todo = _batches(plan, factors, sources, needed_subspace(plan, subspace) if projecting else None, device, inputs)
    done = [(batch.names, merge_batch(batch, matrix, plan, factors, sources, inputs)) for batch, matrix in todo]
    # One row a module: residual, change, finite, outputs. Results of several devices meet on the first.
    rows = torch.cat([result.to(done[0][1][1].device) for _, (_, result) in done]).tolist()
    names = [name for batch, _ in done for name in batch]
    broken = [name for name, row in zip(names, rows, strict=True) if not row[2]]
    if broken:
        raise not_finite(broken)
    edits = {name: Edit(name, row[0], row[1], *row[3:]) for name, row in zip(names, rows, strict=True)}
    new = {name: LowRank(m.A[i], m.B[i]) for batch, (m, _) in done for i, name in enumerate(batch)}
    return {name: new[name] for name in plan.selected}, tuple(edits[name] for name in plan.selected)


def _decisions(plan: MergePlan) -> str:
    """What ranks must agree on; not the readings, whose last bits may differ between machines."""
    mark = hashlib.blake2b("\n".join(plan.selected).encode(), digest_size=4).hexdigest()
    how = plan.how
    decisions = [f"{len(plan.selected)} modules (digest {mark})", how.method, how.space, f"weights {how.weights}"]
    decisions += [f"{rule.name} {value}" for rule, value in rules_in_force(plan.rules, plan.gate) if rule.knob]
    return ", ".join([*decisions, *(f"{name} {value}" for name, value in plan.taken.items()), f"step {plan.step}"])


def _batches(
    plan: MergePlan,
    factors: Mapping[str, LoraFactors],
    sources: Sequence[Adapter],
    subspace: Subspace | None,
    device: torch.device | str | None,
    grams: Mapping[str, Grams],
) -> Iterable[tuple[Batch, AlignmentMatrix | Basis | None]]:
    """The selected modules in batches of one shape and one set of weights, with what they are projected by, if any."""
    if subspace is not None:
        subspace.check(factors)
        # Of a compressed file only the exact one may be multiplied with.
        subspace = subspace.exact()
        if "bases" in plan.how.needs:
            return _basis_batches(plan, factors, subspace, device)
        return _projected_batches(set(plan.selected), batches(factors, subspace, device), subspace)
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name in plan.selected:
        module = factors[name]
        ranks = tuple(source.factors[name].rank for source in sources)
        alike = (_where(module, device), module.shape, module.rank, ranks, plan.weights[name] if plan.grouped else None)
        groups.setdefault(alike, []).append(name)
    # A mask on the entries of the updates needs them formed: all, all masked, the mean and its decomposition.
    matrices = 4 + 4 * (1 + len(sources)) if plan.how.space == "delta" and plan.how.kind.dense else 0
    return [
        (Batch(part, where, transposed=False, comparable=False), None)
        for (where, (d_out, d_in), rank, others, _), names in groups.items()
        # Eight bytes an entry, for the factors of all, their sum and its decomposition.
        for part in split(
            names,
            4 * 8 * (rank + sum(others)) * (d_out + d_in) + 4 * matrices * d_out * d_in + _gram_bytes(grams, names),
        )
    ]


def _gram_bytes(grams: Mapping[str, Grams], names: Sequence[str]) -> int:
    """What a module's Grams take while it is merged: rows × d_in and rows × rows in float64, three of each."""
    if not grams:
        return 0
    rows = sum(factor.shape[-2] for factor in grams[names[0]])
    return 8 * 3 * rows * (rows + grams[names[0]].task.shape[-1])


def _where(module: LoraFactors, device: torch.device | str | None) -> torch.device:
    return module.A.device if device is None else torch.device(device)


def _basis_batches(
    plan: MergePlan, factors: Mapping[str, LoraFactors], subspace: Subspace, device: torch.device | str | None
) -> Iterable[tuple[Batch, Basis]]:
    """Batches with the bases of their modules; V is read only for those whose basis was not found before."""
    operator_rank = plan.how.knobs["operator_rank"]
    turned = {name: factors[name].transposed for name in plan.selected}
    lacking = set(missing_bases(subspace, turned.items(), operator_rank))
    if lacking:
        whole = _projected_batches(lacking, batches(factors, subspace, device), subspace)
        find_bases(subspace, whole, operator_rank)
    known, groups = known_bases(subspace), dict[tuple[Any, ...], list[str]]()
    kept = {n: known[n, t, basis_rank(subspace.modules[n], operator_rank)] for n, t in turned.items()}
    for name, U in kept.items():
        module = factors[name]
        groups.setdefault((_where(module, device), module.shape, module.rank, U.shape[-1]), []).append(name)
    for (where, (d_out, d_in), rank, width), names in groups.items():
        for part in split(names, 4 * (3 * rank * (d_out + d_in) + width * d_out)):
            yield Batch(part, where, False, True), Basis(torch.stack([kept[name] for name in part]).to(where))


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


def basis_rank(header: ModuleHeader, operator_rank: int | None) -> int:
    """Return the rank of a module's basis: `operator_rank`, or the least noted one that holds 0.9 of V's energy, or 64.

    The header notes a lower bound of the energy at ranks 1 to 64. Never more than V has rows or columns.
    """
    enough = [int(rank) for rank, share in header.energy.items() if share >= _ENERGY]
    rank = operator_rank if operator_rank is not None else min(enough, default=_DEFAULT_RANK)
    return min(rank, *header.shape)


def known_bases(subspace: Subspace) -> dict[tuple[str, bool, int], Tensor]:
    """Return the bases found so far: (module, transposed, rank) -> U, (d_out, k), float32, on the host."""
    return _BASES.setdefault(subspace, {})


@full_precision()
def find_bases(subspace: Subspace, batches: Iterable[tuple[Batch, AlignmentMatrix]], operator_rank: int | None) -> None:
    """Find and keep the basis of every module of `batches`, each with its alignment matrices (n, ...).

    One decomposition a module, once a run: about 30 GFLOP at 4096 × 4096 and rank 64.
    """
    kept = known_bases(subspace)
    for batch, stack in batches:
        for i, name in enumerate(batch.names):
            V = type(stack)(*(t[i] for t in stack)) if isinstance(stack, tuple) else stack[i]
            rank = basis_rank(subspace.modules[name], operator_rank)
            kept[name, batch.transposed, rank] = leading_basis(V, rank).float().cpu()


def missing_bases(subspace: Subspace, modules: Iterable[tuple[str, bool]], operator_rank: int | None) -> Sequence[str]:
    """Return the modules, given with their orientation, whose basis was not found yet."""
    kept = known_bases(subspace)
    return [n for n, turned in modules if (n, turned, basis_rank(subspace.modules[n], operator_rank)) not in kept]
