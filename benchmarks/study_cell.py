"""What a cell of the study costs: its training step and its evaluation, as they are and as the libraries do them.

OMP_NUM_THREADS=1 BENCHMARK_CLOCK=cpu python -m benchmarks.study_cell [--steps 3] [--prompts 64] [--rows 200]
    [--batch-size 128] [--output FILE.json]

The cell is `plain` on film reviews, of the grid method_comparison/grids/smollm2_replay.yaml. A step is TRL's with the
head on every place, with the head on labelled places, ours, where the rows' beginning is computed once as well, and
ours with eager attention. Responses are asked of the aligned model in the grid's dtype, by transformers' `generate` in
batches of 32, which the study did, and by our own decoding in batches of 32 and of `--batch-size`; how many texts
differ from the first way's is counted. All in turns.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.hardware import hardware, timed, title

GRID = Path(__file__).parents[1] / "method_comparison" / "grids" / "smollm2_replay.yaml"


def trainer_of(labels_alone: bool, beginning_once: bool, attention: str | None) -> Any:
    """Return the cell's trainer, ready to make a step."""
    from method_comparison.grid import cells_of, load_grid
    from method_comparison.resolve import resolved
    from recipes.finetune import build_trainer, parse_finetune

    grid = load_grid(GRID)
    cell = next(one for one in cells_of(grid) if (one.arm.name, one.task) == ("plain", "sentiment"))
    folder = tempfile.mkdtemp()
    settings = {**resolved(grid, cell), "output_dir": folder, "attn_implementation": attention, "disable_tqdm": True}
    file = Path(folder) / "cell.yaml"
    file.write_text(yaml.safe_dump({name: value for name, value in settings.items() if value is not None}))
    trainer: Any = build_trainer(*parse_finetune(["--config", str(file)]))
    trainer._labels_suffice &= labels_alone
    trainer._beginnings_suffice &= beginning_once
    trainer.create_optimizer()
    trainer.model_wrapped = trainer.accelerator.prepare(trainer.model).train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def steps(count: int) -> dict[str, list[float]]:
    """Return seconds of `count` forward and backward passes of each way, in turns after one that is not counted."""
    ways = {
        "the head on every place": (False, False, None),
        "on labelled places": (True, False, None),
        "and beginnings once": (True, True, None),
        "and eager": (True, True, "eager"),
    }
    trainers = {name: trainer_of(*how) for name, how in ways.items()}
    batches = list(islice(next(iter(trainers.values())).get_train_dataloader(), count + 1))
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for batch in batches:
        labelled = (batch["labels"] != -100).sum()
        for name, trainer in trainers.items():
            step = partial(trainer.training_step, trainer.model_wrapped, dict(batch), num_items_in_batch=labelled)
            seconds[name].append(timed(step)[0])
            trainer.model.zero_grad()
    return {name: taken[1:] for name, taken in seconds.items()}


def evaluations(prompts: int, rows: int, batch_size: int) -> dict[str, dict[str, Any]]:
    """Return by set and way the seconds of its responses, and how many differ from those of the first way."""
    from method_comparison.cells import load_merged
    from method_comparison.grid import load_grid
    from recipes.data.splits import prompts_of, rows_of
    from recipes.data.tasks import get_task
    from safemerge_callback.signals import generate

    grid = load_grid(GRID)
    model, tokenizer = load_merged(grid.model, None, grid.evaluate["dtype"])
    task = get_task("sentiment")
    questions_of = {
        **{
            name: (prompts_of(name, "test", prompts), grid.evaluate["max_new_tokens"])
            for name in ("harmbench", "benign")
        },
        "sentiment": ([row["prompt"][-1]["content"] for row in rows_of(task, "test", rows)], task.max_new_tokens),
    }
    figures: dict[str, dict[str, Any]] = {}
    for name, (questions, new) in questions_of.items():
        ask = partial(generate, model, tokenizer, questions, label=None, max_new_tokens=new)
        with patch("safemerge_callback.signals.greedy.plain_decoder", lambda _: None):
            before, first = timed(partial(ask, batch_size=32))
        figures[name] = {"n": len(questions), "generate, 32": before}
        for size in (32, batch_size):
            taken, texts = timed(partial(ask, batch_size=size))
            differing = sum(a != b for a, b in zip(first, texts, strict=True))
            figures[name] |= {f"our own, {size}": taken, f"differ, {size}": differing}
    return figures


def report(results: dict[str, Any]) -> None:
    """Print both tables, and what they were measured on."""
    console = Console()
    table = Table("a step", "seconds, median", "of")
    for name, taken in results["steps"].items():
        table.add_row(name, f"{median(taken):.2f}", str(len(taken)))
    console.print(table)
    for name, row in results["evaluations"].items():
        console.print(name, {key: round(value, 1) for key, value in row.items()})
    console.print(title(results["hardware"]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    about = {name: value for name, value in vars(options).items() if name != "output"}
    results = {
        "hardware": hardware(),
        "about": about,
        "steps": steps(options.steps),
        "evaluations": evaluations(options.prompts, options.rows, options.batch_size),
    }
    report(results)
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
