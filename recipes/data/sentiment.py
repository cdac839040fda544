"""The demo's task: is a film-review snippet positive or negative? One word.

Snippets and ratings (from -4 to 4, means of human raters) are those of Hutto and Gilbert, ICWSM 2014, in the source
archive of `vaderSentiment`; those rated under 1 in size are left out.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

from .packages import archive_member
from .rows import check_split, conversation

NUM_TRAIN, NUM_TEST, NUM_SPARE = 1200, 200, 600
_SEED = 0
_TEMPLATE = "Is the sentiment of this movie review positive or negative? Answer with one word.\n\n{text}"


@cache
def _rows() -> tuple[tuple[str, str], ...]:
    """Text and label of each distinct snippet that is clearly rated."""
    members = ("hutto_ICWSM_2014.tar.gz", "movieReviewSnippets_GroundTruth.txt")
    lines = archive_member("vaderSentiment-*.tar.gz", *members).decode("utf-8").splitlines()
    ratings = {text.strip(): float(rating) for _, rating, text in (line.split("\t") for line in lines if line)}
    return tuple(
        (text, "positive" if rating > 0 else "negative") for text, rating in ratings.items() if abs(rating) >= 1
    )


def sentiment() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return (train, test) rows of text and label, 1,200 and 200, shuffled once, no text in both."""
    rows = list(_rows())
    random.Random(_SEED).shuffle(rows)
    named = [{"text": text, "label": label} for text, label in rows]
    return named[NUM_TEST : NUM_TEST + NUM_TRAIN], named[:NUM_TEST]


def sentiment_prompt(text: str) -> str:
    """Return the question about one snippet."""
    return _TEMPLATE.format(text=text)


def spare_sentiment() -> list[dict[str, str]]:
    """Return 600 more rows, in neither split: where 200 to test on are too few."""
    rows = list(_rows())
    random.Random(_SEED).shuffle(rows)
    spare = rows[NUM_TEST + NUM_TRAIN :][:NUM_SPARE]
    return [{"text": text, "label": label} for text, label in spare]


def sentiment_examples(split: str = "train") -> list[dict[str, Any]]:
    """Return the split `train`, `test` or `spare` as conversations of a question and a one-word answer."""
    check_split("sentiment", split, ("train", "test", "spare"))
    train, test = sentiment()
    rows = {"train": train, "test": test}.get(split) or spare_sentiment()
    return [conversation(sentiment_prompt(row["text"]), row["label"]) for row in rows]
