"""`golden`: one number by golden section; forward passes only, and each narrows the interval by 0.618."""

from __future__ import annotations

import math

from .registry import Effort, Problem, minimiser

_RATIO = (math.sqrt(5.0) - 1.0) / 2.0
# The width at which the interval is narrow enough: far below what a few dozen rows can tell apart.
WIDTH = 0.06


@minimiser(12, most=1)
def golden(problem: Problem, effort: Effort) -> None:
    """Narrow [0, 1] around the least loss down to a width of 0.06, or until the effort is spent: 8 evaluations, or 9.

    Source: Kiefer 1953. It finds the minimum of a loss with one valley, and a border where the loss falls towards it:
    the border itself is then asked. A loss that is no number counts as infinite, and of two such the interval keeps the
    side of the smaller change.
    """
    low, high = 0.0, 1.0
    points = [high - _RATIO * (high - low), low + _RATIO * (high - low)]
    losses = [problem.loss([point]) for point in points]
    spent = len(points)
    while high - low > WIDTH and spent < effort.evaluations:
        if losses[0] <= losses[1]:
            high, points[1], losses[1] = points[1], points[0], losses[0]
            points[0] = high - _RATIO * (high - low)
            losses[0] = problem.loss([points[0]])
        else:
            low, points[0], losses[0] = points[0], points[1], losses[1]
            points[1] = low + _RATIO * (high - low)
            losses[1] = problem.loss([points[1]])
        spent += 1
    for border in {low, high} & {0.0, 1.0}:
        problem.loss([border])
