"""One cell: its adapter made, its measures taken, its result written; whatever goes wrong is its result."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from recipes.data.splits import SETS, Split, prompts_of, rows_of
from recipes.data.tasks import get_task
from recipes.models import checkpoint
from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation import Judge, Share, Transcript, load_judge, refusal_shares
from safemerge_callback.evaluation.measure import SetKind, coherence, columns, share_of
from safemerge_callback.io.whole_file import whole_file
from safemerge_callback.offline import merge_adapters
from safemerge_callback.offline.search import Opening, search_merge
from safemerge_callback.record import JOURNAL_FILE, read_journal
from safemerge_callback.signals import generate
from safemerge_callback.signals.coefficients import SearchSettings

from .arms import MERGES
from .grid import Grid, GridCell
from .resolve import SEARCH, adapter_of, folder_of, resolved
from .rows import write_rows
from .stamp import ROOT, settings_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
RESULT, SETTINGS, MARK, LOG = "result.json", "cell.yaml", "made.json", "train.log"
# Never published: what models answer to harmful prompts.
RESPONSES = "responses.json"
_LAST_LINES = 15
# What a merge is made of, which its functions take first.
_PARTS = ("finetuned", "safety", "subspace", "output")
# What a cell's result holds of each.
COLUMNS = ("measure", "n", "value", "low", "high", "outcomes")
# Takes what a set's prompts were answered, in the order of the set.
Keep = Callable[[str, list[str]], None]


def run_cell(grid: Grid, cell: GridCell, stamp: Mapping[str, Any]) -> dict[str, Any]:
    """Run a cell, write its result beside its settings, and return it; an exception becomes its `error`.

    An adapter that was finished before is not made again: a run that is killed while it evaluates loses no training.
    """
    folder, settings = folder_of(grid, cell), resolved(grid, cell)
    folder.mkdir(parents=True, exist_ok=True)
    result = _about(grid, cell, settings, stamp)
    try:
        result["seconds"]["make"] = _make_adapter(grid, cell, settings)
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


def died(grid: Grid, cell: GridCell, stamp: Mapping[str, Any], error: str) -> dict[str, Any]:
    """Write and return the result of a cell whose process ended before it had one."""
    result = {**_about(grid, cell, resolved(grid, cell), stamp), "error": error}
    folder_of(grid, cell).mkdir(parents=True, exist_ok=True)
    write_json(folder_of(grid, cell) / RESULT, result)
    return result


def _about(grid: Grid, cell: GridCell, settings: Mapping[str, Any], stamp: Mapping[str, Any]) -> dict[str, Any]:
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


def _make_adapter(grid: Grid, cell: GridCell, settings: Mapping[str, Any]) -> float:
    """Make the cell's adapter unless it is there; return the seconds that it took when it was made."""
    folder = folder_of(grid, cell)
    file, mark = folder / SETTINGS, folder / MARK
    text = yaml.safe_dump(dict(settings), sort_keys=False, default_flow_style=None)
    if mark.is_file() and file.is_file() and file.read_text(encoding="utf-8") == text:
        return float(json.loads(mark.read_text(encoding="utf-8"))["seconds"])
    mark.unlink(missing_ok=True)
    file.write_text(text, encoding="utf-8")
    began = time.perf_counter()
    if cell.arm.kind == "train":
        shutil.rmtree(folder / "adapter", ignore_errors=True)
        _train(grid, file, folder / LOG)
    elif cell.arm.kind in MERGES:
        write_rows(grid, cell, settings)
        (merge_after if cell.arm.kind == "posthoc" else search_after)(settings)
    seconds = time.perf_counter() - began
    write_json(mark, {"seconds": seconds})
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


def merge_after(settings: Mapping[str, Any]) -> None:
    """Merge with the arguments of `merge_adapters`; what an interrupted try left in `output` is replaced.

    ConfigError where the parent's adapter is absent: its own cell failed.
    """
    knobs = {key: value for key, value in settings.items() if key not in _PARTS}
    if "base" in knobs:
        knobs["base"] = checkpoint(knobs["base"])
    with _merging(settings) as parts:
        merge_adapters(*parts, **knobs)


def search_after(settings: Mapping[str, Any]) -> None:
    """Merge by `search_merge`, likewise; where no coefficient is better the adapter stays as it is, which is a result.

    The settings are its own (`task_rows`, `safety_rows`, `rows`, `method`), `base`, and those of `SearchSettings`.
    """
    knobs = {key: value for key, value in settings.items() if key not in _PARTS}
    opening = Opening(checkpoint(knobs.pop("base")))
    search = {name: knobs.pop(name) for name in SEARCH if name in knobs}
    with _merging(settings) as parts:
        search_merge(*parts, settings=SearchSettings(**search), opening=opening, **knobs)


@contextmanager
def _merging(settings: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """The parts of a merge, its output removed; ConfigError where the parent's adapter is absent."""
    finetuned, output = Path(settings["finetuned"]), Path(settings["output"])
    if not (finetuned / "adapter_model.safetensors").is_file():
        raise ConfigError(f"there is no adapter to merge in {str(finetuned)!r}: look at why its own cell failed")
    shutil.rmtree(output, ignore_errors=True)
    with warnings.catch_warnings():
        # The grid says that they are of one model; a copy of it may be called anything.
        warnings.filterwarnings("ignore", message="safemerge: base models have different names")
        yield finetuned, settings["safety"], settings["subspace"], output


def evaluate_cell(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    split: Split,
    counts: Mapping[str, Any],
    keep: Keep | None = None,
) -> list[Share]:
    """Return every measure of a model: `<set>_refused`, `task` and `coherent`; `counts` as `Grid.evaluate`.

    Each set takes the first so many prompts of the split. `coherent` is the share of all responses to prompts that are
    neither empty nor a loop (a proxy). A second judge's measures end in @ and its name. `keep` is given each set's
    responses.
    """
    judges = {name: load_judge(name) for name in counts["judges"]}
    everyone: dict[SetKind, list[Judge]] = {"harm": list(judges.values()), "benign": list(judges.values())}
    options = {**_asking(counts), "max_new_tokens": counts["max_new_tokens"]}

    def answers() -> Iterator[Transcript]:
        for name in SETS:
            prompts = prompts_of(name, split, counts[name])
            said = generate(model, tokenizer, prompts, label=name, **options)
            if keep:
                keep(name, said)
            yield Transcript(name, "benign" if name == "benign" else "harm", prompts, said)

    shares = [counted(one) for one in refusal_shares(answers(), everyone)]
    second = ["", *(f"@{name}" for name in list(judges)[1:])] * len(SETS)
    named: list[Share] = [{**one, "measure": one["measure"] + more} for one, more in zip(shares, second, strict=True)]
    return [
        *named,
        _task_score(model, tokenizer, task, split, counts),
        counted(coherence(shares[:: len(judges)], "coherent")),
    ]


def _asking(counts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: counts.get(name) for name in ("batch_size", "chat_template_kwargs")}


def _task_score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, split: Split, counts: Mapping[str, Any]
) -> Share:
    task = get_task(name)
    rows = rows_of(task, split, counts["task"])
    prompts = [row["prompt"][-1]["content"] for row in rows]
    options = {**_asking(counts), "max_new_tokens": task.max_new_tokens}
    said = generate(model, tokenizer, prompts, label=name, **options)
    right = [task.right(row["completion"][0]["content"], answer) for row, answer in zip(rows, said, strict=True)]
    return counted(share_of("task", "".join("1" if each else "0" for each in right), "task"))


def counted(share: Share) -> Share:
    """Return the share; ConfigError where nothing is left to count."""
    if not share["n"]:
        raise ConfigError(
            f"measure {share['measure']!r}: no response has a verdict; look at the judge, or give more prompts, or "
            "more max_new_tokens to a model that thinks"
        )
    return share


def load_merged(name: str, adapter: Path | None, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model with an adapter's update merged into its weights, on the accelerator or the CPU, and tokenizer."""
    import torch

    from recipes.models import load_model

    model, tokenizer = load_model(name)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.to(device, getattr(torch, dtype)), tokenizer


def trail_of(adapter: Path | None) -> dict[str, Any] | None:
    """Return the trail of an adapter's journal; None where there is no adapter or journal.

    modules: how many were measured. merged: module -> how often. task_weight: mean share of the task's update left.
    checks: [step, mean cosine] and probes: [step, {measure: value}], in the journal's order.
    """
    journal = None if adapter is None else adapter / JOURNAL_FILE
    if journal is None or not journal.is_file():
        return None
    entries = read_journal(journal)
    merges = [entry for entry in entries if entry["kind"] == "merge"]
    left = {module["name"]: module["task_weight"] for entry in merges for module in entry["modules"]}
    modules = max((entry.get("num_modules", 0) for entry in entries if entry["kind"] == "start"), default=0)
    return {
        "modules": modules,
        "merges": len(merges),
        "merged": dict(Counter(module["name"] for entry in merges for module in entry["modules"])),
        "task_weight": (sum(left.values()) + modules - len(left)) / modules if modules else None,
        "checks": [[e["step"], _mean_cosine(e)] for e in entries if e["kind"] == "check"],
        "probes": [[e["step"], _values(e)] for e in entries if e["kind"] == "probe" and e.get("when") != "before"],
    }


def _mean_cosine(check: dict[str, Any]) -> float | None:
    cosines = [module["cosine"] for module in check["modules"] if module["cosine"] is not None]
    return sum(cosines) / len(cosines) if cosines else None


def _values(probe: dict[str, Any]) -> dict[str, float | None]:
    return {measure["measure"]: measure["value"] for measure in probe["measures"]}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that the file is whole or absent whatever stops us."""
    with whole_file(path) as part:
        part.write_text(json.dumps(content, indent=1), encoding="utf-8")
