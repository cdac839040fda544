"""Where models that are made once are kept, and how they get there: whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def cache_folder(cache: Path | None) -> Path:
    """Return where packaged models are kept."""
    return Path(cache or os.environ.get("SAFEMERGE_CACHE") or ROOT / ".cache")


def written_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return `folder`, made aside and renamed, so that it is either whole or absent whatever stops or races us."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.", ignore_cleanup_errors=True) as aside:
        scratch = Path(aside) / "checkpoint"
        make(scratch)
        try:
            scratch.rename(folder)
        except OSError:
            # Another process of a distributed run was first: its folder is the same.
            if not folder.is_dir():
                raise
    return folder


def merged_checkpoint(base: Path, adapter: Path, target: Path) -> None:
    """Write `base` + `adapter` (W + s·B·A in float32) with the base's tokenizer as a checkpoint in `target`."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(target)
    AutoTokenizer.from_pretrained(base).save_pretrained(target)
