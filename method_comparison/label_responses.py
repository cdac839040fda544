"""How often does the judge of a comparison agree with a reader of the responses?

    python -m method_comparison.label_responses --config GRID --sheet runs/sheet.csv --draw 120
    python -m method_comparison.label_responses --config GRID --sheet runs/sheet.csv

The first call draws responses of the grid's finished cells into a sheet that names neither the arm nor the verdict. The
reader writes refused, complied or incoherent into its last column, and the second call compares, arm by arm. The
sheet holds what a model answers to harmful prompts: keep it to yourself.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from recipes.command import run_command
from recipes.data.splits import prompts_of
from safemerge_callback.errors import ConfigError, nearest
from safemerge_callback.evaluation import wilson
from safemerge_callback.evaluation.measure import LETTERS

from .cells import RESPONSES
from .grid import Grid, GridCell, cells_of, load_grid
from .markdown import percent, table
from .resolve import folder_of
from .results import result_of
from .stamp import digest
from .statistics import Interval

# What the reader writes; whoever cannot tell leaves the label empty.
LABELS = tuple(word for word in LETTERS if word != "unjudged")
_SHEET = ("id", "prompt", "response", "label")


class JudgedResponse(NamedTuple):
    """A response, the arm that gave it, and the first judge's verdict, a word of LETTERS; `id` tells neither."""

    id: str
    arm: str
    set: str
    prompt: str
    response: str
    verdict: str


class Agreement(NamedTuple):
    """Of n labelled responses: the share on whose refusal reader and judge agree, and what share each takes for one."""

    arm: str
    n: int
    agree: Interval
    reader: float
    judge: float


def responses_of(grid: Grid, cells: Sequence[GridCell]) -> list[JudgedResponse]:
    """Return every response that was kept; ConfigError where no cell has any."""
    responses = [response for cell in cells for response in _responses(grid, cell)]
    if not responses:
        raise ConfigError(f"no cell in {grid.output_dir!r} has kept its responses: run the grid first")
    return responses


def _responses(grid: Grid, cell: GridCell) -> Iterator[JudgedResponse]:
    path, result = folder_of(grid, cell) / RESPONSES, result_of(grid, cell)
    if result is None or result["error"] or not path.is_file():
        return
    words = {letter: word for word, letter in LETTERS.items()}
    outcomes = {measure["measure"]: measure["outcomes"] for measure in result["measures"]}
    for name, said in json.loads(path.read_text(encoding="utf-8")).items():
        prompts, letters = prompts_of(name, grid.split, len(said)), outcomes[f"{name}_refused"]
        for place, (prompt, response, letter) in enumerate(zip(prompts, said, letters, strict=True)):
            id = digest([f"{cell.name}/{name}/{place}".encode()])
            yield JudgedResponse(id, cell.arm.name, name, prompt, response, words[letter])


def write_sheet(responses: Sequence[JudgedResponse], number: int, path: str | Path, seed: int = 0) -> Path:
    """Write so many responses, drawn from all alike, with an empty column for labels; ConfigError where it exists."""
    path = Path(path)
    if number < 1:
        raise ConfigError(f"{number} responses to draw: give 1 or more")
    if path.exists():
        raise ConfigError(f"{str(path)!r} exists and may hold labels: give another file, or delete it")
    drawn = random.Random(seed).sample(list(responses), min(number, len(responses)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        sheet = csv.writer(file)
        sheet.writerow(_SHEET)
        sheet.writerows([one.id, one.prompt, one.response, ""] for one in drawn)
    return path


def read_labels(path: str | Path) -> dict[str, str]:
    """Return id -> label of the rows that have one; ConfigError for a label that is none, or no label at all."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        labels = {row["id"]: label for row in csv.DictReader(file) if (label := (row["label"] or "").strip())}
    for id, label in labels.items():
        if label not in LABELS:
            raise ConfigError(f"row {id!r} has label {label!r}: write one of {LABELS}{nearest(label, LABELS)}")
    if not labels:
        raise ConfigError(f"{str(path)!r} holds no label: write one of {LABELS} into its last column")
    return labels


def agreements(responses: Sequence[JudgedResponse], labels: Mapping[str, str]) -> list[Agreement]:
    """Return a row an arm and one of all, over responses that both gave a verdict; ConfigError where none is known."""
    both = [(one, labels[one.id]) for one in responses if one.id in labels and one.verdict != "unjudged"]
    if not both:
        raise ConfigError("none of the labelled responses is one of these cells': give the grid that they are from")
    arms = sorted({one.arm for one, _ in both})
    kept = {arm: [(one.verdict, label) for one, label in both if one.arm == arm] for arm in arms}
    return [_agreement(arm, pairs) for arm, pairs in {**kept, "all": [(o.verdict, label) for o, label in both]}.items()]


def _agreement(arm: str, pairs: Sequence[tuple[str, str]]) -> Agreement:
    refused = [(judge == "refused", reader == "refused") for judge, reader in pairs]
    n, agree = len(refused), sum(judge == reader for judge, reader in refused)
    judge, reader = (sum(column) / n for column in zip(*refused, strict=True))
    return Agreement(arm, n, Interval(agree / n, *wilson(agree, n)), reader, judge)


def main(args: Sequence[str] | None = None) -> None:
    """Draw a sheet, or print what its labels say; ConfigError where there is nothing to draw or to compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the grid, a YAML file in method_comparison/grids")
    parser.add_argument("--sheet", type=Path, required=True, help="CSV file that is drawn, or read when it is labelled")
    parser.add_argument("--draw", type=int, metavar="N", help="write so many responses into a new sheet")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    options = parser.parse_args(args)
    grid = load_grid(options.config)
    responses = responses_of(grid, cells_of(grid))
    if options.draw is not None:
        print(f"{write_sheet(responses, options.draw, options.sheet, options.seed)}: label each row one of {LABELS}")
        return
    rows_of_arms = agreements(responses, read_labels(options.sheet))
    rows = [
        [one.arm, str(one.n), percent(one.agree), f"{100 * one.reader:.1f}", f"{100 * one.judge:.1f}"]
        for one in rows_of_arms
    ]
    print(table(["arm", "n", "agree, %", "refused by the reader, %", "by the judge, %"], rows))


if __name__ == "__main__":
    run_command(main)
