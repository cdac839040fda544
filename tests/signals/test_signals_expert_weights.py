"""Weights of experts a module, learned on rows of their types: gradients, known answers, and bad input."""

import pytest
import torch

from safemerge_callback.errors import ConfigError
from safemerge_callback.live.merged_forward import merged_forward
from safemerge_callback.live.modules import live_factors
from safemerge_callback.ops import LowRank
from safemerge_callback.signals.expert_weights import ExpertSettings, _Objective, learn_expert_weights, mixture_penalty
from safemerge_callback.signals.row_batch import row_batch, row_outputs
from safemerge_callback.signals.rows import RowTokens
from tests.signals.test_signals_coefficients import SAFETY, TASK, expert, model  # noqa: F401

HONEST = [RowTokens((40, 41), (42, 43), "benign")]
ROWS = {"helpful": TASK, "harmless": SAFETY, "honest": HONEST}


def updates(model):  # noqa: F811
    return {name: one.low_rank(unit=1.0) for name, one in live_factors(model).items()}


def said_by(model, others, weights, prompts):  # noqa: F811
    """Rows whose responses are what a mixture says."""
    rows = [RowTokens(prompt, (1,), "benign") for prompt in prompts]
    with torch.no_grad(), merged_forward(model, others, dict.fromkeys(live_factors(model), weights)):
        tokens = row_outputs(model, row_batch(rows)).logits[:, -1].argmax(-1).tolist()
    return [RowTokens(prompt, (token,), "benign") for prompt, token in zip(prompts, tokens, strict=True)]


def test_the_gradient_is_that_of_central_differences(model):  # noqa: F811
    others, names = [expert(model, 5), expert(model, 6)], list(live_factors(model))
    norms = torch.rand(4, 3, dtype=torch.float64)
    settings = ExpertSettings(type_weight=0.3, norm_weights=(0.1, 0.2, 0.05))
    objective = _Objective(model, others, names, ROWS, norms, settings, None)
    point, reach = torch.randn(4, 3, dtype=torch.float64), 1e-5
    slope = objective.slope(point, 0)
    for place in ((0, 0), (1, 2), (3, 1)):
        step = torch.zeros_like(point)
        step[place] = reach
        difference = (objective.value(point + step) - objective.value(point - step)) / (2 * reach)
        assert float(slope[place]) == pytest.approx(difference, rel=1e-6, abs=1e-9)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_of_identical_experts_the_mixture_is_the_same_whatever_the_weights(model):  # noqa: F811
    """H3Fusion's oracle: routing between copies changes nothing."""
    others, names = [updates(model), updates(model)], list(live_factors(model))
    objective = _Objective(model, others, names, ROWS, torch.ones(4, 3).double(), ExpertSettings(type_weight=0), None)
    values = [objective.value(torch.randn(4, 3, dtype=torch.float64)) for _ in range(3)]
    assert max(values) - min(values) < 1e-12
    result = learn_expert_weights(model, others, ROWS, ExpertSettings(steps=3, type_weight=0.0))
    assert all(row == pytest.approx((1 / 3, 1 / 3, 1 / 3)) for row in result.weights.values())


def test_rows_that_one_expert_wrote_give_it_the_weight(model):  # noqa: F811
    others = [expert(model, 5, size=1.0)]
    prompts = [(3, 4, 5), (9, 10), (20, 21, 22), (30, 31), (40,), (41, 7)]
    rows = said_by(model, others, (0.0, 1.0), prompts)
    settings = ExpertSettings(steps=60, rate=0.2, type_weight=0.0)
    result = learn_expert_weights(model, others, {"a": rows, "b": rows}, settings)
    assert result.after < result.before
    mean = sum(row[1] for row in result.weights.values()) / len(result.weights)
    assert mean > 0.6
    assert all(sum(row) == pytest.approx(1.0) for row in result.weights.values())


def test_the_penalties():
    even, settings = torch.full((4, 2), 0.5, dtype=torch.float64), ExpertSettings(type_weight=1.0)
    norms, types = torch.tensor([[1.0, 3.0]] * 4).double(), torch.tensor([0.5, 0.5]).double()
    assert float(mixture_penalty(even, norms, types, settings)) == pytest.approx(0.6931471805599453)
    tilted = torch.tensor([[0.9, 0.1]] * 4).double()
    assert mixture_penalty(tilted, norms, types, settings) > mixture_penalty(even, norms, types, settings)
    sized = ExpertSettings(type_weight=0.0, norm_weights=(0.0, 2.0))
    assert float(mixture_penalty(tilted, norms, types, sized)) == pytest.approx(2 * 0.1 * 3)


def test_a_penalty_on_an_experts_norm_takes_its_weight(model):  # noqa: F811
    settings = ExpertSettings(steps=20, norm_weights=(0.0, 50.0), type_weight=0.0)
    rows = {"a": TASK, "b": SAFETY}
    result = learn_expert_weights(model, [expert(model)], rows, settings)
    assert all(row[1] < 0.3 for row in result.weights.values())


def test_where_nothing_is_better_the_even_mixture_stays(model):  # noqa: F811
    result = learn_expert_weights(model, [expert(model)], {"a": TASK, "b": SAFETY}, ExpertSettings(rate=0.0))
    assert set(result.weights.values()) == {(0.5, 0.5)}
    assert result.after == result.before


@pytest.mark.parametrize(
    ("says", "change"),
    [
        ("rows are of 1 types", {"rows": {"helpful": TASK}}),
        ("type 'b' has no rows", {"rows": {"a": TASK, "b": []}}),
        ("norm_weights are 3 numbers for 2 experts", {"settings": {"norm_weights": (1, 2, 3)}}),
        ("norm_weights are", {"settings": {"norm_weights": (1, -2)}}),
        ("steps is 0", {"settings": {"steps": 0}}),
        ("rate is -1", {"settings": {"rate": -1}}),
    ],
)
def test_what_cannot_be_is_refused(model, says, change):  # noqa: F811
    rows = change.get("rows", {"a": TASK, "b": SAFETY})
    with pytest.raises(ConfigError, match=says):
        learn_expert_weights(model, [expert(model)], rows, ExpertSettings(**change.get("settings", {})))
    assert isinstance(next(iter(expert(model).values())), LowRank)
