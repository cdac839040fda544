"""The slope of a module is what its update costs, to first order; and taking it leaves no trace."""

from pathlib import Path

import pytest
import torch

from safemerge_callback.errors import ConfigError
from safemerge_callback.live import live_factors
from safemerge_callback.signals.check_data import DATA_NEEDS, CheckData
from safemerge_callback.signals.module_signals import MODULE_SIGNALS, check_engine, data_among
from safemerge_callback.signals.row_batch import mean_of_targets, row_batch, row_outputs, target_losses
from safemerge_callback.signals.slopes import module_slopes
from tests.support.rows import rows_of_kinds

ROOT = Path(__file__).parents[2]


def moved(world, dtype=torch.float64):
    """A model in evaluation mode whose adapter has moved."""
    return world.model(init_lora_weights=False).to(dtype).eval()


def loss(model, rows):
    batch = row_batch(rows)
    return mean_of_targets(target_losses(row_outputs(model, batch).logits, batch), batch).mean()


def test_it_is_the_inner_product_of_the_update_and_the_gradient_of_the_loss_by_it(world):
    """In float64: ⟨ΔW, ∂L/∂ΔW⟩ by a dense perturbation of the base weight's output, without factors."""
    model, rows = moved(world), rows_of_kinds()
    slopes = module_slopes(CheckData(model), rows, batch_size=2)
    assert slopes.keys() == live_factors(model).keys()
    for name, module in live_factors(model).items():
        layer = next(m for path, m in model.named_modules() if path.endswith(name))
        delta = (module.scaling * module.B @ module.A).detach()
        weight = layer.get_base_layer().weight
        weight.requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(model, rows), weight)
        weight.requires_grad_(False)
        assert slopes[name] == pytest.approx(float((delta * gradient).sum()), rel=1e-10)


def test_it_is_how_the_loss_grows_with_the_update(world):
    model, rows = moved(world), rows_of_kinds()
    slopes = module_slopes(CheckData(model), rows)
    for name, module in live_factors(model).items():
        losses = []
        for scale in (1.03, 0.97):
            kept = module.B.detach().clone()
            with torch.no_grad():
                module.B.mul_(scale)
                losses.append(float(loss(model, rows)))
                module.B.copy_(kept)
        assert slopes[name] == pytest.approx((losses[0] - losses[1]) / 0.06, rel=0.02, abs=5e-6)


def test_nothing_of_the_model_is_changed(world):
    model = world.model(init_lora_weights=False, lora_dropout=0.5).train()
    parameters = dict(model.named_parameters())
    frozen = next(p for n, p in parameters.items() if "lora_B" in n)
    frozen.requires_grad_(False)
    gradients = {n: torch.randn_like(p) for n, p in parameters.items() if p.requires_grad}
    for name, gradient in gradients.items():
        parameters[name].grad = gradient.clone()
    trainable, state = {n: p.requires_grad for n, p in parameters.items()}, torch.get_rng_state()
    module_slopes(CheckData(model), rows_of_kinds())
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert {n: p.requires_grad for n, p in parameters.items()} == trainable
    assert {n for n, p in parameters.items() if p.grad is not None} == gradients.keys()
    assert all(torch.equal(parameters[n].grad, g) for n, g in gradients.items())


def test_the_two_signals_are_of_the_harmful_rows_and_of_the_tasks(world):
    rows = rows_of_kinds(9)
    data = CheckData(moved(world), tuple(r for r in rows if r.kind != "task"), rows[2::3])
    for signal, kind in (("safety_slope", "harm"), ("task_slope", "task")):
        wanted = module_slopes(data, [row for row in rows if row.kind == kind])
        assert MODULE_SIGNALS[signal].function(data) == wanted


def test_what_is_needed_for_a_signal_is_needed():
    assert data_among({"safety_slope": "gate 'x'"}) == {"safety_batch": "gate 'x'"}
    assert data_among({"grams": "method 'y'"}) == dict.fromkeys(("grams", "safety_batch"), "method 'y'")
    assert data_among({"subspace": "method 'z'"}) == {}
    check_engine({"safety_slope": "gate 'x'"}, "DDP")
    with pytest.raises(ConfigError, match=r"gate 'x' needs 'safety_slope', which is taken on .*'DDP', 'one process'"):
        check_engine({"safety_slope": "gate 'x'"}, "FSDP")


def test_every_signal_is_in_the_tables():
    pages = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("check_rows.md", "journal.md")]
    for name in MODULE_SIGNALS:
        assert f"| `{name}` |" in pages[0]
        assert f"`modules[].{name}`" in pages[1]
    assert all(f"| `{need}` |" in pages[0] for need in DATA_NEEDS)
