"""Undoing a run's final merge: whatever moment it is killed at, and whichever adapter was trained."""

import copy
import dataclasses
import shutil

import pytest
import torch
from peft import PeftModel

from safemerge_callback import undo_merge
from safemerge_callback.adapters import load_adapter, save_adapter
from safemerge_callback.errors import AdapterError, ConfigError
from tests.support.versions import found_in


@pytest.fixture(scope="module")
def ended(world, tmp_path_factory):
    """A run that merged at its end, its adapter saved."""
    output = tmp_path_factory.mktemp("ended") / "out"
    trainer = world.trainer(output, world.guard(every=0), max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    return output


def alike(left, right):
    return left.keys() == right.keys() and all(torch.equal(w, right[n]) for n, w in left.items())


def undos(runs, output):
    return [entry["folder"] for entry in runs.entries(output, "undo")]


@pytest.mark.parametrize("where", ["", "checkpoint-2"])
def test_killed_at_any_point_the_adapter_is_whole_and_a_rerun_finishes(ended, runs, tmp_path, kills, where):
    def fresh(k):
        return shutil.copytree(ended, tmp_path / str(k) / "out") / where

    merged, points = runs.saved_weights(ended / where), 0
    undo_merge(plain := fresh(0))
    restored = runs.saved_weights(plain)
    for place in kills(fresh, undo_merge):
        points += 1
        now = runs.saved_weights(place)
        assert alike(now, merged) or alike(now, restored)
        load_adapter(place)
        undo_merge(place)
        output = tmp_path / str(points) / "out"
        assert alike(runs.saved_weights(place), restored)
        assert alike(runs.saved_weights(place / "merged"), merged)
        assert undos(runs, output) == [where or "out"]
        assert [*output.parent.rglob(".*")] == []
        with pytest.raises(ConfigError, match="undone already"):
            undo_merge(place)
    assert points >= 6


def test_a_run_of_an_earlier_release_is_undone_and_set_aside(ended, world, runs, tmp_path):
    run = shutil.copytree(ended, tmp_path / "out")
    (run / "_pre_merge").rename(run / "pre_merge")
    assert len(undo_merge(run)) == 4
    world.trainer(run, world.guard(gate="watch", every=0, safety_adapter=None), max_steps=1).train()
    assert not (run / "pre_merge").exists()
    assert (run / "_pre_merge.1").is_dir()


def test_an_undoing_is_not_done_twice_where_the_merge_was_slight(ended, world, runs, tmp_path):
    """The norms of before and after are alike then, and the copy that was kept must not be written over."""
    slight = {"method": "pull", "strength": 1e-4, "safety_adapter": None, "every": 0}
    trainer = world.trainer(tmp_path, world.guard(**slight), max_steps=2)
    trainer.train()
    trainer.save_model()
    merged = runs.saved_weights(tmp_path)
    undo_merge(tmp_path)
    assert not alike(runs.saved_weights(tmp_path), merged)
    with pytest.raises(ConfigError, match="undone already"):
        undo_merge(tmp_path)
    assert alike(runs.saved_weights(tmp_path / "merged"), merged)


def test_a_named_adapter_beside_one_that_was_not_trained_is_found_from_each_folder(ended, runs, tmp_path):
    run = tmp_path / "out"
    shutil.copytree(ended / "_pre_merge", run / "_pre_merge")
    for folder in (run, run / "checkpoint-2"):
        mine = load_adapter(ended)
        frozen = {n: torch.zeros_like(f.A) for n, f in mine.factors.items()}
        other = {n: dataclasses.replace(f, A=frozen[n]) for n, f in mine.factors.items()}
        save_adapter(folder, dataclasses.replace(mine, factors=other))
        save_adapter(folder / "mine", mine)
    untouched = runs.saved_weights(run)
    for given, adapter in ((run, run / "mine"), (run / "checkpoint-2" / "mine", run / "checkpoint-2" / "mine")):
        undo_merge(given)
        assert not alike(runs.saved_weights(adapter), runs.saved_weights(ended))
        assert alike(runs.saved_weights(adapter / "merged"), runs.saved_weights(ended))
        with pytest.raises(ConfigError, match="undone already"):
            undo_merge(given)
    assert alike(runs.saved_weights(run), untouched)
    assert undos(runs, run) == ["mine", "checkpoint-2/mine"]


def test_a_run_without_a_subspace_has_nothing_to_take_back(replayed, tmp_path):
    run = shutil.copytree(replayed, tmp_path / "out")
    (run / "checkpoint-6").mkdir()
    for place in (run, run / "checkpoint-6"):
        with pytest.raises(ConfigError, match="had no subspace, so it merged nothing and there is no merge to take b"):
            undo_merge(place)
    # of another's journal it is not known
    (run / "safemerge.jsonl").write_text('{"kind": "start", "subspace": 3}\n{"step": 1}\n')
    with pytest.raises(ConfigError, match="holds no folder _pre_merge"):
        undo_merge(run)


def test_a_journal_that_is_none_is_refused_before_the_adapter_is_touched(ended, runs, tmp_path):
    run = shutil.copytree(ended, tmp_path / "out")
    (run / "safemerge.jsonl").write_text("buy milk")
    with pytest.raises(OSError, match="is no journal"):
        undo_merge(run)
    assert alike(runs.saved_weights(run), runs.saved_weights(ended))
    assert not (run / "merged").exists()


def test_an_adapter_saved_over_another_of_other_rank_is_one_of_the_two_at_any_kill(ended, world, tmp_path, kills):
    mine = load_adapter(ended)
    halved = {n: dataclasses.replace(f, A=f.A[:2], B=f.B[:, :2]) for n, f in mine.factors.items()}
    other, points = dataclasses.replace(mine, factors=halved), 0

    def fresh(k):
        place = save_adapter(tmp_path / str(k) / "adapter", mine)
        (place / "notes.txt").write_text("mine")
        return place

    for place in kills(fresh, lambda place: save_adapter(place, other)):
        points += 1
        if {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in place.iterdir()}:
            PeftModel.from_pretrained(
                copy.deepcopy(world.aligned), place
            )  # raises for weights that are not of the config's rank
        ranks = {f.rank for f in load_adapter(place).factors.values()}
        assert ranks in ({4}, {2})
        save_adapter(place, other)
        assert {f.rank for f in load_adapter(place).factors.values()} == {2}
        assert [*place.parent.glob(".*")] == []
        assert (place / "notes.txt").read_text() == "mine"
    assert points >= 5


def test_a_full_disk_is_told_and_leaves_the_adapter(ended, runs, tmp_path, full_disk):
    run = shutil.copytree(ended, tmp_path / "out")
    with full_disk(200), pytest.raises(AdapterError, match="cannot be written"):
        undo_merge(run)
    assert alike(runs.saved_weights(run), runs.saved_weights(ended))
    assert [*run.rglob(".*")] == []


def test_push_to_hub_uploads_none_of_what_undoes_the_final_merge(world, tmp_path, monkeypatch):
    """What transformers asks the Hub's client to leave out, and what that leaves of the folder."""
    import transformers.trainer
    from huggingface_hub.utils import filter_repo_objects

    asked = []

    class Client:
        def upload_folder(self, *, ignore_patterns, **what):
            asked.extend(ignore_patterns)

    trainer = world.trainer(tmp_path, world.guard(every=0), max_steps=1)
    trainer.train()
    found_in(transformers.trainer, "hf_api")
    monkeypatch.setattr(transformers.trainer, "hf_api", Client)
    trainer.hub_model_id = "someone/adapter"
    trainer.push_to_hub()
    (tmp_path / "_pre_merge.1").mkdir()
    (tmp_path / "_pre_merge.1" / "factors.safetensors").write_bytes(b"")
    files = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert any("pre_merge/" in file for file in files)
    assert [file for file in filter_repo_objects(files, ignore_patterns=asked) if "pre_merge" in file] == []
