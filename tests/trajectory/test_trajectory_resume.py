"""A resumed run equals an unbroken one: weights, journal, counts, cooldown."""

import contextlib
import json
import shutil
from dataclasses import dataclass

import pytest
import torch
from transformers import TrainerCallback

from safemerge_callback.corrections.registry import CORRECTIONS, correction
from safemerge_callback.corrections.schedule import Schedule
from safemerge_callback.decision import merge_batch as merging
from safemerge_callback.record import VERSION
from safemerge_callback.record.entries import read_history


def told(entry):
    """A journal entry without what two equal runs may differ in: clocks and folders."""
    plain = {k: v for k, v in entry.items() if k not in ("time", "seconds", "training_seconds")}
    return json.loads(json.dumps(plain))


class Break(TrainerCallback):
    """End the process's part of a run, as a crash after step `at` would."""

    def __init__(self, at):
        self.at = at

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            raise KeyboardInterrupt


def broken_then_resumed(world, output, at, checkpoint, **knobs):
    saving = {"save_strategy": "steps", "save_steps": 2}
    with contextlib.suppress(KeyboardInterrupt):
        world.trainer(output, world.guard(**knobs), Break(at), **saving).train()
    trainer = world.trainer(output, world.guard(**knobs), **saving)
    trainer.train(resume_from_checkpoint=str(output / f"checkpoint-{checkpoint}"))
    return trainer


@pytest.mark.parametrize("how", [{}, {"combination_type": "dare_linear_svd", "density": 0.5, "seed": 3}])
def test_resumed_equals_unbroken(world, runs, tmp_path, how):
    """Random masks too: they come from seed, step and module, and not from a stream that a crash cuts."""
    knobs = {"every": 1, "cooldown": 1, **how}
    whole = world.trainer(tmp_path / "whole", world.guard(**knobs), save_strategy="steps", save_steps=2)
    whole.train()
    # the crash comes after step 3 was checked and journalled, which the checkpoint of step 2 does not know
    parts = broken_then_resumed(world, tmp_path / "parts", at=3, checkpoint=2, **knobs)
    expected, found = runs.lora_weights(whole.model), runs.lora_weights(parts.model)
    assert all(torch.equal(expected[n], w) for n, w in found.items())
    unbroken = [told(e) for e in runs.entries(tmp_path / "whole")]
    resumed = [told(e) for e in runs.entries(tmp_path / "parts")]
    second = [e for e in resumed if e["kind"] == "start"][1]
    assert (second["step"], second["restored"]) == (2, True)
    assert [e for e in resumed if (e["kind"], e["step"]) != ("start", 2)] == unbroken
    assert [e["step"] for e in unbroken if e["kind"] == "merge"] == [1, 3, 5]


def test_masks_are_drawn_from_the_seed_and_the_step_of_the_merge(world, monkeypatch, tmp_path):
    """Step 0 is the rehearsal of every merge before the first step; two modules a layer, two layers."""
    asked = []
    draw = merging.mask_seed
    monkeypatch.setattr(merging, "mask_seed", lambda *of: asked.append(of) or draw(*of))
    world.trainer(tmp_path, world.guard(every=2, method="dare_linear", density=0.5, seed=3), max_steps=4).train()
    assert [(seed, step) for seed, step, _ in asked] == [(3, step) for step in (0, 2, 4) for _ in range(4)]
    assert len({module for _, _, module in asked}) == 4


def test_resumed_at_every_step_equals_unbroken(world, runs, tmp_path):
    """Twelve steps with merges after 4, 8 and 12, saved at each: from any of them on, nothing is otherwise."""
    knobs, saving = {"every": 4}, {"save_strategy": "steps", "save_steps": 1, "max_steps": 12}
    whole = world.trainer(tmp_path / "whole", world.guard(**knobs), **saving)
    whole.train()
    expected = runs.lora_weights(whole.model)
    for step in range(1, 12):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        shutil.copy(tmp_path / "whole" / "safemerge.jsonl", folder)
        trainer = world.trainer(folder, world.guard(**knobs), **{**saving, "save_strategy": "no"})
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        found = runs.lora_weights(trainer.model)
        assert all(torch.equal(expected[n], w) for n, w in found.items()), step
        told_here = [told(e) for e in runs.entries(folder) if (e["kind"], e["step"]) != ("start", step)]
        assert told_here == [told(e) for e in runs.entries(tmp_path / "whole")], step


@dataclass(frozen=True, kw_only=True)
class DrawSettings(Schedule):
    weight: float = 0.5


class Draw:
    """The loss on rows that it draws itself; where its own random numbers stand is in every checkpoint."""

    name, noun = "draw", "place in the rows"

    def __init__(self, settings):
        self.schedule, self.weight, self.stream = settings, settings.weight, torch.Generator().manual_seed(7)

    def loss(self, at, model):
        ids = torch.randint(3, 64, (2, 8), generator=self.stream)
        return model(input_ids=ids, labels=ids).loss

    def after_step(self, at):
        pass

    def save(self, folder, save):
        torch.save({"stream": self.stream.get_state(), "save": save}, folder / "draw.pt")

    def load(self, folders, save):
        for stored in (torch.load(folder / "draw.pt") for folder in folders):
            self.stream.set_state(stored["stream"])
            return stored["save"] == save
        return False

    def rewind(self, folders, save):
        self.load(folders, save)


def test_a_gradient_term_resumed_at_every_step_equals_unbroken(world, runs, tmp_path, monkeypatch):
    """Its rows, the dropout that it sees and the task's, with two batches a step: weights and journal are the same."""

    @correction(DrawSettings, cost="one pass each way")
    def draw(settings):
        return Draw(settings)

    monkeypatch.setitem(CORRECTIONS, "draw", CORRECTIONS.pop("draw"))
    knobs = {"gate": "watch", "safety_adapter": None, "every": 0, "corrections": [{"draw": {}}]}
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 12, "gradient_accumulation_steps": 2}

    def trainer(folder, **changed):
        return world.trainer(folder, world.guard(**knobs), model=world.model(lora_dropout=0.3), **{**saving, **changed})

    whole = trainer(tmp_path / "whole")
    whole.train()
    for step in range(1, 12):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        shutil.copy(tmp_path / "whole" / "safemerge.jsonl", folder)
        part = trainer(folder, save_strategy="no")
        part.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        weights = runs.lora_weights(part.model)
        assert all(torch.equal(weights[n], w) for n, w in runs.lora_weights(whole.model).items()), step
        lines = [told(e) for e in runs.entries(folder) if (e["kind"], e["step"]) != ("start", step)]
        assert lines == [told(e) for e in runs.entries(tmp_path / "whole")], step
    assert len({e["loss"] for e in runs.entries(tmp_path / "whole", "gradient")}) == 12


def test_the_state_tells_what_the_checkpoint_holds(world, runs, tmp_path):
    trainer = broken_then_resumed(world, tmp_path, at=5, checkpoint=4, every=2)
    states = {n: runs.stored(tmp_path / f"checkpoint-{n}") for n in (2, 4, 6)}
    assert [states[n]["merged_steps"] for n in (2, 4, 6)] == [[2], [2, 4], [2, 4, 6]]
    assert [states[n]["checks"] for n in (2, 4, 6)] == [1, 2, 3]
    assert states[6]["seconds"] > states[4]["seconds"] > 0
    assert trainer.state.global_step == 6


def test_a_finished_run_that_is_resumed_is_not_merged_again(world, runs, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    world.trainer(tmp_path, world.guard(every=0), **saving).train()
    assert [e["step"] for e in runs.entries(tmp_path, "merge")] == [6]
    before, after = runs.Recorder(), runs.Recorder()
    again = world.trainer(tmp_path, before, world.guard(every=0), after, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert [e["step"] for e in runs.entries(tmp_path, "merge")] == [6]
    for step, weights in before.steps.items():
        assert all(torch.equal(w, after.steps[step][n]) for n, w in weights.items())


def test_a_finished_run_that_goes_further_is_merged_at_its_new_end(world, runs, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    world.trainer(tmp_path, world.guard(every=0), **saving).train()
    world.trainer(tmp_path, world.guard(every=0), max_steps=8, **saving).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-6")
    )
    assert [e["step"] for e in runs.entries(tmp_path, "merge")] == [6, 8]
    assert len(runs.entries(tmp_path, "end")) == 1


def test_a_checkpoint_that_never_had_the_callback(world, runs, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    world.trainer(tmp_path, **saving, max_steps=4).train()
    trainer = world.trainer(tmp_path, world.guard(every=0), **saving)
    with pytest.warns(UserWarning, match="step 4 holds no state of SafeMergeCallback: all counts begin anew"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [(e["kind"], e["step"]) for e in runs.entries(tmp_path)] == [
        ("start", 4),
        ("check", 6),
        ("merge", 6),
        ("end", 6),
    ]


def test_restoring_callbacks_from_a_checkpoint_does_no_harm(world, runs, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "restore_callback_states_from_checkpoint": True}
    world.trainer(tmp_path, world.guard(every=2), **saving, max_steps=4).train()
    trainer = world.trainer(tmp_path, world.guard(every=2), **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [e["step"] for e in runs.entries(tmp_path, "merge")] == [2, 4, 6]


def test_a_run_goes_on_with_a_journal_of_version_1(world, runs, tmp_path):
    """Its lines stay as they are, those of now follow, and all are read as the unbroken run's."""
    knobs, saving = {"gate": "threshold", "threshold": 0.75, "every": 1}, {"save_strategy": "steps", "save_steps": 2}
    world.trainer(tmp_path / "whole", world.guard(**knobs), **saving).train()
    part = tmp_path / "part"
    part.mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", part / "checkpoint-2")
    older = [as_version_1(entry) for entry in runs.entries(tmp_path / "whole")]
    (part / "safemerge.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in older))
    trainer = world.trainer(part, world.guard(**knobs), **saving)
    trainer.train(resume_from_checkpoint=str(part / "checkpoint-2"))
    lines = runs.entries(part)
    kept = [entry for entry in older if entry["kind"] != "end" and entry["step"] <= 2]
    assert lines[: len(kept)] == kept
    assert [(e["step"], e["version"]) for e in lines if e["kind"] == "start"] == [(0, 1), (2, VERSION)]
    whole, found = read_history(tmp_path / "whole"), read_history(part)
    assert found.cells == whole.cells
    assert {cell.limit for cell in found.cells.values()} == {0.75}
    assert (found.merges, found.steps, found.ended) == (whole.merges, [1, 2, 3, 4, 5, 6], True)


def as_version_1(entry):
    """A line as it was before a check said each module's limit."""
    older = {"version": 1} if "version" in entry else {}
    if entry["kind"] == "check":
        older = {"modules": [{k: v for k, v in m.items() if k != "limit"} for m in entry["modules"]]}
    return {**entry, **older}
