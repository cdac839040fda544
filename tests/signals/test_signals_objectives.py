"""Objectives against their formulas in float64: `kl`, `cross_entropy`, `entropy` and `cocktail`."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safemerge_callback.errors import ConfigError
from safemerge_callback.signals.objectives import OBJECTIVES, get_objective
from safemerge_callback.signals.objectives.cocktail import cocktail_weights
from safemerge_callback.signals.reference import ReferenceRows
from safemerge_callback.signals.row_batch import RowOutputs, row_batch
from safemerge_callback.signals.rows import RowTokens

ROWS = [RowTokens((3, 4), (6, 7, 8), "harm"), RowTokens((9,), (5,), "benign")]
VOCABULARY = 12


def asked(name, logits, reference=None):
    return get_objective(name).function(RowOutputs(logits, None), row_batch(ROWS), reference)


@pytest.fixture
def logits():
    return torch.randn(2, 3, VOCABULARY, dtype=torch.float64)


def whole_and_binned(log_probs, kept):
    p, tokens = log_probs.topk(kept)
    rest = log_probs.scatter(-1, tokens, -torch.inf).logsumexp(-1)
    return ReferenceRows(log_probs, None, None, None), ReferenceRows(p, tokens, rest, None)


def test_kl_is_the_divergence_from_the_reference_over_a_row(logits):
    other = torch.randn_like(logits).log_softmax(-1)
    whole, binned = whole_and_binned(other, 4)
    each = torch.nn.functional.kl_div(logits.log_softmax(-1), other, reduction="none", log_target=True).sum(-1)
    expected = torch.stack([each[0].mean(), each[1, 2]])
    assert torch.allclose(asked("kl", logits, whole), expected, rtol=1e-12)
    assert bool((asked("kl", logits, binned) <= expected).all())
    same = whole_and_binned(logits.log_softmax(-1), 4)
    assert all(float(asked("kl", logits, one).abs().max()) < 1e-14 for one in same)


def test_cross_entropy_and_cocktail_are_the_responses_own(logits):
    log_probs = logits.log_softmax(-1)
    expected = torch.stack([-log_probs[0, [0, 1, 2], [6, 7, 8]].mean(), -log_probs[1, 2, 5]])
    assert torch.allclose(asked("cross_entropy", logits), expected, rtol=1e-12)
    assert torch.equal(asked("cocktail", logits), asked("cross_entropy", logits))


def test_entropy_is_that_of_the_first_token_and_reads_no_label(logits):
    expected = torch.distributions.Categorical(logits=torch.stack([logits[0, 0], logits[1, 2]])).entropy()
    assert torch.allclose(asked("entropy", logits), expected, rtol=1e-12)
    assert get_objective("entropy").first
    assert "sure, not right" in get_objective("entropy").caution


def test_what_an_objective_needs_is_said_by_it():
    assert {name for name, one in OBJECTIVES.items() if one.responses} == {"cross_entropy", "cocktail"}
    assert {name for name, one in OBJECTIVES.items() if one.references} == {"kl"}
    with pytest.raises(ConfigError, match=r"objective 'kll' is unknown.*'kl'"):
        get_objective("kll")


@given(losses=st.lists(st.floats(0.0, 20.0), min_size=1, max_size=5), temperature=st.floats(0.05, 50.0))
def test_cocktails_weights_are_shares_in_the_order_of_the_losses(losses, temperature):
    weights = cocktail_weights(losses, temperature)
    assert sum(weights) == pytest.approx(1.0)
    assert weights == pytest.approx(torch.softmax(-torch.tensor(losses, dtype=torch.float64) / temperature, 0).tolist())


def test_cocktails_limits():
    assert cocktail_weights([2.0, 2.0, 2.0]) == pytest.approx([1 / 3] * 3)
    assert cocktail_weights([1.0, 2.0, 3.0], 1e-6) == [1.0, 0.0, 0.0]
    assert cocktail_weights([1.0, 2.0, 3.0], 1e9) == pytest.approx([1 / 3] * 3)
    assert cocktail_weights([1.0, 2.0], 5.0) == pytest.approx([0.55, 0.45], abs=0.01)
    assert cocktail_weights([math.nan, 2.0, math.inf]) == [0.0, 1.0, 0.0]
    for broken in (([math.nan], 1.0), ([1.0], 0.0), ([1.0], math.nan)):
        with pytest.raises(ConfigError, match=r"temperature|no model has a finite loss"):
            cocktail_weights(*broken)
