import pytest
import torch

from safemerge_callback.ops import LowRank, lowrank, refit_dense
from safemerge_callback.ops.krylov import leading_triplets


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def masked(d_out, d_in, rank=8, seed=0, batch=()):
    """Two updates of low rank, each thinned by chance, summed: what the merge has to cut back to the rank."""
    keep = (normal(2, *batch, d_out, d_in, seed=seed + 9) > 0).double()
    first, second = (
        normal(*batch, d_out, rank, seed=seed + i) @ normal(*batch, rank, d_in, seed=seed + i + 5) for i in (1, 2)
    )
    return 0.8 * first * keep[0] + 0.2 * second * keep[1]


@pytest.mark.parametrize("shape", [(300, 420), (420, 300)])
def test_triplets_of_a_masked_update_are_those_of_the_full_decomposition(shape):
    target = masked(*shape)
    u, s, v = torch.linalg.svd(target, full_matrices=False)
    left, values, right = leading_triplets(target, 8)
    torch.testing.assert_close(values, s[:8], rtol=1e-9, atol=1e-9)
    want = (u[:, :8] * s[:8]) @ v[:8]
    assert float(((left * values) @ right - want).norm() / want.norm()) < 1e-6
    torch.testing.assert_close(left.mT @ left, torch.eye(8).double())


def test_a_flat_spectrum_costs_less_than_a_thousandth():
    target = normal(400, 400, seed=1)
    s = torch.linalg.svdvals(target)
    values = leading_triplets(target, 8)[1]
    least, left_over = s[8:].norm(), (target.norm() ** 2 - values.norm() ** 2).sqrt()
    assert float(least) <= float(left_over) < 1.001 * float(least)


def test_refit_dense_beyond_the_limit_is_refit_dense_below_it(monkeypatch):
    target = masked(260, 300, batch=(2,)).float()
    live = LowRank(normal(2, 8, 300, seed=7).float(), normal(2, 260, 8, seed=8).float())
    exact, lost = refit_dense(live, target)
    monkeypatch.setattr(lowrank, "EXACT_UP_TO", 10)
    fast, left_over = refit_dense(live, target)
    assert float((fast.B @ fast.A - exact.B @ exact.A).norm() / (exact.B @ exact.A).norm()) < 1e-5
    torch.testing.assert_close(left_over, lost, rtol=1e-5, atol=1e-5)
    assert torch.equal(fast.B, refit_dense(live, target)[0].B)


@pytest.mark.parametrize("shape", [(3, 50), (50, 3), (9, 9)])
def test_small_matrices_and_zeros(shape):
    target = normal(*shape, seed=2)
    _, values, _ = leading_triplets(target, 4)
    s = torch.linalg.svdvals(target)
    torch.testing.assert_close(values, s[: min(4, *shape)])
    assert not leading_triplets(0 * target, 4)[1].any()
