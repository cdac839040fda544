"""A frozen adapter beside the live one while it trains: what it adds, and that nothing else knows of it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from recipes.buffer_adapter import BufferAdapter, added_in_training
from recipes.finetune import DataArguments
from recipes.guarded_trainer import buffer_of
from safemerge_callback.adapters import load_adapter
from safemerge_callback.errors import ConfigError
from safemerge_callback.live.batch_hooks import hooked
from tests.support.trainer import entries, lora_weights, saved_weights, tokens

STEPS = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def buffer(world, tmp_path_factory):
    """An adapter of larger numbers, saved as PEFT does."""
    model = world.model(seed=9, r=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("buffer")
    model.save_pretrained(folder)
    return str(folder)


def batch():
    return {key: torch.tensor([row[key] for row in tokens()[:3]]) for key in ("input_ids", "labels", "attention_mask")}


def test_in_training_it_is_a_second_active_adapter_and_else_nothing(world, buffer):
    model, rows = world.model(), batch()
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.add_(0.01)
    names, alone = set(model.state_dict()), model.eval()(**rows)
    with added_in_training(model, load_adapter(buffer)):
        assert torch.equal(model(**rows).logits, alone.logits)
        loss = model.train()(**rows).loss
        loss.backward()
        gradients = [parameter.grad.clone() for parameter in lora_parameters(model)]
        assert set(model.state_dict()) == names
        assert not hooked(model), "a trainer may go on giving it parts of batches"
        with model.disable_adapter():
            without = model(**rows).logits
    assert torch.equal(model(**rows).logits, alone.logits)
    model.zero_grad()
    model.load_adapter(buffer, adapter_name="buffer")
    model.base_model.set_adapter(["default", "buffer"])
    two = model(**rows).loss
    two.backward()
    assert loss.item() == pytest.approx(two.item(), rel=1e-6)
    assert abs(alone.loss.item() - two.item()) > 1e-4
    for gradient, parameter in zip(gradients, lora_parameters(model), strict=True):
        assert torch.allclose(gradient, parameter.grad, rtol=1e-4, atol=1e-7)
    with model.disable_adapter():
        assert torch.equal(model(**rows).logits, without)


def lora_parameters(model):
    return [parameter for name, parameter in model.named_parameters() if "default" in name]


def test_the_callback_merges_saves_and_resumes_the_live_adapter_alone(world, buffer, tmp_path):
    def trained(output, resume=None, **changed):
        guard = world.guard(method="orthogonal", weights=[0.5, 0.5], strength=0.1, every=3)
        trainer = world.trainer(output, guard, BufferAdapter(buffer), **STEPS, **changed)
        before = lora_weights(trainer.model).keys()
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        assert lora_weights(trainer.model).keys() == before
        return trainer

    whole = trained(tmp_path / "whole")
    assert {entry["step"] for entry in entries(tmp_path / "whole", "merge")} == {3, 6}
    stored, live = saved_weights(tmp_path / "whole"), lora_weights(whole.model)
    assert [torch.equal(stored[n.replace(".default", "")], w) for n, w in live.items()] == [True] * len(stored)
    assert not any(module._forward_hooks for module in whole.model.modules())
    assert [p.name for p in (tmp_path / "whole" / "checkpoint-4").glob("adapter_model*")] == [
        "adapter_model.safetensors"
    ]
    resumed = trained(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-4"))
    assert all(torch.equal(weight, live[name]) for name, weight in lora_weights(resumed.model).items())
    plain = world.trainer(
        tmp_path / "plain", world.guard(method="orthogonal", weights=[0.5, 0.5], strength=0.1, every=3)
    )
    plain.train()
    assert not all(torch.equal(weight, live[name]) for name, weight in lora_weights(plain.model).items())


def test_a_buffer_of_0_is_absence_to_the_bit(world, tmp_path):
    nothing = world.model(seed=9)
    nothing.save_pretrained(tmp_path / "nothing")
    runs = []
    for callbacks in ([], [BufferAdapter(str(tmp_path / "nothing"))]):
        trainer = world.trainer(tmp_path / "run", *callbacks, max_steps=2)
        trainer.train()
        runs.append(lora_weights(trainer.model))
    assert all(torch.equal(weight, runs[0][name]) for name, weight in runs[1].items())


@pytest.mark.parametrize("callbacks", [0, 1])
def test_one_that_an_error_left_is_not_at_work_beside_the_next(world, buffer, tmp_path, callbacks):
    trainer = world.trainer(tmp_path, BufferAdapter(buffer), max_steps=1)
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    hooks = []

    def counted(model, *args, **kwargs):
        loss = compute_loss(model, *args, **kwargs)
        hooks.extend(len(module._forward_hooks) for module in model.modules() if hasattr(module, "lora_A"))
        return loss

    nexts = [BufferAdapter(buffer)] * callbacks
    again = world.trainer(tmp_path, *nexts, model=trainer.model, max_steps=1)
    again.compute_loss = counted
    again.train()
    assert hooks == [callbacks] * 4


def test_a_buffer_that_does_not_fit_is_refused_before_the_first_step(world, buffer, tmp_path):
    trainer = world.trainer(tmp_path, BufferAdapter(buffer), model=world.model(targets=["q_proj"]))
    with pytest.raises(
        ConfigError, match=r"buffer_adapter .* adapts module .*v_proj', which the adapter that is trained"
    ):
        trainer.train()
    other = world.aligned.__class__(
        world.aligned.config.__class__(**{**world.aligned.config.to_dict(), "hidden_size": 64})
    )
    get_peft_model(other, LoraConfig(target_modules=["q_proj", "v_proj"])).save_pretrained(tmp_path / "other")
    with (
        pytest.raises(ConfigError, match=r"has \(32, 64\) \(outputs, inputs\) in module .*Linear of \(32, 32\)"),
        added_in_training(world.model(), load_adapter(str(tmp_path / "other"))),
    ):
        pass


def test_a_buffer_without_a_lora_is_refused(buffer):
    from trl import ModelConfig

    assert DataArguments("sentiment").buffer_adapter is None
    with pytest.raises(ConfigError, match="use_peft is false: it works beside a LoRA"):
        buffer_of(buffer, ModelConfig(use_peft=False))
    assert isinstance(buffer_of(buffer, ModelConfig(use_peft=True)), BufferAdapter)
