"""mergekit's published conventions for TIES and DARE, written out in float64 numpy: where ours are other numbers."""

import math

import numpy as np
import pytest
import torch

from safemerge_callback.methods import get_method
from safemerge_callback.ops import LowRank


def matrices(d_out, d_in, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((d_out, d_in)) for _ in range(2)]


def largest(x, density):
    """The int(density · entries) largest entries, the others 0."""
    cut = np.sort(np.abs(x), axis=None)[::-1][int(density * x.size) - 1]
    return np.where(np.abs(x) >= cut, x, 0.0)


def mergekit_ties(xs, weights, density):
    """Weighted updates vote by their sum; `normalize` (its default for ties) divides by the agreeing weights' sum."""
    kept = np.stack([largest(x, density) for x in xs])
    scaled = kept * np.array(weights)[:, None, None]
    majority = np.where(scaled.sum(0) >= 0, 1.0, -1.0)
    agree = np.sign(scaled) == majority
    divisor = (np.array(weights)[:, None, None] * agree).sum(0)
    return (scaled * agree).sum(0) / np.where(divisor == 0, 1.0, divisor)


def by_entries(name, xs, weights, **knobs):
    """Our method on the updates' entries: B is the update and A the identity, which every mask keeps at density 1."""
    live, *safety = (LowRank(torch.eye(x.shape[1], dtype=torch.float64), torch.from_numpy(x)) for x in xs)
    out = get_method(name).merge(live, safety, weights=weights, space="delta", **knobs)
    return (out.B @ out.A).numpy()


@pytest.mark.parametrize("density", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("weight", [0.2, 0.5, 1.0])
def test_ties_with_equal_weights_is_ours_at_weights_of_one(density, weight):
    """Then both elect alike, and their weighted mean is our mean: the equivalent of a mergekit configuration."""
    xs = matrices(30, 40)
    np.testing.assert_allclose(
        by_entries("ties", xs, (1.0, 1.0), density=density), mergekit_ties(xs, (weight, weight), density), atol=1e-9
    )


def test_ties_with_other_weights_elects_other_signs():
    """At .8/.2 on Gaussian entries ½·(2/π)(arctan 4 - arctan 1) = 17 % of the signs are elected otherwise."""
    xs = matrices(400, 500)
    mine, theirs = by_entries("ties", xs, (0.8, 0.2), density=1.0), mergekit_ties(xs, (0.8, 0.2), 1.0)
    share = (np.sign(mine) != np.sign(theirs)).mean()
    assert share == pytest.approx((math.atan(4) - math.atan(1)) / math.pi, abs=0.01)
    assert share == pytest.approx(0.172, abs=0.01)


@pytest.mark.parametrize(("shape", "spread"), [((4, 8), 0.5), ((300, 400), 0.01)])
def test_dare_is_rescaled_by_the_density_here_and_by_the_l1_norm_there(shape, spread):
    """One mask, two scales: 1/density keeps the mean over masks, ‖x‖₁/‖masked‖₁ this matrix's own sum of sizes."""
    x, density = matrices(*shape)[0], 0.4
    generator = torch.Generator().manual_seed(5)
    mine = by_entries("dare_linear", [x, 0 * x], (0.5, 0.5), density=density, generator=generator) / 0.5
    mask = np.abs(mine) > 1e-9
    np.testing.assert_allclose(mine, x * mask / density, atol=1e-8)
    theirs = x * mask * (np.abs(x).sum() / np.abs(x * mask).sum())
    ratio = theirs[mask] / mine[mask]
    assert ratio.std() < 1e-6
    assert ratio[0] == pytest.approx(density * np.abs(x).sum() / np.abs(x * mask).sum())
    assert 1e-5 < abs(ratio[0] - 1) < spread
