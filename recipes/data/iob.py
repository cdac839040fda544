"""Sentences whose entities are tagged token by token (IOB2): read from a file, and written as a text again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from safemerge_callback.errors import ConfigError, shown
from safemerge_callback.io.documents import read_text

_TAG = re.compile(r"O|([BI])(?:-(\S+))?")
# Tokens are cut at every sign; these are written close to the word before, the word after, or both.
_CLOSE_BEFORE = frozenset(".,;:?!%)]'-/")
_CLOSE_AFTER = frozenset("([-/'")


class TaggedSentence(NamedTuple):
    """The tokens of a sentence and the IOB2 tag of each: O outside, B-KIND begins an entity, I-KIND goes on with it."""

    tokens: tuple[str, ...]
    tags: tuple[str, ...]


def read_iob(path: Path) -> list[TaggedSentence]:
    """Return the sentences of an IOB2 or CoNLL file: a token a line and its tag last, an empty line after a sentence.

    Columns are parted by tabs or blanks, those between are not read, and lines that begin with -DOCSTART- are left out.
    ConfigError, with the line, for a token without a tag, a tag that is none, an I tag that follows no entity of its
    kind; and for a file that holds no sentence or cannot be read.
    """
    who = f"IOB file {str(path)!r}"
    lines = enumerate(read_text(path, who, advice="Give a UTF-8 file with a token and its tag a line").split("\n"), 1)
    sentences = list(_sentences(lines, who))
    if not sentences:
        raise ConfigError(f"{who} holds no sentence: give a file with a token and its tag a line")
    return sentences


def check_tags(tags: Sequence[str], where: Sequence[str]) -> None:
    """Raise ConfigError for a tag that is none, or an I that follows no entity of its kind.

    `where` says of each tag where it stands: such as "line 12 of IOB file 'a.tsv'".
    """
    for (before, tag), place in zip(pairwise(("O", *tags)), where, strict=True):
        if not _TAG.fullmatch(tag):
            raise ConfigError(f"{place}: tag {shown(tag)} is none of O, B-KIND and I-KIND")
        if tag.startswith("I") and before[1:] != tag[1:]:
            raise ConfigError(
                f"{place}: tag {tag!r} follows {before!r}, and an entity begins with {'B' + tag[1:]!r}: write IOB2"
            )


def text_and_entities(sentence: TaggedSentence) -> tuple[str, list[str]]:
    """Return a sentence as a text, and its entities as they stand in it, in their order.

    The corpus keeps no blanks: signs are put close to words by rule, "T - cell" becomes "T-cell".
    """
    pieces = [
        token if at == 0 or _close(sentence.tokens, at) else f" {token}" for at, token in enumerate(sentence.tokens)
    ]
    return "".join(pieces), ["".join(pieces[begin:end]).lstrip() for begin, end in _spans(sentence.tags)]


def _sentences(lines: Iterable[tuple[int, str]], who: str) -> Iterator[TaggedSentence]:
    rows: list[tuple[str, str, str]] = []
    for number, line in [*lines, (0, "")]:
        fields = line.split()
        if fields and fields[0] != "-DOCSTART-":
            place = f"line {number} of {who}"
            if len(fields) == 1:
                raise ConfigError(f"{place} is {shown(line.strip())}: give a token and its tag")
            rows.append((fields[0], fields[-1], place))
        elif not fields and rows:
            tokens, tags, where = zip(*rows, strict=True)
            check_tags(tags, where)
            yield TaggedSentence(tokens, tags)
            rows = []


def _spans(tags: Sequence[str]) -> Iterator[tuple[int, int]]:
    """The first token of each entity, and the one after its last."""
    begins = [at for at, tag in enumerate(tags) if tag.startswith("B")]
    for begin in begins:
        rest = tags[begin + 1 :]
        yield begin, begin + 1 + next((i for i, tag in enumerate(rest) if not tag.startswith("I")), len(rest))


def _close(tokens: Sequence[str], at: int) -> bool:
    """Whether no blank stands before a token: around signs, and in decimals such as 0.05."""
    before, token = tokens[at - 1], tokens[at]
    decimal = at > 1 and before == "." and tokens[at - 2].isdigit() and token.isdigit()
    return token in _CLOSE_BEFORE or before in _CLOSE_AFTER or decimal
