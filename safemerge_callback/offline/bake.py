"""An adapter added into the weights of its base model, shard by shard; no model is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..adapters import Adapter, LoraFactors, canonical_name, open_adapter
from ..adapters.tensor_file import DTYPES, Spec, TensorFile
from ..addresses import address_of, fetched
from ..errors import AdapterError, SubspaceError
from ..ops import full_precision
from ..subspace.checkpoints.locate import INDEX, locate
from .tied import HEAD, head_of, untie

# The folder in a baked output that holds the adapter itself: beside the weights, loaders would add it a second time.
BAKED_ADAPTER = "adapter"
_COPIED = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_BLOCK = 1 << 22


@dataclass(frozen=True)
class BaseModel:
    """A checkpoint in a folder: `files` are its shards, `shapes` map each file to its tensors' keys and specs."""

    folder: Path
    shapes: Mapping[str, Mapping[str, Spec]]

    @classmethod
    def find(cls, source: str | Path) -> BaseModel:
        """Return the checkpoint of a folder or Hub id (fetched into the Hub's cache); headers only are read.

        SubspaceError for what has no safetensors weights, AdapterError for dtypes that this package does not know.
        """
        folder = _folder(source)
        shapes: dict[str, dict[str, Spec]] = {}
        for file in locate(folder).files:
            shapes[file.name] = {}
            for key, (shape, dtype) in file.tensors().items():
                if dtype not in DTYPES:
                    raise AdapterError(f"base model {str(source)!r}: {key!r} is of {dtype}, allowed are {[*DTYPES]}")
                shapes[file.name][key] = Spec(DTYPES[dtype], shape)
        return cls(folder, shapes)

    @property
    def file_names(self) -> set[str]:
        """The files and folders that a baked output of this model holds."""
        return {*self.shapes, INDEX, BAKED_ADAPTER, *(path.name for path in self._small_files())}

    @full_precision()
    def bake(self, adapter: str | Path, output: Path, device: torch.device | str | None = None) -> None:
        """Write the checkpoint with `adapter` added into `output`, an existing folder.

        W + s·B·A in float32 or better, cast once to the dtype that the shard has, a tensor at a time; other tensors are
        copied to the bit, and so are configuration, tokenizer and licence. Whole tensors that the adapter holds (heads,
        biases) take their places. Equals `merge_and_unload` of PEFT to rounding. Differs: where input embedding and
        output head are one tied tensor and the adapter changes one of them, they are stored apart and untied in
        config.json, as the adapter has it; PEFT's merge changes both.

        Raises AdapterError for modules that the checkpoint lacks or has in another shape or an integer dtype.
        """
        added = open_adapter(adapter)
        keys = {canonical_name(key): (file, key) for file, held in self.shapes.items() for key in held}
        head = head_of(self.folder, keys, {*added.factors, *map(canonical_name, added.extra)})
        _check(added, self.shapes, keys, head)
        layouts = {file: dict(held) for file, held in self.shapes.items()}
        if head is not None and HEAD not in keys:
            file, key = keys[head]
            layouts[file][f"{HEAD}.weight"] = self.shapes[file][key]
        for path in self._small_files():
            shutil.copyfile(path, output / path.name)
        for file, layout in layouts.items():
            self._write_shard(output / file, layout, added, self.folder / file, keys[head][1] if head else None, device)
        if len(layouts) > 1 or (self.folder / INDEX).exists():
            _write_index(output / INDEX, layouts)
        if head is not None:
            untie(output / "config.json")

    def _write_shard(
        self,
        path: Path,
        layout: Mapping[str, Spec],
        adapter: Adapter,
        source: Path,
        tied: str | None,
        device: torch.device | str | None,
    ) -> None:
        whole = {canonical_name(key): key for key in adapter.extra}
        with TensorFile(path, layout) as target:
            for key in layout:
                name = canonical_name(key)
                stored = tied if tied and name == HEAD and key not in self.shapes[source.name] else key
                weight = adapter.extra[whole[name]].to(layout[key].dtype) if name in whole else _read(source, stored)
                if key.endswith(".weight") and name in adapter.factors:
                    weight = _added(weight, adapter.factors[name], device)
                target.put(key, weight)

    def _small_files(self) -> Iterable[Path]:
        for path in sorted(self.folder.iterdir()):
            kept = path.suffix in _COPIED or path.name.upper().startswith(_LICENCES)
            if path.is_file() and kept and path.name != INDEX and not path.name.startswith("adapter_"):
                yield path


def _folder(source: str | Path) -> Path:
    address = address_of(source, "base model", error=SubspaceError)
    if address.path is not None and address.path.is_file():
        raise SubspaceError(f"base model {str(source)!r} is a file: give the folder that holds it and its config.json.")
    patterns = ["*.safetensors", INDEX, *(f"*{suffix}" for suffix in _COPIED), *(f"{name}*" for name in _LICENCES)]
    return fetched(address, patterns, "base model", error=SubspaceError).resolve()


def _read(path: Path, key: str) -> Tensor:
    # Opened anew for each tensor, so that the pages of the one before are given back.
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(key)


def _check(
    adapter: Adapter, shapes: Mapping[str, Mapping[str, Spec]], keys: Mapping[str, tuple[str, str]], head: str | None
) -> None:
    """Refuse before a byte is written."""
    known = {*keys, *([HEAD] if head else [])}
    lacking = [name for name in (*adapter.factors, *map(canonical_name, adapter.extra)) if name not in known]
    if lacking:
        raise AdapterError(
            f"adapter {adapter.source!r} changes {len(lacking)} modules that the base model lacks, the first is "
            f"{lacking[0]!r}: give the base model that it was trained on"
        )
    for name, module in adapter.factors.items():
        file, key = keys[head if name == HEAD and head and HEAD not in keys else name]
        dtype, shape = shapes[file][key]
        wanted = module.shape[::-1] if module.transposed else module.shape
        if shape != wanted or not dtype.is_floating_point or dtype.itemsize < 2:
            raise AdapterError(
                f"module {name!r}: the adapter's update is {wanted} and the base model has {key!r} as {shape} of "
                f"{dtype}: give the base model that it was trained on, unquantised"
            )


def _added(weight: Tensor, module: LoraFactors, device: torch.device | str | None) -> Tensor:
    """W + s·B·A in the dtype of W, a block of rows at a time."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    A, B = (factor.to(device or "cpu", wide) for factor in (module.A, module.B))
    left, right = (A.mT, B.mT) if module.transposed else (B, A)
    new = torch.empty_like(weight, memory_format=torch.contiguous_format)
    rows = max(1, _BLOCK // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        update = (left[part] @ right) * module.scaling
        new[part] = (weight[part].to(update) + update).to("cpu", weight.dtype)
    return new


def _write_index(path: Path, layouts: Mapping[str, Mapping[str, Spec]]) -> None:
    listed = {key: file for file, layout in layouts.items() for key in layout}
    specs = [spec for layout in layouts.values() for spec in layout.values()]
    size = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in specs)
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": listed}, indent=2, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")
