"""Preferences: pairs of every form, what is refused, and a training of which chosen answers come out likelier."""

import copy
import json

import pytest

from recipes import guarded_trainer
from recipes.data.preferences import PAIR_FORM, pair_of, task_pairs
from recipes.data.table import rows_in_form
from recipes.data.tasks import TASKS
from recipes.dpo import build_trainer, load_pairs, parse_dpo
from recipes.guarded_trainer import train
from safemerge_callback.errors import ConfigError
from tests.recipes.test_recipes_configs import files, on_cpu, settings
from tests.support.trainer import entries, saved_weights

# transformers 5.23 calls it activation_checkpointing; trl 1.x, and earlier transformers, know the old name alone
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
QUESTION = {"role": "user", "content": "a b"}
GOOD, BAD = ({"role": "assistant", "content": word} for word in ("positive", "negative"))
PAIR = {"prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a b", "chosen": "positive", "rejected": "negative", "score": 3},
        PAIR,
        {"chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
        {"prompt": "a b", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
    ],
    ids=["texts", "turns", "whole", "whole-and-prompt"],
)
def test_every_form_is_the_same_pair(row):
    assert pair_of(row, "row 1") == PAIR


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"prompt": "a", "completion": "b"},
            r"no prompt with two answers in its columns \['completion', 'prompt'\]\. Give",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, r"of which \['rejected'\] are empty\. Give prompt, chosen"),
        ({"chosen": "b", "rejected": "c"}, r"in its columns \['chosen', 'rejected'\]"),
        ("text", "no prompt with two answers in 'text'"),
        ({"chosen": [QUESTION, GOOD], "rejected": [GOOD, QUESTION, BAD]}, "differ before their last answers"),
        ({**PAIR, "chosen": [{"role": "tool", "content": "3"}, GOOD]}, "turn 1 has the role 'tool'|differ before"),
    ],
)
def test_a_row_with_no_two_answers_is_refused_with_its_columns(row, says):
    with pytest.raises(ConfigError, match=says):
        pair_of(row, "row 1 of data 'pairs.jsonl'")


@pytest.mark.parametrize("name", sorted(TASKS))
def test_of_a_task_the_right_answer_is_chosen_and_a_wrong_one_rejected(name):
    right, pairs = TASKS[name].right, task_pairs(name)
    assert pairs == task_pairs(name)
    for pair in pairs:
        wanted, other = (pair[side][0]["content"] for side in ("chosen", "rejected"))
        assert right(wanted, wanted)
        assert not right(wanted, other)
    if name != "arithmetic":
        assert all(pair["rejected"][0]["content"] in pair["prompt"][-1]["content"] for pair in pairs)


def test_what_is_no_task_is_refused_with_what_is():
    with pytest.raises(ConfigError, match=r"data 'sentimnt' is unknown: choose one of \['arithmetic', 'cities', 'sent"):
        rows_in_form(PAIR_FORM, "sentimnt")


@pytest.mark.parametrize("path", files("dpo"), ids=lambda p: p.stem)
def test_the_files_are_those_of_the_recipe(path):
    data, dpo, model, safemerge = parse_dpo(on_cpu(path))
    assert (data.data, model.use_peft, dpo.learning_rate) == ("sentiment", True, settings(path)["learning_rate"])
    assert (dpo.output_dir, safemerge is None) == {
        "smollm2_sentiment": ("runs/smollm2_sentiment_dpo", True),
        "smollm2_sentiment_replay": ("runs/smollm2_sentiment_dpo_replay", False),
    }[path.stem]
    assert load_pairs(data).column_names == ["prompt", "chosen", "rejected"]


def words_of(world, folder, data, **changed):
    """A command line of six steps on a tiny model, every module merged after every third."""
    given = {"data": data, "output_dir": folder, "max_steps": 6, "learning_rate": 0.02, "seed": 3}
    given |= {"bf16": "false", "use_cpu": "true", "gradient_checkpointing": "false", "report_to": "none"}
    given |= {"use_peft": "true", "logging_steps": 1, "disable_tqdm": "true", "save_strategy": "no"}
    given |= {"safemerge_subspace": world.subspace, "safemerge_safety_adapter": world.safety}
    given |= {"safemerge_gate": "all", "safemerge_every": 3, **changed}
    targets = ["--lora_target_modules", "q_proj", "v_proj"]
    return [*targets, *(text for name, value in given.items() for text in (f"--{name}", str(value)))]


def test_chosen_answers_come_out_likelier_and_the_callback_is_at_work(world, chat_tokenizer, tmp_path, monkeypatch):
    rows = [{"prompt": f"{a} {b}", "chosen": "positive", "rejected": "negative"} for a in "abcd" for b in "efgh"]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    loaded = (copy.deepcopy(world.aligned), chat_tokenizer)
    monkeypatch.setattr(guarded_trainer, "load_model", lambda *_, **__: loaded)
    words = words_of(world, tmp_path / "out", tmp_path / "pairs.jsonl", per_device_train_batch_size=4)
    trainer = build_trainer(*parse_dpo(words))
    train(trainer)
    saved = saved_weights(tmp_path / "out")
    assert {name.split(".")[-3] for name in saved} == {"q_proj", "v_proj"}
    margins = [line["rewards/margins"] for line in trainer.state.log_history if "rewards/margins" in line]
    assert margins[0] == pytest.approx(0.0, abs=1e-6)
    assert margins[-1] > 0.01
    assert [entry["step"] for entry in entries(tmp_path / "out", "merge")] == [3, 6]
