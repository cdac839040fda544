"""A changed adapter written to a folder, one module at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ..ops import LowRank
from .checkpoint import Adapter, module_path, require_finite
from .factors import LoraFactors
from .files import CONFIG, WEIGHTS
from .rank_pattern import config_with
from .tensor_file import Spec, TensorFile


def save_changed(
    folder: Path, adapter: Adapter, ranks: Mapping[str, int], changed: Iterable[tuple[str, LowRank]]
) -> None:
    """Write `adapter` with the factors of the modules in `ranks` replaced, at those ranks, by what `changed` yields.

    Byte for byte what `save_adapter` would write of the changed adapter, but a module at a time. `changed` yields each
    module of `ranks` once, (r, d_in) and (d_out, r) in its old scaling; they are cast once to the dtype they had.
    `folder` is new and stays when this fails: let the caller remove it. Raises AdapterError for factors that are not
    finite, and OSError.
    """
    folder.mkdir(parents=True)
    shapes = {name: _announced(adapter.factors[name], ranks.get(name)) for name in adapter.factors}
    layout = {key: Spec(tensor.dtype, tuple(tensor.shape)) for key, tensor in adapter.extra.items()}
    for name, module in shapes.items():
        pair = adapter.keys[name]
        layout[pair.A], layout[pair.B] = (Spec(t.dtype, tuple(t.shape)) for t in (module.A, module.B))
    where = f"adapter {adapter.source!r}, to be saved,"
    with TensorFile(folder / WEIGHTS, layout) as file:
        for key in adapter.extra:
            file.put(key, adapter.extra[key])
        for name in adapter.factors:
            if name not in ranks:
                module = adapter.factors[name]
                _put(file, adapter, name, LowRank(module.A, module.B), where)
        for name, update in changed:
            _put(file, adapter, name, update, where)
    paths = {module_path(adapter.keys[name].A): module for name, module in shapes.items()}
    text = json.dumps(config_with(adapter.config, paths), indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


def _announced(module: LoraFactors, rank: int | None) -> LoraFactors:
    """The module without its numbers, at its new rank."""
    rank = rank or module.rank
    A = torch.empty(rank, module.d_in, dtype=module.A.dtype, device="meta")
    return replace(module, A=A, B=torch.empty(module.d_out, rank, dtype=module.B.dtype, device="meta"))


def _put(file: TensorFile, adapter: Adapter, name: str, update: LowRank, where: str) -> None:
    pair, old = adapter.keys[name], adapter.factors[name]
    cast = {pair.A: update.A.detach().to("cpu", old.A.dtype), pair.B: update.B.detach().to("cpu", old.B.dtype)}
    require_finite(cast, where)
    for key, tensor in cast.items():
        file.put(key, tensor)
