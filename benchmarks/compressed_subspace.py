"""What a compressed alignment matrix saves, what it does to the cosine, and how many decisions its intervals prove.

    python benchmarks/compressed_subspace.py --size 2048 --updates 100

V is size x size with a known spectrum; an update of rank 16 goes partly along V, so that cosines spread. float32, one
process, a fixed seed. `near` counts the updates whose cosine is within 0.05 of the threshold.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from safemerge_callback.ops import AlignmentMatrix, Known, LowRank, cosine_interval, full_precision, projected_cosine
from safemerge_callback.subspace.approximate import proven, quantised, truncated

THRESHOLD = 0.35


def spectra(size: int, generator: torch.Generator) -> dict[str, Callable[[], Tensor]]:
    """Return name -> a maker of V: powers of k as singular values, noise, and a merged adapter saved in bfloat16."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def power(exponent: float) -> Tensor:
        values = torch.arange(1, size + 1).double() ** exponent
        return (torch.linalg.qr(random(size, size)).Q * values.float()) @ torch.linalg.qr(random(size, size)).Q

    def merged() -> Tensor:
        base = (0.02 * random(size, size)).bfloat16().float()
        return (base + 1.25e-4 * random(size, 16) @ random(16, size)).bfloat16().float() - base

    return {
        "flat": lambda: power(0.0),
        "noise": lambda: random(size, size),
        "k^-1/2": lambda: power(-0.5),
        "k^-1": lambda: power(-1.0),
        "rank 16, bfloat16": merged,
    }


def update(V: Tensor, generator: torch.Generator) -> LowRank:
    """Return a batch of one update, of which a random share goes along V."""
    share = float(torch.rand((), generator=generator))
    parts = (torch.randn(V.shape[0], 16, generator=generator), V @ torch.randn(V.shape[1], 16, generator=generator))
    B = (1 - share) * parts[0] / parts[0].norm() + share * parts[1] / parts[1].norm()
    return LowRank(torch.randn(1, 16, V.shape[1], generator=generator), B[None])


@full_precision()
def row(name: str, V: Tensor, kind: str, rank: int, count: int, generator: torch.Generator) -> str:
    """Measure one spectrum and kind; a table's line."""
    began = time.perf_counter()
    stored = quantised(V) if kind == "int8" else truncated(V, rank)
    bounds = proven(V, stored)
    took = time.perf_counter() - began
    known = Known(*(torch.tensor([x], dtype=torch.float64) for x in (*bounds, float(V.norm()))))
    small: AlignmentMatrix = type(stored)(*(t[None] for t in stored))
    errors, widths, proved, near = [], [], 0, 0
    for _ in range(count):
        drawn = update(V, generator)
        true = float(projected_cosine(drawn, V[None]))
        rho, lower, upper = cosine_interval(drawn, small, known)[0].tolist()
        if not lower <= true <= upper:
            raise SystemExit(f"{name}, {kind}: {true} is outside [{lower}, {upper}]")
        errors.append(abs(rho - true))
        widths.append(upper - lower)
        proved += not lower < THRESHOLD <= upper
        near += abs(true - THRESHOLD) < 0.05
    saved = 1 - sum(t.numel() * t.itemsize for t in stored) / (V.numel() * V.itemsize)
    cells = [f"{saved:.1%}", f"{max(errors):.1e}", f"{sum(widths) / count:.3f}", f"{proved}/{count}", str(near)]
    return f"| {name} | {kind} | " + " | ".join([*cells, f"{took:.1f}"]) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(options.seed)
    print("| V | kind | bytes saved | largest error | mean width | proven at .35 | near | seconds to compress |")
    print("|---|---|---|---|---|---|---|---|")
    for name, make in spectra(options.size, generator).items():
        V = make()
        for kind in ("int8", "truncated"):
            print(row(name, V, kind, options.rank, options.updates, generator), flush=True)


if __name__ == "__main__":
    main()
