import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils

from safemerge_callback.ops import balances, disjoint_mean, elected


def stack(*rows):
    return torch.tensor(rows, dtype=torch.float64)[:, None, :]


def test_total_and_frequency_elect_differently():
    updates = stack([5.0, 1.0, 0.0, 1.0], [-1.0, -1.0, 0.0, 0.0], [-1.0, 1.0, 2.0, 0.0])
    # Sums 3, 1, 2, 1; signs -1, 1, 1, 1. A zero agrees with no sign.
    assert elected(updates, "total")[:, 0].tolist() == [[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]]
    assert elected(updates, "frequency")[:, 0].tolist() == [[0, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 0]]


def test_a_tie_is_positive():
    updates = stack([1.0, -2.0], [-1.0, 2.0])
    for method in ("total", "frequency"):
        assert elected(updates, method)[:, 0].tolist() == [[1, 0], [0, 1]]


def test_the_mean_is_over_those_that_agree():
    updates = stack([1.0, 4.0, 0.0], [3.0, -1.0, 0.0])
    mean = disjoint_mean(updates * stack([0.5] * 3, [2.0] * 3), elected(updates))
    assert mean[0].tolist() == [(0.5 + 6.0) / 2, 2.0, 0.0]


@settings(max_examples=30, deadline=None)
@given(k=st.integers(1, 4), seed=st.integers(0, 10**6), method=st.sampled_from(["total", "frequency"]))
def test_equal_to_peft(k, seed, method):
    g = torch.Generator().manual_seed(seed)
    updates = torch.randn(k, 2, 5, 6, generator=g, dtype=torch.float64) * torch.randint(0, 2, (k, 2, 5, 6), generator=g)
    mask = merge_utils.calculate_majority_sign_mask(updates, method)
    assert torch.equal(elected(updates, method), mask.to(updates.dtype))
    assert torch.equal(disjoint_mean(updates, elected(updates, method)), merge_utils.disjoint_merge(updates, mask))


def test_balances_favour_what_is_large_and_agreed_with():
    updates = stack([3.0, 1.0, 3.0, -3.0], [3.0, 1.0, -3.0, 0.1])
    own = balances(updates)[0, 0]
    assert own[0] > own[1]
    assert own[0] > own[2]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_balances_of_equal_entries_are_equal(value):
    updates = torch.full((2, 3, 4), value, dtype=torch.float64)
    torch.testing.assert_close(balances(updates), torch.full((2, 3, 4), 2.0, dtype=torch.float64))
