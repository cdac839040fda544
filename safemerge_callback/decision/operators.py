"""Which operator method `project` multiplies with, and the bases of the orthogonal one, found once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from ..errors import ConfigError, shown
from ..io.choices import one_of
from ..io.numbers import is_whole
from ..ops import AlignmentMatrix, full_precision, leading_basis
from ..subspace import Subspace
from ..subspace.header import ModuleHeader
from .batches import Batch

OPERATORS = ("safelora", "orthogonal")
# The share of V's energy that a basis holds, where the user names no rank and the header tells the spectrum so far.
_ENERGY = 0.9
_DEFAULT_RANK = 64
# Bases on the host, (d_out, k), by module, orientation and rank, for as long as the subspace is open.
_FOUND: WeakKeyDictionary[Subspace, dict[tuple[str, bool, int], Tensor]] = WeakKeyDictionary()


def check_operator(method: str, operator: Any, operator_rank: Any) -> tuple[str | None, int | None]:
    """Return the operator and its rank for `project`, `safelora` where none is named, and (None, None) for others.

    ConfigError for an unknown operator, a rank that is no whole number above 0, or either where it is not read.
    """
    if method != "project":
        given = {"operator": operator, "operator_rank": operator_rank}
        idle = [f"{name} is {shown(value)}" for name, value in given.items() if value is not None]
        if idle:
            raise ConfigError(f"{idle[0]}, which method {method!r} does not read: leave it out, or choose 'project'")
        return None, None
    kind = one_of(OPERATORS[0] if operator is None else operator, OPERATORS, "operator")
    if operator_rank is None:
        return kind, None
    if kind != "orthogonal":
        raise ConfigError(
            f"operator_rank is {shown(operator_rank)}, which operator {kind!r} does not read: leave it out, or set "
            "operator='orthogonal'"
        )
    if not is_whole(operator_rank, 1):
        raise ConfigError(f"operator_rank is {shown(operator_rank)}: give a whole number of 1 or more")
    return kind, operator_rank


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
