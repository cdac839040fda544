"""`ema`, `pull`, repeated projection and several adapters in runs of the real trainer."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from safemerge_callback.errors import AdapterError, ConfigError

SCALING = 2.0


def average_of(updates, decay):
    """Σ d^(n-i)·(1 - d)·ΔWᵢ, module by module, in float64."""
    mean = {name: torch.zeros_like(update) for name, update in updates[0].items()}
    for now in updates:
        mean = {name: decay * mean[name] + (1 - decay) * now[name] for name in mean}
    return mean


def best(target, rank):
    U, S, Vh = torch.linalg.svd(target, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def test_the_final_model_is_the_average_of_the_run(world, runs, tmp_path):
    """Nothing interferes before the end: every second step is taken in, and put in place after the last."""
    seen = runs.Recorder()
    guard = world.guard(safety_adapter=None, method="ema", every=0, ema_decay=0.6, ema_every=2)
    trainer = world.trainer(tmp_path, seen, guard)
    trainer.train()
    updates = [runs.updates(seen.steps[step], SCALING) for step in (2, 4, 6)]
    mean = average_of(updates, 0.6)
    found = runs.updates(runs.lora_weights(trainer.model), SCALING)
    assert runs.distance(found, {name: best(target, 4) for name, target in mean.items()}) < 1e-4
    (entry,) = runs.entries(tmp_path, "merge")
    assert (entry["method"], entry["weights"]) == ("ema", [0.0, 1.0])
    assert (entry["average"]["decay"], entry["average"]["followed"]) == (0.6, 3)
    assert 0 <= entry["average"]["residual"] < 1e-5
    # Whose the average is: the task's own, so that none of its weight is given away.
    assert {m["task_weight"] for m in entry["modules"]} == {1.0}


def test_at_every_check_it_is_lookahead(world, runs, tmp_path):
    """ema_every = every and strength 1: slow weights go the share 1 - d to the fast ones, which start anew there."""
    seen, after = runs.Recorder(), runs.Recorder()
    guard = world.guard(safety_adapter=None, method="ema", every=2, ema_decay=0.5, ema_every=2, at_train_end=False)
    world.trainer(tmp_path, seen, guard, after).train()
    slow = None
    for step in (2, 4, 6):
        fast = runs.updates(seen.steps[step], SCALING)
        slow = {n: 0.5 * fast[n] + (0 if slow is None else 0.5 * slow[n]) for n in fast}
        found = runs.updates(after.steps[step], SCALING)
        # The live rank is 4, and a sum of two has more directions: what is kept is the best of rank 4.
        assert runs.distance(found, {n: best(target, 4) for n, target in slow.items()}) < 1e-3


@pytest.mark.parametrize("how", [{"method": "ema", "ema_every": 1}, {"method": "ema", "ema_every": 3, "strength": 0.5}])
def test_resumed_equals_unbroken(world, runs, tmp_path, how):
    knobs = {"safety_adapter": None, "every": 2, "ema_decay": 0.7, **how}
    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = world.trainer(tmp_path / "whole", world.guard(**knobs), **saving)
    whole.train()
    expected = runs.lora_weights(whole.model)
    for step in (1, 4):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        shutil.copy(tmp_path / "whole" / "safemerge.jsonl", folder)
        trainer = world.trainer(folder, world.guard(**knobs), **saving)
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        found = runs.lora_weights(trainer.model)
        assert all(torch.equal(expected[n], w) for n, w in found.items()), step
        end = "checkpoint-6/safemerge_average.safetensors"
        one, other = load_file(tmp_path / "whole" / end), load_file(folder / end)
        assert all(torch.equal(one[key], other[key]) for key in one)
        told = [[e["average"] for e in runs.entries(f, "merge")] for f in (tmp_path / "whole", folder)]
        assert told[0] == told[1]


def test_a_checkpoint_without_an_average_is_told(world, runs, tmp_path):
    knobs = {"safety_adapter": None, "every": 2, "method": "ema", "ema_every": 1}
    saving = {"save_strategy": "steps", "save_steps": 2}
    world.trainer(tmp_path, world.guard(**knobs), **saving).train()
    path = tmp_path / "checkpoint-4" / "safemerge_average.safetensors"
    kept = path.read_bytes()
    path.unlink()
    with pytest.warns(UserWarning, match="holds no average of the run's updates"):
        world.trainer(tmp_path, world.guard(**knobs), **saving).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-4")
        )
    path.write_bytes(kept[:100])
    with pytest.raises(AdapterError, match="corrupt or truncated"):
        world.trainer(tmp_path, world.guard(**knobs)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_an_average_that_fails_costs_no_training(world, runs, tmp_path, monkeypatch):
    from safemerge_callback.corrections.average import Average

    def fail(self, factors):
        raise RuntimeError("no room")

    monkeypatch.setattr(Average, "follow", fail)
    trainer = world.trainer(tmp_path, world.guard(safety_adapter=None, every=3, method="ema", ema_every=1))
    with pytest.warns(UserWarning, match="lacks step 1, training goes on: RuntimeError: no room"):
        trainer.train()
    assert trainer.state.global_step == 6
    assert {e["error"] for e in runs.entries(tmp_path, "error")} == {"RuntimeError: no room"}


def test_pull_without_an_adapter_shrinks_the_update(world, runs, tmp_path):
    before, after = runs.Recorder(), runs.Recorder()
    guard = world.guard(safety_adapter=None, method="pull", strength=0.25, every=3, at_train_end=False)
    world.trainer(tmp_path, before, guard, after).train()
    for step in (3, 6):
        for name, weight in after.steps[step].items():
            share = 0.75 if "lora_B" in name else 1.0
            torch.testing.assert_close(weight, share * before.steps[step][name])
    last = runs.entries(tmp_path, "merge")[-1]
    assert {m["task_weight"] for m in last["modules"]} == {0.75**2}
    assert (last["method"], last["weights"]) == ("pull", [0.75, 0.25])


def test_pulls_that_share_a_strength_leave_its_whole(world, runs, tmp_path):
    knobs = {"safety_adapter": None, "method": "pull", "strength": 0.5, "every": 2, "spread_weights": True}
    world.trainer(tmp_path, world.guard(**knobs)).train()
    weights = [m["task_weight"] for m in runs.entries(tmp_path, "merge")[-1]["modules"]]
    assert weights == pytest.approx([0.5] * 4)


def test_repeated_projection_stays_in_the_subspace(world, runs, tmp_path):
    before, after = runs.Recorder(), runs.Recorder()
    guard = world.guard(safety_adapter=None, method="project", operator="orthogonal", operator_rank=4, every=2)
    world.trainer(tmp_path, before, guard, after).train()
    from safemerge_callback import Subspace

    stored = Subspace.load(world.subspace)
    for step in (2, 4, 6):
        old, new = (runs.updates(r.steps[step], SCALING) for r in (before, after))
        for name, update in new.items():
            V = stored.stack([next(n for n in stored.modules if n.endswith(name))])[0].double()
            U = torch.linalg.svd(V).U[:, :4]
            torch.testing.assert_close(update, U @ U.mT @ old[name], rtol=1e-3, atol=1e-6)
    entry = runs.entries(tmp_path, "merge")[0]
    assert (entry["operator"], entry["operator_rank"]) == ("orthogonal", 4)


def test_restas_vector_is_added_everywhere(world, runs, tmp_path):
    """θ_ft plus a share of θ_safe - θ_unsafe: two adapters, the second taken away, one pattern."""
    unsafe = tmp_path / "unsafe"
    shutil.copytree(world.safety, unsafe)
    weights = load_file(unsafe / "adapter_model.safetensors")
    from safetensors.torch import save_file

    save_file({k: v.flip(0).contiguous() for k, v in weights.items()}, unsafe / "adapter_model.safetensors")
    scaling = json.loads((unsafe / "adapter_config.json").read_text())
    unit = scaling["lora_alpha"] / scaling["r"]
    safe_update, unsafe_update = (
        runs.updates(load_file(f"{folder}/adapter_model.safetensors"), unit) for folder in (world.safety, unsafe)
    )
    before, after = runs.Recorder(), runs.Recorder()
    guard = world.guard(
        safety_adapter=[world.safety, str(unsafe)],
        weights=[1.0, 0.5, -0.5],
        module_weights={"v_proj": [1.0, 0.3, -0.2]},
        every=0,
    )
    world.trainer(tmp_path / "run", before, guard, after).train()
    old, new = (runs.updates(r.steps[6], SCALING) for r in (before, after))
    for name, update in new.items():
        plus, minus = (0.3, 0.2) if "v_proj" in name else (0.5, 0.5)
        target = old[name] + plus * safe_update[name] - minus * unsafe_update[name]
        torch.testing.assert_close(update, best(target, 4), rtol=1e-3, atol=1e-5)
    (entry,) = runs.entries(tmp_path / "run", "merge")
    assert entry["weights"] == [1.0, 0.5, -0.5]
    assert {m["task_weight"] for m in entry["modules"]} == {1.0}


def test_a_pattern_that_fits_nothing_is_refused_before_the_first_step(world, tmp_path):
    trainer = world.trainer(tmp_path, world.guard(module_weights={"o_proj": [0.5, 0.5]}))
    with pytest.raises(ConfigError, match="'o_proj' fits none of the 4 modules"):
        trainer.train()
    assert trainer.state.global_step == 0
