"""Take the final merge of a run back."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from ..adapters import Adapter, load_adapter, save_adapter
from ..adapters.snapshot import SNAPSHOT_FOLDER, Snapshot, load_snapshot, norms_of, norms_of_pairs
from ..decision import JOURNAL_FILE, Journal
from ..errors import AdapterError, ConfigError

MERGED_FOLDER = "merged"
# An engine trains in float32 and saves in half precision: the norms of one and the other differ by less than this.
_TOLERANCE = 1e-2


def undo_merge(run: str | Path) -> tuple[str, ...]:
    """Give the adapter in the folder `run` the factors it had before its final merge; return the modules' names.

    `run` is the output folder of a training (where `trainer.save_model()` put the adapter), or a checkpoint in it.
    The merged adapter is kept in `run`/merged, the journal notes the undoing. Modules that the final merge did not
    touch, and earlier merges, stay. Raises ConfigError where `run` holds no final merge or one that was undone already,
    and AdapterError where the adapter is not the one that was merged; nothing is changed then.
    """
    folder = Path(run).expanduser()
    home = folder if (folder / SNAPSHOT_FOLDER).is_dir() else folder.parent
    if not (home / SNAPSHOT_FOLDER).is_dir():
        raise ConfigError(
            f"run {str(run)!r} holds no folder {SNAPSHOT_FOLDER}: give the output folder of a training whose end merged"
        )
    snapshot, merged = load_snapshot(home), load_adapter(folder, moved_base=True)
    _require_merged(merged, snapshot, str(run))
    save_adapter(folder / MERGED_FOLDER, merged)
    save_adapter(folder, _restored(merged, snapshot))
    names = tuple(snapshot.factors)
    Journal(home / JOURNAL_FILE).append(
        {"kind": "undo", "step": snapshot.step, "folder": folder.name, "modules": list(names)}
    )
    return names


def _require_merged(adapter: Adapter, snapshot: Snapshot, run: str) -> None:
    """Refuse an adapter that is not, to rounding, what the merge left."""
    missing = [name for name in snapshot.factors if name not in adapter.factors]
    if missing:
        raise AdapterError(
            f"the adapter in {run!r} is another one: it lacks {len(missing)} merged modules, first {missing[0]!r}"
        )
    now = norms_of({name: adapter.factors[name] for name in snapshot.factors})
    other = [name for name in now if not _alike(now[name], snapshot.norms[name])]
    if not other:
        return
    before = norms_of_pairs(snapshot.factors)
    if all(_alike(now[name], before[name]) for name in now):
        raise ConfigError(f"run {run!r}: its merge at step {snapshot.step} was undone already")
    raise AdapterError(
        f"{len(other)} modules of the adapter in {run!r} are not as the merge at step {snapshot.step} left them, first "
        f"{other[0]!r}: it was trained on or edited since, and cannot be undone"
    )


def _alike(x: tuple[float, ...], y: tuple[float, ...]) -> bool:
    return all(math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=1e-12) for a, b in zip(x, y, strict=True))


def _restored(adapter: Adapter, snapshot: Snapshot) -> Adapter:
    """The adapter with the factors of before the merge, in the dtype of its file."""
    factors = dict(adapter.factors)
    for name, (A, B) in snapshot.factors.items():
        saved = factors[name]
        factors[name] = replace(saved, A=A.to(saved.A.dtype), B=B.to(saved.B.dtype))
    return replace(adapter, factors=factors)
