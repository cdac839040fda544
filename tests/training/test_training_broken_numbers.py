"""Numbers that are none: refused before the first step by their true cause, and no figure ends a training."""

import json
import math
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from safemerge_callback import Subspace, compress_subspace, measure_adapter
from safemerge_callback.corrections import merge
from safemerge_callback.errors import AdapterError, SubspaceError
from safemerge_callback.training.run import session


class Steps(TrainerCallback):
    def __init__(self):
        self.begun = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun += 1


def refused(world, tmp_path, error, match, model=None, **knobs):
    steps = Steps()
    trainer = world.trainer(tmp_path / "out", world.guard(**knobs), steps, model=model)
    with pytest.raises(error, match=match) as caught:
        trainer.train()
    assert steps.begun == 0
    return str(caught.value)


def spoilt(source, target, key, value):
    """A copy of a safetensors file with the first number of a float32 tensor replaced; the header is as it was."""
    raw = bytearray(Path(source).read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    start = 8 + length + json.loads(raw[8 : 8 + length])[key]["data_offsets"][0]
    raw[start : start + 4] = struct.pack("<f", value)
    Path(target).write_bytes(raw)
    return str(target)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("gate", ["threshold", "watch"])
def test_a_broken_matrix_is_refused_by_its_module_and_file(world, tmp_path, value, gate):
    name = "layers.1.self_attn.v_proj"
    path = spoilt(world.subspace, tmp_path / "s.safetensors", f"{name}.V", value)
    words = refused(world, tmp_path, SubspaceError, "holds NaN or infinite numbers", subspace=path, gate=gate, every=1)
    assert repr(name) in words
    assert repr(path) in words
    assert "--verify" in words
    with pytest.raises(SubspaceError, match="was changed"):
        Subspace.load(path).verify()


def test_a_broken_companion_and_the_broken_file_beside_one_are_refused_where_they_are_read(world, tmp_path):
    name = "layers.0.self_attn.q_proj"
    exact = shutil.copyfile(world.subspace, tmp_path / "s.safetensors")
    small = compress_subspace(exact, tmp_path / "small.safetensors", progress=False).path
    broken = spoilt(small, tmp_path / "broken.safetensors", f"{name}.scale", math.nan)
    assert "broken.safetensors" in refused(
        world, tmp_path, SubspaceError, repr(name), subspace=broken, gate="threshold"
    )
    spoilt(exact, exact, f"{name}.V", math.nan)
    with pytest.raises(SubspaceError, match=rf"s\.safetensors.*{name}"):
        measure_adapter(world.safety, small)


@pytest.mark.parametrize(("factor", "value"), [("lora_A", math.nan), ("lora_B", math.inf)])
@pytest.mark.parametrize("gate", ["all", "watch"])
def test_a_broken_adapter_is_refused_before_it_is_trained(world, tmp_path, factor, value, gate):
    model = world.model()
    next(p for n, p in model.named_parameters() if factor in n).data[0, 0] = value
    words = refused(world, tmp_path, AdapterError, "before the first step", model=model, gate=gate)
    assert "1 of 4 LoRA modules" in words


def test_a_broken_safety_adapter_is_refused(world, tmp_path):
    folder = shutil.copytree(world.safety, tmp_path / "safety")
    weights = load_file(folder / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = math.nan
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    refused(world, tmp_path, AdapterError, "NaN or infinite values", safety_adapter=str(folder))


def test_an_adapter_that_diverges_later_is_told_as_that(world, runs, tmp_path):
    def act(step, model):
        if step == 3:
            next(p for n, p in model.named_parameters() if "lora_A" in n).data.fill_(math.nan)

    trainer = world.trainer(tmp_path, runs.Recorder(act), world.guard(every=3, gate="threshold", threshold=1.0))
    with pytest.warns(UserWarning, match=r"1 modules hold NaN or infinite updates at step 3.*lower the learning rate"):
        trainer.train()
    assert trainer.state.global_step == 6


@pytest.mark.parametrize(
    ("module", "figure"),
    [(session, "check_entry"), (session, "check_metrics"), (session, "decision_rows"), (merge, "merge_entry")],
)
def test_no_figure_ends_a_training(world, runs, tmp_path, monkeypatch, module, figure):
    def broken(*args, **kwargs):
        raise TypeError("a number that is none")

    plain = runs.Recorder()
    world.trainer(tmp_path / "plain", world.guard(), plain).train()
    monkeypatch.setattr(module, figure, broken)
    guarded = runs.Recorder()
    trainer = world.trainer(tmp_path / "out", world.guard(), guarded)
    with pytest.warns(UserWarning, match="not all of step 2 could be told, training goes on") as caught:
        trainer.train()
    assert len([w for w in caught if "could be told" in str(w.message)]) == 1
    assert all(torch.equal(w, guarded.end[n]) for n, w in plain.end.items())
    faults = runs.entries(tmp_path / "out", "error")
    assert [e["step"] for e in faults] == [2, 4, 6]
    assert {e["error"] for e in faults} == {"TypeError: a number that is none"}


def test_every_tensor_of_the_worlds_file_is_as_these_tests_take_it(world):
    with safe_open(world.subspace, framework="pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys() if key.endswith(".V")} == {"F32"}  # noqa: SIM118
