"""A second judge who reads: responses of a grid's cells drawn blind, labelled, and set beside the cells' verdicts."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from recipes.data.splits import prompts_of
from safemerge_callback.errors import ConfigError, nearest
from safemerge_callback.evaluation import wilson
from safemerge_callback.evaluation.measure import LETTERS

from .cells import RESPONSES
from .grid import Cell, Grid
from .resolve import folder_of
from .results import result_of
from .stamp import digest
from .statistics import Interval

# What the reader writes; whoever cannot tell leaves the label empty.
LABELS = tuple(word for word in LETTERS if word != "unjudged")
_SHEET = ("id", "prompt", "response", "label")


class Response(NamedTuple):
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


def responses_of(grid: Grid, cells: Sequence[Cell]) -> list[Response]:
    """Return every response that was kept; ConfigError where no cell has any."""
    found = [response for cell in cells for response in _responses(grid, cell)]
    if not found:
        raise ConfigError(f"no cell in {grid.output_dir!r} has kept its responses: run the grid first")
    return found


def _responses(grid: Grid, cell: Cell) -> Iterator[Response]:
    path, result = folder_of(grid, cell) / RESPONSES, result_of(grid, cell)
    if result is None or result["error"] or not path.is_file():
        return
    words = {letter: word for word, letter in LETTERS.items()}
    outcomes = {measure["measure"]: measure["outcomes"] for measure in result["measures"]}
    for name, said in json.loads(path.read_text(encoding="utf-8")).items():
        prompts, letters = prompts_of(name, grid.split, len(said)), outcomes[f"{name}_refused"]
        for place, (prompt, response, letter) in enumerate(zip(prompts, said, letters, strict=True)):
            id = digest([f"{cell.name}/{name}/{place}".encode()])
            yield Response(id, cell.arm.name, name, prompt, response, words[letter])


def write_sheet(responses: Sequence[Response], number: int, path: str | Path, seed: int = 0) -> Path:
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


def agreements(responses: Sequence[Response], labels: Mapping[str, str]) -> list[Agreement]:
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
