"""Beside the training: the same readings, no setting touched, and a fault is told, never raised."""

import contextlib
import threading
import time
import warnings

import pytest
import torch

from safemerge_callback import Subspace, measure, writer_for
from safemerge_callback.live.faults import Fault
from safemerge_callback.training.run.background import Pending, begin, beside, undisturbed

CPU = torch.device("cpu")
WATCH = {"gate": "watch"}


def moved(world):
    model = world.model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def test_readings_are_those_of_the_weights_that_were_copied(world):
    model = moved(world)
    writer, subspace = writer_for(model), Subspace.load(world.subspace)
    expected = measure(writer.gather(), subspace)
    pending = begin(4, writer, subspace, None, WATCH)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3).add_(0.5)
    assert dict(pending.result()) == dict(expected)
    assert pending.step == 4
    assert dict(measure(writer.gather(), subspace)) != dict(expected)


def test_it_runs_on_another_thread_while_this_one_goes_on():
    held, names = threading.Event(), []

    def action():
        names.append(threading.current_thread().name)
        assert held.wait(20)
        return "done"

    future = beside(action, CPU)
    assert not future.done()
    held.set()
    assert future.result(20) == "done"
    assert names[0].startswith("safemerge")


@pytest.mark.parametrize("where", ["gather", "stacks"])
def test_a_fault_is_kept_until_it_is_asked_for(world, monkeypatch, where):
    writer, subspace = writer_for(moved(world)), Subspace.load(world.subspace)

    def fail(*args):
        raise OSError("the disk is gone")

    monkeypatch.setattr(*((writer, "gather") if where == "gather" else (subspace, "stacks")), fail)
    found = begin(1, writer, subspace, None, WATCH).result()
    assert found == Fault("measure", "OSError: the disk is gone")


def test_no_answer_is_a_fault():
    assert isinstance(Pending(3, None).result(), Fault)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_only_full_precision_is_undisturbed(precision):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert undisturbed() == (precision == "highest")
    finally:
        torch.set_float32_matmul_precision(before)
    assert undisturbed()


def test_where_tf32_is_allowed_checks_are_synchronous_and_a_warning_says_so(world, runs, tmp_path):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with pytest.warns(UserWarning, match="checks are synchronous"):
            world.trainer(tmp_path, world.guard(asynchronous=True)).train()
    finally:
        torch.set_float32_matmul_precision(before)
    checks = runs.entries(tmp_path, "check")
    assert [e["step"] for e in checks] == [2, 4, 6]
    assert not any("measured_at" in e for e in checks)


def test_a_failing_check_costs_the_check_and_not_the_training(world, runs, tmp_path, monkeypatch):
    """The disk fails from step 2 to step 4: nothing is merged at 3, and training goes on to a merge at 5."""
    guard = world.guard(asynchronous=True)
    stacks = Subspace.stacks
    failing = runs.Recorder(
        lambda step, model: monkeypatch.setattr(Subspace, "stacks", broken if step == 2 else stacks)
    )

    def broken(self, requests):
        raise OSError("the disk is gone")

    with pytest.warns(UserWarning, match="measure failed at step 3.*disk is gone"):
        world.trainer(tmp_path, failing, guard).train()
    assert [(e["step"], e["where"]) for e in runs.entries(tmp_path, "error")] == [(3, "measure")]
    assert [e["step"] for e in runs.entries(tmp_path, "merge")] == [5, 6]


def test_a_slow_check_is_waited_for_at_the_next_step(world, runs, tmp_path, monkeypatch):
    stacks = Subspace.stacks

    def slow(self, requests):
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.3)
        return stacks(self, requests)

    monkeypatch.setattr(Subspace, "stacks", slow)
    world.trainer(tmp_path, world.guard(asynchronous=True)).train()
    checks = runs.entries(tmp_path, "check")
    assert [(e.get("measured_at"), e["step"]) for e in checks] == [(2, 3), (4, 5), (None, 6)]
    assert checks[0]["seconds"] > 0.1


def test_the_training_that_fails_leaves_no_thread_behind(world, runs, tmp_path):
    def act(step, model):
        if step == 3:
            raise KeyboardInterrupt

    with warnings.catch_warnings(), pytest.raises(KeyboardInterrupt):
        world.trainer(tmp_path, runs.Recorder(act), world.guard(asynchronous=True)).train()
    deadline = time.monotonic() + 20
    while any(t.name.startswith("safemerge") for t in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(t.name.startswith("safemerge") for t in threading.enumerate())


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("state", [lambda: torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad])
def test_readings_and_merges_do_not_depend_on_the_modes_around_the_training(world, runs, tmp_path, asynchronous, state):
    """The training is one that moves nothing, so that all that differs is ours."""

    def run(name, around):
        guard, model = world.guard(asynchronous=asynchronous, method="linear"), moved(world)
        with around:
            world.trainer(tmp_path / name, guard, model=model, learning_rate=0.0).train()
        readings = [e["modules"] for e in runs.entries(tmp_path / name, "check")]
        return readings, runs.lora_weights(model)

    (expected, weights), (readings, others) = run("plain", contextlib.nullcontext()), run("other", state())
    assert readings == expected
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert any(not torch.equal(weights[name], p) for name, p in runs.lora_weights(moved(world)).items())
