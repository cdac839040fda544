"""One cell: made, evaluated, and its result written; whatever goes wrong is its result."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from safemerge_callback.evaluation.measure import columns
from safemerge_callback.io.whole_file import whole_file

from .grid import Cell, Grid
from .measures import COLUMNS, evaluate_cell, load_merged
from .posthoc import merge_after
from .resolve import adapter_of, folder_of, resolved
from .stamp import ROOT, settings_digest
from .trail import trail_of

RESULT, SETTINGS, MADE, LOG = "result.json", "cell.yaml", "made.json", "train.log"
# Never published: what models answer to harmful prompts.
RESPONSES = "responses.json"
_LAST_LINES = 15


def run_cell(grid: Grid, cell: Cell, stamp: Mapping[str, Any]) -> dict[str, Any]:
    """Run a cell, write its result beside its settings, and return it; an exception becomes its `error`.

    An adapter that was finished before is not made again: a run that is killed while it evaluates loses no training.
    """
    folder, settings = folder_of(grid, cell), resolved(grid, cell)
    folder.mkdir(parents=True, exist_ok=True)
    result = _about(grid, cell, settings, stamp)
    try:
        result["seconds"]["make"] = _made(grid, cell, settings)
        began = time.perf_counter()
        model, tokenizer = load_merged(_model_of(settings, grid), adapter_of(grid, cell), grid.evaluate["dtype"])
        said: dict[str, list[str]] = {}
        shares = evaluate_cell(model, tokenizer, cell.task, grid.split, grid.evaluate, keep=said.__setitem__)
        result["measures"] = [columns(share, COLUMNS) for share in shares]
        write_json(folder / RESPONSES, said)
        result["seconds"]["evaluate"] = time.perf_counter() - began
        result["trail"] = trail_of(adapter_of(grid, cell))
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
        (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
    write_json(folder / RESULT, result)
    return result


def died(grid: Grid, cell: Cell, stamp: Mapping[str, Any], error: str) -> dict[str, Any]:
    """Write and return the result of a cell whose process ended before it had one."""
    result = {**_about(grid, cell, resolved(grid, cell), stamp), "error": error}
    folder_of(grid, cell).mkdir(parents=True, exist_ok=True)
    write_json(folder_of(grid, cell) / RESULT, result)
    return result


def _about(grid: Grid, cell: Cell, settings: Mapping[str, Any], stamp: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "cell": cell.name,
        "arm": cell.arm.name,
        "family": cell.arm.family,
        "kind": cell.arm.kind,
        "task": cell.task,
        "poisoned_share": cell.poisoned_share,
        "seed": cell.seed,
        "split": grid.split,
        "settings": settings_digest(settings, grid.evaluate),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": {},
        "measures": [],
        "trail": None,
        "error": None,
        "stamp": dict(stamp),
    }


def _model_of(settings: Mapping[str, Any], grid: Grid) -> str:
    return settings.get("model") or settings.get("model_name_or_path") or grid.model


def _made(grid: Grid, cell: Cell, settings: Mapping[str, Any]) -> float:
    """Make the cell's adapter unless it is there; return the seconds that it took when it was made."""
    folder = folder_of(grid, cell)
    file, made = folder / SETTINGS, folder / MADE
    text = yaml.safe_dump(dict(settings), sort_keys=False, default_flow_style=None)
    if made.is_file() and file.is_file() and file.read_text(encoding="utf-8") == text:
        return float(json.loads(made.read_text(encoding="utf-8"))["seconds"])
    made.unlink(missing_ok=True)
    file.write_text(text, encoding="utf-8")
    began = time.perf_counter()
    if cell.arm.kind == "train":
        shutil.rmtree(folder / "adapter", ignore_errors=True)
        _train(grid, file, folder / LOG)
    elif cell.arm.kind == "posthoc":
        merge_after(settings)
    seconds = time.perf_counter() - began
    write_json(made, {"seconds": seconds})
    return seconds


def _train(grid: Grid, file: Path, log: Path) -> None:
    """Run recipes/finetune.py with the cell's file: in this process, or by the grid's launcher."""
    if not grid.launch:
        from recipes.finetune import main

        main(["--config", str(file)])
        return
    command = [*grid.launch, str(ROOT / "recipes" / "finetune.py"), "--config", str(file.resolve())]
    if command[0] == "accelerate":
        command[:1] = [sys.executable, "-m", "accelerate.commands.accelerate_cli"]
    with log.open("w", encoding="utf-8") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        last = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:])
        raise RuntimeError(f"{command[0]} ended with {done.returncode}; the last of {log.name}:\n{last}")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that the file is whole or absent whatever stops us."""
    with whole_file(path) as part:
        part.write_text(json.dumps(content, indent=1), encoding="utf-8")
