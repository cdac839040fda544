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
from pathlib import Path

import peft
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.hardware import device, hardware, medians, timed, title
from safemerge_callback.methods import get_method
from safemerge_callback.ops import Factored, LowRank, projected_cosine

WEIGHTS = (0.8, 0.2)


def published_cosine(C, A, B):
    """The formula as published: both d_out × d_in matrices formed, then flattened."""
    return torch.nn.functional.cosine_similarity(((C @ B) @ A).flatten(), (B @ A).flatten(), dim=0)


def peft_svd(task, safety, weights):
    """PEFT's own `add_weighted_adapter(combination_type="svd")` on a model of one linear layer, and its result."""
    (rank, d_in), d_out, where = task.A.shape, task.B.shape[0], task.A.device
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
    linear = torch.nn.Linear(d_in, d_out, bias=False, device=where)
    model = peft.get_peft_model(torch.nn.Sequential(linear), config, adapter_name="task")
    model.add_adapter("safety", config)
    layer = model.base_model.model[0]
    for name, update in (("task", task), ("safety", safety)):
        layer.lora_A[name].weight.data.copy_(update.A)
        layer.lora_B[name].weight.data.copy_(update.B)

    def merge():
        model.base_model.add_weighted_adapter(
            ["task", "safety"], list(weights), "merged", combination_type="svd", svd_rank=rank
        )

    return merge, lambda: layer.get_delta_weight("merged").detach()


@torch.no_grad()
def compare(size, rank, repeats, where):
    """Rows of (work, peer, peer seconds, our seconds, peer's error, our error).

    Errors are absolute against float64 for a cosine, and relative against PEFT's matrix for the merge.
    """

    def rand(*shape):
        return torch.randn(*shape, device=where)

    task, safety = LowRank(rand(rank, size), rand(size, rank)), LowRank(rand(rank, size), rand(size, rank))
    V = rand(size, size)
    factors = Factored(rand(size, 64), rand(64, size))
    C = V @ V.mT / V.norm()
    linear = get_method("linear").merge
    works = {
        "form": lambda: V @ V.mT / V.norm(),
        "each": lambda: published_cosine(C, task.A, task.B),
        "ours": lambda: projected_cosine(task, V),
        "thin": lambda: projected_cosine(task, factors),
        "read": lambda: V.sum(),
        "merge": lambda: linear(task, [safety], weights=WEIGHTS, space="delta"),
    }
    took = medians(works, repeats)
    mine, merged = works["ours"](), works["merge"]()
    theirs_off, ours_off = errors(works["each"](), mine, task, V)
    their_merge, their_result = peft_svd(task, safety, WEIGHTS)
    svd, _ = timed(their_merge)
    theirs = their_result()
    away = float((merged.B @ merged.A - theirs).norm() / theirs.norm())
    each, ours = took["each"], took["ours"]
    return [
        ("cosine of a module, C kept", "published formula", each, ours, theirs_off, ours_off),
        ("cosine of a module, C formed", "published formula", took["form"] + each, ours, theirs_off, ours_off),
        ("cosine of a module, V of rank 64", "published formula, C kept", each, took["thin"], None, None),
        ("cosine of a module", "V read once (its sum)", took["read"], ours, None, None),
        ("merge of a module, exact", "PEFT svd", svd, took["merge"], None, away),
    ]


def errors(theirs, ours, task, V):
    """How far both cosines are from the formula in float64."""
    wide = V.double()
    exact = float(published_cosine(wide @ wide.mT, task.A.double(), task.B.double()))
    return abs(float(theirs) - exact), abs(float(ours) - exact)


def report(rows, about):
    """Print the rows as a table."""
    table = Table("work", "peer", "peer ms", "ours ms", "ratio", "peer off by", "ours off by")
    for work, peer, theirs, ours, *errors in rows:
        off = ["" if error is None else f"{error:.1e}" for error in errors]
        table.add_row(work, peer, f"{theirs * 1e3:.2f}", f"{ours * 1e3:.2f}", f"{theirs / ours:,.1f}x", *off)
    Console(width=132).print(about, table, sep="\n")


def main():
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    machine = hardware()
    rows = compare(options.size, options.rank, options.repeats, device())
    report(rows, f"{options.size} x {options.size}, r {options.rank}, float32. {title(machine)}")
    if options.output:
        keys = ("work", "peer", "peer_seconds", "our_seconds", "peer_off_by", "ours_off_by")
        figures = [dict(zip(keys, row, strict=True)) for row in rows]
        sizes = {"size": options.size, "rank": options.rank, "repeats": options.repeats, "seed": options.seed}
        options.output.write_text(json.dumps({"hardware": machine, **sizes, "rows": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
