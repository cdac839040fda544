import pytest
import torch

from safemerge_callback.ops import Factored, LowRank, null_cosine, projected_cosine
from safemerge_callback.subspace import spectrum as module
from safemerge_callback.subspace.spectrum import (
    ADAPTER_RANKS,
    ENERGY_RANKS,
    estimated_null_cosine,
    factored_spectrum,
    sketch_of,
    spectrum_of,
)


def with_spectrum(rows, columns, values):
    """A matrix with these singular values and random singular vectors."""
    left, _ = torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, len(values), dtype=torch.float64))
    return (left * values) @ right.mT


def power(count, exponent):
    return torch.arange(1, count + 1, dtype=torch.float64) ** -exponent


def spectrum(V):
    norm = float(V.double().norm())
    return spectrum_of(V, norm, sketch_of(V, norm))


def cosines(V, rank, count=400):
    """The cosine of Gaussian updates, each from its own A and B."""
    A, B = torch.randn(count, rank, V.shape[1]), torch.randn(count, V.shape[0], rank)
    return projected_cosine(LowRank(A, B), V.float().expand(count, *V.shape))


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("rows", "columns"), [(192, 96), (96, 192)])
def test_null_std_is_that_of_updates_drawn_afresh(rows, columns, exponent):
    V = with_spectrum(rows, columns, power(90, exponent))
    found = spectrum(V)
    assert [int(rank) for rank in found.null_std] == list(ADAPTER_RANKS)
    for rank in (4, 16, 64):
        drawn = cosines(V, rank)
        # 400 draws, and a sketch of 128 columns: 3.5 and about 9 % each way.
        assert found.null_std[str(rank)] == pytest.approx(float(drawn.std()), rel=0.35)
        assert found.null_cosine == pytest.approx(float(drawn.mean()), abs=3 * float(drawn.std()))


def test_null_std_is_nearly_unbiased():
    """Over many V of one spectrum, what is off for one of them must not add up."""
    ratios = {rank: [] for rank in (4, 32, 64)}
    for _ in range(10):
        V = with_spectrum(96, 144, power(96, 0.5))
        found = spectrum(V).null_std
        for rank, ratio in ratios.items():
            ratio.append(found[str(rank)] / float(cosines(V, rank, 250).std()))
    for rank, ratio in ratios.items():
        assert sum(ratio) / len(ratio) == pytest.approx(1.0, abs=0.1), rank


def test_null_std_shrinks_with_the_rank_and_is_zero_where_the_cosine_cannot_vary():
    stds = list(spectrum(torch.randn(100, 200)).null_std.values())
    assert stds == sorted(stds, reverse=True)
    orthogonal = with_spectrum(50, 80, torch.ones(50, dtype=torch.float64))
    assert max(spectrum(orthogonal).null_std.values()) < 1e-6


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_energy_is_a_lower_bound_and_close_where_the_spectrum_falls(exponent, dtype):
    values = power(250, exponent)
    found = spectrum(with_spectrum(300, 400, values).to(dtype)).energy
    shares = values.square().cumsum(0) / values.square().sum()
    assert [int(rank) for rank in found] == list(ENERGY_RANKS)
    for rank in ENERGY_RANKS:
        exact = float(shares[rank - 1])
        assert found[str(rank)] <= exact
        if exponent == 1.5:
            assert found[str(rank)] == pytest.approx(exact, rel=0.02)


def test_factors_and_the_matrix_they_make_have_one_spectrum():
    U, W = torch.randn(70, 5), torch.randn(5, 90)
    V = U.double() @ W.double()
    dense, factored = spectrum(V), factored_spectrum(Factored(U, W), float(V.norm()))
    assert factored.null_cosine == pytest.approx(dense.null_cosine, rel=1e-6)
    assert factored.energy == pytest.approx(dense.energy, abs=1e-5)
    assert factored.null_std == pytest.approx(dense.null_std, rel=1e-5)
    assert factored.energy["8"] >= 1 - 5e-6


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_scale_changes_neither_spread_nor_energy(scale):
    V = torch.randn(40, 60, generator=torch.Generator().manual_seed(1))
    one, other = spectrum(V), spectrum(V * scale)
    assert other.null_std == pytest.approx(one.null_std, rel=1e-4)
    assert other.energy == pytest.approx(one.energy, abs=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (3, 300)])
def test_matrices_smaller_than_the_sketch(shape):
    found = spectrum(torch.randn(shape))
    assert found.energy["64"] == pytest.approx(1.0, abs=1e-5)
    assert all(0 <= std < 1 for std in found.null_std.values())


@pytest.mark.parametrize("exponent", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(("rows", "columns"), [(600, 900), (900, 600)])
def test_the_estimated_null_cosine_is_the_exact_one_within_a_percent(rows, columns, exponent):
    """On a flat spectrum of 600 values one standard error is 0.36 %; it is smaller wherever the spectrum falls."""
    V = with_spectrum(rows, columns, power(600, exponent)).float() * 3e-4
    norm = float(V.double().norm())
    found = estimated_null_cosine(V, norm, sketch_of(V, norm))
    assert found == pytest.approx(float(null_cosine(V.double())), rel=0.012)
    assert found == estimated_null_cosine(V, norm, sketch_of(V, norm))


def test_large_matrices_have_the_estimate_and_small_ones_the_exact_value(monkeypatch):
    V = with_spectrum(200, 300, power(150, 0.3))
    exact = float(null_cosine(V))
    assert spectrum(V).null_cosine == pytest.approx(exact, rel=1e-12)
    monkeypatch.setattr(module, "EXACT_UP_TO", 199)
    assert spectrum(V).null_cosine != pytest.approx(exact, rel=1e-12)
    assert spectrum(V).null_cosine == pytest.approx(exact, rel=0.012)
