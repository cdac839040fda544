"""Rows that a merge asks the model about, in files of the grid's: `{task_rows}`, `{safety_rows}` and a control.

Apart from `cells`: writing them takes data, and for safety rows the model.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from recipes.finetune import DataArguments, load_data
from safemerge_callback.evaluation.rows import rows_text
from safemerge_callback.io.whole_file import whole_file
from safemerge_callback.signals.rows import SafetyRow

from .grid import Grid, GridCell, parent_of

# Rows of the fine-tune's own data that a cell's merge may read, and prompts of each packaged set.
TASK_ROWS = SAFETY_PROMPTS = 64
_NEW_TOKENS = 24


def row_files(grid: Grid, cell: GridCell) -> dict[str, Path]:
    """Return the files of a cell's rows by the names that settings use for them in braces.

    task_rows: of the data that the cell's adapter was trained on, the poisoned ones among them, since nobody tells them
    apart. safety_rows: what the grid's model itself answers to the packaged prompts. random_rows: the same with
    harmful prompts of words drawn at random, the control of what is taken from those prompts.
    """
    folder = Path(grid.output_dir) / "rows"
    # What else they are made of is in their names, so that a grid that changes meets no rows of the one before.
    of_model = _digest(grid.model, SAFETY_PROMPTS, _NEW_TOKENS)
    of_data = _digest(_data_settings(grid, cell), TASK_ROWS)
    return {
        "task_rows": folder / f"{cell.task}-poisoned-{cell.poisoned_share:g}-seed-{cell.seed}-{of_data}.jsonl",
        "safety_rows": folder / f"safety-{of_model}.jsonl",
        "random_rows": folder / f"random-{of_model}-seed-{grid.random_subspace_seed}.jsonl",
    }


def _data_settings(grid: Grid, cell: GridCell) -> dict[str, Any]:
    """What the data of the adapter that the cell merges were made with: the settings of its training that say so."""
    trained = parent_of(grid, cell) or cell
    settings = {**grid.finetune, **grid.by_task.get(cell.task, {}), **trained.arm.settings}
    data = {field.name: settings[field.name] for field in fields(DataArguments) if field.name in settings}
    of_the_cell = {"data": cell.task, "poisoned_share": cell.poisoned_share, "mixing_seed": cell.seed}
    return {**data, **of_the_cell}


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]


def write_rows(grid: Grid, cell: GridCell, settings: Mapping[str, Any]) -> None:
    """Write those of a cell's files that its settings name and that are not there yet, each whole or not at all."""
    files = row_files(grid, cell)
    named = {name for name, path in files.items() if str(path) in settings.values()}
    if "random_rows" in named:
        named.add("safety_rows")
    for name in sorted(named, key=list(files).index):
        if files[name].is_file():
            continue
        rows = {
            "task_rows": lambda: task_rows(grid, cell),
            "safety_rows": lambda: safety_rows(grid.model),
            "random_rows": lambda: random_rows(files["safety_rows"], grid.random_subspace_seed),
        }[name]()
        files[name].parent.mkdir(parents=True, exist_ok=True)
        with whole_file(files[name]) as part:
            part.write_text(rows_text(rows), encoding="utf-8")


def task_rows(grid: Grid, cell: GridCell) -> list[SafetyRow]:
    """Return rows of the cell's training data, drawn by its seed, as prompts with responses."""
    rows = list(load_data(DataArguments(**_data_settings(grid, cell))))
    # Not the seed alone: by that the poisoned places were drawn, and the same ones would come.
    drawn = random.Random(f"task rows {cell.seed}").sample(rows, min(TASK_ROWS, len(rows)))
    return [SafetyRow(row["prompt"][-1]["content"], row["completion"][0]["content"], "benign") for row in drawn]


def safety_rows(model_name: str) -> Sequence[SafetyRow]:
    """Return what the model answers to the packaged prompts: refusals of harmful ones, answers to harmless ones."""
    from recipes.models import load_model
    from safemerge_callback.evaluation.harvest import harvest
    from safemerge_callback.evaluation.prompts import PACKAGED, load_prompt_sets

    model, tokenizer = load_model(model_name)
    return harvest(
        model.eval(), tokenizer, load_prompt_sets(list(PACKAGED), SAFETY_PROMPTS, 0), max_new_tokens=_NEW_TOKENS
    ).rows


def random_rows(source: Path, seed: int) -> list[SafetyRow]:
    """Return the rows of a file; each harmful prompt is as many words, drawn from all prompts of the file."""
    rows = [SafetyRow(**json.loads(line)) for line in source.read_text(encoding="utf-8").splitlines()]
    words = [word for row in rows for word in row.prompt.split()]
    draw = random.Random(seed)
    return [
        SafetyRow(" ".join(draw.choices(words, k=len(row.prompt.split()))), row.response, row.kind)
        if row.kind == "harm"
        else row
        for row in rows
    ]
