"""Adapters whose factors begin as a part of the base weight (PiSSA, OLoRA, ...): the update is measured against those.

Sources: PiSSA, arXiv:2404.02948; OLoRA, arXiv:2406.01775; CorDA, arXiv:2406.05223; LoftQ, arXiv:2310.08659; LoRA-GA,
arXiv:2407.05000. Each sets the base weight to W - s·B₀·A₀, so that training changes the model by s·(B·A - B₀·A₀).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..adapters.factor_file import read_pairs, write_pairs
from ..adapters.factors import LoraFactors
from ..errors import AdapterError
from ..io.file_faults import reading_fault
from ..ops import LowRank, full_precision

INITIAL_FILE = "safemerge_initial.safetensors"


@full_precision()
def initial_factors(factors: Mapping[str, LoraFactors]) -> dict[str, LowRank]:
    """Return a copy of the factors as they are, to measure later updates against."""
    return {name: LowRank(f.A.detach().clone(), f.B.detach().clone()) for name, f in factors.items()}


def since(factors: Mapping[str, LoraFactors], initial: Mapping[str, LowRank]) -> dict[str, LoraFactors]:
    """Return the factors with what they began as; AdapterError unless `initial` has each of them in its shape."""
    for name, now in factors.items():
        then = initial.get(name)
        if then is None or (then.A.shape, then.B.shape) != (now.A.shape, now.B.shape):
            shapes = "nothing" if then is None else f"{tuple(then.A.shape)} and {tuple(then.B.shape)}"
            raise AdapterError(
                f"module {name!r}: its initial factors should be {tuple(now.A.shape)} and {tuple(now.B.shape)}, and "
                f"are {shapes}. Give those that this very adapter began with."
            )
    return {name: replace(now, initial=initial[name]) for name, now in factors.items()}


def save_initial(folder: Path, initial: Mapping[str, LowRank], save: str = "") -> Path:
    """Write the initial factors into `folder`, whole or not at all, as part of `save`; return the file. OSError."""
    write_pairs(folder / INITIAL_FILE, initial, {"save": save})
    return folder / INITIAL_FILE


def load_initial(folder: str | Path, save: str | None = None) -> dict[str, LowRank]:
    """Read what `save_initial` wrote; AdapterError where there is none of this `save`, or one that cannot be read."""
    path = Path(folder) / INITIAL_FILE
    try:
        pairs, about = read_pairs(path) if path.is_file() else ({}, {})
    except (OSError, ValueError) as error:
        raise AdapterError(f"{str(path)!r} {reading_fault(path, error, 'Take another checkpoint.')}") from error
    if not pairs or (save is not None and about.get("save") != save):
        raise AdapterError(
            f"{str(folder)!r} holds no {INITIAL_FILE} of its own, and the factors began as a part of the base weight, "
            "so what training changed is not known. Resume from a checkpoint that this callback wrote, or start anew."
        )
    return pairs
