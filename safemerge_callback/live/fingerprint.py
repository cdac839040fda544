"""A fingerprint of the live factors: equal exactly when every number in them is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from ..adapters import LoraFactors
from ..adapters.host import to_host


def digest(factors: Mapping[str, LoraFactors]) -> str:
    """Return a hash over names, dtypes, shapes and bytes of all factors; any device, any floating dtype."""
    seen = hashlib.blake2b(digest_size=16)
    names = sorted(factors)
    wholes = to_host([tensor for name in names for tensor in (factors[name].A, factors[name].B)])
    for name, whole in zip([name for name in names for _ in "AB"], wholes, strict=True):
        seen.update(f"{name} {whole.dtype} {tuple(whole.shape)}".encode())
        seen.update(whole.view(-1).view(torch.uint8).numpy().data)
    return seen.hexdigest()
