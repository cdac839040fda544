"""What results depend on besides their settings: versions, code, data, hardware. Others are never mixed in silently."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from recipes.data.splits import SETS, prompts_of, rows_of
from recipes.data.tasks import get_task
from recipes.processor import measured_pace, vector_instructions

from .grid import Grid, cells_of

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")
# What makes a result: a change of how results are shown does not change them.
FLOORS = (
    *("adapters", "corrections", "decision", "evaluation", "io", "live", "methods", "offline", "ops", "record"),
    *("signals", "subspace", "training"),
)
CODE = (
    "safemerge_callback/*.py",
    *(f"safemerge_callback/{floor}/**/*.py" for floor in FLOORS),
    "safemerge_callback/evaluation/*.json",
    "safemerge_callback/evaluation/prompts/*.jsonl",
    "recipes/data/*.py",
    *(f"recipes/{name}.py" for name in ("completion_trainer", "finetune", "evaluate", "models", "settings")),
    *(f"method_comparison/{name}.py" for name in ("cells", "random_subspace", "resolve", "rows")),
)
# A result that differs in one of these is another's; `commit`, `host`, `threads` and `pace` are told and not compared:
# what a cell runs in is its settings', whatever is the quicker here.
COMPARED = ("versions", "code", "data", "model", "device")


def stamp_of(grid: Grid) -> dict[str, Any]:
    """Return the stamp of every cell that this process runs, JSON-able."""
    return {
        "versions": {name: version(name) for name in PACKAGES},
        "code": digest(path.read_bytes() for path in _code()),
        "data": _data(grid),
        "model": _models(grid),
        "device": _device(),
        "commit": commit(),
        "host": f"{platform.machine()} {vector_instructions()}, {os.cpu_count()} cores, {platform.system()}",
        "threads": _threads(),
        "pace": str(measured_pace()),
    }


def digest(parts: Iterable[bytes]) -> str:
    """Return 16 hexadecimal digits of the sha256 of the parts, each with its length."""
    digest_of_parts = hashlib.sha256()
    for part in parts:
        digest_of_parts.update(len(part).to_bytes(8, "little") + part)
    return digest_of_parts.hexdigest()[:16]


def settings_digest(settings: Mapping[str, Any], evaluate: Mapping[str, Any]) -> str:
    """Return the digest of what a cell runs and is evaluated with."""
    return digest([json.dumps([settings, evaluate], sort_keys=True, default=list).encode()])


def differences(then: Mapping[str, Any], now: Mapping[str, Any], same_code: Sequence[str] = ()) -> list[str]:
    """Return in words what differs between two stamps; digests in `same_code` are of one code.

    Data that one of them lacks is another task's: a grid may grow by a task, or lose one.
    """
    differing: list[str] = []
    for key in COMPARED:
        old, new = then.get(key), now.get(key)
        if key == "code" and old in same_code and new in same_code:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            names = sorted(old.keys() & new.keys() if key == "data" else old.keys() | new.keys())
            differing += [
                f"{name} {old.get(name)} and not {new.get(name)}" for name in names if old.get(name) != new.get(name)
            ]
        elif old != new:
            differing.append(f"{key} {old} and not {new}")
    return differing


def _code() -> list[Path]:
    return sorted({path for pattern in CODE for path in ROOT.glob(pattern)})


def _data(grid: Grid) -> dict[str, str]:
    """Digest of every set's prompts, and of each task's rows, trained on and evaluated on."""
    from recipes.data import load_examples, safety_prompts

    sets = {name: digest(text.encode() for text in prompts_of(name, grid.split)) for name in SETS}
    tasks = {
        name: digest(
            json.dumps(row, sort_keys=True).encode()
            for row in [*load_examples(name), *rows_of(get_task(name), grid.split)]
        )
        for name in dict.fromkeys(cell.task for cell in cells_of(grid))
    }
    return {**sets, **tasks, "safety": digest(text.encode() for text in safety_prompts())}


def _models(grid: Grid) -> dict[str, str]:
    """What each model's name stands for."""
    from recipes.models import PACKAGED, checkpoint

    # A packaged one's folder is named after what it holds, and a Hub id is a name for all the world.
    return {
        name: Path(checkpoint(name)).name if name in PACKAGED else name_with_digest(name)
        for name in (grid.model, grid.unaligned)
    }


def name_with_digest(model: str) -> str:
    """Return a Hub id as it is, and a folder's name with a digest of its weights: another training is another model."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return model
    files = sorted(folder.glob("*.safetensors"))
    return f"{folder.name} {digest(_file_digest(file) for file in files)}"


def _file_digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _device() -> str:
    import torch

    if torch.accelerator.is_available() and torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return "cpu" if not torch.accelerator.is_available() else str(torch.accelerator.current_accelerator())


def _threads() -> int:
    import torch

    return torch.get_num_threads()


@cache
def commit() -> str:
    """Return the repository's commit, with `+` where files differ from it; `unknown` outside of a repository."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
