"""The cards that the trainer and PEFT write say what was merged, and nothing that leaves tells of this machine."""

import json
from pathlib import Path

import pytest
import transformers
import yaml
from transformers import Trainer

from safemerge_callback.io.card import BEGIN, END
from safemerge_callback.record.progress import Progress
from safemerge_callback.training.run.artifact import outcome_of, run_card
from tests.support.replay import ROWS, replay_entry, replaying
from tests.support.versions import found_in

SAVING = {"save_strategy": "steps", "save_steps": 3}


def parts(path):
    """Head, text before, ours, and after."""
    text = path.read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    _, head, rest = text.split("---\n", 2)
    before, _, rest = rest.partition(BEGIN)
    ours, _, after = rest.partition(END)
    return yaml.safe_load(head), before, ours, after


class Hub:
    """Stands in for the Hub, which no test may write to: keeps what would be uploaded."""

    def __init__(self):
        self.cards = []

    def create_repo(self, name, **_):
        return type("Url", (), {"repo_id": name})()

    def upload_folder(self, folder_path, **_):
        path = Path(folder_path) / "README.md"
        self.cards.append(path.read_text() if path.exists() else None)
        job = type("Job", (), {"is_done": lambda self: True, "result": lambda self: None, "done": lambda self: True})
        return job()


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    found_in(transformers.trainer, "hf_api")
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    return hub


def test_each_checkpoints_card_says_what_was_merged_by_then(world, tmp_path):
    trainer = world.trainer(tmp_path, world.guard(every=2), **SAVING)
    trainer.train()
    head, before, ours, _ = parts(tmp_path / "checkpoint-3" / "README.md")
    assert {"lora", "safemerge"} <= set(head["tags"])
    assert "Model Card" in before
    assert "checked it once and merged into it once" in ours
    _, _, last, _ = parts(tmp_path / "checkpoint-6" / "README.md")
    assert "4 modules in 1 event, at steps 2" in ours.replace("\\", "")
    assert "merged into it 3 times" in last
    assert "51.2%" in last
    assert "linear, space delta, weights 0.8 / 0.2" in last


def test_what_is_saved_after_training_goes_on_with_the_card(world, tmp_path):
    trainer = world.trainer(tmp_path, world.guard(every=0))
    config = trainer.model.peft_config["default"]
    base, config.base_model_name_or_path = config.base_model_name_or_path, "org/base"
    trainer.train()
    assert parts(tmp_path / "README.md")[0]["base_model"] == "org/base"
    # PEFT asks the Hub for one when it saves.
    config.base_model_name_or_path = base
    trainer.save_model()
    head, _, ours, _ = parts(tmp_path / "README.md")
    assert head["library_name"] == "peft"
    assert {"lora", "safemerge"} <= set(head["tags"])
    assert "merged into it once" in ours
    assert str(world.folder) not in ours
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert "\n- safemerge\n" in (tmp_path / "elsewhere" / "README.md").read_text()


def test_a_run_that_only_watches_says_so_and_sets_no_tag(world, tmp_path):
    trainer = world.trainer(tmp_path, world.guard(gate="watch", safety_adapter=None, every=2), **SAVING)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "checkpoint-6", tmp_path):
        head, _, ours, _ = parts(folder / "README.md")
        assert "safemerge" not in head["tags"]
        assert "checked it 3 times and merged nothing" in ours


def test_a_run_that_only_replays_says_what_it_did_and_none_of_its_rows(world, chat_tokenizer, tmp_path):
    rows = tmp_path / "mine.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    trainer = world.trainer(tmp_path / "out", replaying(rows=str(rows)), tokenizer=chat_tokenizer, **SAVING)
    trainer.train()
    trainer.save_model()
    for folder, steps in (("checkpoint-3", 3), ("checkpoint-6", 6), ("", 6)):
        head, _, ours, _ = parts(tmp_path / "out" / folder / "README.md")
        assert {"lora", "safemerge"} <= set(head["tags"])
        assert f"While this adapter was trained, safety rows were replayed in {steps} steps." in ours
        assert "| settings | replay (rows mine.jsonl) |" in ours.replace("\\", "")
        for word in ("check", "merge ", "merges", ROWS[0]["response"], str(tmp_path)):
            assert word not in ours, word
    text = run_card(outcome_of(replaying().config, Path("j"), None, Progress(correction_steps={"replay": 1}), {}))
    assert "| replay | in 1 step |" in text
    assert "At the last check" not in text
    assert ROWS[0]["response"] not in text


def test_a_run_whose_rows_had_no_part_says_so_and_sets_no_tag(world, chat_tokenizer, tmp_path):
    world.trainer(tmp_path, replaying(weight=0.0), tokenizer=chat_tokenizer).train()
    head, _, ours, _ = parts(tmp_path / "README.md")
    assert "safemerge" not in head["tags"]
    assert "safety rows were replayed in no step: these are the weights that training left" in ours


def test_a_run_that_merges_and_replays_says_both(world, chat_tokenizer, tmp_path, capsys):
    world.trainer(tmp_path, world.guard(every=2, corrections=[replay_entry()]), tokenizer=chat_tokenizer).train()
    _, _, ours, _ = parts(tmp_path / "README.md")
    assert "SafeMerge checked it 3 times and merged into it 3 times, and safety rows were replayed in 6 steps." in ours
    assert "| merges | 12 modules in 3 events, at steps 2, 4, 6 |" in ours.replace("\\", "")
    assert ROWS[0]["response"] not in ours
    assert "left, replay in 6 steps, moved_mean " in capsys.readouterr().out


def test_a_card_of_the_users_own_keeps_every_byte_outside_of_ours(world, tmp_path):
    mine = "---\r\nlicense: mit\r\n# why\r\ntags:\r\n- mine\r\n---\r\n\r\n# Mine\r\n\r\nwith   spaces  \r\n"
    (tmp_path / "README.md").write_bytes(mine.encode())
    for _ in range(2):
        world.trainer(tmp_path, world.guard(every=0)).train()
    text = (tmp_path / "README.md").read_bytes().decode()
    before, _, rest = text.partition(BEGIN)
    assert before.replace("- safemerge\n", "").rstrip() == mine.rstrip()
    assert text.count(BEGIN) == 1
    assert rest.partition(END)[2] == "\n"
    broken = f"---\nlicense: mit\n---\n\n# Mine\n{END}\n{BEGIN}\n"
    (tmp_path / "README.md").write_text(broken)
    world.trainer(tmp_path, world.guard(every=0)).train()
    assert (tmp_path / "README.md").read_text().replace("tags:\n- safemerge\n", "") == broken


@pytest.mark.parametrize(
    "text", ["# My project\n\nTrain it with train.py.\n", "My project\n---\n\n- train.py\n---\n", ""]
)
def test_a_readme_that_is_no_card_stays_as_it_is(world, tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    world.trainer(tmp_path, world.guard(every=2), **SAVING).train()
    assert (tmp_path / "README.md").read_text() == text


def test_a_card_that_is_no_text_is_told_and_left(world, tmp_path):
    (tmp_path / "README.md").write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match=r"README.md' was left as it is \(UnicodeDecodeError"):
        world.trainer(tmp_path, world.guard(every=0)).train()
    assert (tmp_path / "README.md").read_bytes() == b"\xff\xfe\x00"


@pytest.mark.parametrize("in_training", [False, True])
def test_what_is_pushed_says_it(world, hub, tmp_path, in_training):
    settings = {"push_to_hub": True, "hub_model_id": "me/it"} if in_training else {}
    trainer = world.trainer(tmp_path, world.guard(every=2), **SAVING, **settings)
    trainer.train()
    # the plain trainer has no card before the training's end
    assert hub.cards == ([None, None] if in_training else [])
    trainer.push_to_hub()
    assert "merged into it 3 times" in hub.cards[-1]
    assert "- safemerge\n" in hub.cards[-1]
    assert "create_model_card" not in vars(trainer)
    # of a card that is written by hand later the tag is left
    trainer.create_model_card()
    assert "- safemerge\n" in (tmp_path / "README.md").read_text()


class OwnCard(Trainer):
    """Writes its card anew at each checkpoint and each push, as TRL's trainers do."""

    def create_model_card(self, *args, tags=None, **kwargs):
        listed = "".join(f"- {tag}\n" for tag in tags or ["trl"])
        Path(self.args.output_dir, "README.md").write_text(f"---\ntags:\n{listed}---\n\n# own\n")

    def _save_checkpoint(self, *args, **kwargs):
        self.create_model_card()
        super()._save_checkpoint(*args, **kwargs)


def test_a_trainer_with_a_card_of_its_own_says_it_at_every_push(world, runs, hub, tmp_path):
    settings = world.settings(tmp_path, **SAVING, push_to_hub=True, hub_model_id="me/it")
    trainer = OwnCard(world.model(), settings, train_dataset=runs.tokens(), callbacks=[world.guard(every=2)])
    trainer.train()
    trainer.push_to_hub()
    assert ["into it once" in hub.cards[0], "into it 3 times" in hub.cards[-1]] == [True, True]
    assert all("# own" in card and "- safemerge\n" in card and card.count(BEGIN) == 1 for card in hub.cards)


def test_no_folder_of_this_machine_leaves_with_the_journal_or_a_checkpoint(world, runs, tmp_path, monkeypatch):
    from safemerge_callback.training.run.session import Session

    where = str(world.folder)
    fails = {3: "cannot read '/home/someone/secret/x.safetensors'"}
    after_step = Session.after_step

    def failing(self, *, stopping):
        after_step(self, stopping=stopping)
        if self.step in fails:
            self.log.note({"kind": "error", "step": 3, "where": "measure", "error": f"OSError: {fails[3]}"})

    monkeypatch.setattr(Session, "after_step", failing)
    guard = world.guard(every=2, journal=str(tmp_path / "j" / "mine.jsonl"))
    world.trainer(tmp_path / "run", guard, **SAVING).train()
    (start,) = runs.entries(tmp_path / "j", "start", "mine.jsonl")
    names = {"subspace": "subspace.safetensors", "safety_adapter": "safety", "journal": "mine.jsonl"}
    assert {key: start["config"][key] for key in names} == names
    assert start["subspace"]["path"] == "subspace.safetensors"
    (error,) = runs.entries(tmp_path / "j", "error", "mine.jsonl")
    assert error["error"] == "OSError: cannot read 'x.safetensors'"
    files = [tmp_path / "j" / "mine.jsonl", tmp_path / "run" / "README.md"]
    assert not any(where in path.read_text() or str(tmp_path) in path.read_text() for path in files)
    assert where not in str(runs.stored(tmp_path / "run" / "checkpoint-3"))
