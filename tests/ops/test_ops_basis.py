import pytest
import torch

from safemerge_callback.ops import Basis, Factored, Int8, leading_basis, project_on_basis
from safemerge_callback.ops import basis as module


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def falling(rows, columns, dtype=torch.float64):
    """A matrix whose singular values fall as 2^-i, and its left singular vectors."""
    k = min(rows, columns)
    left, right = torch.linalg.qr(normal(rows, k)).Q, torch.linalg.qr(normal(columns, k, seed=1)).Q
    values = 0.5 ** torch.arange(k, dtype=torch.float64)
    return ((left * values) @ right.mT).to(dtype), left


def projector(U):
    return U.double() @ U.double().mT


@pytest.mark.parametrize("shape", [(9, 12), (12, 9)])
@pytest.mark.parametrize("rank", [1, 4])
def test_a_dense_matrix_gives_its_leading_left_vectors(shape, rank):
    V, left = falling(*shape)
    U = leading_basis(V, rank)
    assert U.shape == (shape[0], rank)
    torch.testing.assert_close(projector(U), projector(left[:, :rank]))


def test_factors_give_what_their_product_gives():
    V = Factored(normal(10, 3), normal(3, 14, seed=1))
    torch.testing.assert_close(projector(leading_basis(V, 2)), projector(leading_basis(V.U @ V.W, 2)))
    assert leading_basis(V, 64).shape == (10, 3)


def test_a_large_matrix_is_not_decomposed_whole(monkeypatch):
    V, left = falling(40, 60, torch.float32)
    monkeypatch.setattr(module, "EXACT_UP_TO", 10)
    torch.testing.assert_close(projector(leading_basis(V, 4)), projector(left[:, :4]), atol=1e-4, rtol=0)


def test_directions_that_V_does_not_have_are_left_out():
    """Rank 2 of 6: without the tolerance rounding errors would be taken for directions."""
    V = normal(6, 2) @ normal(2, 8, seed=1)
    U = leading_basis(V, 5)
    assert (U.norm(dim=0) > 0.5).tolist() == [True, True, False, False, False]
    torch.testing.assert_close(projector(U) @ V, V)


def test_eight_bits_are_refused():
    with pytest.raises(TypeError, match="give the exact matrix"):
        leading_basis(Int8(torch.zeros(2, 2, dtype=torch.int8), torch.ones(2, 1)), 1)


def test_a_second_projection_changes_nothing():
    V, left = falling(20, 30)
    basis, B = Basis(leading_basis(V, 5)), normal(2, 20, 3, seed=4)
    once = project_on_basis(B, basis)
    torch.testing.assert_close(once, projector(left[:, :5]) @ B)
    torch.testing.assert_close(project_on_basis(once, basis), once, rtol=1e-14, atol=1e-14)
    assert float(once.norm()) < float(B.norm())
