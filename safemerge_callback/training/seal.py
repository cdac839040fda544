"""A fingerprint of the live factors: equal exactly when every number in them is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from ..adapters import LoraFactors


def digest(factors: Mapping[str, LoraFactors]) -> str:
    """Return a hash over names, dtypes, shapes and bytes of all factors; any device, any floating dtype."""
    seen = hashlib.blake2b(digest_size=16)
    for name in sorted(factors):
        for tensor in (factors[name].A, factors[name].B):
            whole = tensor.detach().cpu().contiguous()
            seen.update(f"{name} {whole.dtype} {tuple(whole.shape)}".encode())
            seen.update(whole.view(-1).view(torch.uint8).numpy().data)
    return seen.hexdigest()
