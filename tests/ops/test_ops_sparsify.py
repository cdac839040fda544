import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils

from safemerge_callback.ops import (
    band_mask,
    bernoulli_mask,
    dropped,
    keep_probabilities,
    kept_count,
    magnitude_mask,
    mask_seed,
    trimmed,
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_mask_seed_is_a_constant():
    """A resumed run, and the next release, must draw what the first one drew."""
    assert mask_seed(0, 0, "") == 3295852573198835230
    assert mask_seed(1, 50, "model.layers.0.self_attn.q_proj") == 5796611552760834181


def test_mask_seeds_differ_where_anything_differs():
    cases = [(s, t, m) for s in range(5) for t in range(5) for m in ("a", "b", "layers.1", "layers.11")]
    # Without a mark between the parts, (1, 11) and (11, 1) would be one.
    cases += [(1, 11, "x"), (11, 1, "x"), (111, 1, "x"), (1, 111, "x")]
    seeds = {mask_seed(*case) for case in cases}
    assert len(seeds) == len(set(cases))
    assert all(0 <= seed < 2**63 for seed in seeds)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    batch=st.sampled_from([(), (3,), (2, 2), (0,)]),
    density=st.floats(1e-3, 1.0),
)
def test_magnitude_mask_keeps_the_largest(shape, batch, density):
    x = normal(*batch, *shape, seed=1)
    mask = magnitude_mask(x, density)
    count = max(1, int(density * (shape[0] * shape[1])))
    for matrix, kept in zip(x.reshape(-1, *shape), mask.reshape(-1, *shape), strict=True):
        assert int(kept.sum()) == count
        order = np.argsort(-np.abs(matrix.numpy()), axis=None)
        assert set(np.flatnonzero(kept.numpy())) == set(order[:count])
    assert mask.dtype == x.dtype


def test_at_least_one_entry_is_kept():
    """PEFT's int(density · entries) is 0 here, which erases the update."""
    assert [kept_count(10, d) for d in (0.01, 0.1, 0.55, 1.0)] == [1, 1, 5, 10]
    assert int(trimmed(normal(2, 5), 0.01).count_nonzero()) == 1
    assert not merge_utils.magnitude_based_pruning(normal(2, 5), 0.01).any()


@pytest.mark.parametrize("density", [0.2, 0.5, 0.95, 1.0])
def test_band_mask_leaves_out_both_ends(density):
    x = normal(2, 10, 20, seed=3)
    mask = band_mask(x, density, 0.1)
    for matrix, kept in zip(x, mask, strict=True):
        size = matrix.abs().flatten().sort(descending=True).values
        count, top = int(density * 200), min(20, 200 - int(density * 200))
        got = (matrix.abs() * kept).flatten().sort(descending=True).values[:count]
        torch.testing.assert_close(got, size[top : top + count])
        assert int(kept.sum()) == count


def test_bernoulli_mask_follows_its_generator_and_its_odds():
    odds = torch.tensor([[0.0, 0.2, 1.0]]).expand(4000, 3).contiguous()
    mask = bernoulli_mask(odds, torch.Generator().manual_seed(1))
    assert torch.equal(mask, bernoulli_mask(odds, torch.Generator().manual_seed(1)))
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    mean = mask.mean(0)
    assert (mean[0], mean[2]) == (0.0, 1.0)
    assert abs(float(mean[1]) - 0.2) < 5 * (0.16 / 4000) ** 0.5


def test_dropped_divides_what_is_left_and_leaves_the_generator_at_density_one():
    x, source = normal(5, 6, dtype=torch.float32), torch.Generator().manual_seed(2)
    state = source.get_state()
    assert dropped(x, 1.0, source) is x
    assert torch.equal(source.get_state(), state)
    thin = dropped(x, 0.25, source)
    kept = thin != 0
    assert 0 < int(kept.sum()) < 30
    assert torch.equal(thin[kept], 4 * x[kept])


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 9), density=st.floats(0.05, 1.0))
def test_keep_probabilities_rise_with_the_magnitude(rows, columns, density):
    x, window = normal(rows, columns, seed=7), min(0.2, 2 * (1 - density), density)
    odds = keep_probabilities(x, density, window)
    for values, chances in zip(x, odds, strict=True):
        in_order = chances[values.abs().argsort()]
        assert (in_order.diff() >= 0).all()
        assert float(chances.mean()) == pytest.approx(density)
        assert float(in_order[-1] - in_order[0]) == pytest.approx(window if columns > 1 else 0.0)
        assert float(chances.max()) <= 1 + 1e-12
        assert float(chances.min()) >= density / 2 - 1e-12
