"""The factors as they were before a merge, in one file beside a run, so that the merge can be undone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import AdapterError
from ..io.file_faults import reading_fault
from ..ops import LowRank, full_precision
from .factor_file import read_pairs, write_pairs
from .factors import LoraFactors

# `push_to_hub` of transformers uploads no folder of such a name.
SNAPSHOT_FOLDER = "_pre_merge"
# What earlier releases called it.
_EARLIER = "pre_merge"
SNAPSHOT_FILE = "factors.safetensors"
_KEYS = ("step", "norms")


@dataclass(frozen=True)
class Snapshot:
    """Factors of the merged modules as they were before the merge at optimizer step `step`.

    `factors`: canonical name -> A (r, d_in) and B (d_out, r), in the dtype they were trained in. `norms`: canonical
    name -> the Frobenius norms of A and B right after the merge, by which a later reader knows the merged weights.
    """

    step: int
    factors: Mapping[str, LowRank]
    norms: Mapping[str, tuple[float, float]]


def norms_of(factors: Mapping[str, LoraFactors]) -> dict[str, tuple[float, float]]:
    """Return the Frobenius norms of A and B of each module, in float32; the host waits once for the device."""
    return norms_of_pairs({name: LowRank(f.A, f.B) for name, f in factors.items()})


@full_precision()
def norms_of_pairs(pairs: Mapping[str, LowRank]) -> dict[str, tuple[float, float]]:
    """Return the Frobenius norms of A and B of each pair, as `norms_of`."""
    if not pairs:
        return {}
    device = next(iter(pairs.values())).A.device
    norms = torch.stack([t.float().norm().to(device) for pair in pairs.values() for t in pair]).tolist()
    return dict(zip(pairs, zip(norms[::2], norms[1::2], strict=True), strict=True))


def save_snapshot(run: Path, snapshot: Snapshot) -> Path:
    """Write `snapshot` into the folder `_pre_merge` of `run`, whole or not at all; return the file. Raises OSError."""
    folder = run / SNAPSHOT_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    about = {"step": json.dumps(snapshot.step), "norms": json.dumps(dict(snapshot.norms))}
    write_pairs(folder / SNAPSHOT_FILE, snapshot.factors, about)
    return folder / SNAPSHOT_FILE


def set_aside_snapshot(run: Path) -> None:
    """Give the snapshot of an earlier run in `run` the next free number, so that no later merge is undone with it."""
    for folder in (run / _EARLIER, run / SNAPSHOT_FOLDER):
        if folder.is_dir():
            numbers = range(1, len(list(run.iterdir())) + 2)
            folder.rename(next(p for n in numbers if not (p := run / f"{SNAPSHOT_FOLDER}.{n}").exists()))


def snapshot_in(run: Path) -> Path | None:
    """Return the snapshot's file in `run`, that of an earlier release too; None where there is none."""
    places = (run / name / SNAPSHOT_FILE for name in (SNAPSHOT_FOLDER, _EARLIER))
    return next((path for path in places if path.is_file()), None)


def load_snapshot(run: Path) -> Snapshot:
    """Read the snapshot of `run`; AdapterError where there is none, or one that cannot be read."""
    path = snapshot_in(run)
    if path is None:
        raise AdapterError(
            f"{str(run)!r} holds no {SNAPSHOT_FOLDER}/{SNAPSHOT_FILE}: no training there ended with a merge."
        )
    try:
        pairs, about = read_pairs(path)
        step, norms = (json.loads(about[key]) for key in _KEYS)
        pairs = {name: pairs[name] for name in norms}
    except (OSError, ValueError, KeyError) as error:
        raise AdapterError(f"{str(path)!r} {reading_fault(path, error, 'The merge cannot be undone.')}") from error
    return Snapshot(step, pairs, {name: tuple(pair) for name, pair in norms.items()})
