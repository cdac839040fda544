"""Walk a large matrix by rows, so that no second copy of it is made."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

# Elements a block: 4 MiB of float32.
_BLOCK = 1 << 20


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Yield slices over the first axis that cover `matrix`, each of about a million elements."""
    width = max(1, matrix[:1].numel())
    step = max(1, _BLOCK // width)
    for start in range(0, matrix.shape[0], step):
        yield slice(start, start + step)
