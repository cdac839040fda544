"""The norm of a module's gradient is that of the dense one, projected, and the same for factors split otherwise."""

import pytest
import torch

from safemerge_callback.live import live_factors
from safemerge_callback.signals.check_data import CheckData
from safemerge_callback.signals.gradient_norms import module_gradient_norms
from safemerge_callback.signals.module_signals import MODULE_SIGNALS
from safemerge_callback.signals.row_batch import mean_of_targets, row_batch, row_outputs, target_losses
from tests.support.rows import rows_of_kinds


def dense(model, rows):
    """∂L/∂ΔW of each module, by a gradient of the base weight."""
    batch = row_batch(rows)
    gradients = {}
    for name in live_factors(model):
        layer = next(m for path, m in model.named_modules() if path.endswith(name))
        weight = layer.get_base_layer().weight.requires_grad_(True)
        loss = mean_of_targets(target_losses(row_outputs(model, batch).logits, batch), batch).mean()
        (gradients[name],) = torch.autograd.grad(loss, weight)
        weight.requires_grad_(False)
    return gradients


def projected(G, A, B):
    """G on the tangent space of the matrices of B·A's rank."""
    rows, columns = torch.linalg.pinv(A) @ A, B @ torch.linalg.pinv(B)
    return columns @ G + G @ rows - columns @ G @ rows


@pytest.mark.parametrize("began", [False, True])
def test_it_is_the_norm_of_the_projected_gradient_however_the_update_is_split(world, began):
    model, rows = world.model(init_lora_weights=began).double().eval(), rows_of_kinds()
    gradients = dense(model, rows)
    wanted = {n: projected(gradients[n], f.A.detach(), f.B.detach()) for n, f in live_factors(model).items()}
    norms = module_gradient_norms(CheckData(model), rows, batch_size=2)
    assert norms == {name: pytest.approx(float(G.norm()), rel=1e-8) for name, G in wanted.items()}
    with torch.no_grad():
        for module in live_factors(model).values():
            mixed = torch.eye(len(module.A), dtype=torch.float64) + 0.3 * torch.ones(len(module.A), len(module.A))
            module.A.copy_(mixed @ module.A)
            module.B.copy_(module.B @ torch.linalg.inv(mixed))
    assert module_gradient_norms(CheckData(model), rows) == {n: pytest.approx(x, rel=1e-8) for n, x in norms.items()}


def test_the_signal_is_of_the_harmful_rows_and_changes_nothing(world):
    rows = rows_of_kinds(9)
    model = world.model(init_lora_weights=False).train()
    data = CheckData(model, tuple(row for row in rows if row.kind != "task"))
    state = torch.get_rng_state()
    said = MODULE_SIGNALS["gradient_norm"].function(data)
    assert said == module_gradient_norms(data, [row for row in rows if row.kind == "harm"])
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
