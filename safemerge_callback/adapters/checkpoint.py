"""LoRA factors of an adapter folder or Hub id, without a model; safetensors only."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import AdapterError
from ..io.file_faults import reading_fault
from ..io.paths import as_path
from ..ops import LowRank, full_precision
from .factors import LoraFactors
from .files import CONFIG, WEIGHTS, adapter_folder, read_config, write_folder
from .lazy_mapping import OnAccess
from .names import canonical_name
from .rank_pattern import config_with, rank_and_scaling
from .refusals import refuse_config
from .tensor_file import Spec, TensorFile

_FACTOR_KEY = re.compile(r"(?P<path>.+)\.lora_(?P<embedding>embedding_)?(?P<letter>[AB])(\.weight)?")
_PEFT_PREFIX = "base_model.model."
# Modules of these names are Conv1D (stored transposed) in GPT-2, and nn.Linear in GPT-BigCode.
_MAYBE_CONV1D = {"c_attn", "c_proj", "c_fc", "q_attn"}


class FactorKeys(NamedTuple):
    """The keys of one module's factors in an adapter file."""

    A: str
    B: str


@dataclass(frozen=True)
class Adapter:
    """A plain LoRA adapter read from `source` (a folder or a Hub id).

    `config` is adapter_config.json as it is; `factors` map canonical names to factors on the CPU. `keys` are the
    factors' keys in the file, and `extra` its other tensors (trained heads, embeddings, biases), both needed to save
    it again. `folder` is where the files lie, None for one that was not read. Make a changed one with
    `dataclasses.replace(adapter, factors=...)`; ranks and scalings may differ.
    """

    source: str
    base_model: str | None
    config: dict[str, Any]
    factors: Mapping[str, LoraFactors]
    keys: Mapping[str, FactorKeys] = field(default_factory=dict, repr=False)
    extra: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    folder: Path | None = field(default=None, repr=False)


@full_precision()
def load_adapter(source: str | Path, *, revision: str | None = None, moved_base: bool = False) -> Adapter:
    """Return the adapter of a folder, or of a Hub id, `org/name[@revision]`; scaling as PEFT would set it.

    `moved_base` accepts factors that began as a part of the base weight (PiSSA, OLoRA): good to copy and to compare,
    but their s·B·A is not what training changed.

    Raises AdapterError when there is none, when its weights are pickled, truncated, not finite, or unlike its config,
    and for every kind of adapter that is not a plain LoRA.
    """
    where = f"adapter {str(source)!r}"
    folder = adapter_folder(source, revision)
    config = read_config(folder / CONFIG, where)
    refuse_config(config, where, moved_base=moved_base)
    tensors = _read_tensors(folder / WEIGHTS, where)
    keys = _factor_keys(tensors, where)
    _refuse_unclear_orientation(keys, config, where)
    factors = {name: _factors_of(name, pair, tensors, config, where) for name, pair in keys.items()}
    used = {key for pair in keys.values() for key in pair}
    extra = {key: tensor for key, tensor in tensors.items() if key not in used}
    return Adapter(str(source), _base_model(config), config, factors, keys, extra, folder)


@full_precision()
def open_adapter(source: str | Path, *, revision: str | None = None) -> Adapter:
    """Return the adapter as `load_adapter` does, but its `factors` and `extra` are read from the file at each access.

    So no more than what is in use is in memory. Tensors are mapped from the file: do not write to them. The file is
    read once here, module by module, to refuse what `load_adapter` refuses.
    """
    where = f"adapter {str(source)!r}"
    folder = adapter_folder(source, revision)
    config = read_config(folder / CONFIG, where)
    refuse_config(config, where)
    names = _read_keys(folder / WEIGHTS, where)
    keys = _factor_keys(dict.fromkeys(names), where)
    _refuse_unclear_orientation(keys, config, where)
    used = {key for pair in keys.values() for key in pair}

    def read(*wanted: str) -> dict[str, Tensor]:
        return _mapped(folder / WEIGHTS, wanted, where)

    factors = OnAccess(keys, lambda name: _factors_of(name, keys[name], read(*keys[name]), config, where))
    extra = OnAccess([key for key in names if key not in used], lambda key: read(key)[key])
    for pair in keys.values():
        require_finite(read(*pair), where)
    for name in factors:
        factors[name]
    for key in extra:
        require_finite(read(key), where)
    return Adapter(str(source), _base_model(config), config, factors, keys, extra, folder)


@full_precision()
def _base_model(config: Mapping[str, Any]) -> str | None:
    name = config.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def save_adapter(folder: str | Path, adapter: Adapter) -> Path:
    """Write `adapter` as a plain PEFT folder, which PeftModel.from_pretrained loads with the same updates.

    Changed ranks and scalings go into rank_pattern and alpha_pattern. A new folder appears whole or not at all; in an
    existing one the two adapter files are replaced and others stay. Raises AdapterError when a module has no key (the
    adapter was not made from a loaded one), or when a factor is not finite.
    """
    strangers = [name for name in adapter.factors if name not in adapter.keys]
    if strangers or not adapter.factors:
        what = f"no file key for {len(strangers)} modules, first {strangers[0]!r}" if strangers else "no LoRA module"
        raise AdapterError(
            f"adapter {adapter.source!r} cannot be saved: {what}. Make it with dataclasses.replace(loaded_adapter, "
            "factors=...), under the loaded names."
        )
    tensors = dict(adapter.extra)
    for name, factors in adapter.factors.items():
        pair = adapter.keys[name]
        tensors[pair.A], tensors[pair.B] = factors.A, factors.B
    plain = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    require_finite(plain, f"adapter {adapter.source!r}, to be saved,")
    wanted = {module_path(adapter.keys[name].A): factors for name, factors in adapter.factors.items()}
    return write_folder(
        as_path(folder, "adapter folder", error=AdapterError), plain, config_with(adapter.config, wanted)
    )


def _read_tensors(path: Path, where: str) -> dict[str, Tensor]:
    tensors = _mapped(path, _read_keys(path, where), where)
    require_finite(tensors, where)
    return tensors


def _read_keys(path: Path, where: str) -> list[str]:
    with _reading(path, where), safe_open(path, framework="pt") as file:
        return list(file.keys())


@full_precision()
def _mapped(path: Path, keys: Iterable[str], where: str) -> dict[str, Tensor]:
    with _reading(path, where), safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in keys}


@contextmanager
def _reading(path: Path, where: str) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{where}: {WEIGHTS} {reading_fault(path, error)}") from error


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


def require_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise AdapterError where a tensor of a file holds NaN or infinities; `tensors` go by their keys there."""
    bad = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise AdapterError(
            f"{where} has {len(bad)} tensors with NaN or infinite values, first that of module "
            f"{canonical_name(bad[0])!r} ({bad[0]}). Use a checkpoint from before the training diverged."
        )


def _factor_keys(tensors: Mapping[str, Any], where: str) -> dict[str, FactorKeys]:
    halves: dict[str, dict[str, str]] = {}
    for key in tensors:
        match = _FACTOR_KEY.fullmatch(key)
        if match:
            letters = halves.setdefault(canonical_name(key), {})
            if match["letter"] in letters:
                raise AdapterError(f"{where}: keys {letters[match['letter']]!r} and {key!r} name one module.")
            letters[match["letter"]] = key
        elif ".lora_" in key:
            raise AdapterError(f"{where} holds {key!r}, which a plain LoRA (lora_A and lora_B) does not have.")
    lone = [name for name, letters in halves.items() if len(letters) != 2]
    if lone or not halves:
        what = f"only one factor of module {lone[0]!r}" if lone else "no LoRA factor"
        raise AdapterError(f"{where}: {WEIGHTS} holds {what}. Save it again with save_pretrained.")
    return {name: FactorKeys(letters["A"], letters["B"]) for name, letters in halves.items()}


def _factors_of(
    name: str, pair: FactorKeys, tensors: Mapping[str, Tensor], config: Mapping[str, Any], where: str
) -> LoraFactors:
    A, B = tensors[pair.A], tensors[pair.B]
    rank, scaling = rank_and_scaling(config, module_path(pair.A), where)
    if A.ndim != 2 or B.ndim != 2 or (A.shape[0], B.shape[1]) != (rank, rank) or 0 in (*A.shape, *B.shape):
        raise AdapterError(
            f"{where}: module {name!r} has lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}, but its config says "
            f"rank {rank}: (r, d_in) and (d_out, r) are allowed. Was it saved from a sharded model, or is it Conv2d?"
        )
    if not (A.is_floating_point() and B.is_floating_point()):
        raise AdapterError(f"{where}: module {name!r} has factors of {A.dtype} and {B.dtype}, not floating point.")
    embedding = ".lora_embedding_" in pair.A
    transposed = embedding or (bool(config.get("fan_in_fan_out")) and name.rpartition(".")[2] != "lm_head")
    return LoraFactors(name, A, B, scaling, transposed)


def module_path(key: str) -> str:
    """Return the module's path in the base model: what PEFT matches rank_pattern and alpha_pattern against."""
    match = _FACTOR_KEY.fullmatch(key)
    return (match["path"] if match else key).removeprefix(_PEFT_PREFIX)


def _refuse_unclear_orientation(keys: Mapping[str, FactorKeys], config: Mapping[str, Any], where: str) -> None:
    """PEFT saves one fan_in_fan_out for all modules: false when lm_head is adapted too, whatever the others are."""
    leaves = {name.rpartition(".")[2] for name in keys}
    if not config.get("fan_in_fan_out") and "lm_head" in leaves and leaves & _MAYBE_CONV1D:
        raise AdapterError(
            f"{where} adapts lm_head and {sorted(leaves & _MAYBE_CONV1D)}, and its config does not tell whether the "
            "latter are Conv1D (GPT-2). If they are, set fan_in_fan_out to true in adapter_config.json; else train the "
            "adapter without lm_head."
        )
