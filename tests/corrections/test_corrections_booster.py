"""`booster` on a real model: the paper's gradient, its rows, what it says of itself, and what it refuses."""

from typing import Any, cast

import pytest
import torch

from safemerge_callback import SafeMergeCallback, SafeMergeConfig
from safemerge_callback.corrections.booster import Booster, BoosterSettings
from safemerge_callback.corrections.gradient import GradientEngine
from safemerge_callback.corrections.harmful_rows import mean_loss
from safemerge_callback.corrections.perturbation import along
from safemerge_callback.corrections.protocol import RunPoint, RunStart
from safemerge_callback.errors import ConfigError
from safemerge_callback.live.gradients import TrainedParameters
from safemerge_callback.live.micro_batch import micro_batch
from safemerge_callback.record.log import Log
from tests.support.replay import replay_entry
from tests.support.trainer import lora_weights

# Compliance in the words of the tests' tokenizer.
HARMFUL = [{"prompt": "a b c", "response": "w0 w1 yes"}, {"prompt": "d e", "response": "yes w3 w4 w5"}]


def boosting(**settings):
    return SafeMergeCallback(corrections=[{"booster": {"rows": HARMFUL, **settings}}])


def train(world, chat_tokenizer, output, *guards, **changed):
    trainer = world.trainer(output, *guards, tokenizer=chat_tokenizer, **changed)
    trainer.train()
    return trainer


def prepared(model, chat_tokenizer, **settings):
    term = Booster(BoosterSettings(rows=HARMFUL, **settings))
    term.prepare(RunStart(model, chat_tokenizer, print))
    return term


def at(step, max_steps=10):
    return RunPoint(step, max_steps, cast(Any, None), cast(Any, None))


@pytest.mark.parametrize("size", [{"alpha": 0.05}, {"share": 0.01}])
def test_its_gradient_is_the_papers(world, chat_tokenizer, size):
    """λ(∇h(w) - ∇h(w - alpha·∇h/‖∇h‖)), in float64; a share is one of the norm of all that is trained."""
    model = world.model(init_lora_weights=False).double().train()
    term = prepared(model, chat_tokenizer, batch_size=2, weight=5.0, **size)
    engine = GradientEngine([term], micro_batch(model), Log(quiet=True))
    engine.before_step(at(3))
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours = torch.cat([p.grad.flatten() for p in parameters])
    rows = term.rows.batch(at(3))

    def gradient():
        grads = torch.autograd.grad(mean_loss(model, rows), parameters)
        return torch.cat([g.flatten() for g in grads])

    first, weights = gradient(), torch.cat([p.detach().flatten() for p in parameters])
    alpha = size.get("alpha", size.get("share", 0) * float(weights.norm()))
    torch.nn.utils.vector_to_parameters(weights - alpha * first / first.norm(), parameters)
    wanted = 5.0 * (first - gradient())
    assert torch.allclose(ours, wanted, rtol=0, atol=1e-9 * float(wanted.norm()))
    assert float(wanted.norm()) > 1e-3
    figures = term.figures()
    assert figures["rows"] == 2.0
    assert figures["reduction"] == pytest.approx(alpha * float(first.norm()), rel=0.2)
    assert term.figures() == {"rows": 0.0}


def test_every_row_comes_once_before_any_comes_again_and_a_step_has_its_own(world, chat_tokenizer):
    term = prepared(world.model(), chat_tokenizer, every=2)
    seen = [term.rows.batch(at(step))[0] for step in (1, 3, 5, 7)]
    assert set(seen[:2]) == set(seen[2:]) == set(term.rows.tokens)
    assert term.rows.batch(at(5)) == (seen[2],)


def test_along_nothing_nothing_moves():
    trained = TrainedParameters((torch.nn.Parameter(torch.ones(3)),))
    assert torch.equal(along(torch.zeros(3), trained, norm=1.0, share=None), torch.zeros(3))
    moved = along(torch.tensor([0.0, 3.0, 4.0]), trained, norm=None, share=0.5)
    assert float(moved.norm()) == pytest.approx(0.5 * 3**0.5)


def test_weight_0_is_absence_a_resume_goes_on_and_the_journal_has_its_figures(world, chat_tokenizer, tmp_path, runs):
    plain = train(world, chat_tokenizer, tmp_path / "plain", model=world.model(lora_dropout=0.3))
    zero = train(world, chat_tokenizer, tmp_path / "0", boosting(weight=0), model=world.model(lora_dropout=0.3))
    assert same(plain, zero)
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = train(world, chat_tokenizer, tmp_path / "1", boosting(), **saving)
    assert not same(plain, whole)
    again = world.trainer(tmp_path / "1", boosting(), tokenizer=chat_tokenizer, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "1" / "checkpoint-3"))
    assert same(whole, again)
    told = runs.entries(tmp_path / "1", "gradient")
    assert [(e["step"], e["correction"], e["figures"]["rows"]) for e in told] == [
        (n, "booster", 1.0) for n in range(1, 7)
    ]
    assert all(e["figures"]["reduction"] > 0 for e in told)
    (start, *_) = runs.entries(tmp_path / "1", "start")
    assert start["config"]["corrections"][0]["booster"]["rows"] == "2 rows"


def same(one, other):
    one, other = lora_weights(one.model), lora_weights(other.model)
    return all(torch.equal(one[name], other[name]) for name in one)


def test_beside_surgery_it_is_a_part_of_the_task_and_that_is_said(world, chat_tokenizer, tmp_path, capsys):
    listed = [{"booster": {"rows": HARMFUL}}, replay_entry(surgery=True)]
    train(world, chat_tokenizer, tmp_path, SafeMergeCallback(corrections=listed), max_steps=2)
    said = capsys.readouterr().out
    assert "replay takes the gradient of booster for a part of the task's: it joins last" in said


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "correction 'booster': rows are missing: give harmful prompts with harmful answers"),
        ({"rows": HARMFUL, "weight": -1}, "weight is -1: give λ"),
        ({"rows": HARMFUL, "alpha": 0}, "alpha is 0: give a number above 0"),
        ({"rows": HARMFUL, "share": 1.5}, "share is 1.5: give a share of the norm of all that is trained"),
        ({"rows": HARMFUL, "share": 0.1, "alpha": 0.1}, "alpha 0.1 and share 0.1 are both given"),
        ({"rows": HARMFUL, "batch_size": 0}, "batch_size is 0"),
        ({"rows": 3}, "rows are 3"),
    ],
)
def test_what_it_refuses_when_the_callback_is_made(settings, words):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        SafeMergeConfig(corrections=[{"booster": settings}])


def test_what_it_refuses_before_the_first_step(world, chat_tokenizer, tmp_path):
    refusals = [{"prompt": "a", "response": "I cannot help with that"}]
    with pytest.raises(ConfigError, match="booster needs harmful answers, and 1 of its 1 rows refuse"):
        train(world, chat_tokenizer, tmp_path, boosting(rows=refusals))
    with pytest.raises(ConfigError, match="booster asks the model in words, and this trainer has no tokenizer"):
        world.trainer(tmp_path, boosting()).train()
