"""On one GPU: the same readings and merges as on the CPU, at full precision, with one wait a check."""

import copy

import pytest
import torch
from transformers import TrainerCallback

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
