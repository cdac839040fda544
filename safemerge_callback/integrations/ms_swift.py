"""ms-swift's callback `safemerge`, with its settings under `ENV` in ms-swift's YAML.

A file that ms-swift loads by `external_plugins` registers it:

    from safemerge_callback.integrations.ms_swift import register
    register()

ms-swift refuses keys that it does not know, and its callbacks receive no settings: environment variables, which its
YAML sets for all processes, are what it leaves. Source: modelscope/ms-swift, swift/callbacks/base.py and mapping.py
(callbacks_map), swift/trainers/mixin.py (_get_callbacks), swift/cli/main.py (parse_yaml_args), as of 4.6.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ConfigError, shown
from ..evaluation.harvest_cache import VARIABLE as CACHE
from ..io.documents import parse_yaml
from ..training import SafeMergeCallback, SafeMergeConfig
from . import split_settings

NAME = "safemerge"
PREFIX = "SAFEMERGE_"


def register(registry: dict[str, Callable[..., Any]] | None = None) -> None:
    """Put `safemerge` among the names that ms-swift's `callbacks` takes; `registry` is its callbacks_map."""
    if registry is None:
        from swift.callbacks import callbacks_map

        registry = callbacks_map
    registry[NAME] = make_callback


def make_callback(_args: Any, trainer: Any) -> SafeMergeCallback:
    """Return the callback of a trainer, called as every entry of callbacks_map; ConfigError as `config_of`."""
    callback = SafeMergeCallback(config_of(os.environ))
    return callback if trainer is None else callback.attach(trainer)


def config_of(environment: Mapping[str, str]) -> SafeMergeConfig:
    """Return the settings that variables such as SAFEMERGE_THRESHOLD hold, their values read as YAML.

    Raises ConfigError where there is none, and for a variable or a value that is refused.
    """
    settings, _ = split_settings({name: text for name, text in environment.items() if name != CACHE}, PREFIX)
    if not settings:
        raise ConfigError(
            f"callback {NAME!r} has no settings: set {PREFIX}SUBSPACE and others under `ENV` of ms-swift's YAML or in "
            f"the environment, or take {NAME!r} out of `callbacks`"
        )
    return SafeMergeConfig.from_dict({name.lower(): _value(PREFIX + name, text) for name, text in settings.items()})


def _value(variable: str, text: str) -> Any:
    return parse_yaml(text, f"variable {variable}, {shown(text)},", advice="Write it as in a YAML file")
