"""What checks ask the live model about, in real trainings: rows, what is refused, and that nothing is disturbed."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from transformers import TrainerCallback

from safemerge_callback.errors import AdapterError, ConfigError
from safemerge_callback.signals.task_rows import TaskRows
from safemerge_callback.training.run.check_data import RunData
from safemerge_callback.training.run.task_state import read_rows
from tests.support.ranks import run_on
from tests.support.replay import ROWS, replay_entry
from tests.support.rows import rows_of_kinds
from tests.support.trainer import entries, lora_weights
from tests.support.versions import above_bound
from tests.support.world import World

SLOPE = {"gate": "safety_slope", "slope_share": 0.5, "safety_adapter": None}
ROWS_OF_OURS = {"safety_rows": ROWS, "num_task_rows": 4}


def trained(world, tokenizer, output, guard=None, resume=None, **changed):
    trainer = world.trainer(output, *([guard] if guard else []), tokenizer=tokenizer, **changed)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_half_of_the_modules_are_merged_by_their_slopes(world, chat_tokenizer, tmp_path):
    trained(world, chat_tokenizer, tmp_path, world.guard(**SLOPE, data=ROWS_OF_OURS))
    checks, merges = entries(tmp_path, "check"), entries(tmp_path, "merge")
    assert [len(check["modules"]) for check in checks] == [4, 4, 4]
    for check, merge in zip(checks, merges, strict=True):
        assert {check["gate"], check["slope_share"]} == {"safety_slope", 0.5}
        slopes = {module["name"]: module["safety_slope"] for module in check["modules"]}
        costly = [name for name in sorted(slopes, key=slopes.get, reverse=True) if slopes[name] > 0][:2]
        assert sorted(module["name"] for module in merge["modules"]) == sorted(costly)


def test_a_resumed_run_is_the_unbroken_one(world, chat_tokenizer, tmp_path):
    steps = {"save_strategy": "steps", "save_steps": 1}
    knobs = {**SLOPE, "per_task_slope": True, "every": 3, "data": ROWS_OF_OURS}
    whole = trained(world, chat_tokenizer, tmp_path, world.guard(**knobs), **steps)
    for step in (2, 5):
        folder = tmp_path / f"checkpoint-{step}"
        again = trained(world, chat_tokenizer, tmp_path, world.guard(**knobs), str(folder), **steps)
        assert same(lora_weights(whole.model), lora_weights(again.model)), step


def test_watching_changes_nothing(world, chat_tokenizer, tmp_path):
    """With dropout, whose random numbers are the task's own, while the signals of another gate are taken."""
    plain = trained(world, chat_tokenizer, tmp_path / "plain", model=world.model(lora_dropout=0.3))
    guard = world.guard(**SLOPE, per_task_slope=True, data=ROWS_OF_OURS, from_step=7, at_train_end=False, every=1)
    with pytest.raises(ConfigError, match="no periodic check falls"):
        trained(world, chat_tokenizer, tmp_path / "never", guard)
    guard = world.guard(**{**SLOPE, "method": "pull", "strength": 1e-30}, per_task_slope=True, data=ROWS_OF_OURS)
    asked = trained(world, chat_tokenizer, tmp_path / "asked", guard, model=world.model(lora_dropout=0.3))
    assert len(entries(tmp_path / "asked", "check")) == 3
    assert same(lora_weights(plain.model), lora_weights(asked.model))


class Look(TrainerCallback):
    """What a guard's run has of rows after each step."""

    def __init__(self, guard):
        self.guard, self.safety, self.task = guard, [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.safety.append(self.guard.session.data.safety)
        self.task.append(self.guard.session.data.task.rows())


def test_the_rows_of_a_replay_beside_are_taken_and_are_none_of_the_tasks(world, chat_tokenizer, tmp_path, capsys):
    """Six steps with two rows each, and a replayed one in each of them."""
    guard = world.guard(**SLOPE, per_task_slope=True, data={"num_task_rows": 10}, corrections=[replay_entry()])
    look = Look(guard)
    world.trainer(tmp_path, guard, look, tokenizer=chat_tokenizer).train()
    assert "gate 'safety_slope' asks about safety rows: those of the correction beside" in capsys.readouterr().out
    assert [row.kind for row in look.safety[0]] == ["harm", "harm", "benign"]
    assert [len(rows) for rows in look.task] == [2, 4, 6, 8, 10, 10]
    assert {len(row.prompt) + len(row.response) for row in look.task[-1]} == {8}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"data": {"num_task_rows": 0}}, "num_task_rows is 0"),
        ({"data": {"rows": 3}}, "data: setting 'rows' is unknown"),
        ({"data": 5}, "data is 5: give a mapping"),
        ({"data": {"safety_rows": "a", "prompts": ["b"]}}, "data: rows and prompts are both given"),
        ({"gate": "all", "slope_share": None, "data": {"num_task_rows": 5}}, "asks the live model about rows: leave"),
    ],
)
def test_settings_that_cannot_be_are_refused(world, changed, says):
    with pytest.raises(ConfigError, match=says):
        world.guard(**{**SLOPE, **changed})


def test_what_cannot_be_asked_is_refused_before_the_first_step(world, chat_tokenizer, tmp_path):
    def refused(guard, tokenizer, **changed):
        trainer = world.trainer(tmp_path, guard, tokenizer=tokenizer, **changed)
        with pytest.raises(ConfigError) as error:
            trainer.train()
        assert trainer.state.global_step == 0
        return str(error.value)

    assert "gate 'safety_slope' asks the model in words, and this trainer has no tokenizer" in refused(
        world.guard(**SLOPE), None
    )
    benign = [row for row in ROWS if row["kind"] == "benign"]
    assert "kind" in refused(world.guard(**SLOPE, data={"safety_rows": benign}), chat_tokenizer)
    bare = copy.deepcopy(chat_tokenizer)
    bare.chat_template = None
    assert "gate 'safety_slope' needs safety rows: the tokenizer has no chat template" in refused(
        world.guard(**SLOPE), bare
    )


def test_the_settings_name_no_path_and_no_row(world, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    config = world.guard(**SLOPE, data={"safety_rows": str(tmp_path / "rows.jsonl")}).config
    assert config.to_publish()["data"]["safety_rows"] == "rows.jsonl"
    assert world.guard(**SLOPE, data=ROWS_OF_OURS).config.to_publish()["data"]["safety_rows"] == "3 rows"
    assert "data" not in world.guard(**SLOPE).config.to_dict()


def test_task_rows_that_cannot_be_read_are_refused(world, chat_tokenizer, tmp_path):
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    knobs = {**SLOPE, "per_task_slope": True, "data": ROWS_OF_OURS}
    trained(world, chat_tokenizer, tmp_path, world.guard(**knobs), **steps)
    (tmp_path / "checkpoint-2" / "safemerge_task_rows.json").write_text('{"ranks": [[[[], [1]]]]}')
    again = world.trainer(tmp_path, world.guard(**knobs), tokenizer=chat_tokenizer, **steps)
    with pytest.raises(AdapterError, match="it is not known what was trained on last"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_that_ranks_did_not_agree_on_holds_no_rows(world, tmp_path, monkeypatch):
    """Rather none than those of an earlier step: a resume then says that they begin anew."""
    data = RunData(task=TaskRows(4, tuple(rows_of_kinds(3))))
    point = SimpleNamespace(step=7)
    monkeypatch.setattr("safemerge_callback.training.run.check_data.many", lambda: True)
    data.after_step(point)
    data.exchange()
    data.save(tmp_path, "a")
    assert len(read_rows([tmp_path], "a")[0]) == 3
    data.after_step(SimpleNamespace(step=8))
    data.save(tmp_path, "b")
    assert read_rows([tmp_path], "b") == []
    assert not data.load([tmp_path], "b")


def two_ranks(folder, output, tokenizer):
    """Each rank trains on rows of its own; both must merge the same, and a resume must be the unbroken run."""
    from transformers import AutoTokenizer

    world, chat_tokenizer = World.load(folder), AutoTokenizer.from_pretrained(tokenizer)
    steps = {"save_strategy": "steps", "save_steps": 1}
    knobs = {**SLOPE, "per_task_slope": True, "every": 3, "data": ROWS_OF_OURS}
    whole = trained(world, chat_tokenizer, output, world.guard(**knobs), **steps)
    weights = lora_weights(whole.model)
    mine = torch.cat([w.flatten() for w in weights.values()])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    assert torch.equal(*both)
    again = trained(world, chat_tokenizer, output, world.guard(**knobs), f"{output}/checkpoint-4", **steps)
    assert same(weights, lora_weights(again.model))


def test_two_ranks_ask_about_the_rows_of_both(world, chat_tokenizer, tmp_path):
    above_bound("transformers", "a run of several ranks on CPUs can be resumed")
    chat_tokenizer.save_pretrained(tmp_path / "tokenizer")
    run_on(2, two_ranks, world.folder, tmp_path / "run", tmp_path / "tokenizer")
    stored = json.loads((tmp_path / "run" / "checkpoint-4" / "safemerge_task_rows.json").read_text())
    assert [len(one) for one in stored["ranks"]] == [2, 2]
    assert stored["ranks"][0] != stored["ranks"][1]
    checks = entries(tmp_path / "run", "check")
    assert {"safety_slope", "task_slope"} <= checks[0]["modules"][0].keys()
