"""How long will it take? A range from measured paces, said before the first cell."""

from __future__ import annotations

from collections.abc import Sequence

from recipes.data.splits import SETS, prompts_of, rows_of
from recipes.data.tasks import get_task
from recipes.processor import measured_pace

from .grid import Cell, Grid
from .resolve import resolved

# SmolLM2-135M on 2 CPU cores in float32: 60 steps of 8 rows took 60 to 125 s, generation made 126 to 255 tokens/s.
SECONDS_A_ROW = (60 / 480, 125 / 480)
TOKENS_A_SECOND = (255.0, 126.0)
# A refusal ends before max_new_tokens: at best half of them are made.
MADE = (0.5, 1.0)
# Loading a model and an adapter, or a merge after training.
OVERHEAD = (2.0, 10.0)


def seconds_of(grid: Grid, cell: Cell) -> tuple[float, float]:
    """Return the least and most seconds that a cell is likely to take, by the paces above."""
    asked = sum(len(prompts_of(name, grid.split, grid.evaluate[name])) for name in SETS)
    task = get_task(cell.task)
    tokens = asked * grid.evaluate["max_new_tokens"]
    tokens += len(rows_of(task, grid.split, grid.evaluate["task"])) * task.max_new_tokens
    rows = 0
    if cell.arm.kind == "train":
        settings = resolved(grid, cell)
        each = settings.get("per_device_train_batch_size", 8) * settings.get("gradient_accumulation_steps", 1)
        rows = max(int(settings.get("max_steps", 0)), 0) * each
    low, high = (
        rows * row + MADE[i] * tokens / pace + OVERHEAD[i]
        for i, (row, pace) in enumerate(zip(SECONDS_A_ROW, TOKENS_A_SECOND, strict=True))
    )
    return low, high


def estimate(grid: Grid, cells: Sequence[Cell]) -> str:
    """Return how long the cells are likely to take on 2 CPU cores, in words."""
    spans = [seconds_of(grid, cell) for cell in cells]
    low, high = (sum(span[i] for span in spans) for i in (0, 1))
    size, unit = (3600, "hours") if high > 3600 else (60, "minutes")
    trained = sum(cell.arm.kind == "train" for cell in cells)
    return (
        f"{len(cells)} cells, {trained} of them trained: about {low / size:.1f} to {high / size:.1f} {unit} at the "
        f"pace of a 135M model on 2 CPU cores in float32{_slower(grid) if cells else ''}"
    )


def _slower(grid: Grid) -> str:
    """Say so where the grid asks the machine for bfloat16, and its products were measured to be slower there."""
    # SFTConfig's own default is bf16.
    asked = grid.finetune.get("bf16", True) or grid.evaluate["dtype"] == "bfloat16"
    pace = measured_pace()
    if pace.ratio >= 1 or not asked:
        return ""
    return (
        f", and longer in bfloat16 ({pace}): take a grid with finetune: {{bf16: false}} and "
        "evaluate: {dtype: float32}, such as method_comparison/grids/smollm2_float32.yaml"
    )
