"""The checksum of a stored tensor: over its bytes as they stand in the file, row-major and little-endian."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from .blocks import row_blocks


class TensorDigest:
    """A digest under way: `update` with a tensor's rows, in order and in the stored dtype; then `hexdigest`."""

    def __init__(self) -> None:
        # Of the hashes in the standard library the quickest where the CPU has SHA instructions, and releases the GIL.
        self._hash = hashlib.sha256()

    def update(self, data: bytes | memoryview) -> None:
        """Take the next bytes."""
        self._hash.update(data)

    def hexdigest(self) -> str:
        """Return the digest of everything given so far: 64 hexadecimal digits."""
        return self._hash.hexdigest()


def digest_of(tensor: Tensor) -> str:
    """Return the checksum of a tensor (any device, shape and dtype), as `ModuleHeader.checksums` holds it."""
    digest = TensorDigest()
    for rows in row_blocks(tensor):
        digest.update(stored_bytes(tensor[rows]))
    return digest.hexdigest()


def digest_of_all(digests: Mapping[str, str]) -> str:
    """Return one checksum of many tensors, name -> checksum, in their order."""
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in digests.items()).encode()).hexdigest()


def stored_bytes(block: Tensor, dtype: torch.dtype | None = None) -> memoryview:
    """Return the bytes that safetensors stores for `block`, cast to `dtype`; a view where no copy is needed."""
    block = block.detach().to("cpu", dtype or block.dtype).contiguous()
    return block.reshape(-1).view(torch.uint8).numpy().data
