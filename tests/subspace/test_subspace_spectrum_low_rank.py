import pytest
import torch

from safemerge_callback.subspace import spectrum


def find_factors(V, norm):
    return spectrum.find_factors(V, norm, spectrum.sketch_of(V, norm))


def low_rank(rank, rows=200, columns=300, dtype=torch.float64):
    return (torch.randn(rows, rank, dtype=torch.float64) @ torch.randn(rank, columns, dtype=torch.float64)).to(dtype)


def relative_residual(V, factors):
    return float((V.double() - factors.U.double() @ factors.W.double()).norm() / V.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 8, 63, 64])
def test_the_rank_is_found_and_the_factors_reproduce_v(rank, dtype):
    V = low_rank(rank, dtype=dtype)
    factors = find_factors(V, float(V.norm()))
    assert factors.U.shape == (200, rank)
    assert factors.W.shape == (rank, 300)
    assert factors.U.dtype == torch.float32
    assert relative_residual(V, factors) < 1e-5


def test_rank_above_the_cap_and_full_rank_are_not_factored():
    for V in (low_rank(65), low_rank(80), torch.randn(200, 300)):
        assert find_factors(V, float(V.norm())) is None


@pytest.mark.parametrize(("noise", "found"), [(3e-6, True), (3e-5, False)])
def test_noise_is_cut_below_the_tolerance_and_keeps_v_dense_above(noise, found):
    V = low_rank(8)
    rest = torch.randn_like(V)
    V = V + rest * (noise * V.norm() / rest.norm())
    factors = find_factors(V, float(V.norm()))
    assert (factors is not None) == found
    if found:
        assert factors.U.shape[1] == 8
        assert relative_residual(V, factors) <= 1e-5


def test_a_spectrum_that_fades_is_cut_where_the_rest_is_negligible():
    left, _ = torch.linalg.qr(torch.randn(100, 40, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(120, 40, dtype=torch.float64))
    values = 0.2 ** torch.arange(40, dtype=torch.float64)
    V = (left * values) @ right.mT
    factors = find_factors(V, float(V.norm()))
    assert factors.U.shape[1] == 8  # what is left after k values is 0.2^k of the norm: 1.3e-5 after 7, 2.6e-6 after 8
    assert relative_residual(V, factors) <= 1e-5


def test_it_is_the_same_every_time():
    V = low_rank(5, dtype=torch.float32)
    torch.manual_seed(1)
    first = find_factors(V, float(V.norm()))
    torch.manual_seed(2)
    second = find_factors(V, float(V.norm()))
    assert torch.equal(first.U, second.U)
    assert torch.equal(first.W, second.W)


def test_matrices_smaller_than_the_sample():
    V = low_rank(2, rows=5, columns=9)
    factors = find_factors(V, float(V.norm()))
    assert factors.U.shape == (5, 2)
    assert relative_residual(V, factors) < 1e-6
