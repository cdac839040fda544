"""The regression between two Grams, against least squares and against the direct formula, in float64."""

import math

import pytest
import torch

from safemerge_callback.errors import PlanError
from safemerge_callback.ops import Grams, gram_cosine, regression, unused_features

D, RANK = 24, 3


def factor(rows, seed, d=D):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(rows, d, generator=source, dtype=torch.float64) / rows**0.5


def update(seed, r=RANK, d=D):
    return torch.randn(r, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def direct(A, grams, mu, ridge, alpha, part="task"):
    """The same with d × d matrices."""
    F, S = (x.mT @ x for x in grams)
    F, S = (alpha * G + (1 - alpha) * torch.diag_embed(G.diagonal(dim1=-2, dim2=-1)) for G in (F, S))
    level = ridge * grams.task.square().sum(-2).mean(-1)
    F = F + level[..., None, None] * torch.eye(D, dtype=torch.float64)
    inverse = torch.linalg.inv(F + mu * S)
    return A @ F @ inverse if part == "task" else A @ (mu * S) @ inverse


@pytest.mark.parametrize("rows", [(7, 5), (40, 5), (5, 40), (1, 1)])
@pytest.mark.parametrize(
    ("mu", "ridge", "alpha"), [(3.0, 0.3, 1.0), (0.5, 1e-2, 1.0), (3.0, 0.3, 0.9), (1.0, 0.3, 0.0)]
)
def test_woodbury_is_the_direct_formula(rows, mu, ridge, alpha):
    grams, A = Grams(factor(rows[0], 1), factor(rows[1], 2)), update(3)
    solved = regression(grams, mu=mu, ridge=ridge, alpha=alpha)
    scale = float(A.abs().max())
    assert torch.allclose(solved.task_part(A), direct(A, grams, mu, ridge, alpha), rtol=0, atol=1e-12 * scale)
    safety = direct(A, grams, mu, ridge, alpha, "safety")
    assert torch.allclose(solved.safety_part(A), safety, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("mu", [0.3, 3.0, 100.0])
def test_it_is_the_least_squares_solution(mu):
    """min ‖(X - A)·Fᵀ‖² + μ·‖(X - A_s)·Sᵀ‖² + ε·‖X - A‖², stacked as one system."""
    grams, A, other = Grams(factor(9, 1), factor(6, 2)), update(3), update(4)
    solved = regression(grams, mu=mu, ridge=0.3)
    level = 0.3 * float(grams.task.square().sum(-2).mean())
    root = level**0.5 * torch.eye(D, dtype=torch.float64)
    system = torch.cat([grams.task, root, mu**0.5 * grams.safety])
    target = torch.cat([grams.task @ A.mT, root @ A.mT, mu**0.5 * grams.safety @ other.mT])
    best = torch.linalg.lstsq(system, target).solution.mT
    X = solved.task_part(A) + solved.safety_part(other)
    assert float((X - best).abs().max()) < 1e-12 * float(best.abs().max())


def test_where_the_grams_agree_it_is_a_share_of_the_way():
    F = factor(40, 1)
    A = update(3)
    for mu in (0.25, 3.0):
        X = regression(Grams(F, F), mu=mu, ridge=1e-6).task_part(A)
        assert torch.allclose(X, A / (1 + mu), rtol=1e-4)
    # a ridge keeps more of what the task's inputs hardly excite
    X = regression(Grams(F, F), mu=3.0, ridge=0.3).task_part(A)
    assert float(X.norm()) > float((A / 4).norm())


def test_much_safety_forgets_what_safety_rows_excite_and_keeps_the_rest():
    grams, A = Grams(factor(200, 1), factor(8, 2)), update(3)
    few, X = (regression(grams, mu=mu, ridge=1e-3).task_part(A) for mu in (1e3, 1e4))
    before, left = (float((one @ grams.safety.mT).abs().max()) for one in (few, X))
    assert left == pytest.approx(before / 10, rel=0.02)
    assert left < 1e-3
    share = float((X @ grams.task.mT).norm() / (A @ grams.task.mT).norm())
    assert 0.5 < share < 1.0


def test_it_is_the_same_in_a_batch_with_zeros_to_fill_up():
    pairs = [Grams(factor(9, 1), factor(6, 2)), Grams(factor(4, 3), factor(2, 4))]
    filled = [
        [torch.nn.functional.pad(x, (0, 0, 0, n - len(x))) for x, n in zip(p, (9, 6), strict=True)] for p in pairs
    ]
    together = Grams(*(torch.stack(side) for side in zip(*filled, strict=True)))
    A = torch.stack([update(5), update(6)])
    X = regression(together, mu=3.0, ridge=0.3).task_part(A)
    for i, pair in enumerate(pairs):
        assert torch.allclose(X[i], regression(pair, mu=3.0, ridge=0.3).task_part(A[i]), rtol=1e-12)


def test_float32_factors_are_widened():
    grams = Grams(*(factor(9, seed).float() for seed in (1, 2)))
    X = regression(grams, mu=3.0, ridge=0.3).task_part(update(3).float())
    assert X.dtype == torch.float64


def test_a_gram_of_nothing_gives_what_is_not_finite_and_no_ridge_is_refused():
    grams = Grams(torch.zeros(4, D), factor(3, 1))
    assert not regression(grams, mu=1.0, ridge=0.3).task_part(update(3)).isfinite().all()
    with pytest.raises(PlanError, match=r"ridge is 0\.0, and a Gram of few rows is singular"):
        regression(Grams(factor(9, 1), factor(6, 2)), mu=1.0, ridge=0.0)


def test_the_angle_is_that_of_the_matrices():
    grams = Grams(factor(9, 1), factor(6, 2))
    F, S = (x.mT @ x for x in grams)
    assert float(gram_cosine(grams)) == pytest.approx(float((F * S).sum() / (F.norm() * S.norm())), rel=1e-12)
    assert float(gram_cosine(Grams(grams.task, 3 * grams.task))) == pytest.approx(1.0)
    apart = Grams(torch.eye(D)[:2], torch.eye(D)[2:5])
    assert float(gram_cosine(apart)) == 0.0
    assert math.isnan(float(gram_cosine(Grams(grams.task, 0 * grams.safety))))


def test_features_that_no_row_used_are_counted():
    X = factor(5, 1)
    X[:, [2, 7]] = 0
    assert unused_features(torch.stack([X, torch.zeros_like(X)])).tolist() == [2.0, float(D)]
