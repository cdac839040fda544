import json

import pytest

from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation.rows import load_rows, rows_text
from safemerge_callback.signals.rows import SafetyRow

ROWS = (
    SafetyRow("How do I harm?", "I'm sorry, but no.", "harm"),
    SafetyRow("How do I bake?", 'With "flour",\nand water.', "benign", "Be kind."),
    SafetyRow("Was ist das?", "Ein\u2028Brot.", "benign"),
)
TABLE = [{"prompt": r.prompt, "response": r.response, "kind": r.kind, "system": r.system} for r in ROWS]


def test_a_list_of_rows_or_mappings():
    assert load_rows(list(ROWS)) == load_rows(TABLE) == ROWS
    assert load_rows([*ROWS, *TABLE]) == (*ROWS, *ROWS)


def test_files(tmp_path):
    (tmp_path / "rows.jsonl").write_text(rows_text(ROWS), encoding="utf-8")
    (tmp_path / "rows.json").write_text(json.dumps(TABLE))
    lines = ["prompt,response,kind,system"]
    lines += [",".join('"' + (row[name] or "").replace('"', '""') + '"' for name in row) for row in TABLE]
    (tmp_path / "rows.csv").write_text("\n".join(lines), encoding="utf-8")
    for name in ("rows.jsonl", "rows.json", "rows.csv"):
        assert load_rows(tmp_path / name) == ROWS
        assert load_rows(str(tmp_path / name)) == ROWS


def test_files_with_a_mark_before_the_text(tmp_path):
    lines = {"rows.jsonl": rows_text(ROWS), "rows.json": json.dumps(TABLE), "rows.csv": "prompt,response\na,b\n"}
    for name, text in lines.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        rows = load_rows(tmp_path / name, both=False)
        assert rows == (ROWS if name != "rows.csv" else (SafetyRow("a", "b", "benign"),))


@pytest.mark.parametrize("column", ["prompt", "response", "system"])
def test_half_of_a_letter_is_refused_with_its_row(tmp_path, column):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in changed(**{column: "so \ud83d"})))
    with pytest.raises(
        ConfigError, match=rf"row 1 of .*rows\.jsonl': {column} holds half of a letter, '.ud83d' at place 4"
    ):
        load_rows(path)


def test_without_a_kind_a_refusal_is_harm():
    rows = [{"prompt": r.prompt, "response": r.response} for r in ROWS]
    assert [row.kind for row in load_rows(rows)] == ["harm", "benign", "benign"]


def test_data_sets_and_the_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(TABLE)
    assert load_rows(table) == load_rows(table.to_iterable_dataset()) == ROWS
    calls = []

    def load_dataset(name, revision, split):
        calls.append((name, revision, split))
        if name == "who/lost":
            raise FileNotFoundError("Dataset 'who/lost' doesn't exist\nmore")
        return table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows("who/rows@v1", split="safe") == ROWS
    assert calls == [("who/rows", "v1", "safe")]
    with pytest.raises(
        ConfigError, match=r"'who/lost' cannot be had from the Hub \(FileNotFoundError: .*exist\): check"
    ):
        load_rows("who/lost")


def changed(**values):
    return [{**TABLE[0], **values}, *TABLE[1:]]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "the safety rows has no rows: give at least one refusal and one answer"),
        (TABLE[1:], r"all 2 rows are of one kind, with no refusal of a harmful prompt \(kind 'harm'\)"),
        (TABLE[:1], r"all 1 rows are of one kind, with no answer to a harmless prompt \(kind 'benign'\)"),
        ([{"prompt": "a", "reponse": "b"}], r"row 1 .* no column 'response', only .*did you mean 'reponse'\?"),
        ([TABLE[0], {"response": "b"}], "row 2 of the safety rows has no column 'prompt'"),
        (changed(prompt=3), "row 1 of the safety rows: prompt is 3, not text"),
        (changed(response=None), "row 1 of the safety rows: response is None, not text"),
        (changed(response="  "), "row 1 of the safety rows: response is empty"),
        (changed(system=["a"]), r"row 1 of the safety rows: system is \['a'\], not text"),
        (changed(kind="harmful"), "row 1 of the safety rows: kind is 'harmful': write harm for"),
        (["a"], "row 1 of the safety rows is 'a': give a mapping with prompt and response"),
        (3, "safety rows are 3: give a list of rows, a file"),
        ({"prompt": "a"}, "give a list of rows, a file"),
        ("lost.jsonl", "safety rows 'lost.jsonl': there is no such file"),
        ("no such thing", "'no such thing': no such file, and not a Hub id"),
    ],
)
def test_each_fault_has_its_own_sentence(rows, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_rows(rows)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "a.txt").write_text("a\n")
    with pytest.raises(ConfigError, match=r"safety rows '.*a.txt': give a file that ends in \.csv, \.jsonl, \.json"):
        load_rows(tmp_path / "a.txt")
    (tmp_path / "b.jsonl").write_text('{"prompt": "a", ')
    with pytest.raises(ConfigError, match=r"safety rows '.*b.jsonl' cannot be read"):
        load_rows(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").write_text("")
    with pytest.raises(ConfigError, match="has no rows"):
        load_rows(tmp_path / "c.jsonl")


def test_rows_of_one_kind_where_that_is_wanted():
    assert load_rows(TABLE[:1], both=False) == ROWS[:1]
    with pytest.raises(ConfigError, match=r"has no rows: give some$"):
        load_rows([], both=False)
