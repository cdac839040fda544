import copy
import json

import pytest
import torch

from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation.rows import load_rows
from safemerge_callback.evaluation.selection import (
    check_same_tokens,
    chosen_text,
    parts,
    select_by_dpp,
    select_by_gap,
    task_tokens,
)
from safemerge_callback.signals.rows import SafetyRow

HARM = [SafetyRow(f"harm {i}", f"no {i}", "harm") for i in range(6)]
BENIGN = [SafetyRow(f"ask {i}", f"yes {i}", "benign", "Be kind.") for i in range(3)]
ROWS = [*HARM, *BENIGN]


# by the gap


def test_the_largest_gaps_of_each_kind_are_chosen():
    aligned = [1.0] * 9
    unaligned = [1.5, 3.0, 0.5, 2.0, 2.5, 1.0, 1.1, 1.3, 1.2]
    chosen = select_by_gap(ROWS, aligned, unaligned, 6)
    assert [one.row.prompt for one in chosen] == ["harm 1", "harm 4", "harm 3", "harm 0", "ask 1", "ask 2"]
    assert [one.place for one in chosen] == [1, 4, 3, 0, 7, 8]
    assert chosen[0].score == 2.0
    assert chosen[0].reason == (
        "1 of 6 harm rows by perplexity gap: +2.000 nats a token (3.000 unaligned, 1.000 aligned)"
    )
    assert [one.place for one in select_by_gap(ROWS, aligned, aligned, 3)] == [0, 1, 6]


def test_a_gap_may_be_negative_and_all_rows_may_be_wanted():
    chosen = select_by_gap(ROWS, [2.0] * 9, [1.0] * 9, 100)
    assert len(chosen) == 9
    assert "-1.000 nats" in chosen[0].reason


# by the dpp


def one_hot(*places):
    return torch.eye(8)[list(places)]


def test_relevance_decides_and_then_what_is_new():
    # harm 0 and 1 are the same and suit the task best; harm 5 does not suit it at all.
    states = torch.cat([one_hot(0, 0, 1, 2, 3, 7), one_hot(0, 1, 4)])
    task = torch.tensor([[1.0, 0.8, 0.6, 0.4, 0.2, 0, 0, 0], [0, 0, 0, 0, 0, 1.0, 0, 0]])
    chosen = select_by_dpp(ROWS, states, task, 6)
    assert [one.row.prompt for one in chosen] == ["harm 0", "harm 2", "harm 3", "harm 4", "ask 0", "ask 1"]
    q = 1 / (1 + 0.64 + 0.36 + 0.16 + 0.04) ** 0.5
    assert chosen[0].reason == f"1 of 6 harm rows by dpp: relevance {q:.3f} to the task, 100% of it new"
    assert chosen[0].score == pytest.approx(q**8)


def test_fewer_come_out_where_nothing_is_new_or_relevant():
    chosen = select_by_dpp(ROWS, one_hot(0, 0, 0, 7, 7, 7, 1, 1, 1), one_hot(0, 1), 9)
    assert [one.place for one in chosen] == [0, 6]


def test_no_relevant_row_at_all():
    with pytest.raises(ConfigError, match=r"no row has anything in common with the task \(no cosine is above 0\)"):
        select_by_dpp(ROWS, one_hot(*range(6), 1, 2, 3), -one_hot(7), 3)


def test_power_0_is_diversity_alone():
    states = torch.cat([torch.randn(6, 4), torch.randn(3, 4)])
    first = select_by_dpp(ROWS, states, torch.randn(5, 4).abs(), 6, power=0.0)
    second = select_by_dpp(ROWS, states, torch.randn(5, 4).abs(), 6, power=0.0)
    # Only a row with relevance 0 could tell: 0 to the power 0 is 1.
    assert [one.place for one in first] == [one.place for one in second]


# what both share


@pytest.mark.parametrize(
    ("rows", "count", "expected"),
    [
        (ROWS, 6, {"harm": 4, "benign": 2}),
        (ROWS, 2, {"harm": 1, "benign": 1}),
        (ROWS, 9, {"harm": 6, "benign": 3}),
        (ROWS, 99, {"harm": 6, "benign": 3}),
        ([*HARM * 20, BENIGN[0]], 50, {"harm": 49, "benign": 1}),
        ([HARM[0], *BENIGN * 20], 50, {"harm": 1, "benign": 49}),
        (HARM, 4, {"harm": 4}),
        (ROWS, 1, {"harm": 1}),
    ],
)
def test_each_kind_keeps_its_part(rows, count, expected):
    assert parts(rows, count) == expected


def test_none_cannot_be_chosen():
    with pytest.raises(ConfigError, match="0 rows are asked for: give 1 or more"):
        parts(ROWS, 0)


def test_what_was_chosen_can_be_read_again():
    chosen = select_by_gap(ROWS, [0.0] * 9, [1.0] * 9, 6)
    lines = [json.loads(line) for line in chosen_text(chosen).splitlines()]
    assert [line["reason"] for line in lines] == [one.reason for one in chosen]
    assert load_rows(lines) == tuple(one.row for one in chosen)


# the task


def test_the_tasks_rows_in_the_chat_template_or_as_they_are(tiny_llama, chat_tokenizer):
    model = tiny_llama()
    rows = [
        {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]},
        {"prompt": "a b", "completion": "c"},
        {"instruction": "a", "input": "b", "output": "c"},
        {"text": "a b c"},
        {"text": "a " * 100},
    ]
    tokens = [chat_tokenizer.decode(ids) for ids in task_tokens(model, chat_tokenizer, rows)]
    assert tokens[:4] == ["<s> user a b <end> <s> bot c <end>"] * 3 + ["a b c"]
    assert len(tokens[4].split()) == 64
    with pytest.raises(ConfigError, match=r"row 1 of the training rows is \{'x': 1\}: give rows with messages"):
        task_tokens(model, chat_tokenizer, [{"x": 1}])
    with pytest.raises(ConfigError, match="the training rows are empty"):
        task_tokens(model, chat_tokenizer, [])


def test_two_models_of_other_tokens_are_no_pair(chat_tokenizer):
    from tokenizers import Tokenizer

    check_same_tokens(chat_tokenizer, copy.deepcopy(chat_tokenizer), ROWS)
    other = copy.deepcopy(chat_tokenizer)
    built = json.loads(other.backend_tokenizer.to_str())
    words = built["model"]["vocab"]
    words["yes"], words["positive"] = words["positive"], words["yes"]
    other._tokenizer = Tokenizer.from_str(json.dumps(built))
    with pytest.raises(ConfigError, match="write the same response in different tokens: give two checkpoints"):
        check_same_tokens(chat_tokenizer, other, ROWS)
