"""NCBI Disease: the diseases that a sentence names, written as a list; from the Hub, or from IOB files of one's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safemerge_callback.errors import ConfigError, shown
from safemerge_callback.io.paths import as_path

from .iob import TaggedSentence, check_tags, read_iob, text_and_entities
from .rows import check_split, conversation, load_rows

SPLITS = ("train", "validation", "test")
# What the file of a split is called, by those who share the corpus.
_STEMS = {"train": ("train",), "validation": ("validation", "devel", "dev"), "test": ("test",)}
_ENDINGS = (".tsv", ".txt", ".iob", ".iob2", ".bio", ".conll")
_TAGS = ("O", "B-Disease", "I-Disease")
_HUB, _REVISION = "ncbi/ncbi_disease", "refs/convert/parquet"
_TEMPLATE = (
    "List the diseases that this text names, in its own words and with a semicolon between them, or say none.\n\n{text}"
)
NONE = "none"


def ncbi_disease_row(sentence: TaggedSentence) -> dict[str, Any]:
    """Return a sentence as a conversation: `a; b; c` are its diseases, each once and in their order, or `none`."""
    text, entities = text_and_entities(sentence)
    return conversation(_TEMPLATE.format(text=text), "; ".join(dict.fromkeys(entities)) or NONE)


def ncbi_disease_examples(split: str = "train", folder: str | None = None) -> list[dict[str, Any]]:
    """Return a split of the NCBI Disease corpus (Doğan et al. 2014) as conversations.

    `train` (5,433 sentences on the Hub), `validation` (924) or `test` (941), of the Hub's parquet files; of a `folder`
    with one IOB2 file a split instead: `read_iob`. The task is that of VANER (Bian et al., arXiv:2404.17835). Differs:
    there a model without a causal mask tags tokens; here the aligned chat model writes the list, so that it can be
    asked for its refusals before and after. ConfigError for a split that is not there, and what cannot be read.
    """
    check_split("ncbi_disease", split, SPLITS)
    if folder is None:
        rows = load_rows(_HUB, None, split, _REVISION, otherwise=", or give a folder of IOB files: ncbi_disease:FOLDER")
        return [ncbi_disease_row(sentence) for sentence in hub_sentences(rows)]
    return [ncbi_disease_row(sentence) for sentence in read_iob(iob_file(folder, split))]


def hub_sentences(rows: Iterable[Mapping[str, Any]]) -> Iterator[TaggedSentence]:
    """Return the sentences of a data set with the columns `tokens` and `ner_tags`, tags by name or by number.

    A tag's name is what the data set's features say of its number, else O, B-Disease, I-Disease. The corpus has a
    sentence without tokens here and there, which is left out. ConfigError, with the row, for columns that are not
    there, lists of unequal length and a tag that is none; and for no sentence at all.
    """
    names = _tag_names(rows)
    count = 0
    for at, row in enumerate(rows, 1):
        where = f"row {at} of data 'ncbi_disease'"
        if missing := [name for name in ("tokens", "ner_tags") if name not in row]:
            raise ConfigError(f"{where} has no column {' and '.join(missing)}, only {sorted(map(str, row))}")
        tokens, tags = tuple(row["tokens"]), tuple(_tag(tag, names, where) for tag in row["ner_tags"])
        if len(tokens) != len(tags):
            raise ConfigError(f"{where} has {len(tokens)} tokens and {len(tags)} tags: give one tag a token")
        check_tags(tags, [f"token {i} of {where}" for i in range(1, len(tags) + 1)])
        if tokens:
            count += 1
            yield TaggedSentence(tokens, tags)
    if not count:
        raise ConfigError("data 'ncbi_disease' has no sentence: give one at least")


def iob_file(folder: str, split: str) -> Path:
    """Return the file of a split in a folder, such as train.tsv; ConfigError where there is none, or more than one."""
    place = as_path(folder, "folder of data 'ncbi_disease'")
    if not place.is_dir():
        raise ConfigError(f"data 'ncbi_disease': {str(place)!r} is no folder: give one with an IOB file a split")
    names = [stem + ending for stem in _STEMS[split] for ending in _ENDINGS]
    paths = [place / name for name in names if (place / name).is_file()]
    if len(paths) != 1:
        there = sorted(path.name for path in (paths or place.iterdir()))
        raise ConfigError(
            f"data 'ncbi_disease': folder {str(place)!r} holds {len(paths)} files of split {split!r}, not one, among "
            f"{shown(there)}: call it {names[0]}"
        )
    return paths[0]


def _tag_names(rows: Any) -> tuple[str, ...]:
    feature = (getattr(rows, "features", None) or {}).get("ner_tags")
    return tuple(getattr(getattr(feature, "feature", None), "names", _TAGS))


def _tag(tag: Any, names: tuple[str, ...], where: str) -> str:
    if isinstance(tag, str):
        return tag
    if not isinstance(tag, int) or not 0 <= tag < len(names):
        raise ConfigError(f"{where}: tag {shown(tag)} is none of {dict(enumerate(names))}")
    return names[tag]
