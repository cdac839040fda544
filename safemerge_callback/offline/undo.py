"""Take the final merge of a run back."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from ..adapters import Adapter, load_adapter, save_adapter
from ..adapters.files import CONFIG
from ..adapters.snapshot import SNAPSHOT_FOLDER, Snapshot, load_snapshot, norms_of, norms_of_pairs, snapshot_in
from ..errors import AdapterError, ConfigError
from ..io.paths import as_path
from ..io.whole_file import settle
from ..record import JOURNAL_FILE, Journal, read_journal
from ..record.entries import undo_entry, undo_noted

MERGED_FOLDER = "merged"
# An engine trains in float32 and saves in half precision: the norms of one and the other differ by less than this.
_TOLERANCE = 1e-2


class Undone(NamedTuple):
    """What was undone: the modules' names, and the folder that keeps the merged adapter."""

    modules: tuple[str, ...]
    kept: Path


def undo_merge(run: str | Path) -> tuple[str, ...]:
    """Give the adapter in the folder `run` the factors it had before its final merge; return the modules' names.

    `run` is the output folder of a training (where `trainer.save_model()` put the adapter), or a checkpoint in it; an
    adapter with a name of its own is found in the folder of that name. The merged adapter is kept in the folder
    `merged` beside its files, the journal notes the undoing. Modules that the final merge did not touch, and earlier
    merges, stay. Killed at any moment, it leaves the merged adapter or the other, and running it again finishes it.

    Raises ConfigError where `run` holds no final merge or one that was undone already, and AdapterError where no
    adapter there is the one that was merged; nothing is changed then.
    """
    return take_back(run).modules


def take_back(run: str | Path) -> Undone:
    """Do what `undo_merge` does, and tell where the merged adapter is kept."""
    folder = Path(os.path.abspath(as_path(run, "run")))  # noqa: PTH100  links in it are not followed
    home = _home(folder, str(run))
    snapshot = load_snapshot(home)
    place, merged = _merged(folder, snapshot, str(run))
    journal = Journal(home / JOURNAL_FILE)
    entry = undo_entry(snapshot.step, _named(place, home), snapshot.factors)
    restored = _restored(merged, snapshot)
    if not _equal(restored, merged):
        save_adapter(place / MERGED_FOLDER, merged)
        save_adapter(place, restored)
    elif undo_noted(read_journal(journal.path), entry):
        raise ConfigError(f"run {str(run)!r}: its merge at step {snapshot.step} was undone already")
    journal.append(entry)
    return Undone(tuple(snapshot.factors), place / MERGED_FOLDER)


def _home(folder: Path, run: str) -> Path:
    """The output folder of the training: `folder`, or that of a checkpoint or an adapter in it."""
    for home in [folder, *folder.parents][:3]:
        if snapshot_in(home):
            return home
        if _without_subspace(home):
            raise ConfigError(
                f"run {run!r} had no subspace, so it merged nothing and there is no merge to take back: what it did "
                f"otherwise is in its journal (safemerge report {shlex.quote(str(home))})"
            )
    raise ConfigError(
        f"run {run!r} holds no folder {SNAPSHOT_FOLDER}: give the output folder of a training whose end merged"
    )


def _without_subspace(home: Path) -> bool:
    """Whether the folder's journal tells of a training that had nothing to measure or merge with."""
    if not (home / JOURNAL_FILE).is_file():
        return False
    entries = read_journal(home / JOURNAL_FILE)
    sources = [entry.get("subspace") for entry in entries if entry.get("kind") == "start"]
    return bool(sources) and all(isinstance(one, Mapping) and one.get("path", "") is None for one in sources)


def _merged(folder: Path, snapshot: Snapshot, run: str) -> tuple[Path, Adapter]:
    """The adapter that was merged, undone or not, and its folder; it may stand beside adapters that were not trained.

    The error of the first where there is none.
    """
    refusals = []
    for place in _adapter_folders(folder):
        try:
            adapter = load_adapter(place, moved_base=True)
            _require_merged(adapter, snapshot, run)
            return place, adapter
        except (AdapterError, ConfigError) as error:
            refusals.append(error)
    raise refusals[0]


def _adapter_folders(folder: Path) -> Iterator[Path]:
    """`folder`, and those in it that PEFT names after their adapters; not the copy that an undoing kept."""
    with suppress(OSError):
        settle(folder)
    below = [path for path in sorted(folder.iterdir()) if (path / CONFIG).is_file()] if folder.is_dir() else []
    alone = not below or (folder / CONFIG).is_file()
    if alone:
        yield folder
    yield from (path for path in below if not alone or path.name != MERGED_FOLDER)


def _require_merged(adapter: Adapter, snapshot: Snapshot, run: str) -> None:
    """Refuse an adapter that is neither, to rounding, what the merge left, nor what undoing it leaves, to the bit."""
    missing = [name for name in snapshot.factors if name not in adapter.factors]
    if missing:
        raise AdapterError(
            f"the adapter in {run!r} is another one: it lacks {len(missing)} merged modules, first {missing[0]!r}"
        )
    now = norms_of({name: adapter.factors[name] for name in snapshot.factors})
    other = [name for name in now if not _alike(now[name], snapshot.norms[name])]
    if not other or _equal(_restored(adapter, snapshot), adapter):
        return
    before = norms_of_pairs(snapshot.factors)
    if all(_alike(now[name], before[name]) for name in now):
        raise ConfigError(f"run {run!r}: its merge at step {snapshot.step} was undone already")
    raise AdapterError(
        f"{len(other)} modules of the adapter in {run!r} are not as the merge at step {snapshot.step} left them, first "
        f"{other[0]!r}: it is an earlier checkpoint, or was trained on or edited since, and cannot be undone"
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


def _equal(one: Adapter, other: Adapter) -> bool:
    pairs = [(one.factors[name], module) for name, module in other.factors.items()]
    return all(torch.equal(x.A, y.A) and torch.equal(x.B, y.B) for x, y in pairs)


def _named(place: Path, home: Path) -> str:
    """What the journal calls the adapter's folder: as seen from the run's, which has a name of its own."""
    return place.name if place == home else place.relative_to(home).as_posix()
