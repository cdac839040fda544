"""The bases that method `project` multiplies with where its operator is the orthogonal one, found once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from weakref import WeakKeyDictionary

from torch import Tensor

from ..ops import AlignmentMatrix, full_precision, leading_basis
from ..subspace import Subspace
from ..subspace.header import ModuleHeader
from .batches import Batch

# The share of V's energy that a basis holds, where the user names no rank and the header tells the spectrum so far.
_ENERGY = 0.9
_DEFAULT_RANK = 64
# Bases on the host, (d_out, k), by module, orientation and rank, for as long as the subspace is open.
_FOUND: WeakKeyDictionary[Subspace, dict[tuple[str, bool, int], Tensor]] = WeakKeyDictionary()


def basis_rank(header: ModuleHeader, asked: int | None) -> int:
    """Return the rank of a module's basis: the asked one, or the least noted one that holds 0.9 of V's energy, or 64.

    The header notes a lower bound of the energy at ranks 1 to 64. Never more than V has rows or columns.
    """
    enough = [int(rank) for rank, share in header.energy.items() if share >= _ENERGY]
    rank = asked if asked is not None else min(enough, default=_DEFAULT_RANK)
    return min(rank, *header.shape)


def known_bases(subspace: Subspace) -> dict[tuple[str, bool, int], Tensor]:
    """Return the bases found so far: (module, transposed, rank) -> U, (d_out, k), float32, on the host."""
    return _FOUND.setdefault(subspace, {})


@full_precision()
def find_bases(subspace: Subspace, batches: Iterable[tuple[Batch, AlignmentMatrix]], operator_rank: int | None) -> None:
    """Find and keep the basis of every module of `batches`, each with its alignment matrices (n, ...).

    One decomposition a module, once a run: about 30 GFLOP at 4096 × 4096 and rank 64.
    """
    kept = known_bases(subspace)
    for batch, stack in batches:
        for i, name in enumerate(batch.names):
            V = type(stack)(*(t[i] for t in stack)) if isinstance(stack, tuple) else stack[i]
            rank = basis_rank(subspace.modules[name], operator_rank)
            kept[name, batch.transposed, rank] = leading_basis(V, rank).float().cpu()


def missing_bases(subspace: Subspace, modules: Iterable[tuple[str, bool]], operator_rank: int | None) -> Sequence[str]:
    """Return the modules, given with their orientation, whose basis was not found yet."""
    kept = known_bases(subspace)
    return [n for n, turned in modules if (n, turned, basis_rank(subspace.modules[n], operator_rank)) not in kept]
