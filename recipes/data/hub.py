"""The papers' tasks, from the Hub: GSM8K and PubMedQA, through pure mapping functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .rows import conversation


def gsm8k_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a GSM8K row (question, worked answer ending in `#### N`) as a conversation."""
    return conversation(row["question"], row["answer"])


def gsm8k_answer(text: str) -> str:
    """Return the final number of a worked answer, without thousands separators; empty where there is none."""
    return text.rpartition("####")[2].strip().replace(",", "") if "####" in text else ""


def pubmedqa_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a PubMedQA row as a conversation: abstract and question, answered by yes, no or maybe.

    Takes the Hub's spelling (question, context.contexts) and that of the authors' file (QUESTION, CONTEXTS).
    """
    question = row.get("question") or row["QUESTION"]
    contexts = row["CONTEXTS"] if "CONTEXTS" in row else row["context"]["contexts"]
    abstract = "\n".join(contexts)
    prompt = f"{abstract}\n\nQuestion: {question}\nAnswer with yes, no or maybe."
    return conversation(prompt, row["final_decision"])


def gsm8k_examples(split: str = "train") -> list[dict[str, Any]]:
    """Return GSM8K (Cobbe et al., arXiv:2110.14168) from the Hub."""
    from datasets import load_dataset

    return [gsm8k_row(row) for row in load_dataset("openai/gsm8k", "main", split=split)]


def pubmedqa_examples(split: str = "train") -> list[dict[str, Any]]:
    """Return PubMedQA's labelled rows (Jin et al., arXiv:1909.06146) from the Hub."""
    from datasets import load_dataset

    return [pubmedqa_row(row) for row in load_dataset("qiaojin/PubMedQA", "pqa_labeled", split=split)]
