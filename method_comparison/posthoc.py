"""A cell that merges after training: its parent's adapter, merged as its settings say."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safemerge_callback.errors import ConfigError
from safemerge_callback.offline import merge_adapters


def merge_after(settings: Mapping[str, Any]) -> None:
    """Merge with the arguments of `merge_adapters`; what an interrupted try left in `output` is replaced.

    ConfigError where the parent's adapter is absent: its own cell failed.
    """
    finetuned, output = Path(settings["finetuned"]), Path(settings["output"])
    if not (finetuned / "adapter_model.safetensors").is_file():
        raise ConfigError(f"there is no adapter to merge in {str(finetuned)!r}: look at why its own cell failed")
    shutil.rmtree(output, ignore_errors=True)
    given = {key: value for key, value in settings.items() if key not in ("finetuned", "safety", "subspace", "output")}
    with warnings.catch_warnings():
        # The grid says that they are of one model; a copy of it may be called anything.
        warnings.filterwarnings("ignore", message="safemerge: base models have different names")
        merge_adapters(finetuned, settings["safety"], settings["subspace"], output, **given)
