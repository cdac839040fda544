import copy
from dataclasses import replace

import pytest

from safemerge_callback.errors import ConfigError
from safemerge_callback.signals.responses import tokenized
from safemerge_callback.signals.rows import RowFormat, RowTokens, SafetyRow, prompt_tokens, row_tokens

ROWS = [
    SafetyRow("a b", "w1 w2 w3", "harm"),
    SafetyRow("c d", "w4 w5", "benign", "e f"),
    SafetyRow("g", "w6", "benign"),
]


@pytest.fixture
def tokenizer(chat_tokenizer):
    return chat_tokenizer


def written(tokenizer, row):
    return tokenizer.decode(row.prompt), tokenizer.decode(row.response)


def test_rows_are_written_as_the_template_writes_a_conversation(tokenizer):
    rows = row_tokens(tokenizer, ROWS)
    assert [written(tokenizer, row) for row in rows] == [
        ("<s> user a b <end> <s> bot", "w1 w2 w3 <end>"),
        ("<s> bot e f <end> <s> user c d <end> <s> bot", "w4 w5 <end>"),
        ("<s> user g <end> <s> bot", "w6 <end>"),
    ]
    assert [row.kind for row in rows] == ["harm", "benign", "benign"]
    for row, text in zip(rows, ROWS, strict=True):
        system = [{"role": "system", "content": text.system}] if text.system else []
        turns = [{"role": "user", "content": text.prompt}, {"role": "assistant", "content": text.response}]
        whole = tokenizer.apply_chat_template([*system, *turns], tokenize=False)
        assert [*row.prompt, *row.response] == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_the_first_tokens_alone(tokenizer):
    rows = row_tokens(tokenizer, ROWS, first_tokens=2)
    assert [written(tokenizer, row)[1] for row in rows] == ["w1 w2", "w4 w5", "w6 <end>"]


def test_rows_in_the_format_of_the_data(tokenizer):
    form = RowFormat("h i", "w7 {prompt} w8")
    assert [written(tokenizer, row)[0] for row in row_tokens(tokenizer, ROWS, form)] == [
        "<s> bot h i <end> <s> user w7 a b w8 <end> <s> bot",
        "<s> bot e f <end> <s> user w7 c d w8 <end> <s> bot",
        "<s> bot h i <end> <s> user w7 g w8 <end> <s> bot",
    ]
    assert prompt_tokens(tokenizer, ["a b"]) == tokenized(tokenizer, ["a b"])


def test_without_the_chat_template_the_wrapper_is_all(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    form = RowFormat(None, "w7 {prompt} w8", chat=False)
    assert [written(bare, row) for row in row_tokens(bare, ROWS[::2], form)] == [
        ("w7 a b w8", "w1 w2 w3 <end>"),
        ("w7 g w8", "w6 <end>"),
    ]
    with pytest.raises(ConfigError, match="system 'e f' has no place without the chat template"):
        row_tokens(bare, ROWS, form)
    with pytest.raises(ConfigError, match="no chat template"):
        row_tokens(bare, ROWS)


def test_a_template_that_writes_finished_turns_otherwise(tokenizer, thinker):
    """The prompt opens a thought, and a turn that is over shows none: the response follows as it is."""
    thinker.chat_template = (
        "{% for m in messages %}<s> {{ m.role }} {{ m.content }} <end> {% endfor %}"
        "{% if add_generation_prompt %}<s> bot <think>{% endif %}"
    )
    (row, *_) = row_tokens(thinker, ROWS[:1])
    assert written(thinker, row)[1] == "w1 w2 w3 <end>"


def test_a_template_that_loses_a_response_or_a_system_prompt(tokenizer):
    lossy = copy.deepcopy(tokenizer)
    lossy.chat_template = (
        "{% for m in messages if m.role == 'user' %}<s> user {{ m.content }} <end> {% endfor %}<s> bot"
    )
    with pytest.raises(ConfigError, match="the chat template loses the response 'w1 w2 w3'"):
        row_tokens(lossy, ROWS[:1])
    with pytest.raises(ConfigError, match="system prompt 'e f' is one that the chat template loses: set tokenizer"):
        row_tokens(lossy, ROWS[1:2])
    lossy.chat_template = "{{ raise_exception('System role not supported') if messages[0].role == 'system' }}" + (
        tokenizer.chat_template
    )
    with pytest.raises(ConfigError, match=r"'e f' is one that the chat template cannot write \(.*not supported\)"):
        row_tokens(lossy, ROWS[1:2])


def test_a_format_holds_the_prompt_once():
    for template in ("no place", "{prompt} and {prompt}"):
        with pytest.raises(ConfigError, match=r"must hold \{prompt\} once"):
            RowFormat(template=template)
    assert RowFormat(template="a {b} {prompt}").wrapped("c {prompt}") == "a {b} c {prompt}"


@pytest.mark.parametrize(
    ("column", "who"), [("prompt", "prompt 1 of 1"), ("response", "a response"), ("system", "row format: system")]
)
@pytest.mark.parametrize("chat", [True, False])
def test_half_of_a_letter_is_no_text(tokenizer, column, who, chat):
    if column == "system" and not chat:
        return
    row = replace(ROWS[0], **{column: "a \ud83d"})
    with pytest.raises(ConfigError, match=f"{who} holds half of a letter"):
        row_tokens(tokenizer, [row], RowFormat(template="{prompt}", chat=chat))


def test_no_rows_are_no_tokens(tokenizer):
    assert row_tokens(tokenizer, []) == ()
    assert row_tokens(tokenizer, ROWS[:1])[0] == RowTokens(
        tuple(tokenized(tokenizer, ["a b"])[0]), tuple(tokenizer("w1 w2 w3 <end>")["input_ids"]), "harm"
    )
