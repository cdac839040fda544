"""What the figures of a few seeds can say: intervals of means and differences, and refusals at equal task score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation import wilson

DRAWS = 2000
_SEED = 0
# Seed of a run -> what was seen on each prompt, in one order: 1.0 (refused, or right), 0.0, or NaN (no verdict).
Outcomes = Mapping[int, Sequence[float]]


class Scored(NamedTuple):
    """What an arm did on its task, and on harmful prompts."""

    task: Outcomes
    harm: Outcomes


class Interval(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


class AtScore(NamedTuple):
    """An arm beside the front of others at the arm's own task score, over the seeds that all of them share.

    above: `refusal` less `front`, with the interval of a bootstrap; None for an arm that scores less than all of the
        front: `front` is the most that it refuses anywhere then, and nobody knows how much more it would there.
    """

    seeds: tuple[int, ...]
    task: float
    refusal: float
    front: float
    above: Interval | None


def mean_interval(outcomes: Outcomes) -> Interval:
    """Return the mean over seeds and prompts: Wilson's interval for one seed, else a bootstrap of seeds and prompts."""
    if len(outcomes) == 1:
        (only,) = outcomes.values()
        kept = [value for value in only if value == value]
        return Interval(sum(kept) / len(kept), *wilson(round(sum(kept)), len(kept)))
    return _bootstrap(_matrix(outcomes, sorted(outcomes)))


def paired_difference(of: Outcomes, against: Outcomes) -> Interval:
    """Return the mean of `of` less that of `against`, with the interval of a paired bootstrap.

    Pairs are of one seed and one prompt. Seeds and prompts are drawn with replacement, each once for both arms (a
    crossed bootstrap: Owen 2007, arXiv:0711.1877, pigeonhole), so what both arms share cancels. With one seed only
    prompts are drawn, and the interval says nothing of other seeds. ConfigError where no seed is in both, or the
    numbers of prompts differ.
    """
    seeds = sorted(of.keys() & against.keys())
    if not seeds:
        raise ConfigError(f"no seed is in both arms: they have {sorted(of)} and {sorted(against)}; run one in both")
    x, y = _matrix(of, seeds), _matrix(against, seeds)
    if x.shape != y.shape:
        raise ConfigError(f"arms were asked {x.shape[1]} and {y.shape[1]} prompts: only the same ones can be paired")
    return _bootstrap(x - y)


def _matrix(outcomes: Outcomes, seeds: Sequence[int]) -> NDArray[np.float64]:
    sizes = {len(outcomes[seed]) for seed in seeds}
    if len(sizes) != 1:
        raise ConfigError(f"seeds {list(seeds)} were asked {sorted(sizes)} prompts: give every seed the same ones")
    return np.array([outcomes[seed] for seed in seeds], dtype=np.float64)


def _bootstrap(values: NDArray[np.float64]) -> Interval:
    """The mean of (seeds, prompts), NaN left out, and the 2.5th and 97.5th percentile of its redrawn means."""
    low, high = np.percentile(_redrawn(values), [2.5, 97.5])
    return Interval(float(np.nanmean(values)), float(low), float(high))


def _redrawn(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of (seeds, prompts) over redrawn seeds and prompts, (DRAWS).

    The same for equal numbers of each, so arms are redrawn together; and the seeds alike for any number of prompts.
    """
    rng = np.random.default_rng(_SEED)
    seeds, prompts = values.shape
    rows = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=DRAWS) / seeds
    columns = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=DRAWS) / prompts
    there = ~np.isnan(values)
    hits, counted = (
        np.einsum("ds,sp,dp->d", rows, table, columns, optimize=True)
        for table in (np.where(there, values, 0.0), there.astype(np.float64))
    )
    return np.asarray(hits / counted)


def at_score(arm: Scored, others: Sequence[Scored]) -> AtScore | None:
    """Return an arm beside the front of others at its own task score; None where they share no seed.

    All are redrawn together, in the seeds that they share. Above its highest task score the front is taken to stay as
    it is there, which is too high and so against the arm.
    """
    seeds = sorted(set.intersection(*(set(part) for scored in (arm, *others) for part in scored)))
    if not seeds:
        return None
    tables = [[_matrix(part, seeds) for part in scored] for scored in (arm, *others)]
    means = np.array([[np.nanmean(table) for table in pair] for pair in tables])
    (task, refusal), ends = means[0].tolist(), means[1:]
    if task < ends[:, 0].min():
        return AtScore(tuple(seeds), task, refusal, float(ends[:, 1].max()), None)
    redrawn = np.array([[_redrawn(table) for table in pair] for pair in tables])
    low, high = np.percentile([_above(points) for points in redrawn.transpose(2, 0, 1)], [2.5, 97.5])
    value = _above(means)
    return AtScore(tuple(seeds), task, refusal, refusal - value, Interval(value, float(low), float(high)))


def _above(points: NDArray[np.float64]) -> float:
    """The refusal of the first of (arms, 2) points (task score, refusal) less that of the front of the rest."""
    (task, refusal), *others = ((float(x), float(y)) for x, y in points)
    there = refusal_at(others, task)
    return refusal - (max(others)[1] if there is None else there)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (task score, refusal) that no other beats in both, by ascending task score."""
    kept: list[tuple[float, float]] = []
    for task, refusal in sorted(set(points), key=lambda point: (-point[0], -point[1])):
        if not kept or refusal > kept[-1][1]:
            kept.append((task, refusal))
    return kept[::-1]


def refusal_at(points: Sequence[tuple[float, float]], task: float) -> float | None:
    """Return the refusal of an arm at a task score, interpolated linearly between neighbours on its front.

    Below its lowest task score the front stays at its highest refusal (nothing is lost by scoring better than asked);
    above its highest it has none: None.
    """
    kept = front(points)
    if not kept or task > kept[-1][0]:
        return None
    if task <= kept[0][0]:
        return kept[0][1]
    above = next(i for i, point in enumerate(kept) if point[0] >= task)
    (x0, y0), (x1, y1) = kept[above - 1], kept[above]
    return y0 + (y1 - y0) * (task - x0) / (x1 - x0)
