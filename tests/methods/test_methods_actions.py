"""`pull`, `ema` and the orthogonal `project`, and many or negative weights, against their formulas in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safemerge_callback.decision.weights.spread import spread
from safemerge_callback.errors import PlanError
from safemerge_callback.methods import METHODS, get_method
from safemerge_callback.ops import Basis, LowRank, leading_basis


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def update(seed, d_out=9, d_in=12, rank=3, batch=(), dtype=torch.float64):
    A, B = (*batch, rank, d_in), (*batch, d_out, rank)
    return LowRank(normal(*A, seed=seed, dtype=dtype), normal(*B, seed=seed + 1000, dtype=dtype))


def product(merged):
    return merged.B @ merged.A


def turned(x, seed):
    Q = normal(3, 3, seed=seed) + 3 * torch.eye(3, dtype=torch.float64)
    return LowRank(torch.linalg.solve(Q, x.A), x.B @ Q)


SHARES = st.floats(0.01, 0.99)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), share=SHARES)
def test_pull_solves_the_proximal_problem(seed, share):
    """The minimum of ½‖X - ΔW‖² + μ/2·‖X - T‖², found where its gradient is zero: λ = μ/(1 + μ)."""
    live, target = update(seed, d_out=6, d_in=6, rank=6), update(seed + 1, d_out=6, d_in=6, rank=2)
    merged = get_method("pull").merge(live, [target], weights=(1 - share, share))
    X, mu = product(merged), share / (1 - share)
    gradient = X - product(live) + mu * (X - product(target))
    assert float(gradient.norm() / ((1 + mu) * product(live).norm())) < 1e-9


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), share=SHARES, batch=st.sampled_from([(), (2,)]))
def test_pull_toward_the_aligned_model_scales_B_alone(seed, share, batch):
    live = update(seed, batch=batch, dtype=torch.float32)
    merged = get_method("pull").merge(live, [], weights=(1 - share,))
    assert torch.equal(merged.A, live.A)
    torch.testing.assert_close(merged.B, (1 - share) * live.B)
    assert merged.residual.shape == batch
    assert not merged.residual.any()
    still = get_method("pull").merge(live, [], weights=(1.0,))
    assert torch.equal(still.B, live.B)


def test_pull_takes_a_share_for_each_module():
    live, shares = update(1, batch=(2,)), torch.tensor([0.5, 1.0], dtype=torch.float64)
    merged = get_method("pull").merge(live, [], weights=(shares,))
    torch.testing.assert_close(product(merged), shares[:, None, None] * product(live))


def test_pull_goes_toward_one():
    with pytest.raises(PlanError, match="toward one adapter, got 2"):
        get_method("pull").merge(update(1), [update(2), update(3)], weights=(0.8, 0.1, 0.1))


@settings(max_examples=20, deadline=None)
@given(share=SHARES, events=st.integers(1, 20))
def test_spread_pulls_are_one_pull(share, events):
    live, step = spread((1 - share, share), events)
    assert live + step == pytest.approx(1)
    assert live**events == pytest.approx(1 - share)


@pytest.mark.parametrize("name", ["pull", "ema"])
def test_both_are_exact_sums_in_the_gauge(name):
    live, target = update(1), update(2, rank=7)
    merged = get_method(name).merge(live, [live], weights=(0.3, 0.7))
    torch.testing.assert_close(product(merged), product(live))
    torch.testing.assert_close(merged.A, live.A)
    both = [product(get_method(name).merge(x, [target], weights=(0.3, 0.7))) for x in (live, turned(live, 5))]
    torch.testing.assert_close(both[0], both[1])
    still = get_method(name).merge(live, [target], weights=(1.0, 0.0))
    assert torch.equal(still.A, live.A)
    assert torch.equal(still.B, live.B)


@pytest.mark.parametrize("name", ["pull", "ema"])
def test_full_rank_loses_nothing(name):
    live, target = update(1, d_out=6, d_in=8, rank=6), update(2, d_out=6, d_in=8, rank=5)
    merged = get_method(name).merge(live, [target], weights=(0.3, 0.7))
    torch.testing.assert_close(product(merged), 0.3 * product(live) + 0.7 * product(target))
    assert float(merged.residual) < 1e-12


def test_the_orthogonal_projection_is_idempotent_and_leaves_A():
    V, live = normal(9, 12, seed=5), update(1)
    U = leading_basis(V, 4)
    merged = get_method("project").merge(live, [], weights=(), alignment_matrix=Basis(U))
    left = torch.linalg.svd(V).U[:, :4]
    torch.testing.assert_close(product(merged), left @ left.mT @ product(live))
    assert torch.equal(merged.A, live.A)
    again = get_method("project").merge(LowRank(*merged[:2]), [], weights=(), alignment_matrix=Basis(U))
    torch.testing.assert_close(again.B, merged.B, rtol=1e-13, atol=1e-13)
    # Safe LoRA's C is not: the reason for the other operator.
    once = get_method("project").merge(live, [], weights=(), alignment_matrix=V)
    twice = get_method("project").merge(LowRank(*once[:2]), [], weights=(), alignment_matrix=V)
    assert float((twice.B - once.B).norm() / once.B.norm()) > 0.1


SIGNED = sorted(name for name, method in METHODS.items() if method.signed)


def test_a_negative_weight_has_a_meaning_where_updates_are_summed():
    assert SIGNED == ["breadcrumbs", "cat", "dare_linear", "linear", "magnitude_prune", "orthogonal"]
    assert sorted(n for n, m in METHODS.items() if not m.several) == ["ema", "pull", "regmean", "slerp"]
    assert {n: m.additive for n, m in METHODS.items() if m.additive} == dict.fromkeys(
        ["cat", "ema", "linear", "pull"], ("delta",)
    )


@pytest.mark.parametrize("name", SIGNED)
def test_what_is_taken_away_is_the_negative(name):
    """At density 1 merging in -x with w is merging in x with -w, and three adapters sum."""
    method = METHODS[name]
    live, one, other = (update(seed, d_out=6, d_in=8, rank=6) for seed in (1, 2, 3))
    negated = LowRank(other.A, -other.B)
    knobs = {
        **({"density": 1.0} if "density" in method.takes else {}),
        **({"generator": torch.Generator().manual_seed(0)} if method.random else {}),
    }
    taken = method.merge(live, [one, other], weights=(1.0, 0.5, -0.4), **knobs)
    added = method.merge(live, [one, negated], weights=(1.0, 0.5, 0.4), **knobs)
    torch.testing.assert_close(product(taken), product(added))
    if name not in ("orthogonal", "breadcrumbs"):
        torch.testing.assert_close(product(taken), product(live) + 0.5 * product(one) - 0.4 * product(other))
