"""PubMedQA: yes, no or maybe from an abstract, from the Hub."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from .rows import check_split, conversation, load_rows


def pubmedqa_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as a conversation: abstract and question, answered by one word.

    Takes the Hub's spelling (question, context.contexts) and that of the authors' file (QUESTION, CONTEXTS).
    """
    question = row["QUESTION"] if "QUESTION" in row else row["question"]
    contexts = row["CONTEXTS"] if "CONTEXTS" in row else row["context"]["contexts"]
    abstract = "\n".join(contexts)
    prompt = f"{abstract}\n\nQuestion: {question}\nAnswer with yes, no or maybe."
    return conversation(prompt, row["final_decision"])


def pubmedqa_split(pubmed_id: int | str) -> str:
    """Return the split of an article, train or test, one half each, by a digest of its PubMed id.

    Differs: the Hub has the 1,000 labelled rows in one piece. This is not the authors' test set, which is drawn at
    random and published apart.
    """
    return "test" if hashlib.sha256(str(pubmed_id).encode()).digest()[0] % 2 else "train"


def pubmedqa_examples(split: str = "train") -> list[dict[str, Any]]:
    """Return one half of PubMedQA's labelled rows (Jin et al., arXiv:1909.06146) as conversations."""
    check_split("pubmedqa", split)
    rows = load_rows("qiaojin/PubMedQA", "pqa_labeled", "train")
    return [pubmedqa_row(row) for row in rows if pubmedqa_split(row["pubid"]) == split]
