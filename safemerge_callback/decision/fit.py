"""Does a plan fit the live adapter, and does the safety adapter fit both? Asked before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..adapters import Adapter, LoraFactors
from ..errors import AdapterError, PlanError, nearest
from ..ops import Grams, all_finite
from ..subspace import Subspace
from .plan import MergePlan


def check_safety_adapter(safety: Adapter, factors: Mapping[str, LoraFactors], *, space: str = "delta") -> None:
    """Raise AdapterError unless `safety` has every module of `factors`, of the same (d_out, d_in), with finite weights.

    One whose update is zero in every module is refused too: merging it in would only shrink what was trained. Ranks
    and scalings may differ, except that `space="factor"` adds the factors themselves and needs equal ranks.
    """
    _check_modules(safety, factors, space)
    wanted = [safety.factors[name] for name in factors]
    broken = [module.name for module in wanted if not all_finite(module.A, module.B)]
    if broken:
        raise AdapterError(f"safety adapter {safety.source!r}: module {broken[0]!r} holds NaN or infinite weights")
    check_not_zero(safety, list(factors))


def check_not_zero(safety: Adapter, names: Sequence[str]) -> None:
    """Raise AdapterError where the adapter's update s·B·A is zero in every one of these modules.

    Modules are read one by one, up to the first that is not.
    """
    scaled = False
    for name in names:
        module = safety.factors[name]
        scaled = scaled or module.scaling != 0
        if module.scaling != 0 and bool(module.A.any()) and bool(module.B.any()):
            return
    why, then = "was never trained", "Train it, or give another adapter"
    if not scaled:
        why = "has lora_alpha 0 in its config"
        then = "Write the lora_alpha that it was trained with into adapter_config.json, or give another adapter"
    if names:
        raise AdapterError(
            f"safety adapter {safety.source!r} {why}: its update is zero in all {len(names)} modules, so merging it in "
            f"would only shrink what was trained. {then}."
        )


def _check_modules(safety: Adapter, factors: Mapping[str, LoraFactors], space: str) -> None:
    who = f"safety adapter {safety.source!r}"
    missing = [name for name in factors if name not in safety.factors]
    if missing:
        raise AdapterError(
            f"{who} lacks {len(missing)} of {len(factors)} modules, the first is {missing[0]!r}"
            f"{nearest(missing[0], safety.factors, then='train one on the same target modules')}"
        )
    for name, live in factors.items():
        other = safety.factors[name]
        if other.shape != live.shape:
            raise AdapterError(
                f"{who}: module {name!r} maps {other.shape} (d_out, d_in), the live one {live.shape}: "
                "train one on this base model"
            )
        if space == "factor" and other.rank != live.rank:
            raise AdapterError(
                f"{who}: module {name!r} has rank {other.rank}, the live one {live.rank}; space 'factor' adds the "
                "factors themselves and needs equal ranks: use space 'delta' or 'aligned_factor'"
            )


def check_plan(plan: MergePlan, factors: Mapping[str, LoraFactors]) -> None:
    """Raise PlanError unless every module to merge is there, of the shape and rank that was measured."""
    if not plan.how.additive and any(module.initial is not None for module in factors.values()):
        raise PlanError(
            f"method {plan.how.method!r} in space {plan.how.space!r} cannot merge factors that began as a part of the "
            "base weight (PiSSA, OLoRA): use method 'linear' or 'pull' in space 'delta', or train a plain LoRA"
        )
    for name in plan.selected:
        if name not in factors:
            raise PlanError(
                f"the plan merges {name!r}, which the adapter lacks{nearest(name, factors, then='measure it again')}"
            )
        reading, module = plan.readings[name], factors[name]
        if (reading.shape, reading.rank) != (module.shape, module.rank):
            raise PlanError(
                f"module {name!r} was measured as {reading.shape} of rank {reading.rank} and is now {module.shape} of "
                f"rank {module.rank}: measure it again"
            )


def sources_of(safety: Adapter | Sequence[Adapter] | None) -> tuple[Adapter, ...]:
    """Return one adapter, several, or none, as a tuple."""
    if safety is None:
        return ()
    return (safety,) if isinstance(safety, Adapter) else tuple(safety)


def needed_sources(
    plan: MergePlan, safety: Adapter | Sequence[Adapter] | None, factors: Mapping[str, LoraFactors]
) -> tuple[Adapter, ...]:
    """Return the adapters that the plan's method merges in, none for one that reads none.

    PlanError if there are fewer or more than the plan has weights for, AdapterError if one does not fit the modules to
    merge.
    """
    how, sources = plan.how, sources_of(safety)
    if not (how.needs | how.kind.optional) & {"safety_adapter", "average"}:
        return ()
    if not sources and "safety_adapter" in how.kind.optional:
        return ()
    if not sources and "average" in how.needs:
        raise PlanError(
            f"method {how.method!r} goes to the average of a run's own updates, got none: use it in training, or give "
            "`Average.adapter`"
        )
    if not sources:
        raise PlanError(
            f"method {how.method!r} needs a safety adapter, got none: load one with load_adapter, or decide "
            "with method='pull', which needs none"
        )
    if len(sources) != len(how.weights) - 1:
        raise PlanError(
            f"the plan has {len(how.weights)} weights {how.weights} and {len(sources)} safety adapters were given: "
            f"give {len(sources) + 1} weights, the first for the task's own update"
        )
    for source in sources:
        _check_modules(source, {name: factors[name] for name in plan.selected}, how.space)
    return sources


def needed_grams(plan: MergePlan, grams: Mapping[str, Grams] | None) -> Mapping[str, Grams]:
    """Return the Grams, none for a method that reads none; PlanError where a module to merge has none."""
    if "grams" not in plan.how.needs:
        return {}
    lacking = [name for name in plan.selected if name not in (grams or {})]
    if lacking:
        raise PlanError(
            f"method {plan.how.method!r} merges by the Grams of the modules' inputs, and module {lacking[0]!r} has "
            "none: use it in training, or give `apply` grams"
        )
    return grams or {}


def needed_subspace(plan: MergePlan, subspace: Subspace | None) -> Subspace:
    """Return the subspace; PlanError if there is none."""
    if subspace is None:
        raise PlanError(
            f"method {plan.how.method!r} projects on the safety subspace, got none: give Subspace.load(path)"
        )
    return subspace
