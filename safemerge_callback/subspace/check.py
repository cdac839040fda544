"""Is a subspace file whole, does it fit the modules and the base at hand? Apart: it needs the header, and never V."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..adapters import LoraFactors
from ..adapters.names import is_vocabulary
from ..errors import SubspaceError
from .header import DTYPES, PROBE_POSITIONS, PROBES, FileHeader, dtype_name
from .recognise import matches

_NAMES = {**{name: dtype_name(dtype) for name, dtype in DTYPES.items()}, "I8": "int8"}


def require_tensors(header: FileHeader, stored: Mapping[str, tuple[tuple[int, ...], str]], where: str) -> None:
    """Raise SubspaceError unless every tensor that the header announces is there; `stored` has shape and dtype."""
    for name, module in header.modules.items():
        for key, shape in module.tensors(name).items():
            there, dtype = stored.get(key, ("absent", ""))
            if there != shape:
                raise SubspaceError(f"{where}: tensor {key!r} should be {shape} but is {there}. Build it again.")
            if _NAMES.get(dtype) != module.dtype_of(key):
                raise SubspaceError(
                    f"{where}: tensor {key!r} should be {module.dtype_of(key)} but is {dtype}. Build it again."
                )
    rows = {stored.get(key, ((0,), ""))[0][0] for key in (PROBES, PROBE_POSITIONS)}
    if rows != {len(header.probed)}:
        raise SubspaceError(f"{where}: probes of {len(header.probed)} modules announced, found {rows}. Build it again.")


def check_modules(header: FileHeader, factors: Mapping[str, LoraFactors], where: str) -> None:
    """Raise SubspaceError for LoRA modules that the subspace lacks, or whose shape differs."""
    unmoved = set(header.unmoved)
    lacking = [name for name in factors if name not in header.modules and name not in unmoved]
    if lacking:
        suffixes = sorted({name.rpartition(".")[2] for name in factors})
        raise SubspaceError(
            f"{where} lacks {len(lacking)} of {len(factors)} LoRA modules, first {lacking[0]!r}. "
            f"Build it again with target_modules={suffixes}, or train LoRA on the modules that it has."
        )
    if factors and all(name in unmoved for name in factors):
        raise SubspaceError(
            f"{where}: aligned and unaligned are equal at all {len(factors)} LoRA modules, so there is nothing to "
            "measure. Train LoRA on other modules, or build from checkpoints that differ there."
        )
    for name, live in factors.items():
        if name in header.modules:
            _check_shape(name, live, header.modules[name].shape, where)


def _check_shape(name: str, live: LoraFactors, stored: tuple[int, int], where: str) -> None:
    expected = stored[::-1] if live.transposed else stored
    if live.shape != expected:
        raise SubspaceError(
            f"module {name!r} is {live.shape} (out, in) in the model but {expected} in {where}: "
            f"{_why_other(name, live.shape, expected)}"
        )


def _why_other(name: str, live: tuple[int, ...], stored: tuple[int, ...]) -> str:
    """Why a module has another shape than the subspace was built from, and what to do."""
    differ = sum(one != other for one, other in zip(live, stored, strict=True))
    if is_vocabulary(name) and differ == 1:
        return (
            "its vocabulary was resized since. Save the resized model (save_pretrained, before it has an adapter) and "
            "build the subspace with it as aligned and common_rows=True (--common-rows)."
        )
    return "it was built from a model of another size. Build it again from this model's checkpoints."


def check_base(
    header: FileHeader, weights: Mapping[str, Tensor], positions: Tensor, expected: Tensor, where: str
) -> None:
    """Raise SubspaceError where live base weights are not those of the aligned checkpoint.

    positions and expected are (modules, probes), one row a name in `header.probed`. Modules without a live weight
    (quantised, sharded) are passed over.
    """
    others, compared = [], 0
    for name, places, values in zip(header.probed, positions, expected, strict=True):
        if name not in weights:
            continue
        compared += 1
        _check_size(name, weights[name], header.modules[name].shape, where)
        if not matches(weights[name], places, values):
            others.append(name)
    if others:
        raise SubspaceError(
            f"the base model is not the aligned checkpoint {header.aligned.get('source')!r} that {where} was built "
            f"from: {len(others)} of {compared} modules differ, first {others[0]!r}. Load that checkpoint as the base "
            "model, or build the subspace from this one."
        )


def _check_size(name: str, weight: Tensor, stored: tuple[int, int], where: str) -> None:
    if tuple(weight.shape) != stored:
        raise SubspaceError(
            f"base weight of {name!r} is {tuple(weight.shape)} in the model but {stored} in {where}: "
            f"{_why_other(name, tuple(weight.shape), stored)}"
        )
