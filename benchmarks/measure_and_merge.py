"""Measuring and merging one module, against the papers' formula as published and PEFT's `svd`, side by side in one run.

python -m benchmarks.measure_and_merge [--size 4096] [--rank 16] [--repeats 5] [--output FILE.json]

The formula's cost is split as its released use splits it: C = V·Vᵀ/‖V‖ is formed once a module and kept (d_out ×
d_out), then each check forms (C·B)·A and B·A and takes their cosine. Both figures are medians; PEFT's `svd` runs once,
since it takes many seconds. Cosines are compared with the formula in float64: a float32 sum over 16 million products,
as the formula needs, loses three digits by itself.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from datetime import date
from pathlib import Path

import peft
import torch
from rich.console import Console
from rich.table import Table

from safemerge_callback.methods import get_method
from safemerge_callback.ops import Factored, LowRank, projected_cosine


def timed(work, repeats):
    """Median seconds of `work()` over `repeats` runs, after one that is not counted."""
    cuda = torch.cuda.is_available()
    seconds = []
    for _ in range(repeats + (repeats > 1)):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = work()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:] or seconds), result


def published_cosine(C, A, B):
    """The formula as published: both d_out × d_in matrices formed, then flattened."""
    return torch.nn.functional.cosine_similarity(((C @ B) @ A).flatten(), (B @ A).flatten(), dim=0)


def peft_svd(size, task, safety, weights, device):
    """PEFT's own `add_weighted_adapter(combination_type="svd")` on a model of one linear layer."""
    rank = task.A.shape[-2]
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
    model = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(size, size, bias=False, device=device)), config, adapter_name="task"
    )
    model.add_adapter("safety", config)
    layer = model.base_model.model[0]
    for name, update in (("task", task), ("safety", safety)):
        layer.lora_A[name].weight.data.copy_(update.A)
        layer.lora_B[name].weight.data.copy_(update.B)

    def merge():
        model.base_model.add_weighted_adapter(
            ["task", "safety"], list(weights), "merged", combination_type="svd", svd_rank=rank
        )

    seconds, _ = timed(merge, 1)
    return seconds, layer.get_delta_weight("merged").detach()


@torch.no_grad()
def compare(size, rank, repeats, device):
    """Rows of (work, peer, peer seconds, our seconds, peer's error, our error).

    Errors are absolute against float64 for a cosine, and relative against PEFT's matrix for the merge.
    """
    torch.manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, device=device)

    task, safety = LowRank(rand(rank, size), rand(size, rank)), LowRank(rand(rank, size), rand(size, rank))
    V = rand(size, size)
    factors = Factored(rand(size, 64), rand(64, size))
    formed, C = timed(lambda: V @ V.mT / V.norm(), repeats)
    each, rho = timed(lambda: published_cosine(C, task.A, task.B), repeats)
    ours, mine = timed(lambda: projected_cosine(task, V), repeats)
    thin, _ = timed(lambda: projected_cosine(task, factors), repeats)
    wide = V.double()
    exact = published_cosine(wide @ wide.mT, task.A.double(), task.B.double())
    theirs_off, ours_off = abs(float(rho) - float(exact)), abs(float(mine) - float(exact))
    weights = (0.8, 0.2)
    svd, theirs = peft_svd(size, task, safety, weights, device)
    linear = get_method("linear").merge
    merge, merged = timed(lambda: linear(task, [safety], weights=weights, space="delta"), repeats)
    away = float((merged.B @ merged.A - theirs).norm() / theirs.norm())
    return [
        ("cosine of a module, C kept", "published formula", each, ours, theirs_off, ours_off),
        ("cosine of a module, C formed", "published formula", formed + each, ours, theirs_off, ours_off),
        ("cosine of a module, V of rank 64", "published formula, C kept", each, thin, None, None),
        ("merge of a module, exact", "PEFT svd", svd, merge, None, away),
    ]


def report(rows, hardware):
    """Print the rows as a table."""
    table = Table("work", "peer", "peer ms", "ours ms", "ratio", "peer off by", "ours off by", title=hardware)
    for work, peer, theirs, ours, *errors in rows:
        off = ["" if error is None else f"{error:.1e}" for error in errors]
        table.add_row(work, peer, f"{theirs * 1e3:.2f}", f"{ours * 1e3:.2f}", f"{theirs / ours:,.0f}x", *off)
    Console(width=132).print(table)


def main():
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    hardware = f"{asked.size} x {asked.size}, r {asked.rank}, float32, {name}, {torch.get_num_threads()} threads"
    rows = compare(asked.size, asked.rank, asked.repeats, device)
    report(rows, f"{hardware}, torch {torch.__version__}, peft {peft.__version__}, {date.today()}")
    if asked.output:
        keys = ("work", "peer", "peer_seconds", "our_seconds", "peer_off_by", "ours_off_by")
        asked.output.write_text(json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
