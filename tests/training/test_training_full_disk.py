"""A disk that is full while a run writes: what could not be written is told once, and a resume works."""

import contextlib

import pytest
from transformers import TrainerCallback

from safemerge_callback import read_journal
from safemerge_callback.training.run import session


class Full(TrainerCallback):
    """Let the disk be full in the hooks of these names, for the callbacks between two of these."""

    def __init__(self, full_disk, *hooks):
        self.disk, self.hooks, self.open = full_disk, hooks, None

    def turn(self, hook):
        if hook not in self.hooks:
            return
        if self.open is None:
            self.open = self.disk(64)
            self.open.__enter__()
        else:
            self.open.__exit__(None, None, None)
            self.open = None

    def on_step_end(self, args, state, control, **kwargs):
        self.turn(f"step {state.global_step}")


def test_the_state_is_told_of_once_and_a_resume_from_the_next_checkpoint_works(
    world, runs, tmp_path, full_disk, monkeypatch
):
    save, saves = session.save_run, []

    def save_when_full(*args):
        saves.append(args)
        with full_disk(64) if len(saves) == 1 else contextlib.nullcontext():
            save(*args)

    monkeypatch.setattr(session, "save_run", save_when_full)

    def guarded(**changed):
        guard = world.guard(method="ema", ema_decay=0.5, ema_every=1, safety_adapter=None)
        return world.trainer(tmp_path, guard, save_strategy="steps", save_steps=2, **changed)

    with pytest.warns(UserWarning, match="the state of checkpoint-2 could not be saved") as caught:
        guarded(max_steps=4).train()
    assert len([w for w in caught if "safemerge" in str(w.message)]) == 1
    assert [p.name for p in (tmp_path / "checkpoint-2").glob(".*")] == []
    guarded().train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    starts = [e for e in read_journal(tmp_path / "safemerge.jsonl") if e["kind"] == "start"]
    assert [e["restored"] for e in starts] == [False, True]


def test_the_snapshot_is_told_of_and_the_journal_catches_up(world, runs, tmp_path, full_disk):
    full = Full(full_disk, "step 6")
    with pytest.warns(UserWarning, match="safemerge: ") as caught:
        world.trainer(tmp_path, full, world.guard(every=0), full).train()
    words = sorted(str(w.message) for w in caught if "safemerge" in str(w.message))
    assert [w.split(" (")[0] for w in words] == [
        "safemerge: the factors before the final merge could not be kept",
        "safemerge: the journal lacks entries from step 6 on",
    ]
    assert [e["kind"] for e in read_journal(tmp_path / "safemerge.jsonl")] == ["start", "check", "merge", "end"]
