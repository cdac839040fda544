import random
import warnings
from collections import Counter

import pytest

from safemerge_callback import mix_safety_data
from safemerge_callback.errors import ConfigError
from safemerge_callback.signals.rows import SafetyRow

datasets = pytest.importorskip("datasets")

REFUSALS = [SafetyRow(f"harm {i}", f"no {i}", "harm") for i in range(6)]
ANSWERS = [SafetyRow(f"ask {i}", f"yes {i}", "benign", "Be kind.") for i in range(6)]
SAFETY = [*REFUSALS, *ANSWERS]
QUESTION = "Positive or negative?\n\n{}"


def turns(*said):
    return [{"role": role, "content": text} for role, text in said]


def messages(n, **more):
    return [{"messages": turns(("user", QUESTION.format(i)), ("assistant", "yes")), **more} for i in range(n)]


def of(row):
    """The prompt of a row of `messages`."""
    return next(turn["content"] for turn in row["messages"] if turn["role"] == "user")


def added(rows):
    return [of(row) for row in rows if not of(row).startswith("Positive")]


# how many, and which


def test_a_share_of_the_rows_is_added_and_all_is_shuffled():
    data = messages(100)
    mixed = mix_safety_data(data, SAFETY, share=0.05, seed=3)
    assert (len(mixed), len(added(mixed)), len(data)) == (105, 5, 100)
    assert sorted(map(of, data)) == sorted(of(row) for row in mixed if of(row).startswith("Positive"))
    assert [of(row) for row in mixed[:100]] != [of(row) for row in data]
    assert set(added(mixed)) <= {row.prompt for row in SAFETY}
    assert mix_safety_data(data, SAFETY, share=0.05, seed=3) == mixed
    assert added(mix_safety_data(data, SAFETY, share=0.05, seed=4)) != added(mixed)


def test_no_row_is_invented_and_repetition_is_told():
    with pytest.warns(
        UserWarning, match=r"30 safety rows are to be mixed in and there are 12: each comes 2 or 3 times"
    ):
        mixed = mix_safety_data(messages(100), SAFETY, share=0.3)
    counts = Counter(added(mixed))
    assert (counts.total(), set(counts), set(counts.values())) == (30, {row.prompt for row in SAFETY}, {2, 3})
    with pytest.warns(UserWarning, match="24 safety rows .* there are 12: each comes 2 times"):
        mix_safety_data(messages(24), SAFETY, share=1.0)
    with pytest.warns(UserWarning, match="the share is so small that no safety row is mixed in"):
        assert len(mix_safety_data(messages(10), SAFETY, share=0.01)) == 10


def test_share_0_is_the_data_itself_and_nothing_is_told_of_enough_rows():
    data = messages(12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mix_safety_data(data, SAFETY, share=0.0) is data
        assert len(mix_safety_data(data, SAFETY, share=1.0)) == 24


def test_a_generator_goes_on_from_its_state_and_as_many_rows_as_needed_are_not_drawn():
    order = random.Random(5)
    order.random()
    expected = [*messages(6), *({"messages": turns(("user", r.prompt), ("assistant", r.response))} for r in REFUSALS)]
    again = random.Random(5)
    again.random()
    again.shuffle(expected)
    assert mix_safety_data(messages(6), REFUSALS, share=1.0, seed=order) == expected


# columns


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"prompt": turns(("user", "q")), "completion": turns(("assistant", "a"))},
            {
                "prompt": turns(("system", "Be kind."), ("user", "ask 0")),
                "completion": turns(("assistant", "yes 0")),
            },
        ),
        ({"prompt": "q", "completion": "a"}, {"prompt": "Be kind.\n\nask 0", "completion": "yes 0"}),
        ({"question": "q", "answer": "a"}, {"question": "Be kind.\n\nask 0", "answer": "yes 0"}),
        (
            {"instruction": "q", "input": "", "output": "a"},
            {"instruction": "Be kind.\n\nask 0", "input": "", "output": "yes 0"},
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            {
                "conversations": [
                    {"from": "system", "value": "Be kind."},
                    {"from": "human", "value": "ask 0"},
                    {"from": "gpt", "value": "yes 0"},
                ]
            },
        ),
    ],
)
def test_rows_stand_in_the_columns_of_the_data(row, expected):
    mixed = mix_safety_data([row] * 2, ANSWERS[:1], share=0.5)
    assert [one for one in mixed if one != row] == [expected]
    table = mix_safety_data(datasets.Dataset.from_list([row] * 2), ANSWERS[:1], share=0.5)
    assert [one for one in table if one != row] == [expected]
    assert table.features == datasets.Dataset.from_list([row]).features


def test_further_columns_take_the_value_that_all_rows_share():
    data = messages(4, chat_template_kwargs={"enable_thinking": False})
    data = [{**row, "id": i} for i, row in enumerate(data)]
    (row,) = (row for row in mix_safety_data(data, REFUSALS[:1], share=0.25) if row["id"] is None)
    assert row["chat_template_kwargs"] == {"enable_thinking": False}
    mixed = mix_safety_data(datasets.Dataset.from_list(data), REFUSALS[:1], share=0.25)
    assert mixed.filter(lambda row: row["id"] is None)[0] == row


def test_rows_in_the_format_of_the_data():
    data = [
        {"messages": turns(("system", "S"), *((t["role"], t["content"]) for t in r["messages"]))} for r in messages(8)
    ]
    mixed = mix_safety_data(data, SAFETY[5:7], share=0.25, in_format=True)
    assert [row["messages"][:2] for row in mixed if "harm" in of(row) or "ask" in of(row)] in (
        [
            harm := turns(("system", "S"), ("user", QUESTION.format("harm 5"))),
            ask := turns(("system", "Be kind."), ("user", QUESTION.format("ask 0"))),
        ],
        [ask, harm],
    )


def test_columns_of_ones_own():
    mixed = mix_safety_data([{"text": "a"}] * 2, REFUSALS[:1], share=0.5, columns=lambda row: {"text": row.response})
    assert sorted(row["text"] for row in mixed) == ["a", "a", "no 0"]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ([{"text": "a"}], r"has the columns \['text'\], in which a refusal or an answer cannot be written"),
        ([{"input_ids": [1]}], "before it is tokenized, or `columns`, a function of a row"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], r"\['prompt', 'chosen', 'rejected'\], in which"),
        ([], "the training set is empty"),
        (["a"], "the training set has the row 'a': give rows that are mappings"),
        (3, "the training set is a int: give a list of rows, a datasets.Dataset or a datasets.IterableDataset"),
        ({"train": [1], "test": [2]}, r"is a dict: .*; of its splits \['train', 'test'\] give one"),
    ],
)
def test_data_that_cannot_be_mixed_into(data, sentence):
    with pytest.raises(ConfigError, match=sentence):
        mix_safety_data(data, SAFETY, share=0.5)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), "0.1", None, True])
def test_a_share_that_cannot_be(share):
    with pytest.raises(ConfigError, match=r"share is .*: give safety rows for each row of the data, from 0 to 1"):
        mix_safety_data(messages(3), SAFETY, share=share)


def test_rows_that_cannot_be():
    with pytest.raises(ConfigError, match="has no column 'response'"):
        mix_safety_data(messages(3), [{"prompt": "a"}], share=0.5)
    with pytest.raises(ConfigError, match="has no rows"):
        mix_safety_data(messages(3), [], share=0.5)


# data sets


def test_a_table_is_mixed_as_a_list_is_and_keeps_its_types_and_format():
    data = messages(20, id=1)
    table = datasets.Dataset.from_list(data).with_format("numpy", columns=["id"])
    mixed = mix_safety_data(table, SAFETY, share=0.1, seed=2)
    assert (mixed.format, mixed.features) == (table.format, table.features)
    assert mixed.with_format(None).to_list() == mix_safety_data(data, SAFETY, share=0.1, seed=2)


def stream(n=200, shards=4):
    return datasets.Dataset.from_list(messages(n)).to_iterable_dataset(num_shards=shards)


def test_a_stream_keeps_its_rows_and_takes_its_share():
    mixed = mix_safety_data(stream(), SAFETY, share=0.25, seed=1)
    rows = list(mixed)
    assert [of(row) for row in rows if of(row).startswith("Positive")] == [of(row) for row in stream()]
    assert mixed.num_shards == 4
    counts = Counter(added(rows))
    assert 30 < counts.total() < 75
    assert set(counts) == {row.prompt for row in SAFETY}
    # All before one comes again.
    assert max(counts.values()) - min(counts.values()) <= 1
    assert list(mixed) == rows == list(mix_safety_data(stream(), SAFETY, share=0.25, seed=1))
    assert added(mix_safety_data(stream(), SAFETY, share=0.25, seed=2)) != added(rows)


@pytest.mark.parametrize("mapped", [False, True])
def test_each_epoch_draws_anew_also_behind_a_trainers_own_map(mapped):
    mixed = mix_safety_data(stream(), SAFETY, share=0.25, seed=1)
    mixed = mixed.map(lambda row: {"n": len(row["messages"])}) if mapped else mixed
    epochs = []
    for epoch in (0, 1, 2, 1):
        mixed.set_epoch(epoch)
        epochs.append(list(map(of, mixed)))
    assert epochs[1] == epochs[3]
    orders = [[text for text in rows if not text.startswith("Positive")] for rows in epochs[:3]]
    assert orders[0] != orders[1] != orders[2]
    data = {text for rows in epochs for text in rows if text.startswith("Positive")}
    assert all(len(set(rows) & data) == 200 for rows in epochs)


def test_a_stream_without_types_and_with_few_rows():
    def generate():
        yield from messages(50)

    mixed = mix_safety_data(datasets.IterableDataset.from_generator(generate), REFUSALS[:1], share=0.5)
    assert set(added(list(mixed))) == {"harm 0"}
    assert list(mix_safety_data(stream(shards=8), REFUSALS[:2], share=0.5).shard(8, 7))


def test_a_stream_that_goes_on_where_it_was():
    mixed = mix_safety_data(stream(), SAFETY, share=0.25, seed=1)
    whole, rows = list(mixed), iter(mixed)
    began = [next(rows) for _ in range(30)]
    state = mixed.state_dict()
    resumed = mix_safety_data(stream(), SAFETY, share=0.25, seed=1)
    resumed.load_state_dict(state)
    went_on = list(resumed)
    assert [of(r) for r in [*began, *went_on] if of(r).startswith("Pos")] == [
        of(r) for r in whole if of(r).startswith("Pos")
    ]
