"""Space `aligned_factor`: a factor merge that does not see the gauge, of any ranks; `factor` does see it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safemerge_callback.methods import METHODS, get_method
from safemerge_callback.ops import LowRank

NAMES = sorted(name for name, method in METHODS.items() if "aligned_factor" in method.spaces)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def update(seed, rank=3):
    return LowRank(normal(rank, 12, seed=seed), normal(9, rank, seed=seed + 1000))


def gauge(pair, seed, orthogonal):
    """The same update in other factors: (B·Q, Q⁻¹·A)."""
    rank = pair.A.shape[-2]
    Q = normal(rank, rank, seed=seed)
    Q = torch.linalg.qr(Q).Q if orthogonal else Q + 2 * torch.eye(rank, dtype=torch.float64)
    return LowRank(torch.linalg.solve(Q, pair.A), pair.B @ Q)


def merged(name, live, safety, space="aligned_factor"):
    knobs = {"density": 0.5} if "density" in METHODS[name].takes else {}
    if METHODS[name].random:
        knobs["generator"] = torch.Generator().manual_seed(3)
    weights = (0.8, *(0.3 for _ in safety))
    return get_method(name).merge(live, safety, weights=weights, space=space, **knobs)


def product(pair):
    return pair.B @ pair.A


def gap(x, y):
    return float((x - y).norm() / y.norm())


def test_who_adds_factors_may_align_them():
    assert sorted(name for name, method in METHODS.items() if "factor" in method.spaces) == NAMES
    assert len(NAMES) == 9


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("orthogonal", [True, False])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_merge_does_not_depend_on_the_gauge(name, orthogonal, seed):
    live, safety = update(seed), update(seed + 1)
    one = merged(name, live, [safety])
    other = merged(name, gauge(live, seed + 2, orthogonal), [gauge(safety, seed + 3, orthogonal)])
    assert gap(product(other), product(one)) < 1e-6
    assert float(one.residual) < 1e-9


@pytest.mark.parametrize("name", ["linear", "ties", "dare_linear"])
@pytest.mark.parametrize("ranks", [(3, 1), (2, 4)])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_nor_with_ranks_that_differ_and_several_adapters(name, ranks, seed):
    live, safety = update(seed, ranks[0]), [update(seed + 1, ranks[1]), update(seed + 2, 3)]
    turned = [gauge(pair, seed + 3 + i, orthogonal=False) for i, pair in enumerate([live, *safety])]
    one, other = merged(name, live, safety), merged(name, turned[0], turned[1:])
    assert one.A.shape == live.A.shape
    assert gap(product(other), product(one)) < 1e-6
    assert (float(one.residual) > 1e-3) == (ranks[0] < 3)


def test_without_alignment_it_does():
    live, safety = update(1), update(2)
    one, other = (merged("linear", live, [pair], "factor") for pair in (safety, gauge(safety, 3, orthogonal=True)))
    assert gap(product(other), product(one)) > 0.1


def test_an_adapter_with_itself_in_another_gauge_is_a_multiple_of_itself():
    """(√w_f + √w_s)² of it, PEFT's cross terms; without alignment it is another matrix."""
    live = update(1)
    same = gauge(live, 3, orthogonal=False)
    want = (0.8**0.5 + 0.3**0.5) ** 2 * product(live)
    assert gap(product(merged("linear", live, [same])), want) < 1e-9
    assert gap(product(merged("linear", live, [same], "factor")), want) > 0.1
