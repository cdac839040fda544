"""How a term's own gradient joins the step's, and how the two lie to each other.

Apart from the engine, which asks for neither where no term keeps its gradient apart and nothing is logged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from torch import Tensor

from ..live.gradients import Gradients, TrainedParameters
from .protocol import Apart, Term

# A task's gradient of less than this share of the terms' is no gradient: float32 rounds their sum by as much.
ROUNDING = 1e-5


class TermGradient(NamedTuple):
    """A term's own gradient in one step, weighted and the mean over the ranks, as `TrainedParameters.vector`.

    `tensors` held it on this rank. `apart`: whether the step's gradient lacks it.
    """

    term: Term
    vector: Tensor
    tensors: Gradients
    apart: bool


def join(trained: TrainedParameters, gradient: TermGradient) -> None:
    """Put what the term makes of the step's gradient and its own in the place of the former. Collective under FSDP.

    Raises what the term raises, and ValueError for other shapes than it was given; the gradients stay then.
    """
    task = trained.whole(trained.vector(trained.gradients()))
    shapes = [tensor.shape for tensor in task]
    together = cast(Apart, gradient.term).combine(task, trained.whole(gradient.vector))
    if [tensor.shape for tensor in together] != shapes:
        raise ValueError(
            f"{gradient.term.name!r} combined gradients of {len(shapes)} tensors into {len(together)} or into other "
            "shapes: return one for each of the task's, in its shape"
        )
    trained.put(together, gradient.tensors)


@dataclass(frozen=True)
class Angles:
    """Inner products of a step's own gradients, and last of what the optimizer would get, which may be clipped.

    `table`: (k + 1, k + 1), on the device until it is asked for. `apart`: which of the k the last lacks.
    """

    names: list[str]
    apart: list[bool]
    table: Tensor

    @classmethod
    def of(cls, trained: TrainedParameters, gradients: Sequence[TermGradient]) -> Angles:
        """Take them between clipping and the optimizer's step. Collective under FSDP."""
        vectors = [*(one.vector for one in gradients), trained.vector(trained.gradients())]
        return cls([one.term.name for one in gradients], [one.apart for one in gradients], trained.products(vectors))

    def readings(self, norm: float | None) -> dict[str, dict[str, float]]:
        """Return each term's `norm`, and its `cosine` to the task's gradient, NaN where that is nothing. Waits.

        `norm`: that of the whole gradient before clipping; None where it was not clipped. Clipping keeps its direction,
        so the whole is known; the task's is what is left of it without the terms that are in it. Where that is as
        small as the rounding of the sum, as in a safe step of `lisa`, it is nothing and has no direction.
        """
        table = self.table.tolist()
        clipped = math.sqrt(table[-1][-1])
        stretch = 1.0 if norm is None else norm / clipped if clipped else math.nan
        inside = [i for i, apart in enumerate(self.apart) if not apart]
        whole = [stretch * x for x in table[-1]]
        size = whole[-1] * stretch - sum(2 * whole[j] - sum(table[j][k] for k in inside) for j in inside)
        if size <= ROUNDING**2 * sum(table[j][j] for j in inside):
            size = 0.0
        readings = {}
        for i, name in enumerate(self.names):
            product, scale = whole[i] - sum(table[i][j] for j in inside), math.sqrt(size * table[i][i])
            cosine = max(-1.0, min(1.0, product / scale)) if scale > 0 else math.nan
            readings[name] = {"norm": math.sqrt(table[i][i]), "cosine": cosine}
        return readings
