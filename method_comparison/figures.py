"""From results to the figures of the page: arms' outcomes by seed, their means, differences, and fronts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .grid import Grid, cells_of
from .results import Result
from .statistics import AtScore, Interval, Scored, at_score, mean_interval, paired_difference

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

    @property
    def title(self) -> str:
        """How the page calls it."""
        return f"{self.task}, {100 * self.poisoned_share:.0f} % poisoned"

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

    def at_score(self, arm: str, others: Sequence[str]) -> AtScore | None:
        """Return an arm beside the front of others at its own task score; None for no others, or no seed in all."""
        scored = [Scored(means["task"], means[HARM]) for name in (arm, *others) if HARM in (means := self.arms[name])]
        return at_score(scored[0], scored[1:]) if len(scored) > len(others) > 0 else None

    def seeds(self, arm: str) -> set[int]:
        """Return the seeds that an arm has here."""
        return set(self.arms[arm]["task"])

    def point(self, arm: str) -> tuple[float, float] | None:
        """Return (task score, refusal of the three sets together), means over seeds."""
        task, harm = self.interval(arm, "task"), self.interval(arm, HARM)
        return (task.value, harm.value) if task and harm else None


def places_of(grid: Grid, results: Sequence[Result]) -> list[Place]:
    """Return the places of the grid's cells where something was trained, shares rising; what is under `more` too.

    Arms of kind `model` are in each place of their task.
    """
    cells = cells_of(grid)
    tasks, shares = dict.fromkeys(cell.task for cell in cells), sorted({cell.poisoned_share for cell in cells})
    places = [Place(task, share) for task in tasks for share in shares]
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
    arms_of: dict[str, list[str]] = {}
    for name, arm in grid.arms.items():
        if name in place.arms:
            arms_of.setdefault(arm.family, []).append(name)
    return arms_of


def fronts(grid: Grid, place: Place) -> dict[str, list[tuple[float, float]]]:
    """Return family -> its points (task score, refusal), the baseline's with each.

    Every defence at no strength is the baseline, so a family's front begins there; models as they are have none.
    """
    base = place.point(grid.baseline)
    points_of: dict[str, list[tuple[float, float]]] = {}
    for family, names in families(grid, place).items():
        points = [point for name in names if grid.arms[name].kind != "model" and (point := place.point(name))]
        if points:
            points_of[family] = points + ([base] if base and family != grid.baseline else [])
    return points_of


def reference_of(grid: Grid, place: Place) -> str | None:
    """Return the arm that others are compared with: the reference, or the first of its family that has results here."""
    named = [name for name in grid.arms if name == grid.reference]
    of_family = [name for name, arm in grid.arms.items() if arm.family == grid.reference]
    return next((name for name in [*named, *of_family] if name in place.arms), None)


def reference_arms(grid: Grid, place: Place) -> list[str]:
    """Return the arms of the reference's front that have results here: its own points, and the baseline."""
    return _with_baseline(grid, place, families(grid, place).get(grid.reference) or [grid.reference])


def matched(grid: Grid, place: Place) -> dict[str, AtScore]:
    """Return family -> the reference beside its front, the baseline's point with it, at the reference's task score.

    Of families that are neither the reference's nor the baseline's; those without a seed in common are left out. Where
    only some of a family's arms have all of the reference's seeds, they are a front of their own, under their names.
    """
    reference = reference_of(grid, place)
    if reference is None:
        return {}
    others = {
        family: [name for name in names if grid.arms[name].kind != "model"]
        for family, names in families(grid, place).items()
        if family not in (grid.arms[reference].family, grid.baseline)
    }
    for names in list(others.values()):
        whole = [name for name in names if place.seeds(reference) <= place.seeds(name)]
        if 0 < len(whole) < len(names):
            others[", ".join(whole)] = whole
    scores = {
        title: place.at_score(reference, _with_baseline(grid, place, names)) for title, names in others.items() if names
    }
    return {title: one for title, one in scores.items() if one}


def _with_baseline(grid: Grid, place: Place, names: Sequence[str]) -> list[str]:
    return [name for name in dict.fromkeys([*names, grid.baseline]) if place.point(name)]
