"""What each setting of the callback may be: one refusal, which prints what it was and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..adapters.optimizer import check_optimizer
from ..decision import check_merge, check_soft
from ..errors import ConfigError
from ..methods import METHODS, check_density, check_majority_sign, get_method
from ..subspace.choice import check_placement

if TYPE_CHECKING:
    from .config import SafeMergeConfig


def check_settings(config: SafeMergeConfig) -> None:
    """Raise ConfigError for a setting that cannot be, or contradicts another; bring numbers into their own type."""
    _check_types(config)
    _check_gate(config)
    _check_method(config)
    _check_strength(config)
    _check_schedule(config)


def _check_types(config: SafeMergeConfig) -> None:
    """Refuse what YAML or a command line may hold by mistake, such as '50' or true where a count is meant."""
    if not isinstance(config.subspace, str | Path) or not str(config.subspace):
        raise ConfigError(f"subspace is {config.subspace!r}: give the path of a safety-subspace file")
    for name in ("subspace", "safety_adapter", "journal"):
        value = getattr(config, name)
        setattr(config, name, str(value) if isinstance(value, Path) else value)
    for name in ("safety_adapter", "journal", "adapter_name"):
        value = getattr(config, name)
        if value is not None and (not isinstance(value, str) or not value):
            raise ConfigError(f"{name} is {value!r}: give a non-empty string, or leave it out")
    for name in ("every", "from_step", "until_step", "cooldown", "num_layers", "seed"):
        value = getattr(config, name)
        optional = value is None and name in ("until_step", "num_layers")
        if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise ConfigError(f"{name} is {value!r}: give a whole number of 0 or more")
    for name in ("at_train_end", "asynchronous", "soft", "spread_weights"):
        if not isinstance(getattr(config, name), bool):
            raise ConfigError(f"{name} is {getattr(config, name)!r}: give true or false")
    check_placement(config.placement)


def _check_gate(config: SafeMergeConfig) -> None:
    config.gate_at()
    if config.threshold == 0:
        raise ConfigError(
            "threshold is 0, below which no cosine is: give one above 0, or set gate='watch' to measure only"
        )
    for name in ("threshold", "z_threshold", "reference_fraction"):
        setattr(config, name, float(getattr(config, name)))
    if config.gate == "reference" and config.safety_adapter is None:
        raise ConfigError(
            "safety_adapter is missing: gate 'reference' compares with its own cosines; give its folder or Hub id, or "
            "choose another gate"
        )


def _check_method(config: SafeMergeConfig) -> None:
    method = get_method(str(config.method))
    if not method.keeps_rank:
        able = sorted(name for name, other in METHODS.items() if other.keeps_rank)
        raise ConfigError(
            f"method {config.method!r} changes the rank, which a live adapter cannot: choose one of {able}, "
            "or merge after training with `safemerge merge`"
        )
    check_optimizer(None, config.optimizer_state)
    config.density = check_density(config.method, config.density)
    check_majority_sign(config.method, config.majority_sign_method)
    config.weights = list(check_merge(config.method, config.space, config.weights))
    if config.weights[0] == 0:
        raise ConfigError(
            f"weights are {config.weights}: the first must be above 0, or a merge erases what was trained"
        )
    if config.merges and "safety_adapter" in method.needs and config.safety_adapter is None:
        raise ConfigError(
            f"safety_adapter is missing: method {config.method!r} merges one in; give its folder or Hub id, or set "
            "gate='watch' to measure only"
        )


def _check_strength(config: SafeMergeConfig) -> None:
    floor = config.min_task_weight
    if isinstance(floor, bool) or not isinstance(floor, int | float) or not 0 <= floor <= 1:
        raise ConfigError(f"min_task_weight is {floor!r}: give a share of the task's update, from 0 (no floor) to 1")
    config.min_task_weight = float(floor)
    check_soft(config.soft, config.method, config.space)
    if config.spread_weights and "safety_adapter" not in get_method(config.method).needs:
        raise ConfigError(
            f"spread_weights is true, and method {config.method!r} reads no weights that could be shared out: leave "
            "it out"
        )


def _check_schedule(config: SafeMergeConfig) -> None:
    if config.every == 0 and not config.at_train_end:
        raise ConfigError("every is 0 and at_train_end is false, so no check would ever happen: set one of them")
    if config.every == 0 and config.asynchronous:
        raise ConfigError(
            "asynchronous is true but every is 0, and the check at the end is never beside a step: give every, or "
            "leave asynchronous out"
        )
    if config.until_step is not None and config.until_step < config.from_step:
        raise ConfigError(
            f"until_step {config.until_step} comes before from_step {config.from_step}: swap them, or leave one out"
        )
    if config.merges and config.method == "project" and config.every > 0:
        raise ConfigError(
            f"method 'project' with every={config.every} would project again and again, and C is not idempotent: "
            "set every=0, so that it happens once, at the end"
        )
