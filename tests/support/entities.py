"""A small corpus of our own in the files of NCBI Disease: a token and its tag a line."""

from __future__ import annotations

from pathlib import Path

# Words, and where the diseases stand among them: first and one past the last.
SENTENCES: tuple[tuple[str, list[tuple[int, int]]], ...] = (
    ("Asthma and cystic fibrosis ran in the family .", [(0, 1), (2, 4)]),
    ("The cohort was followed for ten years .", []),
    ("Two of them had breast cancer ( BC ) , one had measles .", [(4, 6), (7, 8), (11, 12)]),
    ("No variant was found in the others .", []),
    ("Measles was never seen before .", [(0, 1)]),
    ("Carriers of the allele have mild anaemia or none .", [(5, 7)]),
    ("We sequenced both genes .", []),
    ("Gout , gout and again gout was the answer .", [(0, 1), (2, 3), (5, 6)]),
)


def write_corpus(folder: Path) -> Path:
    """Write the sentences as `train.tsv`, those from the fourth on as `test.tsv`; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, sentences in (("train", SENTENCES), ("test", SENTENCES[3:])):
        (folder / f"{split}.tsv").write_text("\n".join(map(_lines, sentences)), encoding="utf-8")
    return folder


def _lines(sentence: tuple[str, list[tuple[int, int]]]) -> str:
    words, spans = sentence
    tags = ["O"] * len(words.split())
    for first, end in spans:
        tags[first:end] = ["B-Disease", *["I-Disease"] * (end - first - 1)]
    return "".join(f"{word}\t{tag}\n" for word, tag in zip(words.split(), tags, strict=True))
