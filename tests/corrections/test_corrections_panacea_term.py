"""`panacea_term`: the paper's gradient on a real model, 0 at weight 0, and what it counts."""

from typing import Any, cast

import pytest
import torch

from safemerge_callback import SafeMergeCallback
from safemerge_callback.corrections.gradient import GradientEngine
from safemerge_callback.corrections.harmful_rows import mean_loss
from safemerge_callback.corrections.panacea_term import PanaceaTerm, PanaceaTermSettings
from safemerge_callback.corrections.protocol import RunPoint, RunStart
from safemerge_callback.errors import ConfigError
from safemerge_callback.live.micro_batch import micro_batch
from safemerge_callback.record.log import Log
from tests.support.trainer import entries, lora_weights

HARMFUL = [{"prompt": "a b c", "response": "w0 w1 yes"}, {"prompt": "d e", "response": "yes w3 w4 w5"}]


def at(step):
    return RunPoint(step, 10, cast(Any, None), cast(Any, None))


def test_its_gradient_is_the_papers(world, chat_tokenizer):
    """-λ(∇h(w + ε) - ∇h(w)), ε = rho·∇h/‖∇h‖, in float64; the parameters have their bits back."""
    model = world.model(init_lora_weights=False).double().train()
    term = PanaceaTerm(PanaceaTermSettings(rows=HARMFUL, batch_size=2, weight=0.5, rho=0.05))
    term.prepare(RunStart(model, chat_tokenizer, print))
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = torch.cat([p.detach().flatten() for p in parameters])
    GradientEngine([term], micro_batch(model), Log(quiet=True)).before_step(at(3))
    assert torch.equal(torch.cat([p.detach().flatten() for p in parameters]), before)
    ours, rows = torch.cat([p.grad.flatten() for p in parameters]), term.rows.batch(at(3))

    def gradient():
        return torch.cat([g.flatten() for g in torch.autograd.grad(mean_loss(model, rows), parameters)])

    first = gradient()
    torch.nn.utils.vector_to_parameters(before + 0.05 * first / first.norm(), parameters)
    wanted = -0.5 * (gradient() - first)
    assert torch.allclose(ours, wanted, rtol=0, atol=1e-9 * float(wanted.norm()))
    assert float(wanted.norm()) > 1e-4
    assert (term.figures(), term.figures()) == ({"rows": 2.0}, {"rows": 0.0})


def test_both_parts_are_a_run_and_weight_0_is_absence(world, chat_tokenizer, tmp_path):
    runs = {}
    for name, terms in (
        ("plain", []),
        ("off", [{"panacea_term": {"rows": HARMFUL, "weight": 0.0}}]),
        ("both", [{"panacea_term": {"rows": HARMFUL, "weight": 1.0}}, {"panacea": {"rows": HARMFUL}}]),
    ):
        guard = [SafeMergeCallback(corrections=terms)] if terms else []
        trainer = world.trainer(tmp_path / name, *guard, tokenizer=chat_tokenizer)
        trainer.train()
        runs[name] = lora_weights(trainer.model)
    assert all(torch.equal(weight, runs["plain"][name]) for name, weight in runs["off"].items())
    assert not all(torch.equal(weight, runs["plain"][name]) for name, weight in runs["both"].items())
    assert [entry["step"] for entry in entries(tmp_path / "both", "change")] == [6]
    assert {entry["figures"]["rows"] for entry in entries(tmp_path / "both", "gradient")} == {1.0}


def test_what_it_refuses():
    assert PanaceaTermSettings(rows=HARMFUL).share == 0.003
    for settings, says in (({"weight": -1}, "weight is -1: give λ"), ({"rho": 0}, "rho is 0: give a number above 0")):
        with pytest.raises(ConfigError, match=says):
            PanaceaTermSettings(rows=HARMFUL, **settings)
