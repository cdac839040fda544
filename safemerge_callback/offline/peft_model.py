"""A merge as a new adapter on a PEFT model, beside the one that it came from: no trainer, no second model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from ..adapters import Adapter, LoraFactors, canonical_name
from ..adapters.rank_pattern import config_with
from ..decision import (
    Gate,
    MergePlan,
    choose,
    cosines_needed,
    measure,
    merged_factors,
    nothing_selected,
)
from ..decision.choices import PlanKnobs
from ..decision.fit import needed_sources
from ..decision.unmerged import base_tensors
from ..errors import AdapterError, ConfigError
from ..live import base_weights, live_factors
from ..live.modules import active_adapter
from ..methods.how import AUTO, How
from ..ops import LowRank, full_precision
from ..subspace import Subspace
from .check_data import ModelRows, check_rows
from .parts import AdapterSource, adapter_of, check_merges, left_out, listed, subspace_of

_PEFT_PREFIX = "base_model.model."


def apply_safemerge(
    model: nn.Module,
    safety_adapter: AdapterSource | Sequence[AdapterSource] | None,
    subspace: str | Path | Subspace,
    *,
    adapter_name: str | None = None,
    new_adapter_name: str = "safemerge",
    gate: str | Gate | None = None,
    method: str | How = AUTO,
    device: torch.device | str | None = None,
    **knobs: Unpack[PlanKnobs],
) -> MergePlan:
    """Add an adapter to a PEFT model: `adapter_name` with `safety_adapter` merged into its drifted modules.

    Source: SafeMERGE, arXiv:2503.17239. Differs: modules are matched by name, and the sum is that of the updates.
    `adapter_name` (None: the active one) stays as it is; `new_adapter_name` is frozen and active afterwards (PEFT's
    `add_weighted_adapter` leaves the old one active: `model.set_adapter` changes it), and `model.save_pretrained` saves
    it. Its factors have the dtype and device of the old ones, its unselected modules are equal to them bit for bit, and
    so are other tensors that the old adapter holds (heads, trained tokens). Only factors are copied, never the model.

    safety_adapter: a folder or Hub id, an `Adapter`, the name of another adapter on the model, or several of these;
    None: method `auto` pulls toward the aligned model.
    The other knobs are those of `MergePlan.decide` and its gate; `cat` is allowed, and adds the ranks up.
    Returns the plan that was carried out. Raises ValueError, nothing added: ConfigError for knobs that cannot be and a
    name that is taken, AdapterError for what is no plain LoRA or does not fit, SubspaceError where the model's base
    weights are not those of the aligned checkpoint, PlanError for a merge that is not finite. Warns where the gate
    selects no module.
    """
    choices = choose(gate, method, knobs, len(listed(safety_adapter)))
    name = _checked_names(model, adapter_name, new_adapter_name)
    check_merges(choices, has_safety=safety_adapter is not None)
    check_rows(choices, ModelRows())
    factors, safety_adapters = live_factors(model, name), _opened_adapters(model, safety_adapter)
    matrices = subspace_of(subspace)
    matrices.check(factors, base_weights(model))
    left_out(safety_adapters, factors, base_tensors(model), level=4)
    cosines = cosines_needed([choices.gate], safety_adapters, factors, matrices, device=device)
    readings = measure(factors, matrices, device=device, gate=choices.gate, reference=cosines)
    plan = MergePlan.of(readings, choices)
    needed_sources(plan, safety_adapters, factors)
    if not plan.selected:
        warnings.warn(f"safemerge: {nothing_selected(plan)}", stacklevel=2)
    new, _ = merged_factors(plan, factors, safety_adapters, matrices, device)
    _add(model, name, new_adapter_name, factors, new)
    return plan


def apply_safelora(
    model: nn.Module,
    subspace: str | Path | Subspace,
    *,
    threshold: float | None = None,
    num_layers: int | None = None,
    adapter_name: str | None = None,
    new_adapter_name: str = "safelora",
    device: torch.device | str | None = None,
) -> MergePlan:
    """Add an adapter to a PEFT model: `adapter_name` with its drifted modules projected on the safety subspace.

    Source: Safe LoRA, arXiv:2405.16833: B ← C·B with C = V·Vᵀ/‖V‖. threshold: the modules of a cosine below it; 0.5, as
    in the release, where neither is given. num_layers: so many of lowest cosine; the release's default mode, with 10.
    Differs: strictly below, where the release has ≤; and the modules are chosen before anything is projected.
    Everything else is as `apply_safemerge` has it. ConfigError where both are given.
    """
    if threshold is not None and num_layers is not None:
        raise ConfigError(f"threshold={threshold} and num_layers={num_layers} exclude each other: give one")
    gate = Gate(threshold=0.5 if threshold is None else threshold)
    if num_layers is not None:
        gate = Gate("num_layers", num_layers=num_layers)
    return apply_safemerge(
        model,
        None,
        subspace,
        adapter_name=adapter_name,
        new_adapter_name=new_adapter_name,
        gate=gate,
        method="project",
        device=device,
    )


def _checked_names(model: nn.Module, old: str | None, new: str) -> str:
    """The name of the adapter to start from; refuse a new one that PEFT could not have or hold beside it."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or not hasattr(model, "add_adapter"):
        raise AdapterError(
            f"model is a {type(model).__name__}, not a PeftModel: wrap it with peft.get_peft_model first"
        )
    if new in configs:
        raise ConfigError(
            f"new_adapter_name {new!r} is taken, the model has {sorted(configs)}: give another, or delete_adapter first"
        )
    if not new or "." in new or new in "lora_":
        raise ConfigError(f"new_adapter_name is {new!r}: give a name without dots that is no part of 'lora_'")
    name = active_adapter(model, old)
    if getattr(configs[name], "bias", "none") != "none":
        raise AdapterError(
            f"adapter {name!r} has bias={configs[name].bias!r}, and PEFT holds one such adapter a model: merge its "
            "folder with merge_adapters"
        )
    return name


def _opened_adapters(model: nn.Module, sources: AdapterSource | Sequence[AdapterSource] | None) -> tuple[Adapter, ...]:
    """The safety adapters, those of the model by name."""
    there: Mapping[str, Any] = model.peft_config  # type: ignore[assignment]
    return tuple(
        Adapter(one, None, {}, live_factors(model, one)) if isinstance(one, str) and one in there else adapter_of(one)
        for one in listed(sources)
    )


@full_precision()
def _add(model: Any, old: str, new: str, factors: Mapping[str, LoraFactors], merged: Mapping[str, LowRank]) -> None:
    """Give the model the adapter `new`; where that fails it is taken off again."""
    changed = {n: replace(factors[n], A=A.to(factors[n].A), B=B.to(factors[n].B)) for n, (A, B) in merged.items()}
    wanted = {**factors, **changed}
    # The new adapter's random beginning is overwritten, and must not move the user's random numbers.
    with torch.random.fork_rng(devices=[]):
        model.add_adapter(new, _config(model, old, wanted))
    try:
        for name, live in live_factors(model, new).items():
            for parameter, tensor in ((live.A, wanted[name].A), (live.B, wanted[name].B)):
                parameter.data = tensor.detach().clone()
        _copy_rest(model, old, new)
    except BaseException:
        model.delete_adapter(new)
        raise
    model.set_adapter(new)
    for parameter in (p for live in live_factors(model, new).values() for p in (live.A, live.B)):
        parameter.requires_grad_(False)


def _config(model: Any, old: str, wanted: Mapping[str, LoraFactors]) -> Any:
    """The old adapter's configuration, with patterns where ranks changed."""
    config = model.peft_config[old]
    paths = {canonical_name(path): path for path, layer in model.named_modules() if hasattr(layer, "lora_A")}
    by_path = {paths[name].removeprefix(_PEFT_PREFIX): module for name, module in wanted.items()}
    settings = config_with(config.to_dict(), by_path)
    names = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
    return replace(config, inference_mode=True, init_lora_weights=True, **{name: settings[name] for name in names})


def _copy_rest(model: nn.Module, old: str, new: str) -> None:
    """What the old adapter holds beside its factors: trained heads, and trained rows of an embedding."""
    for module in model.modules():
        heads = getattr(module, "modules_to_save", None)
        if isinstance(heads, nn.ModuleDict) and old in heads:
            heads[new].load_state_dict(heads[old].state_dict())
        rows = getattr(module, "trainable_tokens_delta", None)
        if isinstance(rows, nn.ParameterDict) and old in rows and new in rows:
            rows[new].data = rows[old].detach().clone()
