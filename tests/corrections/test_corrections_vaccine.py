"""`vaccine`: the perturbation against the loss it is taken of, and real trainings."""

import pytest
import torch
from torch import nn

from safemerge_callback import SafeMergeCallback, SafeMergeConfig
from safemerge_callback.corrections.perturbed_blocks import (
    attention_blocks,
    moved_along,
    output_gradients,
    perturbed_batches,
)
from safemerge_callback.errors import ConfigError
from safemerge_callback.live.batch_hooks import hooked
from safemerge_callback.live.stopwatch import Stopwatch
from safemerge_callback.signals.task_rows import TaskRows
from tests.support.trainer import lora_weights

CPU = torch.device("cpu")


def batch():
    ids = torch.arange(3, 27).reshape(3, 8)
    return {"input_ids": ids, "labels": ids}


def perturbed(model, rule):
    return perturbed_batches(model, "vaccine", attention_blocks(model), rule, Stopwatch(CPU))


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture
def model(world):
    return world.model(init_lora_weights=False).double().train()


def test_the_loss_rises_by_the_gradients_it_was_taken_of(model):
    """By central differences: along its own gradient e a step of h adds h·‖e‖²; and nobody's `.grad` is touched."""
    rises, taken = {}, []
    for h in (1e-3, -1e-3):
        with perturbed(model, lambda outputs, e, h=h: taken.append(e) or [h * x for x in e]) as batches:
            model(**batch())
        ((before, after),) = batches.losses
        rises[h] = float(after - before)
    square = sum(float(x.square().sum()) for x in taken[0])
    assert len(taken[0]) == 2
    assert (rises[1e-3] - rises[-1e-3]) / 2e-3 == pytest.approx(
        square, rel=3e-4
    )  # transformers takes the loss in float32
    assert all(p.grad is None for p in model.parameters())
    assert not hooked(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_is_trained_is_the_pass_with_the_outputs_moved(model):
    kept = []

    def rule(outputs, by_outputs):
        kept[:] = moved_along(outputs, by_outputs, rho=0.5, share=None)
        return kept

    with perturbed(model, rule):
        model(**batch()).loss.backward()
    ours = gradients(model)
    model.zero_grad()
    blocks = attention_blocks(model).values()
    hooks = [
        block.register_forward_hook(lambda _m, _a, out, more=more: (out[0] + more, *out[1:]))
        for block, more in zip(blocks, kept, strict=True)
    ]
    model(**batch()).loss.backward()
    assert torch.equal(ours, gradients(model))
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    model(**batch()).loss.backward()
    assert not torch.allclose(ours, gradients(model), rtol=1e-3)


def test_both_passes_drop_out_the_same_and_the_tasks_random_numbers_are_its_own(world):
    model = world.model(init_lora_weights=False, lora_dropout=0.5).train()
    torch.manual_seed(1)
    plain = model(**batch()).loss
    after, state = torch.rand(1), None
    torch.manual_seed(1)
    with perturbed(model, lambda outputs, e: [torch.zeros_like(x) for x in e]) as batches:
        model(**batch())
        state = torch.rand(1)
    assert torch.equal(state, after)
    assert batches.losses == [(plain, plain)]


def test_the_norm_of_a_perturbation_is_rho_and_of_a_row_its_share():
    generator = torch.Generator().manual_seed(0)
    outputs, e = ([torch.randn(4, 5, 6, generator=generator) for _ in range(3)] for _ in range(2))
    moved = moved_along(outputs, e, rho=2.0, share=None)
    assert float(torch.stack(moved).norm()) == pytest.approx(2.0)
    moved = torch.stack(moved_along(outputs, e, rho=None, share=0.1))
    for row in range(4):
        assert float(moved[:, row].norm()) == pytest.approx(0.1 * float(torch.stack(outputs)[:, row].norm()))
        alone = moved_along([x[row : row + 1] for x in outputs], [x[row : row + 1] for x in e], rho=None, share=0.1)
        assert torch.allclose(torch.stack(alone)[:, 0], moved[:, row], atol=1e-6)
    padded = [[torch.cat([torch.full_like(x[:, :2], more), x], 1) for x in xs] for xs, more in ((outputs, 9), (e, 0))]
    assert torch.allclose(torch.stack(moved_along(*padded, rho=None, share=0.1))[:, :, 2:], moved, atol=1e-6)
    nothing = moved_along(outputs, [torch.zeros_like(x) for x in e], rho=1.0, share=None)
    broken = moved_along(outputs, [x * float("nan") for x in e], rho=1.0, share=None)
    assert not torch.stack([*nothing, *broken]).any()


def train(world, output, corrections=None, **changed):
    guards = [SafeMergeCallback(corrections=corrections)] if corrections is not None else []
    trainer = world.trainer(output, *guards, **{"max_steps": 2, "max_grad_norm": 0.0, **changed})
    trainer.train()
    return torch.cat([weight.flatten() for weight in lora_weights(trainer.model).values()])


def test_0_is_absence_to_the_bit_and_the_journal_has_its_figures(world, tmp_path, runs):
    def dropping():
        return world.model(lora_dropout=0.3)

    plain = train(world, tmp_path / "plain", model=dropping())
    assert torch.equal(plain, train(world, tmp_path / "0", [{"vaccine": {"share": 0}}], model=dropping()))
    assert not torch.equal(plain, train(world, tmp_path / "1", [{"vaccine": {"share": 0.1}}], model=dropping()))
    told = runs.entries(tmp_path / "1", "gradient")
    assert [(e["step"], e["correction"], e["steps"]) for e in told] == [(1, "vaccine", 1), (2, "vaccine", 1)]
    assert all(e["figures"]["rise"] > 0 and e["loss"] > 0 and e["seconds"] > 0 for e in told)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing.*. is deprecated:FutureWarning")
def test_accumulation_and_checkpointing_change_nothing(world, tmp_path, runs):
    settings = {"optim": "sgd", "learning_rate": 1.0}
    listed = [{"vaccine": {"share": 0.1}}]
    eight = train(world, tmp_path / "8", listed, per_device_train_batch_size=8, **settings)
    two = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert torch.allclose(eight, train(world, tmp_path / "2", listed, **two, **settings), atol=1e-5)
    told = [[(e["loss"], e["figures"]["rise"]) for e in runs.entries(tmp_path / n, "gradient")] for n in ("8", "2")]
    assert [pytest.approx(pair, rel=1e-3) for pair in told[0]] == told[1]
    plain = train(world, tmp_path / "plain", None, per_device_train_batch_size=8, **settings)
    assert float((eight - plain).norm()) > 1e-3
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    anew = train(world, tmp_path / "c", listed, per_device_train_batch_size=8, **checkpointing, **settings)
    assert torch.allclose(eight, anew, atol=1e-5)
    checkpointing["gradient_checkpointing_kwargs"] = {"use_reentrant": True}
    with pytest.raises(ConfigError, match="gradient checkpointing of the reentrant kind hides"):
        train(world, tmp_path / "r", listed, **checkpointing)


def test_whoever_looks_at_a_batch_on_its_way_sees_it_once(world, model, tmp_path, runs):
    """The rows that are kept of the task, and the token weights of `constrained`, before it in the list and after."""
    rows = TaskRows(10)
    rows.follow(model)
    with perturbed(model, lambda outputs, e: e):
        model(**batch())
    assert len(rows.rows()) == 3
    for listed in (
        [{"constrained": {}}, {"vaccine": {"share": 0.1}}],
        [{"vaccine": {"share": 0.1}}, {"constrained": {}}],
    ):
        output = tmp_path / next(iter(listed[0]))
        ends = train(world, output, listed)
        assert not runs.entries(output, "error")
        assert {e["correction"] for e in runs.entries(output, "gradient")} == {"constrained", "vaccine"}
    assert torch.equal(ends, train(world, tmp_path / "again", listed[::-1]))


def test_a_batch_without_labels_is_told_of_once(model):
    with perturbed(model, lambda outputs, e: e) as batches:
        model(input_ids=batch()["input_ids"])
    assert batches.faults[0].error == "no batch of this step had labels, so there was no loss to perturb against"


def test_a_first_pass_that_fails_costs_that_batch_its_perturbation(model):
    plain = model(**batch()).loss
    with perturbed(model, lambda outputs, e: 1 / 0) as batches:
        assert torch.equal(model(**batch()).loss, plain)
    assert "ZeroDivisionError" in batches.faults[0].error


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rho": -1}, "rho is -1: give a number of 0"),
        ({"rho": 1, "share": 0.1}, "rho 1 and share 0.1 are both given"),
        ({"share": 50}, "share is 50: give a share of what a row's outputs are, from 0 to 1"),
        ({"blocks": "("}, "blocks '.' is no regular expression"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        SafeMergeConfig(corrections=[{"vaccine": settings}])


def test_blocks_are_the_outermost_or_those_of_a_pattern(world):
    model = world.model()
    found = attention_blocks(model)
    assert [path.rpartition(".layers.")[2] for path in found] == ["0.self_attn", "1.self_attn"]
    assert len(attention_blocks(model, r"layers\.\d+\.mlp$")) == 2
    with pytest.raises(ConfigError, match="no module of the model is an attention block, by its class"):
        attention_blocks(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="by 'nosuch': give `blocks`"):
        attention_blocks(model, "nosuch")


class Crossed(nn.Module):
    """Two blocks, of which the one that is named last is called first."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()

    def forward(self, x):
        return self.first(torch.tanh(self.second(x)))


def test_gradients_are_each_blocks_own_whichever_is_called_first():
    model, x = Crossed(), torch.ones(1, 2, 3, dtype=torch.double)
    blocks = {"first": model.first, "second": model.second}
    with output_gradients(blocks) as gradients:
        loss = model(x).square().sum()
        outputs, by_outputs = gradients(loss)
    second = model.second(x)
    first = model.first(torch.tanh(second))
    assert torch.equal(outputs[0], first)
    assert torch.equal(outputs[1], second)
    assert torch.allclose(by_outputs[0], 2 * first)
    assert torch.allclose(by_outputs[1], (2 * first @ model.first.weight) * (1 - torch.tanh(second) ** 2))


def test_a_block_that_passes_twice_or_not_at_all_is_said():
    model, x = Crossed(), torch.ones(1, 2, 3, dtype=torch.double)
    for call, words in ((lambda: model.first(model(x)), "gave 3 outputs"), (lambda: model.first(x), "gave 1 outputs")):
        with output_gradients({"first": model.first, "second": model.second}) as gradients:
            loss = call().sum()
            with pytest.raises(ValueError, match=f"2 attention blocks {words} in one pass"):
                gradients(loss)
