"""An adapter added into the weights of its base model, shard by shard; no model is loaded."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..adapters import Adapter, LoraFactors, canonical_name, open_adapter
from ..adapters.beside import beside_factors
from ..adapters.files import TOKENIZER
from ..adapters.tensor_file import DTYPES, Spec, TensorFile
from ..errors import AdapterError, SubspaceError
from ..io.addresses import address_of, fetched
from ..ops import full_precision
from ..subspace.checkpoints.locate import INDEX, locate
from ..subspace.checkpoints.quantised import quantised, quantised_modules
from ..subspace.checkpoints.shard_files import LocalFile
from .alignment import Alignment, Rows
from .blueprint import BakedTensor, Blueprint, blueprint, rewrite_config, tied_embedding
from .small_files import PATTERNS, copy_model, copy_tokenizer, small_files, tokenizer_files

# The folder in a baked output that holds the adapter itself: beside the weights, loaders would add it a second time.
BAKED_ADAPTER = "adapter"
_BLOCK = 1 << 22


@dataclass(frozen=True)
class BaseModel:
    """A checkpoint in a folder: `files` are its shards, `shapes` map each file to its tensors' keys and specs.

    `source` is how it was named, and `quantised` maps modules that are packed to the format.
    """

    folder: Path
    shapes: Mapping[str, Mapping[str, Spec]]
    source: str = ""
    quantised: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def find(cls, source: str | Path) -> BaseModel:
        """Return the checkpoint of a folder or Hub id (fetched into the Hub's cache); headers only are read.

        SubspaceError for what has no safetensors weights, AdapterError for dtypes that this package does not know.
        """
        folder = _folder(source)
        located = locate(folder)
        stored = {file.name: file.tensors() for file in located.files}
        packed = quantised_modules({k: v for tensors in stored.values() for k, v in tensors.items()}, located.config)
        shapes: dict[str, dict[str, Spec]] = {}
        for file, tensors in stored.items():
            for key, (_, dtype) in tensors.items():
                if dtype not in DTYPES:
                    raise AdapterError(f"base model {str(source)!r}: {key!r} is of {dtype}, allowed are {[*DTYPES]}")
            shapes[file] = {key: Spec(DTYPES[dtype], shape) for key, (shape, dtype) in tensors.items()}
        return cls(folder, shapes, str(source), packed)

    @property
    def file_names(self) -> set[str]:
        """The files and folders that a baked output of this model may hold."""
        return {*self.shapes, INDEX, BAKED_ADAPTER, *TOKENIZER, *(path.name for path in small_files(self.folder))}

    def blueprint(self, adapter: Adapter) -> Blueprint:
        """Return what `adapter` makes of this checkpoint; whatever forbids it is found here, from headers.

        Raises SubspaceError where what the adapter changes is quantised, and AdapterError for modules that the
        checkpoint lacks or has in another shape, and for a vocabulary that is resized in parts.
        """
        beside = beside_factors(adapter)
        packed = [name for name in (*adapter.factors, *beside) if name in self.quantised]
        if packed:
            total = len(adapter.factors) + len(beside)
            raise quantised(f"base model {self.source!r}", self.quantised[packed[0]], packed, total)
        names = {canonical_name(key) for specs in self.shapes.values() for key in specs}
        return blueprint(adapter, self.shapes, tied_embedding(self.folder, names, {*adapter.factors, *beside}))

    def tensor(self, name: str) -> Tensor | None:
        """Return the tensor of this canonical name, mapped from its shard; None where there is none."""
        for file, specs in self.shapes.items():
            for key, spec in specs.items():
                if canonical_name(key) == name:
                    return _read(LocalFile(self.folder / file), key, spec)
        return None

    def check_alignment(self, alignment: Alignment, plan: Blueprint) -> None:
        """Raise SubspaceError unless `alignment` may be added to what `plan` makes of this checkpoint."""
        parts = [part for shard in plan.shards.values() for part in shard.values()]
        specs = {canonical_name(part.source): part.spec for part in parts}
        alignment.check(specs, self.quantised, self.tensor, self.source)

    @full_precision()
    def bake(
        self,
        adapter: str | Path | Adapter | None,
        output: Path,
        device: torch.device | str | None = None,
        alignment: Alignment | None = None,
    ) -> None:
        """Write the checkpoint with `adapter` added into `output`, an existing folder; None adds none.

        `alignment`: how much more of the alignment vector there is to be, added in the same sum.
        W + s·B·A in float32 or better, cast once to the dtype that the shard has, a tensor at a time; other tensors are
        copied to the bit, and so are configuration, licence, and code that the model refers to (never run). Whole
        tensors that the adapter holds (heads, biases, resized embeddings) and trained rows take their places; the
        configuration then has their number of tokens. The tokenizer is the one that lies
        beside the adapter, else the base model's.
        Equals `merge_and_unload` of PEFT to rounding. Differs: where input embedding and output head are one tied
        tensor and the adapter has something else for the one than for the other, they are stored apart and untied in
        config.json, as the adapter has it; PEFT's merge changes both.

        Raises what `blueprint` raises, before anything is written. Warns where a vocabulary was resized and no
        tokenizer beside the adapter knows the new tokens.
        """
        added = _opened(adapter)
        plan = self.blueprint(added)
        if alignment is not None:
            self.check_alignment(alignment, plan)
        copy_model(self.folder, output)
        from_adapter = copy_tokenizer(added.folder, output)
        if plan.vocabulary is not None and not from_adapter:
            _warn_of_tokenizer(added, plan.vocabulary, output)
        for file, parts in plan.shards.items():
            self._write_shard(output / file, parts, added, LocalFile(self.folder / file), device, alignment)
        if len(plan.shards) > 1 or (self.folder / INDEX).exists():
            _write_index(output / INDEX, plan)
        if plan.untied or plan.vocabulary is not None:
            rewrite_config(output, untied=plan.untied, vocabulary=plan.vocabulary)

    def _write_shard(
        self,
        path: Path,
        parts: Mapping[str, BakedTensor],
        adapter: Adapter,
        source: LocalFile,
        device: torch.device | str | None,
        alignment: Alignment | None,
    ) -> None:
        specs = self.shapes[source.name]
        with TensorFile(path, {key: part.spec for key, part in parts.items()}) as target:
            for key, part in parts.items():
                target.put(key, _bake_tensor(part, adapter, source, specs[part.source], device, alignment))


def _opened(adapter: str | Path | Adapter | None) -> Adapter:
    """The adapter, or one that changes nothing."""
    if adapter is None:
        return Adapter("none", None, {}, {})
    return adapter if isinstance(adapter, Adapter) else open_adapter(adapter)


def _folder(source: str | Path) -> Path:
    address = address_of(source, "base model", error=SubspaceError)
    if address.path is not None and address.path.is_file():
        raise SubspaceError(f"base model {str(source)!r} is a file: give the folder that holds it and its config.json.")
    return fetched(address, ("*.safetensors", *PATTERNS), "base model", error=SubspaceError).resolve()


def _warn_of_tokenizer(adapter: Adapter, vocabulary: tuple[int, int], output: Path) -> None:
    whose = "the base model's" if tokenizer_files(output) else "none"
    warnings.warn(
        f"safemerge: adapter {adapter.source!r} was trained on {vocabulary[1]} tokens in place of {vocabulary[0]}, and "
        f"no tokenizer lies beside it: the baked model has {whose}. Save yours into it (tokenizer.save_pretrained)",
        stacklevel=6,
    )


def _read(source: LocalFile, key: str, spec: Spec) -> Tensor:
    # Opened anew for each tensor, so that the pages of the one before are given back.
    return source.read(key, 0, torch.Size(spec.shape).numel()).view(spec.shape)


def _bake_tensor(
    part: BakedTensor,
    adapter: Adapter,
    source: LocalFile,
    stored: Spec,
    device: torch.device | str | None,
    alignment: Alignment | None,
) -> Tensor:
    """One tensor of the output, in its dtype."""
    if part.beside.whole is not None:
        weight = adapter.extra[part.beside.whole].to(part.spec.dtype)
    else:
        weight = _read(source, part.source, stored)
    if part.beside.rows is not None:
        index = torch.tensor(part.beside.tokens)
        weight = weight.index_copy(0, index, adapter.extra[part.beside.rows].to(weight.dtype))
    where = torch.device(device or "cpu")
    update = None if part.module is None else _update_rows(adapter.factors[part.module], where)
    more = None if alignment is None else alignment.rows(canonical_name(part.source), where)
    changes = [change for change in (update, more) if change is not None]
    return _added(weight, changes, where) if changes else weight


def _update_rows(module: LoraFactors, device: torch.device) -> Rows:
    """The rows of s·B·A as the checkpoint stores them."""

    def rows(part: slice, dtype: torch.dtype) -> Tensor:
        A, B = (factor.to(device, dtype) for factor in (module.A, module.B))
        left, right = (A.mT, B.mT) if module.transposed else (B, A)
        return (left[part] @ right) * module.scaling

    return rows


def _added(weight: Tensor, changes: Sequence[Rows], device: torch.device) -> Tensor:
    """W and all that is added to it, in the dtype of W, a block of rows at a time."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    new = torch.empty_like(weight, memory_format=torch.contiguous_format)
    rows = max(1, _BLOCK // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        total = weight[part].to(device, wide)
        for change in changes:
            total = total + change(part, wide)
        new[part] = total.to("cpu", weight.dtype)
    return new


def _write_index(path: Path, plan: Blueprint) -> None:
    listed = {key: file for file, parts in plan.shards.items() for key in parts}
    specs = [part.spec for parts in plan.shards.values() for part in parts.values()]
    size = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in specs)
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": listed}, indent=2, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")
