"""GSM8K: school arithmetic with worked solutions, from the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .rows import check_split, conversation, load_rows


def gsm8k_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row (question, worked answer ending in `#### N`) as a conversation."""
    return conversation(row["question"], row["answer"])


def gsm8k_answer(text: str) -> str:
    """Return the final number of a worked answer, without thousands separators; empty where there is none."""
    return text.rpartition("####")[2].strip().replace(",", "") if "####" in text else ""


def gsm8k_examples(split: str = "train") -> list[dict[str, Any]]:
    """Return GSM8K's split train (7,473) or test (1,319) (Cobbe et al., arXiv:2110.14168) as conversations."""
    check_split("gsm8k", split)
    return [gsm8k_row(row) for row in load_rows("openai/gsm8k", "main", split)]
