"""What an evaluation writes is what is read of it, and what is no such file is refused."""

import json

import pytest

from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation.digests import template_digest, texts_digest
from safemerge_callback.evaluation.figures_file import figure_rows, question_keys, read_evaluation, read_figures
from safemerge_callback.evaluation.judges import KeywordJudge
from safemerge_callback.evaluation.measure import as_share, share_of
from safemerge_callback.evaluation.prompts import PromptSet

FIGURES = [
    share_of("bad_refused", "110iu", "harm", judge="keywords", prompts="d" * 64),
    as_share("gsm8k_acc", "task", 0.5, 10, 0.2, 0.8, unit="share", judge="lm-eval"),
]


class Tokenizer:
    chat_template = "{{ messages }}"


def test_what_is_written_is_read_again(tmp_path):
    sets = [PromptSet("bad", "harm", ("a", "b"), "mine", "a paper")]
    document = {
        "settings": {"max_new_tokens": 8, "chat_template_kwargs": {}, "seed": 3},
        "figures": figure_rows(FIGURES),
        **question_keys(Tokenizer(), sets, [KeywordJudge()]),
    }
    (tmp_path / "eval.json").write_text(json.dumps(document))
    found = read_evaluation(tmp_path / "eval.json")
    assert found.figures == FIGURES
    assert found.sources == {"bad": "a paper"}
    assert found.manner == {
        "max_new_tokens": 8,
        "chat_template_kwargs": {},
        "template": template_digest(Tokenizer()),
    }
    (row,) = document["sets"]
    assert (row["prompts"], row["digest"]) == (2, texts_digest(["a", "b"]))


def test_digests_tell_order_and_borders_apart():
    assert len({texts_digest(texts) for texts in (["a", "b"], ["b", "a"], ["ab"], ["a", "b", ""], ['a","b'], [])}) == 6
    named, plain = Tokenizer(), Tokenizer()
    named.chat_template = {"default": "{{ messages }}"}
    assert template_digest(named) != template_digest(plain)
    plain.chat_template = None
    assert template_digest(plain) == ""


@pytest.mark.parametrize(
    "text",
    [
        *("[]", "{}", "{"),
        *('{"figures": {}}', '{"figures": [1]}', '{"figures": [{"measure": "a", "kind": "odd"}]}'),
        '{"figures": [{"measure": "bad", "kind": "harm", "n": 10, "value": 1.0, "low": 0.9, "high": 0.8}]}',
        '{"figures": [{"measure": "bad", "kind": "harm", "n": 2, "value": 1.0, "outcomes": "110"}]}',
        '{"figures": [{"measure": "bad", "kind": "harm", "n": 2, "value": 1.0, "outcomes": "10"}]}',
        '{"figures": [{"measure": "bad", "kind": "harm", "n": 2, "value": 1.0, "outcomes": "1x"}]}',
    ],
)
def test_figures_that_are_none_of_ours_are_refused(tmp_path, text):
    file = tmp_path / "eval.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"eval\.json"):
        read_figures(file)
