"""Write a full checkpoint: a base model with an adapter in its weights, with more or less of its alignment vector."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ..adapters import Adapter
from ..errors import ConfigError
from ..io.addresses import source_name
from ..io.card import caveat, escaped, front_matter
from ..subspace import Subspace
from .alignment import Alignment
from .bake import BaseModel
from .output import CARD, free_output, new_folder
from .parts import AdapterSource, adapter_of, subspace_of


def bake_adapter(
    adapter: AdapterSource | None,
    base: str | Path,
    output: str | Path,
    *,
    align: float | Mapping[str, float] = 1.0,
    align_rank: int | None = None,
    subspace: str | Path | Subspace | None = None,
    overwrite: bool = False,
    device: torch.device | str | None = None,
) -> Path:
    """Write W_unaligned + c·V + s·B·A as a checkpoint into `output`, and return the folder; no model is loaded.

    Source and conventions: `offline/alignment.py`. `base` is the aligned model, W_unaligned + V, so that `align` 1, the
    default, adds nothing to it but the adapter; `adapter` None adds none.
    align: c, one number from 0 to 10 or a mapping from patterns of module names to numbers, modules without one at 1.
    align_rank: only so many leading directions of V go beyond 1. subspace: the file that holds V, of this base.

    It appears whole or not at all. Raises ConfigError for settings that cannot be or an output that may not be written,
    SubspaceError for a V that does not fit the base, and what `BaseModel.bake` raises; nothing is written then.
    """
    alignment = _alignment(align, align_rank, subspace)
    if adapter is None and (alignment is None or not alignment.coefficients):
        raise ConfigError("there is nothing to bake: give an adapter, or align other than 1 with a subspace")
    model = BaseModel.find(base)
    target = free_output(output, [adapter, base, subspace], overwrite, model.file_names)
    added = None if adapter is None else adapter_of(adapter)
    with new_folder(target) as folder:
        folder.mkdir()
        model.bake(added, folder, device, alignment)
        (folder / CARD).write_text(_card(added, str(base), alignment), encoding="utf-8")
    return target


def _alignment(
    align: float | Mapping[str, float], rank: int | None, subspace: str | Path | Subspace | None
) -> Alignment | None:
    if subspace is not None:
        return Alignment.of(subspace_of(subspace), align, rank)
    if align != 1.0 or rank is not None:
        setting = "align" if align != 1.0 else "align_rank"
        raise ConfigError(f"{setting} was given without a subspace: give the file that holds the alignment vector")
    return None


def _card(adapter: Adapter | None, base: str, alignment: Alignment | None) -> str:
    facts = {
        "base model": source_name(base),
        "adapter": None if adapter is None else source_name(adapter.source),
        "alignment": None if alignment is None else alignment.words,
        "subspace": None if alignment is None else alignment.subspace.name,
    }
    rows = [f"| {name} | {escaped(value)} |" for name, value in facts.items() if value]
    title = "# Model with a LoRA adapter added in\n" if adapter else "# Model with another share of its alignment\n"
    return "\n".join([front_matter(base, baked=True), title, "| | |", "|---|---|", *rows, "", caveat("This"), ""])
