"""All linear modules of a Llama's shapes: measured against the published formula, merged into against PEFT's `svd`.

python -m benchmarks.model_shapes [--model 7b] [--layers 1] [--rank 16] [--repeats 5] [--skip-svd] [--output FILE.json]

Weights are random; a layer has seven modules (q, k, v, o, gate, up, down). `--layers` of them are measured, all by
default on a GPU and one on a CPU: 7B takes 26 GiB for V in float32 and 39 GiB for the peer's matrices C, besides.

measure: ours is `measure(factors, subspace)` with V in memory. The peer is the papers' formula as published, its
matrices C = V·Vᵀ/‖V‖ built beforehand: (C·B)·A and B·A formed, their cosine taken and read, module by module. Both in
turns; memory is what each holds at once besides its matrices.

merge: ours is `merged_factors` for all modules, checks included. The peer is PEFT's add_weighted_adapter("svd"), run
once for one module of each shape and counted once for each module of that shape, since it takes many seconds a module.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.hardware import device, extra_bytes, hardware, medians, timed, title
from benchmarks.measure_and_merge import peft_svd, published_cosine
from safemerge_callback.adapters import Adapter, LoraFactors
from safemerge_callback.decision import MergePlan, Reading, Readings, measure
from safemerge_callback.decision.apply import merged_factors
from safemerge_callback.ops import LowRank
from safemerge_callback.subspace import Request, Subspace
from safemerge_callback.subspace.header import FileHeader, ModuleHeader

WEIGHTS = (0.8, 0.2)
Shapes = dict[str, tuple[int, int]]


class Model(NamedTuple):
    """The sizes of a decoder: `kv` is the width of its keys and values."""

    layers: int
    hidden: int
    intermediate: int
    kv: int

    def shapes(self, layers: int | None = None) -> Shapes:
        """Return module -> (d_out, d_in) of the linear modules of so many layers, all if None."""
        hidden, wide, kv = self.hidden, self.intermediate, self.kv
        attention = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
        mlp = {"gate_proj": (wide, hidden), "up_proj": (wide, hidden), "down_proj": (hidden, wide)}
        each = {**attention, "o_proj": (hidden, hidden), **mlp}
        return {f"layers.{i}.{name}": shape for i in range(layers or self.layers) for name, shape in each.items()}


MODELS = {
    "tiny": Model(layers=2, hidden=64, intermediate=96, kv=32),
    "135m": Model(layers=30, hidden=576, intermediate=1536, kv=192),
    "1b": Model(layers=16, hidden=2048, intermediate=8192, kv=512),
    "7b": Model(layers=32, hidden=4096, intermediate=11008, kv=4096),
    "70b": Model(layers=80, hidden=8192, intermediate=28672, kv=1024),
}


class InMemory:
    """A placement that makes V at random when it is first asked for, and keeps it."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype) -> None:
        self._shapes, self._dtype = shapes, dtype
        self._kept: dict[tuple[str, ...], torch.Tensor] = {}

    def stacks(self, read: Any, requests: Iterable[Request]) -> Iterator[torch.Tensor]:
        """Yield the stack of each request; nothing is read."""
        for names, where, _ in requests:
            if names not in self._kept:
                shape = (len(names), *self._shapes[names[0]])
                self._kept[names] = torch.randn(shape, dtype=self._dtype, device=where)
            yield self._kept[names]

    def matrices(self) -> dict[str, torch.Tensor]:
        """Return module -> V of all that were asked for, as views."""
        return {name: V[i] for names, V in self._kept.items() for i, name in enumerate(names)}


def random_factors(shapes: Shapes, rank: int, where: str) -> dict[str, LoraFactors]:
    """Return LoRA factors of every module, both of them random."""
    return {
        name: LoraFactors(name, torch.randn(rank, d_in, device=where), torch.randn(d_out, rank, device=where), 2.0)
        for name, (d_out, d_in) in shapes.items()
    }


def random_subspace(shapes: Shapes, dtype: torch.dtype) -> tuple[Subspace, InMemory]:
    """Return a subspace of random V, made in memory when it is first measured against, and where they are kept."""
    kind = str(dtype).removeprefix("torch.")
    modules = {name: ModuleHeader(shape, "dense", None, kind, 1.0, 0.5) for name, shape in shapes.items()}
    subspace, placement = Subspace(Path("random"), FileHeader({}, {}, modules), "random"), InMemory(shapes, dtype)
    subspace.place(placement)
    return subspace, placement


def published_cosines(matrices: dict[str, torch.Tensor], factors: dict[str, LoraFactors]) -> dict[str, float]:
    """The formula as published, module by module, each cosine read at once."""
    return {name: published_cosine(C, factors[name].A, factors[name].B).item() for name, C in matrices.items()}


def published_operator(V: torch.Tensor) -> torch.Tensor:
    """C = V·Vᵀ/‖V‖, d_out × d_out."""
    return V @ V.mT / V.norm()


def size_of(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of all tensors."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


@torch.no_grad()
def compare_measures(shapes: Shapes, rank: int, dtype: torch.dtype, repeats: int, where: str) -> dict[str, Any]:
    """Measure all modules on both sides; return seconds, bytes, and how far the cosines are apart."""
    factors = random_factors(shapes, rank, where)
    subspace, placement = random_subspace(shapes, dtype)
    readings = measure(factors, subspace)
    matrices = {name: published_operator(V.float()) for name, V in placement.matrices().items()}
    works = {"our": lambda: measure(factors, subspace), "peer": lambda: published_cosines(matrices, factors)}
    seconds = medians(works, repeats)
    published = published_cosines(matrices, factors)
    return {
        "work": "measure",
        "peer": "published formula, C kept",
        "modules": len(shapes),
        **{f"{side}_seconds": taken for side, taken in seconds.items()},
        **{f"{side}_extra_bytes": extra_bytes(work) for side, work in works.items()},
        "our_resident_bytes": size_of(placement.matrices().values()),
        "peer_resident_bytes": size_of(matrices.values()),
        "apart": max(abs(reading.cosine - published[name]) for name, reading in readings.items()),
    }


@torch.no_grad()
def compare_merges(shapes: Shapes, rank: int, repeats: int, where: str, with_svd: bool) -> dict[str, Any]:
    """Merge into all modules; return seconds and bytes of both, the peer's from one module of each shape."""
    factors, others = random_factors(shapes, rank, where), random_factors(shapes, rank, where)
    safety = Adapter("random", None, {}, others)
    readings = Readings(Reading(name, 0.1, 0.7, 1.0, rank, shape) for name, shape in shapes.items())
    plan = MergePlan.decide(readings, gate="all", weights=WEIGHTS)

    def merge() -> Any:
        return merged_factors(plan, factors, safety)

    row = {
        "work": "merge",
        "peer": "PEFT svd",
        "modules": len(shapes),
        "our_seconds": medians({"our": merge}, repeats)["our"],
        "our_extra_bytes": extra_bytes(merge),
    }
    if not with_svd:
        return row
    merged, _ = merge()
    each: dict[tuple[int, int], dict[str, Any]] = {}
    for shape in dict.fromkeys(shapes.values()):
        name = next(name for name, size in shapes.items() if size == shape)
        pair = (factors[name].low_rank(), others[name].low_rank())
        each[shape] = compare_svd(pair, merged[name])
    count = Counter(shapes.values())
    return {
        **row,
        "peer_seconds": sum(each[shape]["seconds"] * n for shape, n in count.items()),
        "peer_extra_bytes": max(row["extra_bytes"] for row in each.values()),
        "apart": max(row["apart"] for row in each.values()),
        "peer_by_shape": {f"{shape[0]}x{shape[1]}": row["seconds"] for shape, row in each.items()},
    }


def compare_svd(pair: tuple[LowRank, LowRank], merged: LowRank) -> dict[str, float]:
    """Merge one module as PEFT does; return its seconds, its bytes, and how far `merged` is from it, relative."""
    merge, result = peft_svd(*pair, WEIGHTS)
    seen = {}

    def once() -> None:
        seen["seconds"], _ = timed(merge)

    seen["extra_bytes"] = extra_bytes(once)
    theirs = result()
    seen["apart"] = float((merged.B @ merged.A - theirs).norm() / theirs.norm())
    return seen


def report(results: dict[str, Any]) -> None:
    """Print the rows as a table."""
    table = Table(
        "work", "peer", "modules", "ratio", "ours, s", "peer, s", "held, ours", "held, peer", "of it", "apart"
    )
    for row in results["rows"]:
        ours, theirs = row["our_extra_bytes"], row.get("peer_extra_bytes")
        table.add_row(
            row["work"],
            row["peer"],
            str(row["modules"]),
            f"{row['peer_seconds'] / row['our_seconds']:,.1f}x" if theirs else "not measured",
            f"{row['our_seconds']:.4f}",
            f"{row['peer_seconds']:.3f}" if theirs else "",
            f"{ours / 2**20:,.1f} MiB",
            f"{theirs / 2**20:,.1f} MiB" if theirs else "",
            f"{100 * ours / theirs:.2f} %" if theirs else "",
            f"{row['apart']:.1e}" if theirs else "",
        )
    console = Console(width=150)
    console.print(title(results["hardware"]), results["about"], table, sep="\n")


def main() -> None:
    """Run both comparisons and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="7b")
    parser.add_argument("--layers", type=int, help="how many layers to measure")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="that of V")
    parser.add_argument("--skip-svd", action="store_true", help="leave PEFT's merge out: it takes minutes")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    machine = hardware()
    where, model = device(), MODELS[options.model]
    layers = options.layers or (model.layers if where == "cuda" else 1)
    shapes, dtype = model.shapes(layers), getattr(torch, options.dtype)
    sizes = f"{layers} of {model.layers} layers, {len(shapes)} modules"
    about = f"{options.model}: {sizes}, r {options.rank}, V in {options.dtype}"
    rows = [
        compare_measures(shapes, options.rank, dtype, options.repeats, where),
        compare_merges(shapes, options.rank, options.repeats, where, not options.skip_svd),
    ]
    results = {"hardware": machine, "about": about, "seed": options.seed, "layers": layers, "rows": rows}
    report(results)
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
