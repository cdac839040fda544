"""From results to the figures of the page: arms' outcomes by seed, their means, differences, and fronts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .grid import Grid
from .results import Result
from .statistics import Interval, Scored, above_front, mean_interval, paired_difference, refusal_at

HARMFUL = ("harmbench_refused", "strongreject_refused", "advbench_refused")
# All three harmful sets together; not a set of its own.
HARM = "harm_refused"
SHOWN = (HARM, *HARMFUL, "benign_refused", "task", "coherent")
_VALUES = {"1": 1.0, "0": 0.0, "i": 0.0, "u": float("nan")}


@dataclass
class Place:
    """What was seen at one task and poisoned share: arm -> measure -> seed -> outcomes, and each arm's trails."""

    task: str
    poisoned_share: float
    arms: dict[str, dict[str, dict[int, list[float]]]] = field(default_factory=dict)
    trails: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    _intervals: dict[tuple[str, str], Interval] = field(default_factory=dict)

    def interval(self, arm: str, measure: str) -> Interval | None:
        """Return an arm's mean over seeds; None where the measure was not taken."""
        outcomes = self.arms.get(arm, {}).get(measure)
        if not outcomes:
            return None
        # A bootstrap is worth doing once.
        if (arm, measure) not in self._intervals:
            self._intervals[arm, measure] = mean_interval(outcomes)
        return self._intervals[arm, measure]

    def difference(self, arm: str, other: str, measure: str) -> Interval | None:
        """Return `arm` less `other`, paired; None where they share no seed. A model as it is pairs with every seed."""
        of, against = (self.arms.get(name, {}).get(measure) for name in (arm, other))
        if not of or not against or not of.keys() & against.keys():
            return None
        return paired_difference(of, against)

    def above(self, arm: str, others: Sequence[str]) -> Interval | None:
        """Return how far an arm's refusal is above the front of others at its own task score."""
        scored = [Scored(held["task"], held[HARM]) for name in (arm, *others) if HARM in (held := self.arms[name])]
        return above_front(scored[0], scored[1:]) if len(scored) > len(others) > 0 else None

    def point(self, arm: str) -> tuple[float, float] | None:
        """Return (task score, refusal of the three sets together), means over seeds."""
        task, harm = self.interval(arm, "task"), self.interval(arm, HARM)
        return (task.value, harm.value) if task and harm else None


def places_of(grid: Grid, results: Sequence[Result]) -> list[Place]:
    """Return the grid's places where something was trained; arms of kind `model` are in each place of their task."""
    places = [Place(task, share) for task in grid.tasks for share in grid.poisoned_shares]
    for place in places:
        for result in results:
            here = result["kind"] == "model" or result["poisoned_share"] == place.poisoned_share
            if here and result["task"] == place.task and not result["error"]:
                _enter(place, result)
    return [place for place in places if any(grid.arms[name].kind != "model" for name in place.arms)]


def _enter(place: Place, result: Result) -> None:
    arm = place.arms.setdefault(result["arm"], {})
    taken = {m["measure"]: [_VALUES[letter] for letter in m["outcomes"]] for m in result["measures"]}
    if all(name in taken for name in HARMFUL):
        taken[HARM] = [value for name in HARMFUL for value in taken[name]]
    for measure, outcomes in taken.items():
        arm.setdefault(measure, {})[result["seed"]] = outcomes
    if result["trail"]:
        place.trails.setdefault(result["arm"], []).append(result["trail"])


def families(grid: Grid, place: Place) -> dict[str, list[str]]:
    """Return family -> its arms that have results in the place, in the grid's order."""
    found: dict[str, list[str]] = {}
    for name, arm in grid.arms.items():
        if name in place.arms:
            found.setdefault(arm.family, []).append(name)
    return found


def fronts(grid: Grid, place: Place) -> dict[str, list[tuple[float, float]]]:
    """Return family -> its points (task score, refusal), the baseline's with each.

    Every defence at no strength is the baseline, so a family's front begins there; models as they are have none.
    """
    base = place.point(grid.baseline)
    found: dict[str, list[tuple[float, float]]] = {}
    for family, names in families(grid, place).items():
        points = [point for name in names if grid.arms[name].kind != "model" and (point := place.point(name))]
        if points:
            found[family] = points + ([base] if base and family != grid.baseline else [])
    return found


def reference_arms(grid: Grid, place: Place) -> list[str]:
    """Return the arms of the reference's front that have results here: its own points, and the baseline."""
    names = families(grid, place).get(grid.reference) or [grid.reference]
    return [name for name in dict.fromkeys([*names, grid.baseline]) if place.point(name)]


def matched(grid: Grid, place: Place) -> tuple[float, dict[str, float | None]] | None:
    """Return the reference's mean task score, and each family's refusal there, interpolated on its front.

    Where the reference has several points, its best refusal's. None where it has no result.
    """
    names = families(grid, place).get(grid.reference) or [grid.reference]
    points = [point for name in names if (point := place.point(name))]
    if not points:
        return None
    score = max(points, key=lambda point: point[1])[0]
    return score, {family: refusal_at(points, score) for family, points in fronts(grid, place).items()}
