"""The signed cosine: what the papers' cosine does not see."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safemerge_callback.ops import Factored, Int8, LowRank, cosines, projected_cosine


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def signed(update, V):
    return float(cosines(update, V).along) / float(V.double().norm())


def dense_signed(update, V):
    dw, V = update.B.double() @ update.A.double(), V.double()
    return float((V * dw).sum() / (V.norm() * dw.norm()))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 8), st.integers(0, 999))
@settings(max_examples=100, deadline=None)
def test_it_equals_float64_dense(d_out, d_in, r, seed):
    update = LowRank(rand(r, d_in, seed=seed), rand(d_out, r, seed=seed + 1))
    V = rand(d_out, d_in, seed=seed + 2)
    assert signed(update, V) == pytest.approx(dense_signed(update, V), abs=1e-6)


@given(st.integers(2, 30), st.integers(2, 30), st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_it_turns_with_the_update_and_the_papers_cosine_does_not(d_out, d_in, seed):
    update = LowRank(rand(3, d_in, seed=seed), rand(d_out, 3, seed=seed + 1))
    V = rand(d_out, d_in, seed=seed + 2)
    there, back = cosines(update, V), cosines(LowRank(update.A, -update.B), V)
    assert torch.equal(there.projected, back.projected)
    assert torch.equal(there.along, -back.along)
    assert torch.equal(there.projected, projected_cosine(update, V))


def test_the_safety_training_undone_has_the_papers_cosine_of_the_safety_training():
    A, B = rand(4, 30, seed=1), rand(20, 4, seed=2)
    V = B @ A
    assert signed(LowRank(A, B), V) == pytest.approx(1.0, abs=1e-6)
    assert signed(LowRank(A, -B), V) == pytest.approx(-1.0, abs=1e-6)
    assert float(projected_cosine(LowRank(A, -B), V)) == pytest.approx(float(projected_cosine(LowRank(A, B), V)))
    assert float(projected_cosine(LowRank(A, -B), V)) > 0.8


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize(("d_out", "d_in", "spectrum"), [(40, 40, 1.0), (12, 60, 0.5), (60, 12, 0.1)])
def test_of_unrelated_updates_it_has_mean_0_and_the_stated_spread(d_out, d_in, spectrum, rank):
    """Whatever V's spectrum and the update's rank: 1/√(d_out·d_in)."""
    draws, inner = 4000, min(d_out, d_in)
    V = (rand(d_out, inner, seed=1) * spectrum ** torch.arange(inner)) @ rand(inner, d_in, seed=2)
    update = LowRank(rand(draws, rank, d_in, seed=3), rand(draws, d_out, rank, seed=4))
    z = cosines(update, V.expand(draws, -1, -1)).along / V.double().norm() * (d_out * d_in) ** 0.5
    # four standard errors of a mean, and of a standard deviation of values with a kurtosis of up to 9
    assert float(z.mean()) == pytest.approx(0.0, abs=4 / draws**0.5)
    assert float(z.square().mean().sqrt()) == pytest.approx(1.0, abs=4 * (8 / 4 / draws) ** 0.5)


@pytest.mark.parametrize(("scale_b", "scale_v"), [(1e-12, 1e-12), (1e15, 1e15), (1e-18, 1e12)])
def test_it_does_not_see_scale(scale_b, scale_v):
    A, B, V = rand(4, 30, seed=1), rand(20, 4, seed=2), rand(20, 30, seed=3)
    assert signed(LowRank(A, scale_b * B), scale_v * V) == pytest.approx(dense_signed(LowRank(A, B), V), abs=1e-6)


def test_every_form_of_V_and_a_batch_give_the_same():
    A, B = rand(2, 4, 30, seed=1), rand(2, 20, 4, seed=2)
    U, W = rand(2, 20, 3, seed=3), rand(2, 3, 30, seed=4)
    Q = torch.randint(-127, 128, (2, 20, 30), generator=torch.Generator().manual_seed(5), dtype=torch.int8)
    scale = rand(2, 20, 1, seed=6).abs()
    for V, whole in ((Factored(U, W), U @ W), (Int8(Q, scale), Q * scale), (U @ W, U @ W)):
        found = cosines(LowRank(A, B), V).along
        assert found.shape == (2,)
        for i, value in enumerate(found.tolist()):
            expected = dense_signed(LowRank(A[i], B[i]), whole[i])
            assert value / float(whole[i].double().norm()) == pytest.approx(expected, abs=1e-6)


def test_what_has_not_moved_or_is_not_finite_has_none():
    A, B, V = rand(4, 30, seed=1), rand(20, 4, seed=2), rand(20, 30, seed=3)
    assert cosines(LowRank(A, torch.zeros_like(B)), V).along.isnan()
    assert float(cosines(LowRank(A, B), torch.zeros_like(V)).along) == 0.0
    assert cosines(LowRank(A, B.clone().fill_(torch.inf)), V).along.isnan()
