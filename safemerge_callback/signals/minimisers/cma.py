"""`cma`: CMA-ES of the library `cma`, an extra; forward passes only, a batch of rows a generation."""

from __future__ import annotations

import math

from ...errors import ConfigError
from .registry import Effort, Problem, minimiser

# mergekit's, as One Bad Model ran it.
_SIGMA = 1.0 / 6.0


@minimiser(96, least=2)
def cma(problem: Problem, effort: Effort) -> None:
    """Let CMA-ES ask for points, a generation on the same rows, then ask all rows at its last mean.

    Source: Hansen, arXiv:1604.00772, in its author's library; EvoMM of One Bad Model (arXiv:2406.14563): σ₀ = 1/6.
    Differs: it begins where one coefficient for all is best, not at 0.5, and a population of 4 + 3·ln n with 100
    evaluations is a few generations: use it for few numbers. What is no number counts as worse than the worst of its
    generation. ConfigError where the library is not installed.
    """
    try:
        import cma as library
    except ImportError:
        raise ConfigError("minimiser 'cma' needs cma: pip install 'safemerge-callback[search]'") from None
    # Seed 0 would be the time.
    options = {"bounds": [0.0, 1.0], "seed": effort.seed + 1, "maxfevals": effort.evaluations, "verbose": -9}
    strategy = library.CMAEvolutionStrategy([*problem.start], _SIGMA, options)
    generation = 0
    while not strategy.stop():
        points = [[float(number) for number in point] for point in strategy.ask()]
        losses = [problem.loss(point, batch=generation) for point in points]
        worst = max((loss for loss in losses if math.isfinite(loss)), default=0.0) + 1.0
        strategy.tell(points, [loss if math.isfinite(loss) else worst for loss in losses])
        generation += 1
    problem.loss([min(1.0, max(0.0, float(number))) for number in strategy.result.xfavorite])
