"""`by_pattern`: weights of their own for modules whose names fit a pattern."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...errors import ConfigError, shown
from ...io.knobs import Knob
from ...io.patterns import as_pattern
from ...methods import check_merge, get_method
from ...methods.weights import check_way
from .registry import Case, Weights, weights_rule

_SETTING = "module_weights"


def check_module_weights(
    method: str, space: str, module_weights: Any, adapters: int | None = None
) -> dict[str, tuple[float, ...]]:
    """Return pattern -> weights, each checked as `check_merge` does; ConfigError for what is no such mapping."""
    if module_weights is None:
        return {}
    if not isinstance(module_weights, Mapping):
        raise ConfigError(
            f"module_weights is {shown(module_weights)}: map patterns of module names to weights, such as "
            "{'v_proj': [0.5, 0.5]}"
        )
    rule = get_method(method)
    if module_weights and not rule.weighted and rule.strength is None:
        raise ConfigError(f"module_weights is set, and method {method!r} reads no weights: leave it out")
    checked = {}
    for pattern, weights in module_weights.items():
        _compiled(pattern)
        try:
            checked[pattern] = check_merge(method, space, weights, adapters)
            if rule.strength is not None:
                check_way(method, checked[pattern])
        except ConfigError as error:
            raise ConfigError(f"module_weights of {shown(pattern)}: {error}") from error
    return checked


def pattern_of(name: str, patterns: Iterable[str], setting: str = _SETTING) -> str | None:
    """Return the first pattern that a module's name fits, None where none does; `setting` names whose they are.

    A pattern is a regular expression of the name or of its end, whole parts: `v_proj` fits every v_proj,
    `layers.[0-3].*` the first four layers. Source: PEFT's `rank_pattern`.
    """
    return next((pattern for pattern in patterns if _compiled(pattern, setting).fullmatch(name)), None)


def check_patterns(patterns: Iterable[str], names: Sequence[str], setting: str = _SETTING) -> None:
    """Raise ConfigError for a pattern that fits none of the modules `names`, or only such as an earlier one takes.

    `setting` names whose they are.
    """
    patterns = list(patterns)
    used = {pattern_of(name, patterns, setting) for name in names}
    idle = [pattern for pattern in patterns if pattern not in used]
    if idle:
        shown = f", the first is {names[0]!r}" if names else ""
        raise ConfigError(
            f"{setting} of {idle[0]!r} fits none of the {len(names)} modules{shown}, or only such that an earlier "
            "pattern takes: the first that fits counts; give the end of a name, or a regular expression"
        )


def _check(value: Any, beside: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    how = beside["how"]
    return check_module_weights(how.method, how.space, value, len(how.weights) - 1)


def _words(value: Mapping[str, Sequence[float]]) -> str:
    return "".join(f", {pattern} {' / '.join(f'{w:g}' for w in weights)}" for pattern, weights in value.items())


MODULE_WEIGHTS = Knob(
    _SETTING,
    "Weights for the modules whose name, or its end, a pattern fits, as {pattern: weights}; the first that fits "
    "counts.",
    _check,
)


@weights_rule(knob=MODULE_WEIGHTS, words=_words)
def by_pattern(weights: Weights, patterns: Mapping[str, tuple[float, ...]], _case: Case) -> Weights:
    """Return the weights of the first pattern that fits, those from before where none does.

    ConfigError for a pattern that fits none of the modules.
    """
    check_patterns(patterns, list(weights))
    fits = {name: pattern_of(name, patterns) for name in weights}
    return {name: weights[name] if fit is None else patterns[fit] for name, fit in fits.items()}


def _compiled(pattern: Any, setting: str = _SETTING) -> re.Pattern[str]:
    return as_pattern(pattern, f"{setting}:", within=(r"(?:.*\.)?(?:", ")"))
