"""Coefficients of a merge learned from rows: their gradient, what comes out of known cases, and bad input."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from safemerge_callback.errors import ConfigError
from safemerge_callback.live.modules import live_factors
from safemerge_callback.ops import LowRank
from safemerge_callback.signals.coefficients import SearchSettings, learn_weights, search_rows
from safemerge_callback.signals.merge_problem import MergedModel, PathProblem
from safemerge_callback.signals.objectives import OBJECTIVES
from safemerge_callback.signals.rows import RowTokens
from tests.support.world import with_lora

TASK = [RowTokens((3, 4, 5), (6, 7), "benign"), RowTokens((9, 10, 11, 12), (14,), "benign")]
SAFETY = [RowTokens((20, 21), (22, 23, 24), "harm"), RowTokens((30, 31, 32), (33, 34), "benign")]


class Speaker(nn.Module):
    """A causal model all of whose arithmetic is in its own dtype: a Llama's norms are in float32 whatever it is in."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(64, 8)
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8), "v": nn.Linear(8, 8)}) for _ in range(2))
        self.head = nn.Linear(8, 64)

    def forward(self, input_ids, attention_mask):
        state = self.words(input_ids) * attention_mask.unsqueeze(-1)
        for layer in self.layers:
            state = state + torch.tanh(layer["v"](torch.tanh(layer["q"](state.cumsum(1)))))
        return SimpleNamespace(logits=self.head(state))


@pytest.fixture
def model():
    """Under a random adapter of 4 modules in 2 blocks, in float64, and nothing of it trained."""
    model = with_lora(Speaker(), ["q", "v"], r=3, init_lora_weights=False).double().eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def expert(model, seed=5, size=0.2):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LowRank(
            *(size * torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, one.d_in), (one.d_out, 3)))
        )
        for name, one in live_factors(model).items()
    }


def learned(model, others=None, task=TASK, safety=SAFETY, **settings):
    chosen = SearchSettings(**settings)
    return learn_weights(model, others or {}, search_rows(model, task, safety, chosen), chosen)


@pytest.mark.parametrize("objective", ["kl", "cross_entropy", "entropy"])
@pytest.mark.parametrize("pull", [True, False])
def test_the_gradient_of_the_coefficients_is_that_of_central_differences(model, objective, pull):
    settings = SearchSettings(objective=objective, share=0.7, batch_size=1)
    rows = search_rows(model, TASK, SAFETY, settings)
    others, names = [] if pull else [expert(model)], list(live_factors(model))
    merged = MergedModel(model, others, names, OBJECTIVES[objective], *rows, 0.7, 1)
    begin = torch.zeros(len(names), 1 + len(others)).double()
    begin[:, 0] = 1.0
    end = begin.flip(1) if others else torch.zeros_like(begin)
    problem = PathProblem(merged, begin, end, [0, 0, 1, 2], [0.5] * 3, "s", penalty=0.3, common=0.4)
    point, reach = [0.3, 0.6, 0.9], 1e-5
    value, slopes = problem.gradient(point)
    assert value == pytest.approx(problem.loss(point), rel=1e-12)
    for place, slope in enumerate(slopes):
        higher, lower = (problem.loss([x + way * reach * (i == place) for i, x in enumerate(point)]) for way in (1, -1))
        assert slope == pytest.approx((higher - lower) / (2 * reach), rel=1e-6, abs=1e-9)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_one_coefficient_is_between_the_task_and_the_aligned_model(model):
    result = learned(model, share=1.0)
    (step,) = result.steps
    assert result.improved
    assert 0.01 < step.single < 0.99
    assert result.after == step.after < result.before == step.before
    assert set(result.weights.values()) == {(1 - step.single, step.single)}
    assert result.forward == len(TASK + SAFETY) * len(result.trace)
    assert result.backward == 0


@pytest.mark.parametrize(("share", "border"), [(0.0, 0.0), (1e4, 1.0)])
def test_a_coefficient_that_runs_to_its_border_is_named(model, share, border):
    result = learned(model, share=share)
    assert result.steps[0].single == pytest.approx(border, abs=0.01)
    if border:
        assert "1 of 1 coefficients ran to a border, the first is 'all'" in result.notes[0]
    else:
        assert not result.improved
        assert set(result.weights.values()) == {(1.0, 0.0)}
        assert "no coefficient lowers the objective" in result.notes[0]


@pytest.mark.parametrize(("granularity", "count"), [("block", 2), ("module", 4)])
@pytest.mark.parametrize("minimiser", [None, "tezo"])
def test_more_coefficients_do_not_do_worse_than_one_on_the_same_rows(model, granularity, count, minimiser):
    one = learned(model, {"safe": expert(model)})
    many = learned(model, {"safe": expert(model)}, granularity=granularity, minimiser=minimiser, penalty=0.0)
    (step,) = many.steps
    assert step.single == one.steps[0].single
    assert len(step.coefficients) == count
    assert many.after <= one.after
    if minimiser is None:
        assert many.after < one.after
        assert many.backward > 0
    assert len(set(many.weights.values())) <= count


def test_the_penalty_holds_coefficients_to_the_best_single_one(model):
    free, bound = (learned(model, granularity="module", penalty=penalty).steps[0] for penalty in (0.0, 1e3))
    spread = [max(abs(x - step.single) for x in step.coefficients.values()) for step in (free, bound)]
    assert spread[1] < spread[0] / 4


def test_several_updates_are_merged_one_after_another_the_best_alone_first(model):
    better, worse = expert(model, size=0.02), expert(model, seed=6, size=0.9)
    result = learned(model, {"worse": worse, "better": better}, share=3.0)
    assert [step.label for step in result.steps] == ["better", "worse"]
    first, second = result.steps
    assert first.merged
    assert second.before == first.after
    assert result.after == (second.after if second.merged else first.after)
    assert all(sum(row) == pytest.approx(1.0) for row in result.weights.values())
    if not second.merged:
        assert {row[1] for row in result.weights.values()} == {0.0}


def test_of_updates_near_to_one_another_the_best_alone_is_tried(model):
    others = {"a": expert(model, size=0.9), "b": expert(model, size=0.02), "c": expert(model, seed=6, size=0.3)}
    settings = SearchSettings()
    rows = search_rows(model, TASK, SAFETY, settings)
    result = learn_weights(model, others, rows, settings, clusters={"a": 0, "b": 0, "c": 1})
    assert sorted(step.label for step in result.steps) == ["b", "c"]
    assert "a: near to b, which is better alone, so it is not tried" in result.notes


def test_an_update_equal_to_the_live_one_cannot_be_told_apart(model):
    same = {name: one.low_rank(unit=1.0) for name, one in live_factors(model).items()}
    result = learned(model, {"same": same})
    assert not result.improved
    assert any("cannot tell the updates apart" in note for note in result.notes)


def test_cocktail_weighs_by_what_each_does_alone(model):
    others = {"safe": expert(model)}
    result = learned(model, others, objective="cocktail", share=0.5)
    (step,) = result.steps
    alone = [one.value / 1.5 for one in result.trace[:2]]
    expected = torch.softmax(-torch.tensor(alone).double(), 0).tolist()
    assert list(step.coefficients.values()) == pytest.approx(expected)
    if result.improved:
        assert set(result.weights.values()) == {tuple(step.coefficients.values())}
    cold = learned(model, others, objective="cocktail", temperature=1e-6)
    assert max(cold.steps[0].coefficients.values()) == pytest.approx(1.0)


def test_entropy_warns_of_what_it_asks_for(model):
    with pytest.warns(UserWarning, match="sure, not right"):
        learned(model, objective="entropy")


def test_losses_that_are_no_number_leave_the_adapter_as_it_is(model):
    rows = search_rows(model, TASK, SAFETY, SearchSettings())
    broken = {name: LowRank(A, B * math.nan) for name, (A, B) in expert(model).items()}
    for granularity in ("run", "module"):
        result = learn_weights(model, {"broken": broken}, rows, SearchSettings(granularity=granularity))
        assert not result.improved
        assert set(result.weights.values()) == {(1.0, 0.0)}
        assert any("had no finite loss" in note for note in result.notes)


@pytest.mark.parametrize("granularity", ["run", "module"])
def test_a_search_goes_on_where_it_was_killed(model, granularity):
    settings = SearchSettings(granularity=granularity, batch_size=1)
    rows, notes = search_rows(model, TASK, SAFETY, settings), []
    whole = learn_weights(model, {}, rows, settings, note=notes.append)
    assert notes == whole.trace

    def kill(evaluation):
        notes.append(evaluation)
        if len(notes) == 7:
            raise KeyboardInterrupt

    notes.clear()
    with pytest.raises(KeyboardInterrupt):
        learn_weights(model, {}, rows, settings, note=kill)
    again = learn_weights(model, {}, rows, settings, known=notes, note=notes.append)
    assert again.weights == whole.weights
    assert [one.key for one in notes] == [one.key for one in whole.trace]
    assert again.forward < whole.forward


def test_the_model_and_the_random_state_are_left_as_they_were(model):
    model.train()
    next(p for n, p in model.named_parameters() if "lora_A" in n).requires_grad_(True)
    before, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    wants = [parameter.requires_grad for parameter in model.parameters()]
    scalings = [dict(layer.scaling) for layer in model.modules() if hasattr(layer, "lora_A")]
    learned(model, granularity="block", minimiser="tezo")
    learned(model, granularity="module")
    assert torch.equal(torch.get_rng_state(), before)
    assert modes == [module.training for module in model.modules()]
    assert wants == [parameter.requires_grad for parameter in model.parameters()]
    assert scalings == [dict(layer.scaling) for layer in model.modules() if hasattr(layer, "lora_A")]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"objective": "js"}, "objective 'js' is unknown"),
        ({"granularity": "layer"}, "granularity 'layer' is unknown"),
        ({"minimiser": "adam"}, "minimiser 'adam' is unknown"),
        ({"minimiser": "cma"}, "'cma' is not for one coefficient"),
        ({"granularity": "block", "minimiser": "golden"}, "'golden' is not for a coefficient a block"),
        ({"objective": "cocktail", "granularity": "module"}, "in closed form"),
        ({"share": -1.0}, "share is -1.0"),
        ({"penalty": math.inf}, "penalty is inf"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"evaluations": True}, "evaluations is True"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_computed(settings, words):
    with pytest.raises(ConfigError, match=words):
        SearchSettings(**settings)


def test_rows_of_both_kinds_are_needed(model):
    with pytest.raises(ConfigError, match="there are no safety rows"):
        learned(model, safety=[])
