"""Rows as tokens of the tests' small models, of each kind."""

from __future__ import annotations

import torch

from safemerge_callback.signals.rows import RowTokens

KINDS = ("harm", "benign", "task")


def rows_of_kinds(count: int = 6, vocabulary: int = 64, seed: int = 0) -> tuple[RowTokens, ...]:
    """Rows of unlike lengths, kinds in turn, always the same."""
    source = torch.Generator().manual_seed(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, vocabulary, (length,), generator=source).tolist())

    return tuple(RowTokens(ids(3 + i % 4), ids(1 + i % 3), KINDS[i % 3]) for i in range(count))  # type: ignore[arg-type]
