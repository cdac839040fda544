"""Rank spaces aligned by Procrustes: the products stay and the rotation is the best, in weights and activations."""

import pytest
import torch

from safemerge_callback.ops import LowRank, aligned_ranks, rank_similarity


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def update(seed, rank=3, batch=()):
    return LowRank(normal(*batch, rank, 12, seed=seed), normal(*batch, 9, rank, seed=seed + 1000))


def rotation(seed, rank=3):
    return torch.linalg.qr(normal(rank, rank, seed=seed)).Q


def test_the_products_are_what_they_were_whatever_the_ranks():
    updates = [update(1, 3), update(2, 5), update(3, 1)]
    aligned = aligned_ranks(updates)
    assert {pair.A.shape[-2] for pair in aligned} == {5}
    for before, after in zip(updates, aligned, strict=True):
        torch.testing.assert_close(after.B @ after.A, before.B @ before.A, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(after.B.T @ after.B, (after.A @ after.A.T), rtol=1e-9, atol=1e-9)


def test_no_other_rotation_fits_better():
    live, other = aligned_ranks([update(1), update(2)])

    def distance(turn):
        return float((other.B @ turn - live.B).square().sum() + (turn.T @ other.A - live.A).square().sum())

    best = distance(torch.eye(3, dtype=torch.float64))
    assert all(distance(rotation(seed)) > best for seed in range(20))


@pytest.mark.parametrize("weight_share", [0.0, 0.5, 1.0])
def test_an_adapter_in_another_gauge_is_found_again(weight_share):
    """By activations alone too: the inputs excite more directions than the rank has."""
    live, turn = update(1, batch=(2,)), rotation(5)
    other = LowRank(turn.T @ live.A, live.B @ turn)
    first, second = aligned_ranks([live, other], inputs=normal(2, 40, 12, seed=7), weight_share=weight_share)
    torch.testing.assert_close(second.A, first.A, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(second.B, first.B, rtol=1e-8, atol=1e-8)


def test_activations_count_where_the_inputs_lie():
    """S_a is A_o·G·A_lᵀ with the Gram G; where no input is, the weights decide alone."""
    live, other, X = update(1), update(2), normal(30, 12, seed=3)
    similarity = rank_similarity(other, live, X, 0.0)
    want = other.A @ (X.T @ X) @ live.A.T
    torch.testing.assert_close(similarity, want / want.norm())
    alone = rank_similarity(other, live, torch.zeros_like(X), 0.5)
    plain = rank_similarity(other, live)
    torch.testing.assert_close(alone, 0.5 * plain / plain.norm())
