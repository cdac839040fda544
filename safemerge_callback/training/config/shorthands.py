"""Shorthands of the settings: the papers' own by name, and a merge as an entry in the list of corrections."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ...corrections.merge import MERGE
from ...corrections.registry import named_entries
from ...errors import ConfigError, shown
from ...io.choices import one_of
from ...io.documents import parse_json, read_yaml

# Settings of a run, whatever is done to it.
OF_THE_RUN = ("corrections", "adapter_name", "placement", "journal", "quiet", "wandb_chart")
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


def with_merge_entry(knobs: dict[str, Any]) -> dict[str, Any]:
    """Return `knobs` with the settings of an entry `merge` of `corrections` in the place of that entry.

    ConfigError where some of a merge's settings stand beside it, where there are two such entries, and where one names
    no subspace.
    """
    listed = as_list(knobs.get("corrections"))
    if listed is None:
        return knobs
    entries = named_entries(listed)
    merges = [settings for name, settings in entries if name == MERGE]
    rest = [{name: dict(settings)} for name, settings in entries if name != MERGE]
    others = rest or (None if merges else [])
    flat = {**{key: value for key, value in knobs.items() if key != "corrections"}, "corrections": others}
    if not merges:
        return flat
    beside = sorted(flat.keys() - set(OF_THE_RUN))
    if len(merges) > 1 or beside:
        why = f"settings {beside} of a merge stand beside it" if beside else "there are two"
        raise ConfigError(f"corrections hold a merge, and {why}: give a merge's settings in one place")
    if merges[0].get("subspace") is None:
        raise ConfigError(
            "setting 'subspace' is missing, and corrections hold a merge, which measures with it: give the "
            "safety-subspace file (`safemerge build` makes one), or leave the merge out"
        )
    twice = sorted((flat.keys() & merges[0].keys()) - {"corrections"})
    if twice or "corrections" in merges[0]:
        raise ConfigError(f"corrections hold a merge with {twice or ['corrections']}: give those beside the list")
    return {**flat, **merges[0]}


def as_list(corrections: Any) -> Any:
    """Return the setting `corrections`, or what its text means, as on a command line: a YAML file, or JSON."""
    if not isinstance(corrections, str):
        return corrections
    who = f"corrections {shown(corrections)}"
    if corrections.endswith((".yaml", ".yml")):
        return read_yaml(corrections, who)
    return parse_json(corrections, who, advice='Give such as [{"name": {"every": 10}}], or a file that ends in .yaml')
