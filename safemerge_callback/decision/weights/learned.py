"""`learned`: each module's weights are those with the least objective on the rows of a check."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError, nearest, shown
from ...io.knobs import Knob
from ...methods.how import How
from .registry import Case, Weights, check_additive, weights_rule

# What `signals.coefficients.SearchSettings` is made with, which checks the values before the first step.
SETTINGS = (
    *("objective", "granularity", "minimiser", "share", "penalty", "evaluations", "batch_size", "temperature"),
    "seed",
)
_SIGNAL = "learned_share"


def _check(value: Any, _beside: Mapping[str, Any]) -> dict[str, Any] | None:
    if value is None or value is False:
        return None
    settings = {"granularity": value} if isinstance(value, str) else value
    if not isinstance(settings, Mapping):
        raise ConfigError(
            f"learned is {shown(value)}: give run, block or module, or a mapping of some of {list(SETTINGS)}"
        )
    for name in settings:
        if name not in SETTINGS:
            raise ConfigError(
                f"learned: setting {shown(name)} is unknown"
                f"{nearest(str(name), SETTINGS, then=f'choose among {list(SETTINGS)}')}"
            )
    return {"granularity": "run", **settings}


def _fits(how: How) -> None:
    check_additive(how, "learned with", "weights that are learned of a sum")
    if len(how.weights) != 2:
        raise ConfigError(
            f"learned with weights {how.weights}: at a check one coefficient a module is learned, toward one safety "
            "adapter or the aligned model: give one; `safemerge search` takes several"
        )


def _words(value: Mapping[str, Any]) -> str:
    return f", learned by {value.get('objective', 'kl')}, one a {value['granularity']}"


LEARNED = Knob(
    "learned",
    "Learn the weights at each check: run, block or module, or a mapping of a search's settings.",
    _check,
)


@weights_rule(knob=LEARNED, fits=_fits, needs=frozenset({_SIGNAL}), grouped=False, words=_words)
def learned(weights: Weights, _settings: Mapping[str, Any], case: Case) -> Weights:
    """Return (1 - λ, λ) with each module's λ, as `signals.module_signals.learned_share` has it; patterns give way.

    Source: One Bad Model, arXiv:2406.14563, and AdaMerging, arXiv:2310.02575: that coefficients are learned from data.
    Differs: see `docs/search.md`. ConfigError for readings without it: it is taken in training, and
    offline where rows are given.
    """
    if not case.readings:
        return weights
    return {name: _shared(name, module_weights, case) for name, module_weights in weights.items()}


def _shared(name: str, weights: tuple[float, ...], case: Case) -> tuple[float, ...]:
    reading = case.readings.get(name)
    if reading is None or _SIGNAL not in reading.signals:
        raise ConfigError(
            f"learned: module {name!r} has no {_SIGNAL}, which is asked of the live model: use it in training, "
            "name rows to a merge of files, or use `safemerge search`"
        )
    share = reading.signals[_SIGNAL]
    return (1.0 - share, share) if math.isfinite(share) else (1.0, *(0.0 for _ in weights[1:]))
