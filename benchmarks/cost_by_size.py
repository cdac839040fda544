"""What a check costs against the size of the model: bytes of V, operations, seconds.

python -m benchmarks.cost_by_size [--models 135m 1b 7b 70b] [--memory 6] [--rank 16] [--repeats 5] [--output FILE.json]

A check is `measure(factors, subspace)` of all linear modules of a Llama's shapes, with V in memory and random weights.
As many whole layers are measured as `--memory` GiB of V hold, at least one; where that is not all of them, the seconds
of the whole model are those of the measured layers times their number, and the row says so. Operations are counted by
torch's FlopCounterMode on tensors without storage, so they are exact at every size: two a multiply-add.

The line through the measured points (bytes of V, seconds) and its R² say whether the cost is linear in bytes of V.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.hardware import device, hardware, medians, title
from benchmarks.model_shapes import MODELS, Model, random_factors, random_subspace
from safemerge_callback.decision import measure
from safemerge_callback.ops import LowRank, projected_cosine

SIZES = ("135m", "1b", "7b", "70b")


def bytes_of(model: Model, dtype: torch.dtype, layers: int | None = None) -> int:
    """Return the bytes of V of so many layers, all if None."""
    return dtype.itemsize * sum(rows * columns for rows, columns in model.shapes(layers).values())


def operations(model: Model, rank: int) -> int:
    """Return the floating-point operations of a check of the whole model: of its matrix products."""
    return sum(_operations_of(shape, rank) * count for shape, count in Counter(model.shapes().values()).items())


def _operations_of(shape: tuple[int, int], rank: int) -> int:
    d_out, d_in = shape
    update = LowRank(torch.empty(rank, d_in, device="meta"), torch.empty(d_out, rank, device="meta"))
    with FlopCounterMode(display=False) as counter:
        projected_cosine(update, torch.empty(d_out, d_in, device="meta"))
    return counter.get_total_flops()


@torch.no_grad()
def cost_of(name: str, rank: int, dtype: torch.dtype, memory: float, repeats: int, where: str) -> dict[str, Any]:
    """Measure as many layers as `memory` GiB hold; return bytes, operations and seconds of them and of the whole."""
    model = MODELS[name]
    layers = max(1, min(model.layers, int(memory * 2**30 / bytes_of(model, dtype, 1))))
    shapes = model.shapes(layers)
    factors = random_factors(shapes, rank, where)
    subspace, _ = random_subspace(shapes, dtype)
    seconds = medians({"check": lambda: measure(factors, subspace)}, repeats)["check"]
    return {
        "model": name,
        "modules": len(model.shapes()),
        "layers": model.layers,
        "measured_layers": layers,
        "measured_bytes": bytes_of(model, dtype, layers),
        "measured_seconds": seconds,
        "bytes": bytes_of(model, dtype),
        "operations": operations(model, rank),
        "seconds": seconds * model.layers / layers,
    }


def line(points: list[tuple[float, float]]) -> dict[str, float] | None:
    """Return slope, intercept and R² of the least-squares line through (x, y); None for fewer than three points."""
    if len(points) < 3:
        return None
    x, y = zip(*points, strict=True)
    slope, intercept = statistics.linear_regression(x, y)
    return {"slope": slope, "intercept": intercept, "r_squared": statistics.correlation(x, y) ** 2}


def report(results: dict[str, Any]) -> None:
    """Print a row a size, and the line."""
    table = Table("model", "modules", "V, GiB", "operations, G", "seconds", "layers measured", "GiB/s")
    for row in results["rows"]:
        whole = row["measured_layers"] == row["layers"]
        how = f"all {row['layers']}" if whole else f"{row['measured_layers']} of {row['layers']}, the rest computed"
        numbers = f"{row['bytes'] / 2**30:.2f}", f"{row['operations'] / 1e9:,.1f}", f"{row['seconds']:.4f}"
        speed = f"{row['measured_bytes'] / 2**30 / row['measured_seconds']:.1f}"
        table.add_row(row["model"], str(row["modules"]), *numbers, how, speed)
    fit = results["line"]
    said = "fewer than three sizes: no line"
    if fit:
        per_gib = fit["slope"] * 2**30 * 1e3
        said = (
            f"{per_gib:.2f} ms a GiB of V {fit['intercept'] * 1e3:+.2f} ms, R² {fit['r_squared']:.4f} (measured points)"
        )
    Console(width=132).print(title(results["hardware"]), results["about"], table, said, sep="\n")


def main() -> None:
    """Measure every size and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=MODELS, nargs="+", default=list(SIZES))
    parser.add_argument("--memory", type=float, default=6.0, help="GiB of V to measure with at most")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="that of V")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    machine = hardware()
    dtype, where = getattr(torch, options.dtype), device()
    rows = [cost_of(name, options.rank, dtype, options.memory, options.repeats, where) for name in options.models]
    results = {
        "hardware": machine,
        "about": f"one check, r {options.rank}, V in {options.dtype}, median of {options.repeats}, seed {options.seed}",
        "rows": rows,
        "line": line([(row["measured_bytes"], row["measured_seconds"]) for row in rows]),
    }
    report(results)
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
