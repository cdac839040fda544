"""Rewards of right answers: which are right, what is refused, and a training that comes to earn more."""

import copy
import json

import pytest

from recipes import guarded_trainer
from recipes.grpo import answer_reward, build_trainer, load_questions, parse_grpo
from recipes.guarded_trainer import train
from safemerge_callback.errors import ConfigError
from tests.recipes.test_recipes_configs import files, on_cpu, settings
from tests.recipes.test_recipes_dpo import words_of
from tests.support.trainer import entries

# transformers 5.23 calls it activation_checkpointing; trl 1.x, and earlier transformers, know the old name alone
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


def settings_of(*words):
    return parse_grpo([*words, "--output_dir", "out", "--bf16", "false", "--use_cpu", "true"])[0]


def written(folder, *answers):
    path = folder / "rows.jsonl"
    letters = "cdefgh"[: len(answers)]
    rows = [{"prompt": f"a b {word}", "completion": answer} for word, answer in zip(letters, answers, strict=True)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("name", "answer", "right", "wrong"),
    [
        ("sentiment", "positive", "Positive.", "negative"),
        ("arithmetic", "-7", "It is -7.", "It is 7."),
        ("cities", "Guinea", "guinea", "In Guinea"),
    ],
)
def test_a_task_pays_for_what_it_calls_right(name, answer, right, wrong):
    data = settings_of("--data", name)
    reward = answer_reward(data.right)
    completions = [[{"role": "assistant", "content": text}] for text in (right, wrong)]
    assert reward(completions=completions, answer=[answer, answer], prompts=[], trainer_state=None) == [1.0, 0.0]
    assert load_questions(data).column_names == ["prompt", "answer"]


@pytest.mark.parametrize(
    ("check", "answer"), [("word", "very good"), ("number", "3.5"), ("number", "many"), ("name", "42")]
)
def test_an_answer_that_no_response_could_give_is_refused(tmp_path, check, answer):
    path = written(tmp_path, {"word": "good", "number": "3", "name": "Oslo"}[check], answer)
    with pytest.raises(
        ConfigError, match=rf"row 2 of the data has the answer '{answer}', which answer_check '{check}'"
    ):
        load_questions(settings_of("--data", str(path), "--answer_check", check))


def test_without_a_task_the_check_is_named(tmp_path):
    path = str(written(tmp_path, "3"))
    with pytest.raises(ConfigError, match=r"answer_check is not set, and '.*rows.jsonl' says nothing of when .* word,"):
        settings_of("--data", path)
    with pytest.raises(ConfigError, match=r"answer_check .*'numbers'.*did you mean 'number'"):
        settings_of("--data", path, "--answer_check", "numbers")


@pytest.mark.parametrize("path", files("grpo"), ids=lambda p: p.stem)
def test_the_files_are_those_of_the_recipe(path):
    data, grpo, model, safemerge = parse_grpo(on_cpu(path))
    assert (data.data, model.use_peft, grpo.learning_rate) == ("sentiment", True, settings(path)["learning_rate"])
    assert (grpo.output_dir, safemerge is None) == {
        "smollm2_sentiment": ("runs/smollm2_sentiment_grpo", True),
        "smollm2_sentiment_replay": ("runs/smollm2_sentiment_grpo_replay", False),
    }[path.stem]


def test_a_training_earns_more_and_the_callback_is_at_work(world, chat_tokenizer, tmp_path, monkeypatch):
    loaded = (copy.deepcopy(world.aligned), chat_tokenizer)
    monkeypatch.setattr(guarded_trainer, "load_model", lambda *_, **__: loaded)
    path = written(tmp_path, *["positive"] * 6)
    how = {"per_device_train_batch_size": 32, "num_generations": 16, "max_completion_length": 1, "max_steps": 9}
    # Of 64 words it may say three, so that it is right now and then from the beginning.
    others = [
        token for word, token in chat_tokenizer.get_vocab().items() if word not in ("positive", "negative", "yes")
    ]
    how |= {"generation_kwargs": json.dumps({"suppress_tokens": others}), "learning_rate": 0.1}
    words = words_of(world, tmp_path / "out", path, answer_check="word", **how)
    trainer = build_trainer(*parse_grpo(words))
    train(trainer)
    rewards = [line["rewards/right_answer/mean"] for line in trainer.state.log_history if "reward" in line]
    assert len(rewards) == 9
    assert sum(rewards[6:]) > sum(rewards[:3])
    assert [entry["step"] for entry in entries(tmp_path / "out", "merge")] == [3, 6, 9]
