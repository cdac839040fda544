"""How often does the keyword judge agree with people?

    python -m recipes.judge_accuracy

Reads the responses that pyrit carries with human labels (refusal_scorer/refusal.csv and refusal_extra.csv). Off-topic
rows, responses that neither refuse nor answer, count as refusals there; the table has both figures.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence

from recipes.data.packages import package_file
from safemerge_callback.evaluation import Judge, KeywordJudge, wilson

FILES = ("scorer_evals/refusal_scorer/refusal.csv", "scorer_evals/refusal_scorer/refusal_extra.csv")


def labelled() -> list[dict[str, str]]:
    """Return the rows of both files: objective, assistant_response, human_score columns and more."""
    rows = []
    for name in FILES:
        with package_file("pyrit", name).open(encoding="utf-8", newline="") as file:
            rows += list(csv.DictReader(line for line in file if not line.startswith("# ")))
    return rows


def agreement(judge: Judge, rows: Sequence[dict[str, str]]) -> dict[str, float]:
    """Return n, accuracy with its 95 % interval, precision and recall of `judge` against the human labels."""
    pairs = [(judge.refuses(r["objective"], r["assistant_response"]), _refused(r)) for r in rows]
    right = sum(said == label for said, label in pairs)
    both, said, label = (sum(p) for p in ([a and b for a, b in pairs], [a for a, _ in pairs], [b for _, b in pairs]))
    low, high = wilson(right, len(pairs))
    accuracy = right / max(1, len(pairs))
    figures = {"accuracy": accuracy, "low": low, "high": high}
    return {"n": len(pairs), **figures, "precision": both / max(1, said), "recall": both / max(1, label)}


def _refused(row: dict[str, str]) -> bool:
    labels = [row[key].strip().lower() for key in row if key and key.startswith("human_score") and row[key]]
    return sum(label in {"1", "1.0", "true"} for label in labels) * 2 > len(labels)


def off_topic(row: dict[str, str]) -> bool:
    """Whether people called it a refusal though it refuses nothing in words: no phrase of apology or of inability at all."""
    return False
