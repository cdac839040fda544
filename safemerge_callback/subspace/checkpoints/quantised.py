"""Quantised checkpoints, told by config.json and by the names and dtypes of their tensors; none of them is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...adapters import canonical_name
from ...errors import SubspaceError
from ..header import DTYPES

# What stands in the place of a packed weight, or beside it, by the last part of its key; the first that is there tells
# the format, so the telling ones come first.
_MARKS = {
    r"g_idx": "gptq",
    r"qweight|qzeros": "gptq or awq",
    r"(weight\.)?(nested_)?(absmax|quant_map)|weight\.quant_state\..+": "bitsandbytes 4-bit",
    r"SCB|weight_format": "bitsandbytes 8-bit",
    r"weight_packed|weight_shape|weight_zero_point": "compressed-tensors",
    r"weight_scale_inv": "fp8",
    r"weight_scale(_2|s)?|input_scale": "fp8 or compressed-tensors",
    r"W_q": "hqq",
    r"codes|codebooks": "aqlm",
    r"centroids|indices": "vptq",
    r"weight[.:_]_?(data|scale|shift|qdata|zero_point)": "quanto or torchao",
}
# Of these, what a plain model may call a tensor of its own.
_COMMON = {"codes", "indices"}
_MARKED = re.compile(rf"(?P<module>.+?)\.(?P<mark>{'|'.join(_MARKS)})")
# One tensor for all experts: told as the first of them, since experts are single modules here.
_STACKED = re.compile(r"(?P<parent>.+\.experts)\.(?P<last>\w+_proj)_(blocks|scales)")
_BY_DTYPE = {"F8": "fp8", "F4": "fp4", "F6": "fp6", "I8": "int8"}


def format_of(config: Mapping[str, Any]) -> str | None:
    """Return how config.json, or the part of it for the language model, says that the weights are quantised."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("quantization_config", "compression_config"):
            settings = part.get(key)
            if isinstance(settings, dict):
                bits = next((f" {n}-bit" for n in (4, 8) if settings.get(f"load_in_{n}bit")), "")
                return f"{settings.get('quant_method') or 'bitsandbytes'}{bits}"
    return None


def quantised_modules(tensors: Mapping[str, tuple[tuple[int, ...], str]], config: Mapping[str, Any]) -> dict[str, str]:
    """Return canonical name -> format of the modules whose weight is no plain matrix of floats.

    `tensors` is key -> shape and dtype, as safetensors names it. A weight that is stored in a dtype of `DTYPES` is
    plain, whatever lies beside it and whatever the configuration says; so is a module without a packed tensor: scales
    alone pack nothing.
    """
    config_format = format_of(config)
    formats = {
        canonical_name(key): by_dtype(dtype)
        for key, (shape, dtype) in tensors.items()
        if key.endswith(".weight") and len(shape) > 1 and dtype not in DTYPES
    }
    plain = {canonical_name(key) for key, (_, dtype) in tensors.items() if key.endswith(".weight") and dtype in DTYPES}
    marked = {
        name: marks
        for name, marks in _marked(tensors).items()
        if name in formats or _packs(marks, config_format is not None)
    }
    for pattern, how in reversed(_MARKS.items()):
        formats.update(
            {name: how for name, marks in marked.items() if any(re.fullmatch(pattern, mark) for mark in marks)}
        )
    packed = [key for key, (_, dtype) in tensors.items() if dtype not in DTYPES]
    stacked = {_expert(match) for match in map(_STACKED.fullmatch, packed) if match}
    formats.update(dict.fromkeys(stacked, "mxfp4"))
    return {name: config_format or how for name, how in formats.items() if name not in plain}


def _marked(tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, dict[str, str]]:
    """Canonical name -> mark -> dtype."""
    marks: dict[str, dict[str, str]] = {}
    for key, (_, dtype) in tensors.items():
        if match := _MARKED.fullmatch(key):
            marks.setdefault(canonical_name(match["module"]), {})[match["mark"]] = dtype
    return marks


def _packs(marks: Mapping[str, str], in_config: bool) -> bool:
    """Whether one of these tensors can be a packed weight; a common word needs another mark, or the configuration."""
    sure = in_config or len(marks) > 1
    return any(dtype not in DTYPES and (sure or mark not in _COMMON) for mark, dtype in marks.items())


def _expert(match: re.Match[str]) -> str:
    return canonical_name(f"{match['parent']}.0.{match['last']}")


def by_dtype(dtype: str) -> str:
    """Return the format of a weight by its safetensors dtype, such as `fp8` of `F8_E4M3`."""
    return _BY_DTYPE.get(dtype.partition("_")[0], f"packed as {dtype}")


def quantised(what: str, how: str, modules: list[str], of: int) -> SubspaceError:
    """Return the error for a checkpoint whose `modules`, of so many that are wanted, are quantised."""
    detail = f" {len(modules)} of {of} modules are packed, first {modules[0]!r}." if modules else ""
    return SubspaceError(f"{what} is quantised ({how}): use the unquantised checkpoint.{detail}")
