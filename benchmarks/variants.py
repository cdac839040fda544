"""The same arithmetic done otherwise: modules in a batch or one by one, and `torch.compile` or none.

python -m benchmarks.variants [--repeats 7] [--output FILE.json]
    [--batches 64x576x8 8x4096x16] [--compiled 4096x16] [--skip-compile]

A batch is COUNTxSIZExRANK: that many square modules. Cosine and exact merge are timed in turns, once as one call for
all and once as a call for each. Compiling is timed on `projected_cosine` of one module, SIZExRANK, after warm-up; what
the compilation itself takes is beside it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.hardware import device, hardware, medians, timed, title
from safemerge_callback.methods import get_method
from safemerge_callback.ops import LowRank, projected_cosine

WEIGHTS = (0.8, 0.2)


def random_update(count: int, size: int, rank: int, where: str) -> LowRank:
    """Return `count` random updates of square modules as one batch."""
    return LowRank(torch.randn(count, rank, size, device=where), torch.randn(count, size, rank, device=where))


def one(update: LowRank, i: int) -> LowRank:
    """Return the batch of module `i` alone."""
    return LowRank(update.A[i : i + 1], update.B[i : i + 1])


@torch.no_grad()
def compare_batch(count: int, size: int, rank: int, repeats: int, where: str) -> list[dict[str, Any]]:
    """Return a row for the cosine and one for the merge: seconds of one call for all, and of a call for each."""
    task, safety = random_update(count, size, rank, where), random_update(count, size, rank, where)
    V = torch.randn(count, size, size, device=where)
    linear = get_method("linear").merge
    works = {
        "cosine, batch": lambda: projected_cosine(task, V),
        "cosine, alone": lambda: [projected_cosine(one(task, i), V[i : i + 1]) for i in range(count)],
        "merge, batch": lambda: linear(task, [safety], weights=WEIGHTS),
        "merge, alone": lambda: [linear(one(task, i), [one(safety, i)], weights=WEIGHTS) for i in range(count)],
    }
    took = medians(works, repeats)
    return [
        {
            "work": f"{work} of {count} modules {size} x {size}, r {rank}",
            "baseline": "one by one",
            "baseline_seconds": took[f"{work}, alone"],
            "variant": "batched",
            "seconds": took[f"{work}, batch"],
        }
        for work in ("cosine", "merge")
    ]


@torch.no_grad()
def compare_compiled(size: int, rank: int, repeats: int, where: str) -> dict[str, Any]:
    """Return a row for `projected_cosine` compiled, and the seconds that compiling took."""
    task, V = random_update(1, size, rank, where), torch.randn(1, size, size, device=where)
    compiled = torch.compile(projected_cosine)
    compiling, _ = timed(lambda: compiled(task, V))
    took = medians({"eager": lambda: projected_cosine(task, V), "compiled": lambda: compiled(task, V)}, repeats)
    return {
        "work": f"cosine of a module {size} x {size}, r {rank}",
        "baseline": "eager",
        "baseline_seconds": took["eager"],
        "variant": "torch.compile",
        "seconds": took["compiled"],
        "compiling_seconds": compiling,
    }


def report(results: dict[str, Any]) -> None:
    """Print the rows as a table."""
    table = Table("work", "baseline", "variant", "baseline ms", "variant ms", "ratio", "to compile, s")
    for row in results["rows"]:
        before, after, compiling = row["baseline_seconds"], row["seconds"], row.get("compiling_seconds")
        numbers = f"{before * 1e3:.2f}", f"{after * 1e3:.2f}", f"{before / after:.2f}x"
        names = row["work"], row["baseline"], row["variant"]
        table.add_row(*names, *numbers, "" if compiling is None else f"{compiling:.1f}")
    Console(width=132).print(title(results["hardware"]), table, sep="\n")


def sizes(text: str) -> list[int]:
    """Parse 64x576x8."""
    return [int(number) for number in text.split("x")]


def main() -> None:
    """Run the comparisons and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=sizes, nargs="*", default=[[64, 576, 8], [8, 4096, 16]])
    parser.add_argument("--compiled", type=sizes, default=[4096, 16])
    parser.add_argument("--skip-compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    machine = hardware()
    where = device()
    rows = [
        row for count, size, rank in options.batches for row in compare_batch(count, size, rank, options.repeats, where)
    ]
    if not options.skip_compile:
        size, rank = options.compiled
        rows.append(compare_compiled(size, rank, options.repeats, where))
    results = {"hardware": machine, "seed": options.seed, "repeats": options.repeats, "rows": rows}
    report(results)
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
