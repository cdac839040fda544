"""TACT's statistics of module outputs, against the outputs themselves in float64, and what they make of merges."""

import pytest
import torch

from safemerge_callback.methods import get_method
from safemerge_callback.ops import LowRank, output_moments, output_ratio, rescaled_outputs


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def update(seed, batch=(), rank=3):
    return LowRank(normal(*batch, rank, 12, seed=seed), normal(*batch, 9, rank, seed=seed + 1000))


def inputs(seed, batch=()):
    """Rows whose mean is not 0, in fewer directions than there are."""
    return normal(*batch, 40, 7, seed=seed) @ normal(*batch, 7, 12, seed=seed + 1) + 0.5


@pytest.mark.parametrize("batch", [(), (2, 3)])
@pytest.mark.parametrize("with_weight", [False, True])
def test_the_moments_are_those_of_the_outputs(batch, with_weight):
    live, X = update(1, batch), inputs(2, batch)
    weight = normal(*batch, 9, 12, seed=4) if with_weight else None
    outputs = X @ (live.B @ live.A + (weight if with_weight else 0.0)).mT
    moments = output_moments(live, X, weight)
    torch.testing.assert_close(moments.mean, outputs.mean(-2))
    torch.testing.assert_close(moments.std, outputs.std(-2, correction=0))


def test_an_unmerged_module_has_ratio_1_in_whatever_gauge_and_a_pull_its_share():
    live, X = update(1, (4,)), inputs(2, (4,))
    assert torch.equal(output_ratio(live, live, X), torch.ones(4, dtype=torch.float64))
    Q = normal(3, 3, seed=3) + 2 * torch.eye(3, dtype=torch.float64)
    turned = LowRank(torch.linalg.solve(Q, live.A), live.B @ Q)
    torch.testing.assert_close(output_ratio(turned, live, X), torch.ones(4, dtype=torch.float64))
    pulled = get_method("pull").merge(live, [], weights=(0.8,))
    torch.testing.assert_close(output_ratio(LowRank(pulled.A, pulled.B), live, X), torch.full((4,), 0.8).double())


def test_with_the_base_weight_the_ratio_hides_the_merge():
    live, X, weight = update(1), inputs(2), 100 * normal(9, 12, seed=4)
    nothing = LowRank(live.A, 0 * live.B)
    assert float(output_ratio(nothing, live, X)) == 0.0
    assert abs(float(output_ratio(nothing, live, X, weight)) - 1) < 0.1


def test_after_the_rescale_every_channel_is_as_large_as_the_experts():
    live, X = update(1), inputs(2)
    merged = get_method("linear").merge(live, [update(5)], weights=(0.5, 0.5))
    pair = LowRank(merged.A, merged.B)
    rescaled = rescaled_outputs(pair, live, X, largest=1e6)
    assert torch.equal(rescaled.A, pair.A)
    torch.testing.assert_close(output_moments(rescaled, X).std, output_moments(live, X).std)
    assert float(output_ratio(rescaled, live, X)) == pytest.approx(1.0)
    # Directions stay the merge's: each row of the update is a multiple of what it was.
    rows, old = rescaled.B @ rescaled.A, pair.B @ pair.A
    cosines = (rows * old).sum(-1) / (rows.norm(dim=-1) * old.norm(dim=-1))
    torch.testing.assert_close(cosines, torch.ones_like(cosines))


def test_a_pull_is_taken_back_and_channels_without_output_stay():
    live, X = update(1), inputs(2)
    pulled = LowRank(live.A, 0.25 * live.B)
    torch.testing.assert_close(rescaled_outputs(pulled, live, X).B, live.B)
    torch.testing.assert_close(rescaled_outputs(pulled, live, X, largest=2.0).B, 2 * pulled.B)
    half = LowRank(live.A, torch.cat([live.B[:4], torch.zeros_like(live.B[4:])]))
    assert torch.equal(rescaled_outputs(half, live, X).B[4:], half.B[4:])
    nothing = LowRank(live.A, 0 * live.B)
    assert float(output_ratio(nothing, nothing, X)) == 1.0
    assert float(output_ratio(live, nothing, X)) == float("inf")
    assert torch.isfinite(rescaled_outputs(nothing, live, X).B).all()


def test_a_factor_of_the_gram_stands_for_the_inputs_where_nothing_is_centred():
    """Any X with the same Xᵀ·X: here its triangular one, of fewer rows; sizes are then known up to √(t/rows)."""
    live, X = update(1), inputs(2)
    merged = LowRank(live.A, live.B * torch.linspace(0.5, 1.5, 9, dtype=torch.float64)[:, None])
    factor = torch.linalg.qr(X).R
    assert len(factor) < len(X)
    whole = output_ratio(merged, live, X, centred=False)
    torch.testing.assert_close(output_ratio(merged, live, factor, centred=False), whole)
    moments = output_moments(live, X, centred=False)
    outputs = X @ (live.B @ live.A).mT
    torch.testing.assert_close(moments.std, outputs.square().mean(-2).sqrt())
    assert not moments.mean.any()
    sizes = output_moments(live, factor, centred=False).std
    torch.testing.assert_close(sizes * (len(factor) / len(X)) ** 0.5, moments.std)
