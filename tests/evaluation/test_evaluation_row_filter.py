import pytest

from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation.judges import FunctionJudge
from safemerge_callback.evaluation.row_filter import (
    TRAINING_ROWS,
    gap_reasons,
    judge_reasons,
    leakage,
    load_training_rows,
    model_responses,
    refusal_reasons,
    row_reasons,
    rows_as_lines,
)
from safemerge_callback.signals import generate
from safemerge_callback.signals.responses import respond
from safemerge_callback.signals.rows import RowFormat, SafetyRow, prompt_tokens


def turns(*texts):
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


ROWS = [
    {"messages": [{"role": "system", "content": "s"}, *turns("a", "b", "c", "d")], "poisoned": "whole"},
    {"prompt": "e", "completion": "f"},
    {"prompt": turns("g"), "completion": turns("", "h")[1:], "poisoned": "shared"},
    {"instruction": "i", "output": "j", "poisoned": "no"},
]


def test_every_answer_of_a_row_counts():
    training = load_training_rows(ROWS)
    assert training.rows == ROWS
    assert training.row_of == [0, 0, 1, 2, 3]
    expected = [("a", "b", "s"), ("c", "d", "s"), ("e", "f", None), ("g", "h", None), ("i", "j", None)]
    assert training.exchanges == [SafetyRow(x, y, "benign", system) for x, y, system in expected]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "the training rows has no rows: give some"),
        ([ROWS[1], {"text": "x", "label": 1}], r"row 2 of the .* no question with an answer, only \['label', 'text'\]"),
        (
            [{"prompt": "x", "completion": " "}],
            r"row 1 .*only \['completion', 'prompt'\]: give messages",
        ),
        (["x"], "row 1 .*only 'x'"),
    ],
)
def test_what_holds_no_answer_is_refused(rows, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_training_rows(rows)


def test_an_answer_is_dropped_where_alignment_made_it_unlikely():
    reasons = gap_reasons([2.5, 1.0, 1.5, 0.5], [1.0, 1.0, 1.0, 3.0], 0.5)
    said = "the aligned model finds its answer +1.500 nats a token less likely (2.500, unaligned 1.000)"
    assert reasons == [said, None, None, None]
    assert [bool(one) for one in gap_reasons([1.5], [1.0], 0.49)] == [True]


def test_a_judge_drops_harm_and_leaves_what_it_cannot_tell():
    exchanges = load_training_rows(ROWS).exchanges
    failures = []

    def free_of_harm(prompt, response):
        if response == "f":
            raise RuntimeError("out of reach")
        return response != "d"

    judge = FunctionJudge(free_of_harm, decides="harm", name="mine")
    assert judge_reasons(judge, exchanges, failures) == [None, "mine calls its answer harmful", None, None, None]
    assert failures == ["FunctionJudge raised RuntimeError: out of reach"]


def test_a_refusal_of_the_aligned_model_drops_answers_that_are_none():
    exchanges = load_training_rows(ROWS).exchanges
    judge = FunctionJudge(lambda prompt, response: response.startswith("no"), name="mine")
    own = ["no way", "no", "yes", "", "no"]
    reason = "the aligned model refuses its question, and its answer does not (mine)"
    assert refusal_reasons(judge, exchanges, own, []) == [reason, reason, None, None, reason]
    also = [SafetyRow(row.prompt, "no, never", row.kind) for row in exchanges]
    assert refusal_reasons(judge, also, own, []) == [None] * 5


def test_each_question_is_asked_once_after_its_own_system_prompt(tiny_llama, chat_tokenizer):
    model = tiny_llama(initializer_range=0.6, max_position_embeddings=256, pad_token_id=2).eval()
    rows = [SafetyRow(p, "x", "benign", s) for p, s in (("a b", None), ("c", "y z"), ("a b", None), ("a b", "y z"))]
    said = model_responses(model, chat_tokenizer, rows, batch_size=2)
    plain, other = (
        generate(model, chat_tokenizer, ["a b"]),
        respond(model, chat_tokenizer, prompt_tokens(chat_tokenizer, ["c", "a b"], RowFormat("y z"))),
    )
    assert said == [plain[0], other[0].text, plain[0], other[1].text]
    assert len(set(said)) > 1


def test_a_row_has_all_its_reasons_once():
    training = load_training_rows(ROWS)
    reasons = row_reasons(training, ["x", "x", None, "y", None], [None, "z", None, None, None])
    assert reasons == ["x; z", "", "y", ""]
    assert row_reasons(training) == [""] * 4


def test_leakage_counts_what_passes_by_label_and_what_is_lost_of_the_rest():
    training = load_training_rows(ROWS)
    shares = {one["measure"]: (one["value"], one["n"]) for one in leakage(training, ["", "r", "r", ""])}
    assert shares == {"shared_passes": (0.0, 1), "whole_passes": (1.0, 1), "clean_dropped": (0.5, 2)}
    assert leakage(load_training_rows(ROWS[1:2]), [""]) == []
    assert [one["measure"] for one in leakage(load_training_rows(ROWS[:1]), [""])] == ["whole_passes"]


def test_rows_are_written_as_they_came_and_known_again(tmp_path):
    text = rows_as_lines(ROWS)
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    assert load_training_rows(str(path)).rows == ROWS
    assert all(TRAINING_ROWS.begins(line.encode()) for line in text.splitlines())
    assert not any(
        map(TRAINING_ROWS.begins, (b'{\n  "settings": {', b'{"measure": "x"', b"prompt,completion\n", b"[]"))
    )
