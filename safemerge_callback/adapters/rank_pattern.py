"""Rank and scaling of each module, read from and written to a LoRA config as PEFT reads it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..errors import AdapterError, shown
from ..io.numbers import is_number, is_whole
from ..io.patterns import as_pattern
from .factors import LoraFactors


def rank_and_scaling(config: Mapping[str, Any], path: str, where: str) -> tuple[int, float]:
    """Return (r, scaling) that PEFT gives the module at `path` (in the base model, without `base_model.model.`).

    scaling = alpha/r, or alpha/√r with use_rslora (rsLoRA, arXiv:2312.03732). Raises AdapterError when the config
    holds no usable rank or alpha.
    """
    rank = _resolved(config, "rank_pattern", path, "r", where)
    alpha = _resolved(config, "alpha_pattern", path, "lora_alpha", where)
    if not is_whole(rank, 1):
        raise AdapterError(
            f"{where}: module {path!r} has rank {shown(rank)} in its config; it must be a positive integer."
        )
    if not is_number(alpha):
        raise AdapterError(
            f"{where}: module {path!r} has lora_alpha {shown(alpha)} in its config; it must be a number."
        )
    return rank, float(alpha / math.sqrt(rank)) if config.get("use_rslora") else float(alpha / rank)


def config_with(config: Mapping[str, Any], wanted: Mapping[str, LoraFactors]) -> dict[str, Any]:
    """Return `config`, changed where needed so that PEFT gives each path the rank and scaling of its factors."""
    new = {**config, "inference_mode": True}
    now = {path: rank_and_scaling(config, path, "config") for path in wanted}
    if all(now[path] == (factors.rank, factors.scaling) for path, factors in wanted.items()):
        return new
    ranks = {path: factors.rank for path, factors in wanted.items()}
    alphas = {path: _alpha(factors) for path, factors in wanted.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    patterns = {"rank_pattern": _exceptions(ranks, rank), "alpha_pattern": _exceptions(alphas, alpha)}
    return {**new, "use_rslora": False, "r": rank, "lora_alpha": alpha, **patterns}


def _resolved(config: Mapping[str, Any], key: str, path: str, default: str, where: str) -> Any:
    """The value of the first pattern that matches; the rule of matching is PEFT's own."""
    patterns = config.get(key)
    if not patterns:
        return config.get(default)
    if not isinstance(patterns, Mapping):
        raise AdapterError(f"{where}: {key} is {shown(patterns)} in its config; it must map patterns to values.")
    for pattern in patterns:
        as_pattern(pattern, f"{where}: {key}", within=(r"(.*\.)?(", ")$"), error=AdapterError)
    from peft.utils.other import get_pattern_key

    return patterns.get(get_pattern_key(list(patterns), path), config.get(default))


def _alpha(factors: LoraFactors) -> int | float:
    alpha = factors.scaling * factors.rank
    return int(alpha) if alpha.is_integer() else alpha


def _exceptions(values: Mapping[str, Any], common: Any) -> dict[str, Any]:
    """Patterns that match one whole path each."""
    return {f"^{re.escape(path)}": value for path, value in values.items() if value != common}
