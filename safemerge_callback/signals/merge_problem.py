"""What coefficients of a merge cost: an objective of the merged model, with its gradient where it is asked for.

Cost: a forward pass of the rows an evaluation, and a backward pass where a gradient is asked for. No matrix of
d_out × d_in: the gradient of a coefficient goes through one number a module and update.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..live.merged_forward import merged_forward
from ..ops import LowRank
from .model_state import preserve_state
from .objectives import Objective
from .reference import Reference
from .responses import alike_lengths
from .row_batch import row_batch, row_outputs
from .rows import RowTokens
from .shared_prefix import prefix_agrees, prefix_length, prefixed_outputs


class SearchRows(NamedTuple):
    """Rows of one kind, and what their reference says of each; None for an objective that compares with none."""

    rows: Sequence[RowTokens]
    reference: Reference | None


class Evaluation(NamedTuple):
    """One evaluation: where, on which rows (None: all), and what came out.

    `value` = task + μ·safety + the penalty on spread, infinite where it is no number; `task` and `safety` are means
    over the rows, in nats; `slopes`: the derivatives of `value`, None where they were not asked for.
    """

    stage: str
    point: tuple[float, ...]
    batch: int | None
    value: float
    task: float
    safety: float
    slopes: tuple[float, ...] | None
    seconds: float

    @property
    def key(self) -> tuple[Any, ...]:
        """What was asked."""
        return self.stage, self.point, self.batch, self.slopes is not None


@dataclass
class MergedModel:
    """A model under weights (modules, updates), the first column the live update's, and its loss on two kinds of rows.

    `others`: as `merged_forward`. `names`: the modules, in the order of the weights' rows. `share`: μ. `batch_size`:
    rows a pass, and rows of each kind that an evaluation of a batch has. `forward` and `backward` count rows.
    """

    model: Any
    others: Sequence[Mapping[str, LowRank]]
    names: Sequence[str]
    objective: Objective
    task: SearchRows
    safety: SearchRows
    share: float = 1.0
    batch_size: int = 16
    adapter_name: str | None = None
    forward: int = 0
    backward: int = 0
    _prefixes: dict[int, int] = field(default_factory=dict)

    def losses(self, weights: Tensor, batch: int | None = None) -> tuple[float, float]:
        """Return the mean loss of task rows and of safety rows.

        Where `weights`, a leaf, take a gradient, that of task + μ·safety is added to theirs.
        """
        with self._frozen(weights.requires_grad):
            return self._mean(self.task, 1.0, weights, batch), self._mean(self.safety, self.share, weights, batch)

    @contextmanager
    def _frozen(self, gradients: bool) -> Iterator[None]:
        """The model as a signal may use it, with no gradient of a parameter."""
        with preserve_state(self.model, gradients=gradients):
            for parameter in self.model.parameters() if gradients else ():
                parameter.requires_grad_(False)
            yield

    @contextmanager
    def _merged(self, weights: Tensor) -> Iterator[None]:
        through = weights.requires_grad
        used = [k for k in range(len(self.others)) if through or bool((weights[:, 1 + k] != 0).any())]
        rows = weights if through else weights.tolist()
        by_module = {name: [row[0], *(row[1 + k] for k in used)] for name, row in zip(self.names, rows, strict=True)}
        with merged_forward(self.model, [self.others[k] for k in used], by_module, self.adapter_name):
            yield

    def _mean(self, kind: SearchRows, share: float, weights: Tensor, batch: int | None) -> float:
        places = self._places(len(kind.rows), batch)
        lengths = [len(kind.rows[i].prompt) + len(kind.rows[i].response) for i in places]
        total = 0.0
        for part in alike_lengths(lengths, self.batch_size):
            chosen = [places[i] for i in part]
            # Anew for each pass: a backward pass frees what lies between the weights and the model.
            with self._merged(weights):
                losses = self._row_losses(kind, chosen)
                self.forward += len(chosen)
                if weights.requires_grad:
                    (losses.sum() * (share / len(places))).backward()
                    self.backward += len(chosen)
            total += float(losses.detach().double().sum()) / len(places)
        return total

    def _places(self, count: int, batch: int | None) -> list[int]:
        """The rows of a batch: as many as a pass has, in turn."""
        if batch is None or count <= self.batch_size:
            return list(range(count))
        return [(batch * self.batch_size + i) % count for i in range(self.batch_size)]

    def _row_losses(self, kind: SearchRows, places: Sequence[int]) -> Tensor:
        device = next(self.model.parameters()).device
        rows, length = [kind.rows[i] for i in places], self._prefix(kind)
        if length:
            outputs, batch = prefixed_outputs(self.model, rows, length, device)
        else:
            batch = row_batch(rows, device)
            outputs = row_outputs(self.model, batch)
        reference = None if kind.reference is None else kind.reference.rows(places, device)
        return self.objective.function(outputs, batch, reference)

    def _prefix(self, kind: SearchRows) -> int:
        """How many tokens all rows of a kind begin with that may be paid for once; asked of the model once a kind."""
        if id(kind) not in self._prefixes:
            length, device = prefix_length(self.model, kind.rows), next(self.model.parameters()).device
            agrees = length and prefix_agrees(self.model, kind.rows[: self.batch_size], length, device)
            self._prefixes[id(kind)] = length if agrees else 0
        return self._prefixes[id(kind)]


def unnoted(_evaluation: Evaluation) -> None:
    """Keep nothing of an evaluation but in the problem itself."""


@dataclass
class PathProblem:
    """The way from `begin` to `end`, weights (modules, updates) each, a number λ a group of modules; a `Problem`.

    Weights are (1 - λ)·begin + λ·end. `groups`: each module's group, by place. `start`, `shape`: as `Problem`.
    `penalty` is of the mean squared distance of the numbers from `common`. `known`: what an earlier run was answered,
    which is answered again without a pass; `note` is told of every other evaluation.
    """

    merged: MergedModel
    begin: Tensor
    end: Tensor
    groups: Sequence[int]
    start: Sequence[float]
    stage: str
    shape: tuple[int, int] = (1, 1)
    penalty: float = 0.0
    common: float = 0.0
    known: Mapping[tuple[Any, ...], Evaluation] = field(default_factory=dict)
    note: Callable[[Evaluation], None] = unnoted
    trace: list[Evaluation] = field(default_factory=list)

    def weights(self, point: Sequence[float] | Tensor) -> Tensor:
        """Return the weights (modules, updates) at a point, float64, on the model's device."""
        numbers = torch.as_tensor(point, dtype=torch.float64, device=self.begin.device)
        each = numbers[torch.as_tensor(self.groups, device=self.begin.device)].unsqueeze(1)
        return self.begin + each * (self.end - self.begin)

    def loss(self, point: Sequence[float], batch: int | None = None) -> float:
        """Return the value at a point; see `Problem`."""
        return self._evaluation(point, batch, slopes=False).value

    def gradient(self, point: Sequence[float], batch: int | None = None) -> tuple[float, list[float]]:
        """Return the value at a point and its derivatives; see `Problem`."""
        evaluation = self._evaluation(point, batch, slopes=True)
        return evaluation.value, list(evaluation.slopes or ())

    @property
    def best(self) -> Evaluation:
        """The candidate of the least value, of this stage; at least one must have been asked for."""
        candidates = (one for one in self.trace if one.stage == self.stage and one.batch is None)
        return min(candidates, key=lambda one: one.value)

    def _evaluation(self, point: Sequence[float], batch: int | None, slopes: bool) -> Evaluation:
        key = (self.stage, tuple(float(number) for number in point), batch, slopes)
        before = next((one for one in self.trace if one.key == key), None)
        if before is not None:
            return before
        evaluation = self.known.get(key)
        if evaluation is None:
            evaluation = self._measure(key[1], batch, slopes)
            self.note(evaluation)
        self.trace.append(evaluation)
        return evaluation

    def _measure(self, point: tuple[float, ...], batch: int | None, slopes: bool) -> Evaluation:
        began = time.perf_counter()
        numbers = torch.tensor(point, dtype=torch.float64, device=self.begin.device, requires_grad=slopes)
        with torch.set_grad_enabled(slopes):
            weights = self.weights(numbers)
        through = weights.detach().requires_grad_(slopes)
        task, safety = self.merged.losses(through, batch)
        value = task + self.merged.share * safety + self._spread(numbers.detach())
        derivatives = None
        if slopes:
            assert through.grad is not None, "the model was run with a gradient of the weights"
            weights.backward(through.grad)
            assert numbers.grad is not None, "every number moves some weight"
            derivatives = tuple((numbers.grad + self._spread_slopes(numbers.detach())).tolist())
        value = value if math.isfinite(value) else math.inf
        return Evaluation(self.stage, point, batch, value, task, safety, derivatives, time.perf_counter() - began)

    def _spread(self, numbers: Tensor) -> float:
        return self.penalty * float((numbers - self.common).square().mean())

    def _spread_slopes(self, numbers: Tensor) -> Tensor:
        return self.penalty * 2.0 * (numbers - self.common) / len(numbers)
