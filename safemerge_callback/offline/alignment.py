"""The alignment vector once more: what baking adds of V to a checkpoint beyond what the aligned model has of it.

W = W_unaligned + c·V + s·B·A with V = W_aligned - W_unaligned, so the aligned model's weight gets (c - 1)·V: at c = 1,
which is the aligned model, nothing, above 1 V goes on beyond it, and at 0 it is taken away.
Source: MergeAlign, arXiv:2411.06824, which adds task and alignment vectors with a coefficient each. Differs: the
fine-tune begins with the aligned model, which has the vector whole, so c is 1 and not a share where nothing is said.
With a rank, LoX, arXiv:2506.15606: W_aligned + (c - 1)·U_k·U_kᵀ·V on the k leading left singular vectors of V.
Differs: LoX extrapolates before a fine-tune; baked without an adapter, this gives such a model to train.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters.lazy_mapping import OnAccess
from ..adapters.tensor_file import Spec
from ..decision.weights.by_pattern import check_patterns, pattern_of
from ..errors import ConfigError, SubspaceError, nearest, shown
from ..io.numbers import is_number, is_whole
from ..ops import AlignmentMatrix, Factored, leading_basis, rows_of
from ..subspace import Subspace
from ..subspace.check import check_base
from ..subspace.checkpoints.quantised import quantised
from ..subspace.header import PROBE_POSITIONS, PROBES

# Some rows of what is added to a weight, in the dtype asked for.
Rows = Callable[[slice, torch.dtype], Tensor]
_LARGEST = 10.0
# Rows of V that are widened at once.
_ROWS = 1024


@dataclass(frozen=True)
class Alignment:
    """How much of V each module of a checkpoint is to have: `coefficients` map modules to c, those at 1 left out.

    `rank`: only the leading directions of V go beyond 1, as LoX has it; None for the whole of V.
    """

    subspace: Subspace
    coefficients: Mapping[str, float]
    rank: int | None = None

    @classmethod
    def of(cls, subspace: Subspace, align: float | Mapping[str, float], rank: int | None = None) -> Alignment:
        """Return the coefficients by module: `align` is one for all of them, or pattern -> c, others staying at 1.

        Patterns are those of `module_weights`. The exact file is taken in the place of a compressed one. ConfigError
        for a coefficient outside [0, 10], a rank below 1 and a pattern that fits no module; SubspaceError where the
        exact file is not there.
        """
        if rank is not None and not is_whole(rank, 1):
            raise ConfigError(f"align_rank is {shown(rank)}: give a whole number of 1 or more, or leave it out")
        exact = subspace.exact()
        names = list(exact.modules)
        if isinstance(align, Mapping):
            patterns = {pattern: _coefficient(c, f"align of {shown(pattern)}") for pattern, c in align.items()}
            check_patterns(patterns, names, "align")
            fits = {name: pattern_of(name, patterns, "align") for name in names}
            chosen = {name: patterns[fit] for name, fit in fits.items() if fit is not None}
        else:
            chosen = dict.fromkeys(names, _coefficient(align, "align"))
        return cls(exact, {name: c for name, c in chosen.items() if c != 1.0}, rank)

    def check(
        self, specs: Mapping[str, Spec], packed: Mapping[str, str], read: Callable[[str], Tensor | None], source: str
    ) -> None:
        """Raise SubspaceError unless V may be added to the checkpoint `source`.

        `specs`: canonical name -> what its tensor is to be; `packed`: quantised modules -> format; `read` reads one.
        Refused: modules that it lacks, has packed or in another shape, and weights that are not those of the aligned
        checkpoint, by the probes of the file.
        """
        header, where = self.subspace.header, f"subspace {self.subspace.source!r}"
        if done := [name for name in self.coefficients if name in packed]:
            raise quantised(f"base model {source!r}", packed[done[0]], done, len(self.coefficients))
        for name in self.coefficients:
            if name not in specs:
                raise SubspaceError(
                    f"base model {source!r} has no module {name!r}, of which {where} has V: give the "
                    "aligned checkpoint that it was built from, or name modules by patterns, {pattern: c}"
                    f"{nearest(name, specs)}"
                )
            if specs[name].shape != header.modules[name].shape:
                raise SubspaceError(
                    f"module {name!r} is {specs[name].shape} in base model {source!r} and {header.modules[name].shape} "
                    f"in {where}: give the aligned checkpoint that it was built from, its vocabulary as it was"
                )
        probed = [name for name in header.probed if name in specs and name not in packed]
        if self.coefficients and probed:
            positions, expected = self.subspace.tensors([PROBE_POSITIONS, PROBES])
            check_base(header, OnAccess(probed, lambda name: _there(read(name))), positions, expected, where)

    def rows(self, name: str, device: torch.device) -> Rows | None:
        """Return the rows of (c - 1)·V of a module, computed as they are asked for; None where there is none."""
        if name not in self.coefficients:
            return None
        matrix = self.subspace.stack([name])
        V = matrix if self.rank is None else _leading(matrix, self.rank)
        share = self.coefficients[name] - 1.0
        return lambda part, dtype: _rows(V, part, device, dtype) * share

    @property
    def words(self) -> str:
        """The coefficients in words, for a card."""
        values = sorted(set(self.coefficients.values()))
        some = f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}" if values else "1"
        which = "" if self.rank is None else f", its {self.rank} leading directions"
        return f"{some} of the alignment vector{which}, in {len(self.coefficients)} modules"


def _there(weight: Tensor | None) -> Tensor:
    if weight is None:
        raise KeyError("a tensor that was there is gone")
    return weight


def _coefficient(value: Any, who: str) -> float:
    if not is_number(value) or not 0 <= value <= _LARGEST:
        raise ConfigError(
            f"{who} is {shown(value)}: give how often the weights are to have the alignment vector, from 0 to "
            f"{_LARGEST:g}; the aligned model has it once"
        )
    return float(value)


def _leading(matrix: AlignmentMatrix, rank: int) -> Factored:
    """U_k·(U_kᵀ·V) of one module as factors, (1, d_out, k) and (1, k, d_in)."""
    U = leading_basis(matrix, rank)
    if isinstance(matrix, Factored):
        return Factored(U, (U.mT @ matrix.U.to(U.dtype)) @ matrix.W.to(U.dtype))
    starts = range(0, U.shape[-2], _ROWS)
    blocks = [U[..., at : at + _ROWS, :].mT @ rows_of(matrix, slice(at, at + _ROWS), U.dtype) for at in starts]
    return Factored(U, torch.stack(blocks).sum(0))


def _rows(V: AlignmentMatrix, part: slice, device: torch.device, dtype: torch.dtype) -> Tensor:
    if isinstance(V, Factored):
        return V.U[0, part].to(device, dtype) @ V.W[0].to(device, dtype)
    return rows_of(V, part, dtype)[0].to(device)
