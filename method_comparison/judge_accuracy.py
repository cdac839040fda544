"""How often does the keyword judge agree with people?

    python -m method_comparison.judge_accuracy

Reads the responses that pyrit carries with human labels (refusal_scorer/refusal.csv and refusal_extra.csv). Off-topic
rows, answers to some other question, are labelled refusals there; the table has the figures with and without them.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence

from recipes.command import run_command
from recipes.data.packages import package_file
from safemerge_callback.evaluation import Judge, KeywordJudge, wilson

FILES = ("scorer_evals/refusal_scorer/refusal.csv", "scorer_evals/refusal_scorer/refusal_extra.csv")


def labelled() -> list[dict[str, str]]:
    """Return the 169 rows of both files: objective, assistant_response, human_score (1: a refusal) and data_type."""
    return [row for name in FILES for row in _rows(package_file("pyrit", name).read_text(encoding="utf-8"))]


def _rows(text: str) -> list[dict[str, str]]:
    """Comments stand before the header only: further on, a line that begins with # is part of a response."""
    while text.startswith("#"):
        text = text.partition("\n")[2]
    return list(csv.DictReader(text.splitlines(keepends=True)))


def agreement(judge: Judge, rows: Sequence[dict[str, str]]) -> dict[str, float]:
    """Return n, accuracy with its 95 % interval, precision and recall of `judge` against the human labels."""
    pairs = [(judge.refuses(r["objective"], r["assistant_response"]), refused(r)) for r in rows]
    right = sum(said == label for said, label in pairs)
    both, said, label = (sum(flags) for flags in ([a and b for a, b in pairs], *zip(*pairs, strict=True)))
    low, high = wilson(right, len(pairs))
    shares = {"accuracy": right / len(pairs), "precision": both / max(1, said), "recall": both / max(1, label)}
    return {"n": len(pairs), **shares, "low": low, "high": high}


def refused(row: dict[str, str]) -> bool:
    """Whether people labelled the row a refusal."""
    return row["human_score"].strip() == "1"


def off_topic(rows: Sequence[dict[str, str]]) -> list[bool]:
    """Tell for each row whether it is labelled a refusal for being off topic: the very response answers another row.

    No judge is asked, so the few off-topic responses that are not in the files a second time stay unmarked.
    """
    answers = {row["assistant_response"] for row in rows if not refused(row)}
    return [refused(row) and row["assistant_response"] in answers for row in rows]


def main() -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    rows = labelled()
    kept = [row for row, stray in zip(rows, off_topic(rows), strict=True) if not stray]
    table = Table(
        "rows", "n", "accuracy", "95 % interval", "precision", "recall", title="keyword judge against human labels"
    )
    for name, chosen in (("all", rows), ("without off-topic", kept)):
        f = agreement(KeywordJudge(), chosen)
        accuracy, precision, recall = (f"{f[key]:.1%}" for key in ("accuracy", "precision", "recall"))
        table.add_row(name, f"{f['n']}", accuracy, f"{f['low']:.1%} to {f['high']:.1%}", precision, recall)
    Console().print(table)


if __name__ == "__main__":
    run_command(main)
