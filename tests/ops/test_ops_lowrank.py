import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safemerge_callback.ops import (
    LowRank,
    column_space,
    inner_product,
    refit,
    refit_dense,
    squared_norm,
    truncate,
    weighted_sum,
)


def update(d_out, d_in, r, seed=0, n=(), dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(*n, r, d_in, generator=g, dtype=torch.float64).to(dtype),
        torch.randn(*n, d_out, r, generator=g, dtype=torch.float64).to(dtype),
    )


def dense(u):
    return u.B.double() @ u.A.double()


def best(matrix, rank):
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]


def relative(x, y):
    return float((x - y).norm() / y.norm())


SHAPES = st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(1, 8), st.integers(1, 8), st.integers(0, 999))


@given(SHAPES)
@settings(max_examples=60, deadline=None)
def test_norm_and_inner_product_equal_dense(shape):
    d_out, d_in, r, q, seed = shape
    x, y = update(d_out, d_in, r, seed), update(d_out, d_in, q, seed + 1)
    torch.testing.assert_close(squared_norm(x), dense(x).square().sum(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(inner_product(x, y), (dense(x) * dense(y)).sum(), rtol=1e-9, atol=1e-9)


@given(SHAPES)
@settings(max_examples=60, deadline=None)
def test_truncate_and_refit_are_the_best_rank_r(shape):
    d_out, d_in, r, q, seed = shape
    x, y = update(d_out, d_in, r, seed), update(d_out, d_in, q, seed + 1)
    target = 0.8 * dense(x) + 0.2 * dense(y)
    stacked = weighted_sum([x, y], [0.8, 0.2])
    tail = target - best(target, r)
    for fitted, residual in (truncate(stacked, r), refit(x, stacked)):
        assert fitted.A.shape == x.A.shape
        assert fitted.B.shape == x.B.shape
        # Where singular values tie the best approximation is not unique, its distance is.
        # Float32 factors round by their own size, however much of the products cancels.
        rounding = 2e-5 * float(target.norm()) + 1e-6 * float(stacked.A.norm() * stacked.B.norm())
        assert float((dense(fitted) - target).norm()) <= float(tail.norm()) + rounding
        assert float(residual) == pytest.approx(float(tail.norm() / target.norm()), abs=1e-5)


def test_batch_equals_one_by_one():
    x, y = update(12, 20, 4, 1, n=(3,)), update(12, 20, 2, 2, n=(3,))
    fitted, residual = refit(x, weighted_sum([x, y], [0.5, 0.5]))
    for i in range(3):
        one_x, one_y = LowRank(x.A[i], x.B[i]), LowRank(y.A[i], y.B[i])
        one, one_residual = refit(one_x, weighted_sum([one_x, one_y], [0.5, 0.5]))
        assert relative(fitted.A[i], one.A) < 1e-4
        assert relative(dense(LowRank(fitted.A[i], fitted.B[i])), dense(one)) < 1e-5
        assert float(residual[i]) == pytest.approx(float(one_residual), abs=1e-6)


def test_refit_stays_in_the_gauge():
    """A small change of the update is a small change of both factors, however unbalanced the live pair is."""
    live = LowRank(100 * update(30, 40, 6, 3).A, 1e-3 * update(30, 40, 6, 3).B)
    nudge = update(30, 40, 6, 4)
    target = weighted_sum([live, nudge], [1.0, 1e-6])
    fitted, _ = refit(live, target)
    assert relative(fitted.A, live.A) < 1e-3
    assert relative(fitted.B, live.B) < 1e-3
    balanced, _ = truncate(target, 6)
    assert relative(balanced.A, live.A) > 0.5, "the balanced pair is far away: the gauge is what refit adds"


def test_refit_keeps_the_gram_of_A():
    live, other = update(30, 40, 6, 5), update(30, 40, 6, 6)
    fitted, _ = refit(live, weighted_sum([live, other], [0.0, 1.0]))
    torch.testing.assert_close(fitted.A @ fitted.A.mT, live.A @ live.A.mT, rtol=1e-4, atol=1e-3)
    assert relative(dense(fitted), dense(other)) < 1e-5


@pytest.mark.parametrize(("d_out", "d_in", "r"), [(5, 40, 8), (40, 5, 8), (4, 4, 8), (1, 7, 1), (16, 16, 1)])
def test_refit_where_the_rank_exceeds_the_matrix(d_out, d_in, r):
    live, other = update(d_out, d_in, r, 7), update(d_out, d_in, r, 8)
    fitted, residual = refit(live, weighted_sum([live, other], [0.8, 0.2]))
    target = 0.8 * dense(live) + 0.2 * dense(other)
    assert relative(dense(fitted), best(target, r)) < 1e-4
    assert torch.isfinite(fitted.A).all()
    assert float(residual) <= 1.0


def test_refit_from_an_update_that_is_zero():
    """B = 0, every LoRA's first step: the target is the safety update alone."""
    live, other = update(20, 24, 4, 9), update(20, 24, 4, 10)
    live = LowRank(live.A, torch.zeros_like(live.B))
    fitted, residual = refit(live, weighted_sum([live, other], [0.8, 0.2]))
    assert relative(dense(fitted), 0.2 * dense(other)) < 1e-5
    assert float(residual) < 1e-6


def test_bf16_factors_are_widened():
    x, y = update(16, 16, 3, 11, dtype=torch.bfloat16), update(16, 16, 3, 12, dtype=torch.bfloat16)
    stacked = weighted_sum([x, y], [0.3, 0.7])
    assert stacked.A.dtype == torch.float32
    torch.testing.assert_close(dense(stacked), 0.3 * dense(x) + 0.7 * dense(y), rtol=1e-5, atol=1e-5)


def test_shapes_are_checked_in_the_test_run():
    from safemerge_callback.ops import project

    with pytest.raises(Exception, match=r"(?i)type-check|jaxtyping|shape"):
        project(torch.randn(4, 3).long(), torch.randn(4, 5))


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (12, 12)])
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_refit_dense_is_refit_of_the_same_target(shape, batch):
    g = torch.Generator().manual_seed(0)
    d_out, d_in = shape
    live, target = (
        LowRank(torch.randn(*batch, r, d_in, generator=g).double(), torch.randn(*batch, d_out, r, generator=g).double())
        for r in (3, 6)
    )
    dense, lost = refit_dense(live, target.B @ target.A)
    fitted, residual = refit(live, target)
    torch.testing.assert_close(dense.A, fitted.A, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(dense.B, fitted.B, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(lost, residual)


def test_column_space_is_the_products_and_knows_its_rank():
    g = torch.Generator().manual_seed(1)
    A, B = torch.randn(2, 4, 15, generator=g).double(), torch.randn(2, 11, 4, generator=g).double()
    B[1, :, 2:] = 0  # the second module has rank 2
    basis = column_space(LowRank(A, B))
    assert (basis.norm(dim=-2) > 0.5).sum(-1).tolist() == [4, 2]
    delta = B @ A
    torch.testing.assert_close(basis @ (basis.mT @ delta), delta)
    assert not column_space(LowRank(A, 0 * B)).any()
