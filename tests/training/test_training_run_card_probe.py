"""What is uploaded says of a run what was asked before and after: through the real trainers, by the real client."""

import copy
import json
import os

import pytest
import yaml

from safemerge_callback import SafetyEvalCallback, Subspace
from safemerge_callback.errors import SubspaceError
from safemerge_callback.io.card import BEGIN, END
from safemerge_callback.training.run import opening
from safemerge_callback.training.run.card_probe import probe_rows, probes_in
from tests.support.replay import replaying


@pytest.fixture
def probe(chat_tokenizer):
    def make(**changed):
        knobs = {"every": 0, "max_new_tokens": 2, "tokenizer": chat_tokenizer, "quiet": True, **changed}
        return SafetyEvalCallback({"harm": ["a b", "c d e"]}, {"plain": ["x y", "z"]}, **knobs)

    return make


def measure(name, value, n=32):
    return {"measure": name, "kind": "harm", "n": n, "value": value, "low": None, "high": None, "unit": "share"}


def journal_of(path, *entries):
    lines = [{"kind": "start", "version": 2, "step": 0}, *entries]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def probed(step, when, value, settings=None):
    measures = [measure("a_refused", value)]
    more = {"settings": settings} if settings else {}
    return {"kind": "probe", "step": step, "when": when, "seconds": 1.0, "measures": measures, **more}


KEYWORD = {"judge": "keywords", "benign_judge": "keywords"}


def test_before_and_after_stand_side_by_side(tmp_path):
    path = journal_of(
        tmp_path / "j", probed(0, "begin", 0.9, KEYWORD), probed(9, "every", 0.5), probed(20, "end", 0.75)
    )
    text = "\n".join(probe_rows(probes_in(path))).replace("\\", "")
    assert "At step 0 and, as it is now, at step 20 the model was asked (judge keywords; 95 % intervals):" in text
    assert "| a_refused | 90.0 %, n = 32 | 75.0 %, n = 32 |" in text


def test_a_merge_that_was_taken_back_is_not_what_the_model_is_now(tmp_path):
    steps = [probed(0, "begin", 0.9, KEYWORD), probed(9, "before", 0.8), probed(9, "after", 0.1)]
    undone = {"kind": "rollback", "step": 9, "reason": "task", "modules": []}
    path = journal_of(tmp_path / "j", *steps, undone)
    assert probes_in(path).last.measures[0].value == 0.8
    path = journal_of(tmp_path / "j", *steps)
    assert probes_in(path).last.measures[0].value == 0.1


def test_another_judge_after_a_resume_is_named_and_one_probe_stands_alone(tmp_path):
    llm = {"judge": "llamaguard", "benign_judge": "keywords"}
    path = journal_of(tmp_path / "j", probed(0, "begin", 0.9, KEYWORD), probed(9, "begin", 0.8, llm))
    text = "\n".join(probe_rows(probes_in(path)))
    assert "judge keywords, then llamaguard, of harmless prompts keywords" in text
    alone = "\n".join(probe_rows(probes_in(journal_of(tmp_path / "j", probed(0, "begin", 0.9, KEYWORD)))))
    assert "At step 0 the model was asked" in alone
    assert "| measure | step 0 |" in alone
    assert probes_in(journal_of(tmp_path / "j")) is None
    assert probes_in(tmp_path / "absent") is None
    path.write_text('{"kind": "start"}\n{"kind": "probe"}\n')
    assert probes_in(path) is None


def section_of(repo):
    card = repo.tree()["README.md"].decode()
    assert card.count(BEGIN) == card.count(END) == 1
    _, head, rest = card.split("---\n", 2)
    before, _, rest = rest.partition(BEGIN)
    return yaml.safe_load(head), before, rest.partition(END)[0].replace("\\", "")


def test_a_trainer_uploads_what_was_replayed_merged_and_refused(world, chat_tokenizer, probe, hub, tmp_path):
    settings = {"hub_model_id": "me/guarded", "push_to_hub": False}
    rows = replaying().config.corrections
    guard = world.guard(every=2, corrections=rows)
    trainer = world.trainer(tmp_path / "out", guard, probe(), tokenizer=chat_tokenizer, **settings)
    trainer.train()
    for _ in range(2):
        trainer.push_to_hub()
    repo = hub.repos["me/guarded"]
    head, before, ours = section_of(repo)
    assert {"lora", "safemerge"} <= set(head["tags"])
    assert "safemerge" not in before.lower()
    for words in (
        "merged into it 3 times, and safety rows were replayed in 6 steps",
        "At step 0 and, as it is now, at step 6 the model was asked (judge keywords; 95 % intervals)",
        "| harm_refused | 0.0 % (0 to 66), n = 2 | 0.0 % (0 to 66), n = 2 |",
        "plain",
    ):
        assert words in ours, words
    machine = str(tmp_path).encode()
    ours = [name for name in repo.tree() if name in ("README.md", "safemerge.jsonl", "safemerge_report.html")]
    assert len(ours) >= 2
    for name in ours:
        assert machine not in repo.tree()[name], name
        assert os.fspath(world.folder).encode() not in repo.tree()[name], name
    assert not any(name.startswith("_pre_merge") for name in repo.tree())


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
def test_trls_own_card_keeps_its_text_and_ours_stands_in_it_once(world, runs, chat_tokenizer, hub, tmp_path):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    how = {**runs.defaults(tmp_path / "out"), "bf16": False, "gradient_checkpointing": False, "max_length": 8}
    how |= {"hub_model_id": "me/sft", "push_to_hub": True, "save_strategy": "steps", "save_steps": 3}
    settings = SFTConfig(**how)
    data = Dataset.from_list([{"input_ids": row["input_ids"]} for row in runs.tokens()])
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    own = {"train_dataset": data, "processing_class": chat_tokenizer, "peft_config": lora}
    trainer = SFTTrainer(copy.deepcopy(world.aligned), settings, **own, callbacks=[world.guard(every=2)])
    trainer.train()
    trainer.push_to_hub(dataset_name="mine")
    head, before, ours = section_of(hub.repos["me/sft"])
    assert {"trl", "sft", "safemerge"} <= set(head["tags"])
    assert "This model is a fine-tuned version of" in before
    assert "TRL" in before
    assert "merged into it 3 times" in ours
    assert "| refusals | not counted in this run |" in ours


def test_a_run_takes_its_subspace_from_the_hub_and_pins_its_commit(world, runs, hub, tmp_path):
    content = (world.folder / "subspace.safetensors").read_bytes()
    repo = hub.make("org/v", {"model.subspace.safetensors": content})
    world.trainer(tmp_path / "hub", world.guard(subspace="org/v")).train()
    (start,) = runs.entries(tmp_path / "hub", "start")
    address = f"org/v@{repo.branches['main']}/model.subspace.safetensors"
    assert start["subspace"]["path"] == address
    assert start["config"]["subspace"] == address
    assert address in (tmp_path / "hub" / "README.md").read_text().replace("\\", "")
    world.trainer(tmp_path / "file", world.guard()).train()
    one, other = (runs.entries(tmp_path / name, "merge") for name in ("hub", "file"))
    assert [e["modules"] for e in one] == [e["modules"] for e in other]
    assert Subspace.from_pretrained(start["subspace"]["path"]).verify() > 0


@pytest.mark.parametrize("name", ["org/absent", "org/empty", "org/v@nowhere"])
def test_a_subspace_that_the_hub_does_not_give_ends_a_run_before_its_first_step(world, hub, tmp_path, name):
    hub.make("org/empty", {"README.md": b"nothing"})
    hub.make("org/v", {"v.safetensors": b""})
    trainer = world.trainer(tmp_path / "out", world.guard(subspace=name))
    with pytest.raises(SubspaceError, match=rf"subspace '{name.partition('@')[0]}'"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not (tmp_path / "out" / "safemerge.jsonl").exists()


def test_a_resume_is_told_that_the_subspace_is_another_by_now(world, runs, hub, tmp_path):
    content = (world.folder / "subspace.safetensors").read_bytes()
    repo = hub.make("org/v", {"v.safetensors": content})
    saving = {"save_strategy": "steps", "save_steps": 3}
    world.trainer(tmp_path, world.guard(subspace="org/v"), **saving).train()
    (old,), checkpoint = runs.entries(tmp_path, "start"), str(tmp_path / "checkpoint-3")
    world.trainer(tmp_path, world.guard(subspace="org/v"), **saving).train(resume_from_checkpoint=checkpoint)
    repo.commit({"v.safetensors": content, "README.md": b"new"}, "newer")
    address = f"org/v@{repo.branches['main']}/v.safetensors"
    with pytest.warns(UserWarning, match=f"subspace '{old['subspace']['path']}' -> '{address}'"):
        world.trainer(tmp_path, world.guard(subspace="org/v"), **saving).train(resume_from_checkpoint=checkpoint)


def test_all_processes_take_the_commit_of_the_first(world, hub, monkeypatch):
    content = (world.folder / "subspace.safetensors").read_bytes()
    repo = hub.make("org/v", {"v.safetensors": content})
    first = Subspace.from_pretrained("org/v").address
    repo.commit({"v.safetensors": content, "README.md": b"new"}, "pushed while the other processes began")
    assert opening._opened("org/v").address != first
    monkeypatch.setattr(opening, "from_first", lambda _value: first)
    assert opening._opened("org/v").address == first
