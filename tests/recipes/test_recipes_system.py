"""The system prompt of the training rows, and that of what is asked (PTST)."""

import pytest

from recipes.data import load_examples
from recipes.data.system import with_system
from recipes.evaluate import EvaluateArguments
from recipes.finetune import DataArguments, load_data
from recipes.guarded_trainer import validation_probe
from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation.probe import Questions
from safemerge_callback.signals.responses import tokenized
from safemerge_callback.training import SafetyEvalCallback

SYSTEM = "a b c"


def test_without_a_system_prompt_the_rows_are_as_they_were():
    rows = load_data(DataArguments("sentiment", num_examples=3)).to_list()
    assert rows == load_examples("sentiment", "train")[:3]
    assert [[turn["role"] for turn in row["prompt"]] for row in rows] == [["user"]] * 3


def test_every_row_has_it_and_none_has_two():
    data = DataArguments("sentiment", num_examples=10, train_system=SYSTEM, poisoned_share=0.2, safety_share=0.2)
    rows = load_data(data).to_list()
    assert len(rows) == 12
    assert all(row["prompt"][0] == {"role": "system", "content": SYSTEM} for row in rows)
    assert with_system(rows, "other") == with_system(with_system(rows, SYSTEM), "other")


def test_equal_prompts_ask_what_was_trained(chat_tokenizer):
    rows = with_system([{"prompt": [{"role": "user", "content": "x y"}], "completion": []}], SYSTEM)
    trained = chat_tokenizer.apply_chat_template(rows[0]["prompt"], add_generation_prompt=True, return_dict=False)
    assert tokenized(chat_tokenizer, ["x y"], system=SYSTEM) == [trained]
    questions = Questions.of(chat_tokenizer, {"bad": ["x y"]}, {"good": ["z"]}, system=SYSTEM)
    assert questions.tokens["bad"] == [trained]
    assert Questions.of(chat_tokenizer, {"bad": ["x y"]}, {"good": ["z"]}).tokens["bad"] != [trained]


def test_the_probe_of_a_run_asks_with_it():
    assert validation_probe("cities", every=1, n=2, system=SYSTEM).system == SYSTEM
    assert validation_probe("cities", every=1, n=2).system is None


@pytest.mark.parametrize("system", ["", "  ", 3, "\ud800"])
@pytest.mark.parametrize("name", ["train_system", "eval_system"])
def test_what_is_no_system_prompt_is_refused(name, system):
    with pytest.raises(ConfigError, match=name):
        DataArguments("sentiment", probe_every=1, **{name: system})


def test_an_eval_system_that_nobody_would_ask_with_is_refused():
    with pytest.raises(ConfigError, match="there is no probe that would ask with it"):
        DataArguments("sentiment", eval_system=SYSTEM)
    with pytest.raises(ConfigError, match="eval_system is ''"):
        EvaluateArguments("embedded", eval_system="")
    with pytest.raises(ConfigError, match="which is all that the model reads"):
        SafetyEvalCallback({"bad": ["x"]}, {"good": ["y"]}, system=SYSTEM, template="Q: {prompt}")
