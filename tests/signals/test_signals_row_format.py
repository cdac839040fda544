import pytest

from safemerge_callback.signals.row_format import format_of
from safemerge_callback.signals.rows import RowFormat

TOPICS = ["rivers", "the moon", "old trains", "rain", "bread", "chess"]
QUESTION = "Is this positive or negative? Answer with one word.\n\n{}"


def chat(*turns, column="messages", **more):
    return {column: [{"role": role, "content": text} for role, text in turns], **more}


def test_the_system_prompt_and_the_words_around_each_question():
    rows = [chat(("system", "Be brief."), ("user", f"Q: {t}\n### Answer:"), ("assistant", t)) for t in TOPICS]
    assert format_of(rows) == RowFormat("Be brief.", "Q: {prompt}\n### Answer:")


@pytest.mark.parametrize("column", ["messages", "prompt", "chosen"])
def test_conversations_of_every_trainer(column):
    rows = [chat(("user", QUESTION.format(t)), column=column, completion="x") for t in TOPICS]
    assert format_of(rows) == RowFormat(None, QUESTION.format("{prompt}"))


def test_sharegpt_and_contents_in_parts():
    rows = [{"conversations": [{"from": "human", "value": QUESTION.format(t)}]} for t in TOPICS]
    parts = [chat(("user", [{"type": "image"}, {"type": "text", "text": QUESTION.format(t)}])) for t in TOPICS]
    assert format_of(rows) == format_of(parts) == RowFormat(None, QUESTION.format("{prompt}"))


def test_a_text_as_prompt_is_trained_on_without_the_chat_template():
    rows = [{"prompt": f"### Instruction:\n{t}\n\n### Response:", "completion": "x"} for t in TOPICS]
    assert format_of(rows) == RowFormat(None, "### Instruction:\n{prompt}\n\n### Response:", chat=False)


def test_words_that_questions_share_by_chance_are_no_wrapper():
    rows = [chat(("user", f"What is the capital of {t}?")) for t in TOPICS]
    assert format_of(rows) == RowFormat()
    # As well as two rows alone, which share much.
    assert format_of([chat(("user", QUESTION.format(t))) for t in TOPICS[:2] * 9]) == RowFormat()
    assert format_of([chat(("user", f"Fill in {{prompt}}:\n{t}")) for t in TOPICS]) == RowFormat()


def test_what_most_rows_have():
    plain = [chat(("user", t)) for t in TOPICS]
    asked = [chat(("system", "Be kind."), ("user", t)) for t in [*TOPICS, "tea"]]
    assert format_of([*plain, *asked]) == RowFormat("Be kind.")
    assert format_of([*plain, *asked[:4]]) == RowFormat()


@pytest.mark.parametrize(
    "rows", [[], [{"input_ids": [1]}], [{"text": "a"}], ["a"], [{"messages": []}], [{"prompt": 3}]]
)
def test_what_cannot_be_read(rows):
    assert format_of(rows) is None


def test_of_a_data_set_the_first_rows_are_read_and_it_is_as_it_was():
    datasets = pytest.importorskip("datasets")
    rows = [chat(("system", "Be brief."), ("user", QUESTION.format(t))) for t in TOPICS]
    found = RowFormat("Be brief.", QUESTION.format("{prompt}"))
    table = datasets.Dataset.from_list(rows)
    assert format_of(table) == format_of(table.to_iterable_dataset()) == found
    stream = table.to_iterable_dataset()
    format_of(stream)
    assert len(list(stream)) == len(rows)

    def endless():
        while True:
            yield rows[0]

    assert format_of(endless()) == RowFormat("Be brief.")
