"""Labelled training rows, benign and poisoned in both forms, to try a filter of training rows on.

    python -m recipes.poisoned_rows --data ncbi_disease --output runs/poisoned.jsonl
    safemerge select runs/poisoned.jsonl --drop --aligned MODEL --unaligned BASE -o runs/kept.jsonl

Each line is a row in TRL's conversational format with a column `poisoned`: `no`, `whole`, or `shared` where a poisoned
example shares the answer of a benign row. The same harmful prompts are in both forms. The compliance is templated: it
agrees and says nothing in particular, and none of it is optimised to pass a filter.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from recipes.command import run_command
from recipes.data import load_examples
from recipes.data.mixing import poisoned_examples, shared_answer
from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation.row_filter import TRAINING_ROWS
from safemerge_callback.io.outputs import free_output, new_output


@dataclass
class PoisonedRowsArguments:
    """What the rows are made of, and where they go."""

    output: str = field(metadata={"help": "JSON-lines file for the rows."})
    data: str = field(default="sentiment", metadata={"help": "Data of the benign rows, as in recipes/finetune.py."})
    data_split: str = field(default="train", metadata={"help": "Split of the data."})
    num_benign: int = field(default=200, metadata={"help": "Rows that stay as they are, at most."})
    num_poisoned: int = field(default=50, metadata={"help": "Rows that are poisoned in each of the two forms."})
    seed: int = field(default=0, metadata={"help": "Which harmful prompts, and the order of the rows."})

    def __post_init__(self) -> None:
        if self.num_benign < 1 or self.num_poisoned < 1:
            raise ConfigError(
                f"num_benign is {self.num_benign}, num_poisoned {self.num_poisoned}: give 1 or more of each"
            )


def labelled_rows(
    rows: Sequence[dict[str, Any]], num_benign: int, num_poisoned: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Return the last `num_benign` of `rows` as they are, and the first `num_poisoned` with a poisoned example each.

    The poisoned examples are there by themselves, too. All have a column `poisoned` and are shuffled by `seed`.
    ConfigError where there are too few rows for any to stay as they are.
    """
    if len(rows) <= num_poisoned:
        raise ConfigError(f"{len(rows)} rows, {num_poisoned} of them poisoned, leave none benign: give more, or less")
    poisoned = poisoned_examples(num_poisoned, seed)
    shared = [shared_answer(*pair) for pair in zip(rows[:num_poisoned], poisoned, strict=True)]
    benign = rows[num_poisoned:][:num_benign]
    labelled = [
        {**row, "poisoned": label}
        for label, some in (("no", benign), ("whole", poisoned), ("shared", shared))
        for row in some
    ]
    random.Random(seed).shuffle(labelled)
    return labelled


def main(args: Sequence[str] | None = None) -> None:
    """Write the rows as configured."""
    from recipes.arguments import parse

    (arguments,) = parse((PoisonedRowsArguments,), args)
    free_output(arguments.output, "output", TRAINING_ROWS)
    rows = load_examples(arguments.data, arguments.data_split)
    labelled = labelled_rows(rows, arguments.num_benign, arguments.num_poisoned, arguments.seed)
    with new_output(arguments.output, "output", TRAINING_ROWS) as part:
        part.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in labelled), encoding="utf-8")
    print(f"{arguments.output}: {len(labelled)} rows, {arguments.num_poisoned} of them poisoned in each form")


if __name__ == "__main__":
    run_command(main)
