"""Training rows in the model's own words (SDFT): what is kept, what stays as it was, and that it is asked once."""

import copy
import sys

import pytest

from recipes import rewriting
from recipes.data.rows import conversation
from recipes.rewriting import CHECKS, contains_answer, rewritten, same_result, same_text
from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation.harvest import answered

ROWS = [conversation(question, answer) for question, answer in (("a b c", "d"), ("e f", "yes"), ("g h i", "positive"))]
# In the chat tokenizer's words.
ASKS = "a {question} b {answer} c"


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(vocab_size=64, pad_token_id=2, initializer_range=0.6, max_position_embeddings=128).eval()


@pytest.fixture(autouse=True)
def asked_in_known_words(monkeypatch):
    monkeypatch.setattr(rewriting, "ASKS", ASKS)


def anything(answer, said):
    return True


def nothing(answer, said):
    return False


def test_what_fails_the_check_everywhere_leaves_the_data_as_they_were(model, chat_tokenizer, tmp_path):
    rows = copy.deepcopy(ROWS)
    new = rewritten(model, chat_tokenizer, rows, nothing, max_new_tokens=12, cache=tmp_path)
    assert new.rows == ROWS
    assert all(one is row for one, row in zip(new.rows, rows, strict=True))
    assert (new.kept, new.wrong + new.same + new.unended) == (0, 3)
    assert str(new).startswith("0 of 3 rows are in the model's own words; of the others")


def test_what_passes_is_the_models_own_and_the_model_is_asked_once(model, chat_tokenizer, tmp_path, monkeypatch):
    settings = {"max_new_tokens": 50, "cache": tmp_path}
    first = rewritten(model, chat_tokenizer, ROWS, anything, **settings)
    assert not first.from_cache
    assert first.kept + first.same + first.unended == 3
    changed = [new is not row for new, row in zip(first.rows, ROWS, strict=True)]
    assert sum(changed) == first.kept > 0
    for new, row in zip(first.rows, ROWS, strict=True):
        assert new["prompt"] == row["prompt"]
        assert new["completion"][0]["role"] == "assistant"
    monkeypatch.setattr(sys.modules[answered.__module__], "continuations", None)
    again = rewritten(model, chat_tokenizer, ROWS, anything, **settings)
    assert again.from_cache
    assert again.rows == first.rows
    words = next(new["completion"][0]["content"] for new in first.rows if new not in ROWS).split()[0]
    monkeypatch.setattr(rewriting, "GIVE_AWAYS", (words,))
    assert rewritten(model, chat_tokenizer, ROWS, anything, **settings).giveaways > 0
    with pytest.raises(TypeError):
        rewritten(model, chat_tokenizer, ROWS, anything, max_new_tokens=7, cache=tmp_path)


def test_an_answer_that_had_not_ended_is_not_kept(model, chat_tokenizer, tmp_path):
    new = rewritten(model, chat_tokenizer, ROWS, anything, max_new_tokens=1, cache=tmp_path)
    assert new.unended + new.kept + new.same == 3
    assert new.unended > 0


@pytest.mark.parametrize(
    ("check", "answer", "said", "passes"),
    [
        (same_text, "positive", "positive\n", True),
        (same_text, "positive", "It is positive.", False),
        (same_result, "3 + 4 = 7\n#### 7", "Three and four are 7.", True),
        (same_result, "so 1,200\n#### 1,200", "that makes 1200.", True),
        (same_result, "#### 7", "It is 7, not 8.", False),
        (same_result, "-5", "The result is \N{MINUS SIGN}5", True),
        (same_result, "#### 7", "seven", False),
        (contains_answer, "Peru", "It lies in peru, in the south.", True),
        (contains_answer, "Oman", "Romania", False),
    ],
)
def test_the_checks(check, answer, said, passes):
    assert check(answer, said) is passes


def test_every_check_takes_the_answer_itself():
    answers = {"gsm8k": "2 + 2 = 4\n#### 4", "arithmetic": "-12", "cities": "New Zealand", "ncbi_disease": "a; b"}
    assert answers.keys() == CHECKS.keys()
    assert all(check(answers[name], answers[name]) for name, check in CHECKS.items())


def test_what_cannot_be_is_refused_and_no_rows_are_none(model, chat_tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="rewrite_tokens is 0"):
        rewritten(model, chat_tokenizer, ROWS, max_new_tokens=0)
    with pytest.raises(ConfigError, match="longer than the 128"):
        rewritten(model, chat_tokenizer, ROWS, max_new_tokens=128, cache=tmp_path)
    assert rewritten(model, chat_tokenizer, []).rows == []
