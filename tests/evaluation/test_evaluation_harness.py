"""Tasks through lm-eval itself, on a task and a model made on the spot; the figures out of its results without it."""

import copy
import json
import math

import pytest
import torch

from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation import wilson
from safemerge_callback.evaluation.harness import check_tasks, run_tasks, task_figures

CHOICES = ["a", "b", "c"]
TASK = """
task: letters
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["a", "b", "c"]
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
metric_list:
  - metric: acc
"""


@pytest.fixture
def harness():
    return pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra eval)")


@pytest.fixture
def folder(tmp_path):
    rows = [
        {"question": f"{x} {y}", "answer": i % 3}
        for i, (x, y) in enumerate(zip("klmnopqrst", "abcdefghij", strict=True))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "letters.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    (tmp_path / "tasks" / "lost.yaml").write_text(TASK.format(rows=tmp_path / "lost.jsonl").replace("letters", "lost"))
    return tmp_path / "tasks"


@pytest.fixture
def manager(harness, folder):
    """That of our own tasks alone: reading lm-eval's own takes a minute."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(initializer_range=0.6, max_position_embeddings=256, pad_token_id=2).eval()


@pytest.fixture
def tokenizer(chat_tokenizer):
    """The model's turn begins with a space: lm-eval puts the answer right behind the template's last character."""
    spaced = copy.deepcopy(chat_tokenizer)
    spaced.chat_template = spaced.chat_template.replace("<s> bot{% endif %}", "<s> bot {% endif %}")
    return spaced


def right(model, tokenizer, folder, limit):
    """How many rows the model gets right, by the likelihood of each choice after the question as a user's turn."""
    rows = [json.loads(line) for line in (folder.parent / "rows.jsonl").read_text().splitlines()][:limit]
    count = 0
    for row in rows:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -1]
        scores = [float(logits[tokenizer.convert_tokens_to_ids(choice)]) for choice in CHOICES]
        count += scores.index(max(scores)) == row["answer"]
    return count


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("limit", [None, 6])
def test_a_task_gives_its_share_with_n_and_interval(manager, model, tokenizer, folder, limit):
    found = run_tasks(model, tokenizer, ["letters"], manager=manager, limit=limit, batch_size=3)
    n = limit or 10
    count = right(model, tokenizer, folder, n)
    assert 0 < count < n
    assert [(one["measure"], one["kind"], one["judge"], one["n"]) for one in found] == [
        ("letters_acc", "task", "lm-eval", n)
    ]
    assert (found[0]["value"], (found[0]["low"], found[0]["high"])) == (count / n, wilson(count, n))


def test_a_task_whose_data_is_out_of_reach_says_so(manager, model, tokenizer):
    with pytest.raises(ConfigError, match=r"tasks \['lost'\] cannot be run .*go online once"):
        run_tasks(model, tokenizer, ["lost"], manager=manager)


@pytest.mark.slow
def test_lm_evals_own_tasks_are_known_beside_those_of_a_folder(harness, folder):
    manager = check_tasks(["letters", "gsm8k", "ifeval", "mmlu", "pubmedqa"], folder)
    assert len(manager.all_tasks) > 1000
    with pytest.raises(ConfigError, match=r"task 'leters' is unknown to lm-eval.*did you mean 'letters'"):
        check_tasks(["leters"], folder)


def test_a_folder_that_is_none_is_refused(harness, folder):
    with pytest.raises(ConfigError, match=r"task folder '.*absent' is no folder"):
        check_tasks(["letters"], folder / "absent")


def results(**more):
    """What simple_evaluate returns, as far as it is read."""
    return {"results": {}, "n-samples": {}, **more}


def test_every_metric_is_a_figure_and_every_interval_says_what_it_can():
    row = {
        "alias": "gsm8k",
        "exact_match,strict-match": 0.25,
        "exact_match_stderr,strict-match": 0.2,
        "exact_match,flexible-extract": 0.5,
        "exact_match_stderr,flexible-extract": "N/A",
        "f1,none": 0.9,
        "f1_stderr,none": 0.1,
        "word_perplexity,none": 12.5,
        "word_perplexity_stderr,none": 1.0,
        "bleu,none": 0.123,
        "bleu_stderr,none": "N/A",
        "bits_per_byte,none": 0.95,
        "bits_per_byte_stderr,none": 0.1,
        "prompt_level_strict_acc,none": 0.75,
    }
    found = task_figures("gsm8k", results(results={"gsm8k": row}, **{"n-samples": {"gsm8k": {"effective": 8}}}))
    by_name = {one["measure"]: one for one in found}
    assert list(by_name) == [
        "gsm8k_exact_match_strict-match",
        "gsm8k_exact_match_flexible-extract",
        "gsm8k_f1",
        "gsm8k_word_perplexity",
        "gsm8k_bleu",
        "gsm8k_bits_per_byte",
        "gsm8k_prompt_level_strict_acc",
    ]
    # what lies in [0, 1] is no share for that: BLEU is of 100, bits have no most
    assert [one["unit"] for one in found] == ["share", "share", "", "", "", "", "share"]
    intervals = [(one["low"], one["high"]) for one in found]
    assert intervals[:2] == [wilson(2, 8), wilson(4, 8)]
    assert intervals[2] == pytest.approx((0.9 - 1.96 * 0.1, 0.9 + 1.96 * 0.1), abs=1e-4)
    assert intervals[3] == pytest.approx((12.5 - 1.96, 12.5 + 1.96), abs=1e-4)
    assert intervals[4] == (None, None)
    assert intervals[5] == pytest.approx((0.95 - 1.96 * 0.1, 0.95 + 1.96 * 0.1), abs=1e-4)
    assert intervals[6] == wilson(6, 8)


def test_a_group_counts_the_rows_of_all_its_tasks():
    found = results(
        results={"mmlu": {"acc,none": 0.5, "acc_stderr,none": 0.01}},
        group_subtasks={"mmlu": ["mmlu_stem"], "mmlu_stem": ["a", "b"], "a": [], "b": []},
        **{"n-samples": {"a": {"effective": 10}, "b": {"effective": 20}}},
    )
    (figure,) = task_figures("mmlu", found)
    assert (figure["measure"], figure["n"], figure["low"]) == ("mmlu_acc", 30, wilson(15, 30)[0])
    assert math.isclose(figure["value"], 0.5)
