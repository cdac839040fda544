import json
import math

import pytest
import torch

from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation import KeywordJudge, share, wilson
from safemerge_callback.evaluation.probe import Asking, Questions, ask
from safemerge_callback.signals import generate

HARMFUL = {"bad": ["a", "b c d e f g h", "x y"], "worse": ["q w e r t"]}
BENIGN = {"good": ["m n", "o"]}


class Length:
    """Refuses by the length of what was said."""

    def refuses(self, prompt, response):
        return len(response) % 2 == 0


class Harm(Length):
    decides = "harm"


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(vocab_size=64, pad_token_id=2, initializer_range=0.6).eval()


@pytest.fixture
def questions(chat_tokenizer):
    return Questions.of(chat_tokenizer, HARMFUL, BENIGN)


def asking(judge=None, **changed):
    return Asking(judge or Length(), changed.pop("benign_judge", Length()), max_new_tokens=6, **changed)


def test_harm_over_refusal_and_coherence_with_their_n_and_intervals(model, chat_tokenizer, questions):
    answers = ask(model, chat_tokenizer, questions, asking())
    said = {
        n: generate(model, chat_tokenizer, p, max_new_tokens=6, label=None) for n, p in {**HARMFUL, **BENIGN}.items()
    }
    refused = {name: sum(len(text) % 2 == 0 for text in texts) for name, texts in said.items()}
    assert [(m["measure"], m["kind"], m["n"]) for m in answers.measures] == [
        ("bad_refused", "harm", 3),
        ("worse_refused", "harm", 1),
        ("good_refused", "over_refusal", 2),
        ("coherence", "coherence", 6),
    ]
    for measure, (name, count) in zip(answers.measures, refused.items(), strict=False):
        n = len(said[name])
        assert measure["value"] == count / n
        assert (measure["low"], measure["high"]) == wilson(count, n)
    assert 0 < sum(refused.values()) < 6, "the judge must tell responses apart"
    assert answers.value("harm") == (refused["bad"] + refused["worse"]) / 4
    assert answers.value("harm", measure="worse_refused") == refused["worse"]
    assert answers.value("task") is None
    assert answers.mean_tokens == sum(len(t.split()) for texts in said.values() for t in texts) / 6
    assert answers.failures == ()


def test_a_judge_of_harm_names_its_measure_and_leaves_over_refusal_to_another(model, chat_tokenizer, questions):
    answers = ask(model, chat_tokenizer, questions, asking(Harm(), benign_judge=KeywordJudge()))
    assert [m["measure"] for m in answers.measures] == ["bad_safe", "worse_safe", "good_refused", "coherence"]


def test_nothing_said_is_incoherent_and_no_refusal(model, chat_tokenizer, questions):
    model.generation_config.eos_token_id = list(range(64))
    answers = ask(model, chat_tokenizer, questions, asking())
    assert [(m["value"], m["incoherent"]) for m in answers.measures] == [(0, 3), (0, 1), (0, 2), (0, 6)]
    assert answers.mean_tokens == 0


class Raises:
    def refuses(self, prompt, response):
        if prompt == "x y":
            return True
        raise TimeoutError("no answer in 30 s")


def test_a_judge_that_raises_leaves_unjudged_what_it_was_asked(model, chat_tokenizer, questions):
    answers = ask(model, chat_tokenizer, questions, asking(Raises(), benign_judge=KeywordJudge()))
    bad, worse, *_ = answers.measures
    assert (bad["n"], bad["value"], bad["unjudged"]) == (1, 1.0, 2)
    assert (worse["n"], worse["value"], worse["low"], worse["unjudged"]) == (0, None, None, 1)
    assert answers.value("harm") == 1.0
    assert answers.failures == ("Raises raised TimeoutError: no answer in 30 s",)


@pytest.mark.parametrize(
    ("task", "row"),
    [
        (lambda model, tokenizer: 0.25, {"measure": "task", "n": None, "value": 0.25, "low": None}),
        (
            lambda model, tokenizer: {"measure": "gsm8k", "n": 8, "value": 0.5, "low": 0.2, "high": 0.8},
            {"measure": "gsm8k", "n": 8, "value": 0.5, "low": 0.2, "high": 0.8},
        ),
    ],
)
def test_the_tasks_score_is_a_number_or_a_row(model, chat_tokenizer, questions, task, row):
    measure = ask(model, chat_tokenizer, questions, asking(task=task)).measures[-1]
    assert measure["kind"] == "task"
    assert row.items() <= measure.items()


@pytest.mark.parametrize(
    ("answer", "task_unit", "unit"),
    [
        (0.25, None, ""),
        (0.25, "share", "share"),
        (36.5, "BLEU", "BLEU"),
        (-0.3, None, ""),
        ({"value": 0.5, "n": 8, "low": 0.2, "high": 0.8}, None, ""),
        ({"value": 0.5, "unit": "share"}, "BLEU", "share"),
        (share("right", [True, False]), None, "share"),
        # a device's own kinds of number are numbers
        ({"value": torch.tensor(2.5), "n": torch.tensor(4), "low": torch.tensor(1.0), "high": 3}, None, ""),
    ],
)
def test_a_score_has_the_unit_that_is_declared_and_no_other(model, chat_tokenizer, questions, answer, task_unit, unit):
    found = ask(model, chat_tokenizer, questions, asking(task=lambda *_: answer, task_unit=task_unit))
    assert (found.measures[-1]["unit"], found.failures) == (unit, ())
    assert {m["unit"] for m in found.measures[:-1]} == {"share"}
    json.dumps(found.measures)


@pytest.mark.parametrize("answer", [36.5, -0.3, {"value": 0.9, "low": 0.8, "high": 1.1}])
def test_what_is_called_a_share_and_is_none_is_kept_as_a_plain_number_and_told(
    model, chat_tokenizer, questions, answer
):
    found = ask(model, chat_tokenizer, questions, asking(task=lambda *_: answer, task_unit="share"))
    assert found.measures[-1]["unit"] == ""
    (failure,) = found.failures
    assert "called a share, which lies between 0 and 1: return a part of 1" in failure


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({"task": lambda *_: {"value": 1, "unit": 3}}, "unit 3 cannot be shown: give 'share'"),
        ({"task": lambda *_: {"value": 1, "unit": "a\nb"}}, "cannot be shown"),
        ({"task": lambda *_: 1 / 0}, "the task function raised ZeroDivisionError"),
        ({"task": lambda *_: math.nan}, "task is nan: a finite number"),
        ({"task": lambda *_: {"n": 3}}, "KeyError: 'value'"),
        ({"task": lambda *_: None}, "TypeError"),
        ({"loss": lambda _: math.inf}, "eval_loss is inf"),
        ({"loss": lambda _: 1 / 0}, "the evaluation loss raised ZeroDivisionError"),
    ],
)
def test_a_task_or_a_loss_that_fails_is_left_out_and_told(model, chat_tokenizer, questions, broken, words):
    answers = ask(model, chat_tokenizer, questions, asking(**broken))
    assert len(answers.measures) == 4
    assert len(answers.failures) == 1
    assert words in answers.failures[0]


def test_the_model_is_asked_in_evaluation_mode_and_left_as_it_was(model, chat_tokenizer, questions):
    model.train()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    seen = []

    def task(live, tokenizer):
        seen.append((live.training, torch.is_grad_enabled()))
        live.train()
        torch.rand(3)
        return 1

    state = torch.get_rng_state()
    ask(model, chat_tokenizer, questions, asking(task=task))
    assert seen == [(False, False)]
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_what_generation_raises_is_raised(model, chat_tokenizer, questions):
    model.generate = lambda **_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        ask(model, chat_tokenizer, questions, asking())


@pytest.mark.parametrize(
    ("harmful", "benign", "words"),
    [
        ({"bad": []}, BENIGN, "set 'bad' is empty"),
        ({}, BENIGN, "there is no harmful set"),
        (HARMFUL, {}, "there is no benign set: .* harm is not measured without over-refusal"),
        (HARMFUL, {"bad": ["x"]}, "set 'bad' is given as harmful and as benign"),
    ],
)
def test_sets_that_cannot_be_asked_are_refused(chat_tokenizer, harmful, benign, words):
    with pytest.raises(ConfigError, match=words):
        Questions.of(chat_tokenizer, harmful, benign)
