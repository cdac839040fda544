"""`panacea`: how far its step goes, where to, and that a run without it is the same but for the step."""

import math

import pytest
import torch

from safemerge_callback import SafeMergeCallback
from safemerge_callback.adapters import LoraFactors
from safemerge_callback.corrections import panacea as at_end
from safemerge_callback.corrections.harmful_rows import mean_loss
from safemerge_callback.corrections.panacea import PanaceaSettings, harmful_gradient, moved, random_direction
from safemerge_callback.errors import ConfigError, PlanError
from safemerge_callback.evaluation.rows import load_rows
from safemerge_callback.ops import LowRank
from safemerge_callback.signals.rows import row_tokens
from tests.support.trainer import entries, lora_weights

# Compliance in the words of the tests' tokenizer.
HARMFUL = [{"prompt": "a b c", "response": "w0 w1 yes"}, {"prompt": "d e", "response": "yes w3 w4 w5"}]
D_OUT, D_IN, RANK = 7, 9, 3


def factors(seed=0):
    source = torch.Generator().manual_seed(seed)

    def one(name, scaling):
        A, B = (torch.randn(shape, generator=source, dtype=torch.float64) for shape in ((RANK, D_IN), (D_OUT, RANK)))
        return LoraFactors(name, A, B, scaling)

    return {name: one(name, scaling) for name, scaling in (("q", 2.0), ("v", 0.5))}


def direction(seed=5):
    return {name: LowRank(module.A, module.B) for name, module in factors(seed).items()}


def dense(module, pair=None):
    A, B = (module.A, module.B) if pair is None else pair
    return module.scaling * B @ A


def test_rho_is_the_norm_of_the_step_and_a_linear_loss_gains_rho_times_its_gradients_norm():
    live, G = factors(), direction()
    new, edits = moved(live, G, norm=0.7)
    steps = [(new[n].A - live[n].A, new[n].B - live[n].B) for n in live]
    norm = math.sqrt(sum(float(one.square().sum()) for pair in steps for one in pair))
    assert norm == pytest.approx(0.7, rel=1e-12)
    gain = sum(
        float((step * g).sum())
        for pair, name in zip(steps, live, strict=True)
        for step, g in zip(pair, G[name], strict=True)
    )
    length = math.sqrt(sum(float(g.square().sum()) for pair in G.values() for g in pair))
    assert gain == pytest.approx(0.7 * length, rel=1e-12)
    for edit in edits:
        before, after = dense(live[edit.name]), dense(live[edit.name], new[edit.name])
        assert edit.change == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-9)


@pytest.mark.parametrize("way", [direction(), random_direction(factors(), 3, 6)], ids=["gradient", "random"])
@pytest.mark.parametrize("share", [0.1, 1.0])
def test_a_share_is_of_the_norm_of_all_updates_whatever_the_direction(way, share):
    live = factors()
    new, _ = moved(live, way, share=share, norm=None)
    change = math.sqrt(sum(float((dense(live[n], new[n]) - dense(live[n])).square().sum()) for n in live))
    whole = math.sqrt(sum(float(dense(module).square().sum()) for module in live.values()))
    assert change == pytest.approx(share * whole, rel=1e-9)


def test_a_random_direction_is_that_of_its_seed_and_step():
    one, same, other = (random_direction(factors(), seed, 6) for seed in (3, 3, 4))
    assert torch.equal(one["q"].A, same["q"].A)
    assert not torch.equal(one["q"].A, other["q"].A)
    assert not torch.equal(one["q"].A, one["v"].A)


def test_no_direction_is_no_step():
    live, G = factors(), direction()
    still = {name: LowRank(0 * pair.A, 0 * pair.B) for name, pair in G.items()}
    broken = {name: LowRank(pair.A * math.nan, pair.B) for name, pair in G.items()}
    for way, says in ((still, r"the norm of its direction is 0\.0"), (broken, "the norm of its direction is nan")):
        with pytest.raises(PlanError, match=says):
            moved(live, way, norm=1.0)
    untrained = {name: LoraFactors(name, module.A, 0 * module.B, 1.0) for name, module in live.items()}
    with pytest.raises(PlanError, match=r"share 0\.1 of an update of norm 0"):
        moved(untrained, G, share=0.1, norm=None)
    assert moved(untrained, G, norm=1.0)[1][0].change == math.inf


def test_its_gradient_is_that_of_all_rows_and_the_model_is_left_as_it_was(world, chat_tokenizer):
    model = world.model(init_lora_weights=False, lora_dropout=0.5).double().train()
    rows = tuple(row_tokens(chat_tokenizer, load_rows(HARMFUL * 2, both=False)))
    ours = harmful_gradient(model, None, rows, batch_size=3)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    named = {name: p for name, p in model.eval().named_parameters() if "lora_" in name}
    wanted = dict(zip(named, torch.autograd.grad(mean_loss(model, rows), [*named.values()]), strict=True))
    assert len(ours) == len(named) // 2
    for module, pair in ours.items():
        for kind, gradient in (("lora_A", pair.A), ("lora_B", pair.B)):
            (name,) = [one for one in named if f"{module}.{kind}" in one]
            assert torch.allclose(gradient.double(), wanted[name], rtol=1e-5, atol=1e-9)


def trained(world, chat_tokenizer, output, **settings):
    guard = [SafeMergeCallback(corrections=[{"panacea": {"rows": HARMFUL, **settings}}])] if settings else []
    trainer = world.trainer(output, *guard, tokenizer=chat_tokenizer, optim="adamw_torch")
    trainer.train()
    return trainer


@pytest.mark.parametrize("way", ["gradient", "random"])
def test_a_run_ends_with_one_step_and_is_else_the_plain_one(world, chat_tokenizer, tmp_path, way):
    plain = trained(world, chat_tokenizer, tmp_path / "plain")
    stepped = trained(world, chat_tokenizer, tmp_path / "out", share=0.2, direction=way)
    before, after = lora_weights(plain.model), lora_weights(stepped.model)
    (entry,) = entries(tmp_path / "out", "change")
    assert (entry["step"], entry["correction"]) == (6, "panacea")
    assert {module["task_weight"] for module in entry["modules"]} == {1.0}
    assert not entries(tmp_path / "out", "error")
    assert all(not torch.equal(after[name], weight) for name, weight in before.items())
    updates = [
        {n: weights[n.replace("lora_A", "lora_B")].double() @ A.double() for n, A in weights.items() if "lora_A" in n}
        for weights in (before, after)
    ]
    change, whole = (
        math.sqrt(sum(float(one.square().sum()) for one in many))
        for many in ([b - a for a, b in zip(*(u.values() for u in updates), strict=True)], updates[0].values())
    )
    assert change == pytest.approx(0.2 * whole, rel=1e-4)
    states = [[s["exp_avg"] for s in t.optimizer.optimizer.state.values()] for t in (plain, stepped)]
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))
    rows = tuple(row_tokens(chat_tokenizer, load_rows(HARMFUL, both=False)))
    with torch.no_grad():
        losses = [float(mean_loss(t.model.eval(), rows)) for t in (plain, stepped)]
    assert (losses[1] > losses[0]) or way == "random"


def test_that_a_reloaded_checkpoint_may_be_without_its_step_is_said_before(world, chat_tokenizer, tmp_path):
    saving = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 1}
    guard = SafeMergeCallback(corrections=[{"panacea": {"rows": HARMFUL}}])
    trainer = world.trainer(tmp_path, guard, tokenizer=chat_tokenizer, load_best_model_at_end=True, **saving)
    with pytest.warns(UserWarning, match="panacea changes the weights at the last step, and load_best_model_at_end"):
        trainer.train()


def test_what_is_not_finite_costs_the_step_alone(world, chat_tokenizer, tmp_path, monkeypatch):
    plain = trained(world, chat_tokenizer, tmp_path / "plain")
    monkeypatch.setattr(at_end, "mean_loss", lambda model, rows: mean_loss(model, rows) * math.nan)
    with pytest.warns(UserWarning, match="panacea failed at step 6, nothing was merged"):
        broken = trained(world, chat_tokenizer, tmp_path / "out", share=0.2)
    weights = lora_weights(plain.model)
    assert all(torch.equal(weight, weights[name]) for name, weight in lora_weights(broken.model).items())


def test_what_it_refuses(world, chat_tokenizer, tmp_path):
    assert (PanaceaSettings(rows=HARMFUL).share, PanaceaSettings(rows=HARMFUL, rho=1.0).share) == (0.1, None)
    for settings, says in (
        ({"rho": 1.0, "share": 0.1}, "rho 1.0 and share 0.1 are both given"),
        ({"rho": -1}, "rho is -1: give a number above 0"),
        ({"direction": "up"}, "direction"),
        ({"every": 0, "at_train_end": False}, "it would never be due"),
    ):
        with pytest.raises(ConfigError, match=says):
            PanaceaSettings(rows=HARMFUL, **settings)
    with pytest.raises(ConfigError, match="rows are missing: give harmful prompts with harmful answers"):
        PanaceaSettings()
    refusals = [{"prompt": "a", "response": "I'm sorry, I can't help with that."}]
    with pytest.raises(ConfigError, match="panacea needs harmful answers"):
        world.trainer(
            tmp_path, SafeMergeCallback(corrections=[{"panacea": {"rows": refusals}}]), tokenizer=chat_tokenizer
        ).train()
