"""The registry of objectives: what each asks of a merged model on rows of the task and on safety rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ...io.choices import one_of
from ..reference import ReferenceRows
from ..row_batch import RowBatch, RowOutputs

# (outputs of the merged model, batch, what the reference says there) -> the loss of each row, (n,).
Function = Callable[[RowOutputs, RowBatch, ReferenceRows | None], Tensor]
# (the loss of each update alone, temperature) -> the weight of each.
ClosedForm = Callable[[Sequence[float], float], list[float]]


@dataclass(frozen=True)
class Objective:
    """What a merge is to be good at: J = mean over task rows + μ·mean over safety rows of `function`, in nats.

    `references`: it compares with what the fine-tuned model says of task rows and the aligned one of safety rows.
    `responses`: it needs rows with responses of their own; without, a reference completes them. `first`: it reads
    nothing behind the first place of a response. `closed_form`: the weights are a formula of each update's own J, and
    nothing is searched. `caution`: what its user is warned of.
    """

    name: str
    function: Function
    references: bool = False
    responses: bool = False
    first: bool = False
    closed_form: ClosedForm | None = None
    caution: str | None = None


OBJECTIVES: dict[str, Objective] = {}


def objective(
    *,
    references: bool = False,
    responses: bool = False,
    first: bool = False,
    closed_form: ClosedForm | None = None,
    caution: str | None = None,
) -> Callable[[Function], Function]:
    """Enter an objective under its function's own name; the fields are those of `Objective`."""

    def enter(function: Function) -> Function:
        name = function.__name__
        OBJECTIVES[name] = Objective(name, function, references, responses, first, closed_form, caution)
        return function

    return enter


def get_objective(name: str) -> Objective:
    """Return the objective called `name`; ConfigError names those there are."""
    return OBJECTIVES[one_of(name, sorted(OBJECTIVES), "objective")]
