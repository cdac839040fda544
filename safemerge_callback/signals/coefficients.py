"""The coefficients of a merge, learned from a few rows: one for all, one a block of modules, or one a module.

Cost: a forward pass of all rows for each reference and evaluation; a backward pass too where a minimiser asks for it.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adapters.names import layer_and_type
from ..errors import ConfigError, shown
from ..io.choices import one_of
from ..io.numbers import is_number
from ..live.modules import live_factors
from ..ops import LowRank
from .adapter_off import adapter_off
from .merge_problem import Evaluation, MergedModel, PathProblem, SearchRows, unnoted
from .minimisers import Effort, Minimiser, get_minimiser
from .model_state import preserve_random_states
from .objectives import Objective, get_objective
from .reference import Reference, take_reference
from .rows import RowTokens

# Which modules share a coefficient, by name.
GRANULARITIES: Mapping[str, Callable[[str], str]] = {
    "run": lambda _name: "all",
    "block": lambda name: name.rpartition(".")[0] or name,
    "module": lambda name: name,
}
# Nearer than this to 0 or 1 a coefficient is said to have run to its border.
_BORDER = 0.01
# By how much of its size an objective must fall, or nothing is merged.
_GAIN = 1e-6


@dataclass(frozen=True)
class SearchSettings:
    """How coefficients are searched; ConfigError for what cannot be, before anything is computed.

    `objective`: a name of `OBJECTIVES`. `granularity`: run, block (the modules of one part of a layer, as
    `layers.3.self_attn`) or module. `minimiser`: a name of `MINIMISERS`; None: golden for one coefficient, gradient for
    more. `share`: μ, what a safety row counts against a task row. `penalty`: on the mean squared distance of many
    coefficients from the best single one, in nats. `evaluations`: at most so many of a loss or gradient; None: the
    minimiser's. `batch_size`: rows a pass, and of each kind a step. `temperature`: of a closed form.
    """

    objective: str = "kl"
    granularity: str = "run"
    minimiser: str | None = None
    share: float = 1.0
    penalty: float = 0.1
    evaluations: int | None = None
    batch_size: int = 16
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        kind = get_objective(self.objective)
        one_of(self.granularity, GRANULARITIES, "granularity")
        for name, least in (("share", 0.0), ("penalty", 0.0), ("temperature", 1e-9)):
            value = getattr(self, name)
            if not is_number(value) or not value >= least or not math.isfinite(value):
                raise ConfigError(f"{name} is {shown(value)}: give a finite number, {least:g} or more")
        for name in ("batch_size", "evaluations"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} is {shown(value)}: give a whole number, 1 or more")
        way = get_minimiser(self.minimiser or ("golden" if self.granularity == "run" else "gradient"))
        single = self.granularity == "run"
        if kind.closed_form is not None and (self.minimiser is not None or not single):
            raise ConfigError(
                f"objective {self.objective!r} has its weights in closed form, one set for all modules: leave "
                "minimiser and granularity out"
            )
        if (single and way.least > 1) or (not single and way.most == 1):
            many = "one coefficient" if single else "a coefficient a block or module"
            raise ConfigError(
                f"minimiser {way.name!r} is not for {many}, which granularity {self.granularity!r} has: choose another"
            )

    @property
    def way(self) -> Minimiser:
        """The minimiser."""
        return get_minimiser(self.minimiser or ("golden" if self.granularity == "run" else "gradient"))

    @property
    def kind(self) -> Objective:
        """The objective."""
        return get_objective(self.objective)


class Step(NamedTuple):
    """One update that was merged in, or tried: what came of it.

    `label`: whose update it is. `before` and `after`: the objective without and with it. `single`: the best one
    coefficient for all modules, and `single_value` the objective there: the control. `coefficients`: group -> λ.
    `merged`: whether it was taken; `borders`: the groups whose λ ran to 0 or 1.
    """

    label: str
    before: float
    after: float
    single: float | None
    single_value: float | None
    coefficients: Mapping[str, float]
    merged: bool
    borders: tuple[str, ...]


@dataclass
class Learned:
    """What a search found.

    `weights`: module -> (w_live, w_1, ...), of the updates called `labels`; without any, w_1 is the aligned model's.
    `before` and `after`: the objective of the fine-tuned model and of the merge. `improved`: whether anything was
    merged; without, the weights are (1, 0, ...). `forward` and `backward` count rows, `seconds` all of it.
    """

    weights: dict[str, tuple[float, ...]]
    labels: tuple[str, ...]
    before: float
    after: float
    steps: list[Step]
    trace: list[Evaluation]
    forward: int = 0
    backward: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def improved(self) -> bool:
        """Whether any update was taken in."""
        return any(step.merged for step in self.steps)


def search_rows(
    model: Any, task: Sequence[RowTokens], safety: Sequence[RowTokens], settings: SearchSettings
) -> tuple[SearchRows, SearchRows]:
    """Return rows of both kinds with what their reference says: the live model of the task, the aligned of safety.

    A forward pass a row where the objective compares, and none else. ConfigError for no rows of a kind.
    """
    for what, rows in (("task", task), ("safety", safety)):
        if not rows:
            raise ConfigError(f"there are no {what} rows, and coefficients are learned from both kinds: give some")
    if settings.kind.first:
        task, safety = ([row._replace(response=row.response[:1]) for row in rows] for rows in (task, safety))
    if not settings.kind.references:
        return SearchRows(task, None), SearchRows(safety, None)
    live = take_reference(model, task, batch_size=settings.batch_size)
    with adapter_off(model):
        aligned: Reference = take_reference(model, safety, batch_size=settings.batch_size)
    return SearchRows(task, live), SearchRows(safety, aligned)


def learn_weights(
    model: Any,
    others: Mapping[str, Mapping[str, LowRank]],
    rows: tuple[SearchRows, SearchRows],
    settings: SearchSettings,
    *,
    names: Sequence[str] | None = None,
    clusters: Mapping[str, int] | None = None,
    known: Sequence[Evaluation] = (),
    note: Callable[[Evaluation], None] = unnoted,
    adapter_name: str | None = None,
) -> Learned:
    """Return the weights of each module with the least objective; the model is left as it was.

    `others`: label -> the updates that may be merged in, as `merged_forward` takes them; none: the aligned model, whose
    update is 0, so that the merge is a pull. Several are tried one after another, the best alone first, each with its
    best coefficients, and are taken where the objective falls: Model-GLUE's greedy merging (arXiv:2410.05357), of which
    the release saves the last coefficient that it tried, and not the best. `clusters`: label -> a number that
    updates near to one another share; of such only the best alone is tried. `names`: the modules, all of the adapter by
    default. `known` and `note`: as `PathProblem`.
    """
    began = time.perf_counter()
    if settings.kind.caution:
        warnings.warn(f"safemerge: {settings.kind.caution}", stacklevel=2)
    modules = list(live_factors(model, adapter_name) if names is None else names)
    merged = MergedModel(
        model, list(others.values()), modules, settings.kind, *rows, settings.share, settings.batch_size, adapter_name
    )
    search = _Search(merged, list(others), settings, {one.key: one for one in known}, note, clusters or {})
    with preserve_random_states(model):
        learned = search.closed() if settings.kind.closed_form else search.greedy()
    return replace(learned, forward=merged.forward, backward=merged.backward, seconds=time.perf_counter() - began)


@dataclass
class _Search:
    merged: MergedModel
    labels: list[str]
    settings: SearchSettings
    known: Mapping[tuple[Any, ...], Evaluation]
    note: Callable[[Evaluation], None]
    clusters: Mapping[str, int]
    trace: list[Evaluation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def unit(self, which: int | None) -> Tensor:
        """The weights with which one update stands alone: 0 is the live one's, None is nothing, the aligned model's."""
        device = next(self.merged.model.parameters()).device
        weights = torch.zeros(len(self.merged.names), 1 + len(self.labels), dtype=torch.float64, device=device)
        if which is not None:
            weights[:, which] = 1.0
        return weights

    def path(self, begin: Tensor, end: Tensor, stage: str, **more: Any) -> PathProblem:
        way = {"groups": [0] * len(self.merged.names), "start": [0.5], **more}
        return PathProblem(
            self.merged, begin, end, stage=stage, known=self.known, note=self.note, trace=self.trace, **way
        )

    def greedy(self) -> Learned:
        """Merge in each update that lowers the objective, in the order of how good each is alone."""
        now, steps = self.unit(0), []
        candidates: list[tuple[int | None, str]] = [*enumerate(self.labels, 1)] or [(None, "the aligned model")]
        before = value = self.path(now, now, "live").loss([0.0])
        if len(candidates) > 1:
            alone = {k: self.path(self.unit(k), self.unit(k), f"alone {label}").loss([0.0]) for k, label in candidates}
            candidates.sort(key=lambda one: (alone[one[0]], one[0]))
        tried: dict[int, str] = {}
        for which, label in candidates:
            cluster = self.clusters.get(label)
            if cluster is not None and tried.setdefault(cluster, label) != label:
                self.notes.append(f"{label}: near to {tried[cluster]}, which is better alone, so it is not tried")
                continue
            step, end = self.step(now, self.unit(which), label, value)
            steps.append(step)
            if step.merged:
                now, value = end, step.after
        return self.learned(now, before, value, steps)

    def step(self, begin: Tensor, end: Tensor, label: str, before: float) -> tuple[Step, Tensor]:
        """Search the way from `begin` to `end`, and return what came of it, and the weights of the best point."""
        settings, way = self.settings, self.settings.way
        single = self.path(begin, end, f"one {label}")
        effort = Effort(settings.evaluations or way.evaluations, settings.seed)
        groups = _groups(self.merged.names, settings.granularity)
        if len(groups) == 1 and way.most != 1:
            way.function(single, effort)
        else:
            golden = get_minimiser("golden")
            golden.function(single, effort if way is golden else Effort(golden.evaluations))
        best, problem = single.best, single
        if len(groups) > 1 and math.isfinite(best.value):
            common = best.point[0]
            problem = self.path(
                begin,
                end,
                f"{settings.granularity} {label}",
                groups=[groups[_group(name, settings.granularity)] for name in self.merged.names],
                start=[common] * len(groups),
                shape=_shape(list(groups)),
                penalty=settings.penalty,
                common=common,
            )
            problem.loss(problem.start)
            way.function(problem, effort)
        return self.outcome(problem, groups, label, before, best)

    def outcome(
        self, problem: PathProblem, groups: Mapping[str, int], label: str, before: float, single: Evaluation
    ) -> tuple[Step, Tensor]:
        best = problem.best
        after = best.task + self.settings.share * best.safety
        merged = after < before - _GAIN * max(1.0, abs(before))
        numbers = best.point if len(best.point) == len(groups) else best.point * len(groups)
        coefficients = dict(zip(groups, numbers, strict=True))
        borders = tuple(name for name, number in coefficients.items() if not _BORDER <= number <= 1 - _BORDER)
        one, value = single.point[0], single.value
        return (
            Step(label, before, after, one, value, coefficients, merged, borders if merged else ()),
            problem.weights(best.point),
        )

    def closed(self) -> Learned:
        """Weigh the updates by their own objectives, each alone."""
        settings, form = self.settings, self.settings.kind.closed_form
        assert form is not None, "this objective has a closed form"
        alone: list[int | None] = [0, *range(1, 1 + len(self.labels))] if self.labels else [0, None]
        units = [self.unit(which) for which in alone]
        labels = ["live", *(self.labels or ["the aligned model"])]
        values = [
            self.path(unit, unit, f"alone {label}").loss([0.0]) for unit, label in zip(units, labels, strict=True)
        ]
        shares = form([value / (1.0 + settings.share) for value in values], settings.temperature)
        mixture = sum((share * unit for share, unit in zip(shares, units, strict=True)), torch.zeros_like(units[0]))
        path = self.path(units[0], mixture, "mixture")
        after = path.loss([1.0])
        taken = after < values[0] - _GAIN * max(1.0, abs(values[0]))
        coefficients = dict(zip(labels, shares, strict=True))
        step = Step(" + ".join(labels), values[0], after, None, None, coefficients, taken, ())
        return self.learned(mixture if taken else units[0], values[0], after if taken else values[0], [step])

    def learned(self, weights: Tensor, before: float, after: float, steps: list[Step]) -> Learned:
        rows = weights.tolist()
        if not self.labels:
            rows = [[share, 1.0 - share] for (share,) in rows]
        by_module = {name: tuple(row) for name, row in zip(self.merged.names, rows, strict=True)}
        return Learned(
            by_module,
            tuple(self.labels),
            before,
            after,
            steps,
            self.trace,
            notes=[*self.notes, *_notes(steps, self.trace)],
        )


def _group(name: str, granularity: str) -> str:
    return GRANULARITIES[granularity](name)


def _groups(names: Sequence[str], granularity: str) -> dict[str, int]:
    """Each group's place, in the order of the modules."""
    groups = dict.fromkeys(_group(name, granularity) for name in names)
    return {group: place for place, group in enumerate(groups)}


def _shape(groups: Sequence[str]) -> tuple[int, int]:
    """Layers × types where the groups are such a table by row, else one column."""
    places = [layer_and_type(group) for group in groups]
    layers, types = list(dict.fromkeys(p[0] for p in places)), list(dict.fromkeys(p[1] for p in places))
    table = [(layer, kind) for layer in layers for kind in types]
    return (len(layers), len(types)) if table == places else (len(groups), 1)


def _notes(steps: Sequence[Step], trace: Sequence[Evaluation]) -> list[str]:
    notes = []
    for step in steps:
        if not step.merged:
            notes.append(f"{step.label}: no coefficient lowers the objective, so nothing of it is merged")
        elif step.borders:
            many = f"{len(step.borders)} of {len(step.coefficients)}"
            notes.append(f"{step.label}: {many} coefficients ran to a border, the first is {step.borders[0]!r}")
    lost = sum(not math.isfinite(one.value) for one in trace)
    if lost:
        notes.append(f"{lost} of {len(trace)} evaluations had no finite loss, and were left out")
    values = [one.value for one in trace if one.batch is None and math.isfinite(one.value)]
    if len(values) > 2 and max(values) - min(values) <= _GAIN * max(1.0, abs(values[0])):
        notes.append("the objective is the same everywhere: these rows cannot tell the updates apart")
    return notes
