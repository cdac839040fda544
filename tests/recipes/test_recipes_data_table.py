"""Rows of one's own: files and data sets of the Hub, in every form, and what is refused."""

import json
import re
from pathlib import Path

import pytest

from recipes import guarded_trainer
from recipes.data import load_examples
from recipes.data.rows import conversation
from recipes.finetune import DataArguments, build_trainer, load_data, parse_finetune
from safemerge_callback.errors import ConfigError

PAGE = (Path(__file__).parents[2] / "docs" / "own_data.md").read_text(encoding="utf-8")
ROW = conversation("My parcel is late.", "delivery")
# transformers 5.23 calls it activation_checkpointing; trl 1.x, and earlier transformers, know the old name alone
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
USER, BOT = ROW["prompt"][0], ROW["completion"][0]
QUESTION, ANSWER = USER["content"], BOT["content"]


def written(folder, *rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, BOT]},
        {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}], "id": 3},
        {"prompt": QUESTION, "completion": ANSWER},
        {"prompt": [USER], "completion": [BOT], "source": "shop"},
        {"prompt": QUESTION, "response": ANSWER},
        {"instruction": QUESTION, "input": "", "output": ANSWER},
        {"question": QUESTION, "answer": ANSWER},
    ],
    ids=lambda row: "-".join(row),
)
def test_every_form_is_the_same_conversation(tmp_path, row):
    assert load_examples(written(tmp_path, row)) == [ROW]


def test_csv_and_json_are_read_as_json_lines_are(tmp_path):
    (tmp_path / "rows.csv").write_text(f'prompt,completion\n"{QUESTION}",{ANSWER}\n')
    (tmp_path / "rows.json").write_text(json.dumps([{"question": QUESTION, "answer": ANSWER}]))
    assert [load_examples(str(tmp_path / f"rows.{ending}")) for ending in ("csv", "json")] == [[ROW], [ROW]]


def test_of_a_conversation_the_last_answer_is_learned_and_the_rest_is_the_prompt(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "Since when?"}]
    turns += [{"role": "user", "content": "Monday."}, BOT]
    assert load_examples(written(tmp_path, {"messages": turns})) == [{"prompt": turns[:-1], "completion": [BOT]}]


def test_a_data_set_of_the_hub_is_asked_for_by_its_split_and_revision(monkeypatch):
    import datasets

    asked_for = []

    def load_dataset(repo, **how):
        asked_for.append((repo, how))
        return [{"messages": [USER, BOT]}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_examples("shop/tickets@v2", "validation") == [ROW]
    assert asked_for == [("shop/tickets", {"revision": "v2", "split": "validation"})]


LACKS = "has no question with an answer in its columns"


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([{"text": "x"}], rf"row 1 of data '.*rows.jsonl' {LACKS} \['text'\]\. Give messages, a list of turns"),
        ([ROW, {"prompt": "a", "completion": ""}], r"row 2 .*, of which \['completion'\] are empty"),
        ([{"messages": [USER]}], rf"{LACKS} \['messages'\]\. Give .* the last one the assistant's"),
        ([{"messages": [BOT, USER]}], LACKS),
        ([{"prompt": "a", "chosen": "b"}], LACKS),
        ([{"messages": [USER, {"role": "tool", "content": "3"}, BOT]}], "turn 2 has the role 'tool': a recipe knows"),
        ([{"messages": [USER, {"role": "assistant", "content": None}]}], "turn 2, the assistant's, has no text"),
        ([{"prompt": "a\ud800", "completion": "b"}], "turn 1 holds half of a letter"),
        ([], "has no rows: give at least one, with messages"),
    ],
)
def test_a_row_without_question_and_answer_is_refused_with_its_columns(tmp_path, rows, match):
    with pytest.raises(ConfigError, match=match):
        load_examples(written(tmp_path, *rows))


def test_a_source_that_is_none_is_refused_with_what_is_allowed(tmp_path):
    with pytest.raises(ConfigError, match=r"'tickets' is unknown.*Or give rows of your own, a file \(.jsonl"):
        load_examples("tickets")
    for name in ("tickets.jsonl", "no/such/folder/tickets.csv"):
        with pytest.raises(ConfigError, match="there is no such file"):
            load_examples(name)
    with pytest.raises(ConfigError, match=r"give a file that ends in .csv, .jsonl, .json"):
        load_examples(written(tmp_path, ROW, name="rows.md"))
    with pytest.raises(ConfigError, match="is a file, which has no split 'test': leave data_split out"):
        load_examples(written(tmp_path, ROW), "test")


def test_the_data_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(guarded_trainer, "load_model", lambda *args, **how: pytest.fail("a model was loaded"))
    words = ["--data", str(tmp_path / "none.jsonl"), "--model_name_or_path", "m", "--output_dir", str(tmp_path)]
    with pytest.raises(ConfigError, match="there is no such file"):
        build_trainer(*parse_finetune([*words, "--bf16", "false", "--use_cpu", "true"]))


def test_the_example_of_the_page_is_read(tmp_path, monkeypatch):
    (rows,), (settings, mixture) = (re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL) for kind in ("json", "yaml"))
    (tmp_path / "tickets.jsonl").write_text(rows)
    root = Path(__file__).parents[2]
    (tmp_path / "tickets.yaml").write_text(settings.replace("base: ", f"base: {root}/"))
    monkeypatch.chdir(tmp_path)
    data, _, _, safemerge = parse_finetune(["--config", "tickets.yaml"])
    loaded = load_data(data).to_list()
    assert [row["completion"][0]["content"] for row in loaded] == ["delivery", "billing"]
    assert [[turn["role"] for turn in row["prompt"]] for row in loaded] == [["user"], ["system", "user"]]
    assert [one.kind.name for one in safemerge.chosen_corrections] == ["replay"]
    assert DataArguments("tickets.jsonl").data in settings
    (tmp_path / "mixture.yaml").write_text(mixture + "output_dir: out\nbf16: false\nuse_cpu: true\n")
    data, *_ = parse_finetune(["--config", "mixture.yaml"])
    assert [entry["path"] for entry in data.datasets] == ["org/name", "json", "tickets.jsonl"]
