"""What a chat template is given travels from YAML through every recipe, and tasks read answers without thoughts."""

import json

import pytest
import yaml

from method_comparison.cells import _asking
from method_comparison.grid import load_grid
from method_comparison.stamp import settings_digest
from recipes import evaluate
from recipes.arguments import parse
from recipes.data.tasks import says_name, says_number
from recipes.evaluate import EvaluateArguments, task_shares
from recipes.finetune import DataArguments, load_data
from safemerge_callback.errors import ConfigError

OFF = {"enable_thinking": False}
GRID = {
    "output_dir": "runs/x",
    "model": "org/aligned",
    "unaligned": "org/unaligned",
    "target_modules": ["q_proj"],
    "seeds": [1],
    "tasks": ["sentiment"],
    "arms": {"plain": {"about": "plain"}},
}


@pytest.mark.parametrize("given", [OFF, json.dumps(OFF)])
def test_a_files_mapping_or_json_reaches_the_rows_that_are_trained_on(tmp_path, given):
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump({"data": "sentiment", "num_examples": 3, "chat_template_kwargs": given}))
    (data,) = parse((DataArguments,), ["--config", str(path)])
    assert data.chat_template_kwargs == OFF
    assert load_data(data)["chat_template_kwargs"] == [OFF] * 3
    assert load_data(DataArguments("sentiment", num_examples=3)).column_names == ["prompt", "completion"]


def test_the_command_line_takes_json():
    words = ["--model_name_or_path", "m", "--chat_template_kwargs", json.dumps(OFF)]
    (arguments,) = parse((EvaluateArguments,), words)
    assert arguments.chat_template_kwargs == OFF
    with pytest.raises(ConfigError, match="chat_template_kwargs 'off' is no JSON"):
        EvaluateArguments("m", chat_template_kwargs="off")


def test_a_grid_that_says_nothing_of_it_has_the_digest_it_had(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(GRID))
    before = load_grid(path)
    assert "chat_template_kwargs" not in before.evaluate
    path.write_text(yaml.safe_dump({**GRID, "evaluate": {"chat_template_kwargs": OFF}}))
    grid = load_grid(path)
    assert _asking(grid.evaluate) == {"batch_size": 32, "chat_template_kwargs": OFF}
    assert settings_digest({}, grid.evaluate) != settings_digest({}, before.evaluate)
    path.write_text(yaml.safe_dump({**GRID, "evaluate": {"chat_template_kwargs": [1]}}))
    with pytest.raises(ConfigError, match="give a mapping of what the chat template reads"):
        load_grid(path)


def test_a_tasks_answer_is_read_after_the_thought(monkeypatch):
    said = ["<think>negative?</think> positive", "<think>positive"]
    given = {}
    monkeypatch.setattr(evaluate, "generate", lambda *_, **more: given.update(more) or said)
    rows = [{"prompt": [{"content": "p"}], "completion": [{"content": "positive"}]}] * 2
    assert task_shares(None, None, rows, "sentiment", chat_template_kwargs=OFF)[0]["value"] == 0.5
    assert given["chat_template_kwargs"] == OFF
    assert says_number("3", "<think>5 - 2, so 4?</think>3")
    assert says_name("Germany", "<think>France</think>\nGermany")
