"""LoRA factors of many modules in one safetensors file, without a config: `<module>.lora_A` and `<module>.lora_B`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..io.whole_file import whole_file
from ..ops import LowRank, full_precision
from .host import to_host


@full_precision()
def write_pairs(path: Path, pairs: Mapping[str, LowRank], metadata: Mapping[str, str] | None = None) -> None:
    """Write the factors to `path`, whole or not at all. Raises OSError."""
    keys = [f"{name}.lora_{letter}" for name in pairs for letter in "AB"]
    tensors = to_host([tensor for pair in pairs.values() for tensor in pair])
    try:
        with whole_file(path) as part:
            save_file(dict(zip(keys, tensors, strict=True)), part, metadata=dict(metadata or {}) or None)
    except SafetensorError as error:
        raise OSError(str(error)) from error


@full_precision()
def read_pairs(path: Path) -> tuple[dict[str, LowRank], dict[str, str]]:
    """Return what `write_pairs` wrote, and its metadata; OSError or ValueError for a file that is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            names = dict.fromkeys(key.rpartition(".lora_")[0] for key in file.keys())  # noqa: SIM118  no mapping
            pairs = {name: LowRank(*(file.get_tensor(f"{name}.lora_{letter}") for letter in "AB")) for name in names}
            return pairs, file.metadata() or {}
    except SafetensorError as error:
        raise OSError(str(error)) from error
