"""On one GPU: the same readings and merges as on the CPU, at full precision, with one wait a check."""

import copy
import time

import pytest
import torch
from transformers import TrainerCallback

from safemerge_callback.errors import ConfigError
from safemerge_callback.live.stopwatch import Stopwatch, settled
from tests.support.replay import replaying

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


class See(TrainerCallback):
    """Where the factors are, and what they are at the end."""

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.devices = {p.device.type for n, p in model.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("tf32", [False, True])
def test_readings_and_merges_equal_those_of_the_cpu(world, tf32):
    from safemerge_callback import MergePlan, Subspace, apply, load_adapter, measure, writer_for

    subspace, safety = Subspace.load(world.subspace), load_adapter(world.safety)
    model = world.model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    there = copy.deepcopy(model).cuda()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        found = {}
        for device, one in (("cpu", model), ("cuda", there)):
            writer = writer_for(one)
            plan = MergePlan.decide(measure(writer.gather(), subspace), gate="all", weights=(0.8, 0.2))
            apply(plan, writer, safety, subspace)
            found[device] = plan.readings, {n: (f.B @ f.A).cpu() for n, f in writer.gather().items()}
    finally:
        torch.set_float32_matmul_precision("highest")
    for name, reading in found["cpu"][0].items():
        assert found["cuda"][0][name].cosine == pytest.approx(reading.cosine, abs=1e-5)
        torch.testing.assert_close(found["cuda"][1][name], found["cpu"][1][name], rtol=1e-4, atol=1e-5)


def test_a_training_on_the_gpu_is_guarded(world, runs, tmp_path):
    seen = See()
    trainer = world.trainer(tmp_path, world.guard(every=2), seen, use_cpu=False)
    trainer.train()
    assert seen.devices == {"cuda"}
    assert [e["step"] for e in runs.entries(tmp_path, "merge")] == [2, 4, 6]


def test_tensors_come_to_the_host_together_and_as_they_are():
    from safemerge_callback.adapters.host import to_host

    torch.manual_seed(0)
    sent = [torch.randn(3, 5), torch.randn(4, 2, device="cuda").T, torch.randn(6, device="cuda").bfloat16()]
    for before, after in zip(sent, to_host(sent), strict=True):
        assert after.device.type == "cpu"
        assert torch.equal(before.cpu(), after)


def test_the_clock_of_a_pace_waits_for_the_device_and_a_stopwatch_does_not():
    device, x = torch.device("cuda", 0), torch.randn(4096, 4096, device="cuda")
    (x @ x).sum().item()
    watch, began = Stopwatch(device), settled(device)
    with watch.lap():
        for _ in range(50):
            x = x @ x / 64
    queued = time.perf_counter() - began
    done = settled(device) - began
    assert 0 < queued < done
    assert watch.seconds == pytest.approx(done, rel=0.2)


def test_what_replay_takes_is_measured_on_the_device(world, chat_tokenizer, runs, tmp_path):
    """Where no share is set it decides nothing; where one is, a tiny one makes it come seldom."""
    for share, steps in ((None, range(1, 13)), (1e-4, range(1, 7))):
        guard, folder = replaying(max_share=share), tmp_path / str(share)
        trainer = world.trainer(folder, guard, tokenizer=chat_tokenizer, max_steps=12, use_cpu=False)
        began = time.perf_counter()
        trainer.train()
        took = time.perf_counter() - began
        entries = runs.entries(folder, "gradient")
        assert [entry["step"] for entry in entries] == [*steps]
        assert all(entry["seconds"] > 0 for entry in entries)
        # In the first step the model is the reference.
        assert all(entry["norm"] > 0 for entry in entries[1:])
        assert sum(entry["seconds"] for entry in entries) < took


def test_replay_goes_through_fp16s_scaler_and_surgery_is_refused_there(world, chat_tokenizer, runs, tmp_path):
    fp16 = {"tokenizer": chat_tokenizer, "use_cpu": False, "fp16": True}
    world.trainer(tmp_path / "held", replaying(batch_size=3), max_steps=30, **fp16).train()
    entries = runs.entries(tmp_path / "held", "gradient")
    assert len(entries) == 30
    # A step whose gradients overflow is skipped whole, and its norm is not known.
    finite = [entry["norm"] for entry in entries if "norm" in entry]
    assert finite
    assert all(0 < norm < 1e3 for norm in finite)
    for settings in ({"surgery": True}, {"max_norm": 0.5}):
        with pytest.raises(ConfigError, match=r"keeps its gradient apart .* fp16's scaler .* train in bf16"):
            world.trainer(tmp_path / "refused", replaying(**settings), **fp16).train()
