"""IOB files and the Hub's columns, read as sentences and written as lists of entities."""

import re
import tempfile
from contextlib import suppress
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes import data
from recipes.data import ncbi_disease
from recipes.data.iob import TaggedSentence, read_iob, text_and_entities
from recipes.data.ncbi_disease import hub_sentences, iob_file, ncbi_disease_examples, ncbi_disease_row
from recipes.entities import entity_set
from safemerge_callback.errors import ConfigError
from tests.support.entities import write_corpus

ROOT = Path(__file__).parents[2]
WHOLE = ROOT.parent / "shared" / "data" / "ncbi_disease"
WORDS = "Ataxia - telangiectasia ( A - T ) in a T - cell leukaemia ( 0 . 05 ) ."
TAGS = "B I I O B I I O O O B I I I O O O O O O"
SENTENCE = TaggedSentence(tuple(WORDS.split()), tuple(tag if tag == "O" else f"{tag}-Disease" for tag in TAGS.split()))


def written(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def answered(row):
    return row["completion"][0]["content"]


def asked(row):
    return row["prompt"][-1]["content"]


def test_a_sentence_is_written_as_people_write_it_and_its_entities_stand_in_it():
    text, entities = text_and_entities(SENTENCE)
    assert text == "Ataxia-telangiectasia (A-T) in a T-cell leukaemia (0.05)."
    assert entities == ["Ataxia-telangiectasia", "A-T", "T-cell leukaemia"]


def test_a_row_asks_for_a_list_and_has_each_disease_once():
    row = ncbi_disease_row(SENTENCE)
    assert asked(row).endswith("\n\nAtaxia-telangiectasia (A-T) in a T-cell leukaemia (0.05).")
    assert answered(row) == "Ataxia-telangiectasia; A-T; T-cell leukaemia"
    twice = TaggedSentence(("cancer", "and", "cancer"), ("B-Disease", "O", "B-Disease"))
    assert answered(ncbi_disease_row(twice)) == "cancer"
    assert answered(ncbi_disease_row(TaggedSentence(("No", "case"), ("O", "O")))) == "none"


def test_iob_and_conll_files_are_read_line_by_line(tmp_path):
    tabs = written(tmp_path / "a.tsv", "", "a\tB-Disease", "b\tI-Disease", "", "", "c\tO")
    assert read_iob(tabs) == [TaggedSentence(("a", "b"), ("B-Disease", "I-Disease")), TaggedSentence(("c",), ("O",))]
    blanks = written(tmp_path / "a.conll", "-DOCSTART- -X- O O", "", "a NN I-NP B-X", "b NN I-NP B-Y", "c NN O I-Y")
    assert read_iob(blanks) == [TaggedSentence(("a", "b", "c"), ("B-X", "B-Y", "I-Y"))]


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["a\tO", "b"], r"line 2 of IOB file '.*x\.tsv' is 'b': give a token and its tag"),
        (["a\tO", "", "b\tDisease"], r"line 3 of IOB file .*: tag 'Disease' is none of O, B-KIND and I-KIND"),
        (
            ["a\tO", "b\tI-Disease"],
            r"line 2 of .*: tag 'I-Disease' follows 'O', .* begins with 'B-Disease': write",
        ),
        (["a\tB-Gene", "b\tI-Disease"], r"line 2 of .*'I-Disease' follows 'B-Gene'"),
        (["a\tB-Disease", "", "b\tI-Disease"], r"line 3 of .*'I-Disease' follows 'O'"),
        (["", " "], r"IOB file '.*x\.tsv' holds no sentence"),
    ],
)
def test_a_broken_file_says_the_line(tmp_path, lines, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read_iob(written(tmp_path / "x.tsv", *lines))


@settings(deadline=None, max_examples=100)
@given(text=st.text(alphabet="ab BIO-\t\n\r\u2028", max_size=40))
def test_any_text_is_sentences_or_an_error_of_ours(text):
    with tempfile.TemporaryDirectory() as folder, suppress(ConfigError):
        path = Path(folder) / "x.tsv"
        path.write_text(text, encoding="utf-8", newline="")
        for sentence in read_iob(path):
            whole, entities = text_and_entities(sentence)
            assert whole
            assert len(entities) == sum(tag.startswith("B") for tag in sentence.tags)


def test_a_folder_has_one_file_a_split(tmp_path):
    with pytest.raises(ConfigError, match=r"is no folder: give one with an IOB file a split"):
        iob_file(str(tmp_path / "nowhere"), "train")
    with pytest.raises(ConfigError, match=r"holds 0 files of split 'test', not one, among \[\]: call it test.tsv"):
        iob_file(str(tmp_path), "test")
    for name in ("devel.tsv", "dev.txt"):
        written(tmp_path / name, "a\tO")
        if name == "devel.tsv":
            assert iob_file(str(tmp_path), "validation") == tmp_path / name
    with pytest.raises(ConfigError, match=r"holds 2 files of split 'validation', not one, among \['dev.txt', 'devel"):
        iob_file(str(tmp_path), "validation")


def test_data_is_read_from_a_folder_where_it_may_be(tmp_path):
    write_corpus(tmp_path)
    rows = data.load_examples(f"ncbi_disease:{tmp_path}", "test")
    assert rows == ncbi_disease_examples("test", str(tmp_path))
    assert [answered(row) for row in rows] == ["none", "Measles", "mild anaemia", "none", "Gout; gout"]
    with pytest.raises(ConfigError, match=r"gsm8k is read from no folder, as \['ncbi_disease'\] may be"):
        data.load_examples(f"gsm8k:{tmp_path}")
    with pytest.raises(ConfigError, match=r"split 'dev' of data 'ncbi_disease' does not exist.*train, validation or"):
        data.load_examples("ncbi_disease", "dev")


@pytest.mark.skipif(not WHOLE.is_dir(), reason="../shared/data is absent")
def test_every_right_answer_of_the_corpus_says_what_is_tagged():
    for split, count in (("train", 5432), ("devel", 923), ("test", 940)):
        sentences = read_iob(WHOLE / f"{split}.tsv")
        assert len(sentences) == count
        for sentence in sentences:
            text, entities = text_and_entities(sentence)
            assert text.replace(" ", "") == "".join(sentence.tokens)
            assert all(entity in text for entity in entities)
            row = ncbi_disease_row(sentence)
            assert entity_set(answered(row)) == frozenset().union(*map(entity_set, entities))
            assert asked(row).endswith(text)


# the Hub's columns


def of_the_hub(rows):
    tags = datasets.List(datasets.ClassLabel(names=["O", "B-Disease", "I-Disease"]))
    text = datasets.Value("string")
    columns = {"id": text, "tokens": datasets.List(text), "ner_tags": tags}
    return datasets.Dataset.from_list(rows, features=datasets.Features(columns))


def test_the_hubs_rows_are_the_same_sentences(monkeypatch, tmp_path):
    """Read by `datasets` itself, from parquet files that lie as in the Hub's own conversion."""
    numbers = [("O", "B-Disease", "I-Disease").index(tag) for tag in SENTENCE.tags]
    rows = [{"id": "0", "tokens": list(SENTENCE.tokens), "ner_tags": numbers}]
    rows.append({"id": "1", "tokens": [], "ner_tags": []})
    for split in ("train", "validation", "test"):
        (tmp_path / "hub" / "ncbi_disease" / split).mkdir(parents=True)
        of_the_hub(rows).to_parquet(tmp_path / "hub" / "ncbi_disease" / split / "0000.parquet")
    monkeypatch.setattr(ncbi_disease, "_HUB", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert data.load_examples("ncbi_disease", "validation") == [ncbi_disease_row(SENTENCE)]
    assert list(hub_sentences([{"tokens": SENTENCE.tokens, "ner_tags": SENTENCE.tags}])) == [SENTENCE]


def test_a_hub_that_is_out_of_reach_says_what_else_would_do(monkeypatch):
    places = []

    def out_of_reach(*place, **more):
        places.append((*place, more))
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", out_of_reach)
    sentence = (
        "split 'test' of 'ncbi/ncbi_disease' cannot be had from the Hub (ConnectionError: no network): go online once, "
        "or give a folder of IOB files: ncbi_disease:FOLDER"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}$"):
        data.load_examples("ncbi_disease", "test")
    assert places == [("ncbi/ncbi_disease", None, {"split": "test", "revision": "refs/convert/parquet"})]
    with pytest.raises(ConfigError, match=r"'openai/gsm8k' cannot .* go online once$"):
        data.load_examples("gsm8k")


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {"text": "a", "tags": []},
            r"row 1 of data 'ncbi_disease' has no column tokens and ner_tags, only \['tags', 't",
        ),
        ({"tokens": ["a"], "labels": [0]}, r"has no column ner_tags, only \['labels', 'tokens'\]"),
        ({"tokens": ["a", "b"], "ner_tags": [0]}, "row 1 .* has 2 tokens and 1 tags"),
        ({"tokens": ["a"], "ner_tags": [3]}, r"tag 3 is none of \{0: 'O', 1: 'B-Disease', 2: 'I-Disease'\}"),
        ({"tokens": ["a"], "ner_tags": [2]}, "token 1 of row 1 .*'I-Disease' follows 'O'"),
        ({"tokens": [], "ner_tags": []}, "has no sentence: give one at least"),
    ],
)
def test_rows_that_cannot_be_read_are_refused(row, sentence):
    with pytest.raises(ConfigError, match=sentence):
        list(hub_sentences([row]))
