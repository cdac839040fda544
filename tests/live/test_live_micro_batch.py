"""What cannot take one more micro-batch says so, each in its own sentence."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

from safemerge_callback.live import micro_batch
from safemerge_callback.live.micro_batch import refusal


def test_a_pass_under_a_scaler_is_scaled_and_read_without_its_factor(world):
    """As the scaler's own `unscale_` gives it back, and in float32 at least."""
    model = world.model(init_lora_weights=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    batch = micro_batch.micro_batch(model, SimpleNamespace(scaler=scaler))
    ids = torch.arange(3, 11).reshape(1, 8)
    batch.backward(model(input_ids=ids, labels=ids).loss)
    scaled = batch.trained.vector(batch.trained.gradients())
    optimizer = torch.optim.SGD(batch.trained.parameters)
    scaler.unscale_(optimizer)
    plain = batch.trained.vector(batch.trained.gradients())
    assert torch.equal(scaled, 1024 * plain)
    assert torch.equal(batch.unscaled(scaled), plain)


@pytest.fixture
def accelerate(monkeypatch):
    """What accelerate says of this process."""

    def says(**state):
        monkeypatch.setattr(AcceleratorState, "_shared_state", state)

    says()
    return says


@pytest.fixture
def deepspeed(monkeypatch):
    """A trainer whose DeepSpeed engine answers so."""
    monkeypatch.setattr(micro_batch, "engine_of", lambda *about: "DeepSpeed")

    def answers(**answers):
        engine = SimpleNamespace(**{name: lambda value=value: value for name, value in answers.items()})
        return SimpleNamespace(model_wrapped=engine)

    return answers


def test_a_plain_training_takes_it(world, accelerate):
    assert refusal(world.model()) is None


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"cp_size": 2}, "context parallelism splits rows or layers over processes"),
        ({"sp_size": 2}, "sequence parallelism splits"),
        ({"tp_size": 2}, "tensor parallelism splits"),
    ],
)
def test_what_splits_a_row_is_named(world, accelerate, sizes, says):
    accelerate(parallelism_config=SimpleNamespace(**sizes))
    assert says in refusal(world.model())


def test_shards_and_replicas_alone_split_no_row(world, accelerate):
    accelerate(parallelism_config=SimpleNamespace(dp_shard_size=2, dp_replicate_size=2, tp_size=1, cp_size=None))
    assert refusal(world.model()) is None


def test_a_model_that_was_loaded_in_parallel_is_named(world, accelerate):
    model = world.model()
    model.base_model.model._tp_size = 2
    assert "tensor parallelism splits" in refusal(model)


def test_megatron_is_named(world, accelerate):
    accelerate(distributed_type="MEGATRON_LM")
    assert "Megatron-LM, whose passes are its own" in refusal(world.model())


def test_an_optimizer_that_does_not_wait_is_named(world, accelerate):
    class AdaLomo:
        pass

    assert "optimizer AdaLomo makes its step inside every backward pass" in refusal(world.model(), AdaLomo())


def test_deepspeed_asks_for_the_trainer(world, accelerate, deepspeed):
    assert "add the line guard.attach(trainer) before trainer.train()" in refusal(world.model())
    assert refusal(world.model(), None, deepspeed(managed_gradient_accumulation=True, autotp_size=0)) is None
    assert refusal(world.model(), None, deepspeed()) is None


def test_deepspeed_must_manage_the_accumulation(world, accelerate, deepspeed):
    says = refusal(world.model(), None, deepspeed(managed_gradient_accumulation=False))
    assert "managed_gradient_accumulation is false" in says


def test_deepspeeds_own_tensor_parallelism_is_named(world, accelerate, deepspeed):
    assert "tensor parallelism splits" in refusal(world.model(), None, deepspeed(autotp_size=2))
