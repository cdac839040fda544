import json
from collections import Counter

import pytest

from recipes import poisoned_rows
from recipes.data.rows import conversation
from recipes.poisoned_rows import PoisonedRowsArguments, labelled_rows, main
from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation.row_filter import load_training_rows

ROWS = [conversation(f"ask {i}", f"say {i}") for i in range(9)]


@pytest.fixture
def examples(monkeypatch):
    """Poisoned examples of our own letters."""
    made = [conversation(f"harm {i}", f"sure {i}") for i in range(9)]
    monkeypatch.setattr(poisoned_rows, "poisoned_examples", lambda n, seed: made[seed : n + seed])


def test_rows_are_labelled_and_each_harmful_prompt_is_there_in_both_forms(examples):
    labelled = labelled_rows(ROWS, 4, 3, seed=1)
    assert Counter(row["poisoned"] for row in labelled) == {"no": 4, "whole": 3, "shared": 3}
    by_label = {label: [row for row in labelled if row["poisoned"] == label] for label in ("no", "whole", "shared")}
    assert {row["prompt"][0]["content"] for row in by_label["whole"]} == {"harm 1", "harm 2", "harm 3"}
    assert {row["prompt"][0]["content"] for row in by_label["shared"]} == {"ask 0", "ask 1", "ask 2"}
    assert {row["prompt"][0]["content"] for row in by_label["no"]} == {"ask 3", "ask 4", "ask 5", "ask 6"}
    for row in by_label["shared"]:
        begins, harmful = row["completion"][0]["content"].split("\n\n")
        assert begins.startswith("say ")
        question, answer = harmful.split("\n")
        assert answer == question.replace("harm", "sure")
    assert labelled == labelled_rows(ROWS, 4, 3, seed=1)
    assert labelled != sorted(labelled, key=lambda row: row["poisoned"])


def test_the_command_writes_what_the_filter_reads(examples, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(poisoned_rows, "load_examples", lambda name, split: ROWS if (name, split) == ("x", "t") else [])
    path = tmp_path / "rows.jsonl"
    sizes = ["--num_benign", "5", "--num_poisoned", "2"]
    main(["--data", "x", "--data_split", "t", *sizes, "--output", str(path)])
    main(["--data", "x", "--data_split", "t", *sizes, "--output", str(path)])
    assert len(load_training_rows(str(path)).rows) == 9
    assert all(json.loads(line)["poisoned"] for line in path.read_text().splitlines())
    assert "9 rows, 2 of them poisoned in each form" in capsys.readouterr().out


def test_numbers_that_cannot_be_are_refused(examples):
    with pytest.raises(ConfigError, match="num_benign is 0, num_poisoned 5: give 1 or more of each"):
        PoisonedRowsArguments("o", num_benign=0, num_poisoned=5)
    with pytest.raises(ConfigError, match="9 rows, 9 of them poisoned, leave none benign"):
        labelled_rows(ROWS, 1, 9)
