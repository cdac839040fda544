"""The papers' own settings by name, where they differ from the defaults here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ...io.choices import one_of

_AFTER_TRAINING = {"every": 0, "at_train_end": True}
# Name -> settings. Each merges once, when training ends, as its source does after it.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # SafeMERGE, arXiv:2503.17239, as its released script does it: A and B summed apart, .8/.2, below 0.35.
        "safemerge": {
            **_AFTER_TRAINING,
            "gate": "threshold",
            "threshold": 0.35,
            "method": "linear",
            "space": "factor",
            "weights": [0.8, 0.2],
        },
        # Safe LoRA, arXiv:2405.16833, as released: the ten modules of lowest cosine projected on V.
        "safelora": {**_AFTER_TRAINING, "gate": "num_layers", "num_layers": 10, "method": "project"},
    }
)


def with_preset(knobs: dict[str, Any]) -> dict[str, Any]:
    """Return `knobs` with `preset` replaced by the settings that it names; those that are given go before its own.

    ConfigError for an unknown name.
    """
    if "preset" not in knobs:
        return knobs
    rest = {key: value for key, value in knobs.items() if key != "preset"}
    name = one_of(knobs["preset"], sorted(PRESETS), "preset")
    settings = {key: list(value) if isinstance(value, list) else value for key, value in PRESETS[name].items()}
    return {**settings, **rest}
