"""What the machine multiplies with: its name, its vector instructions, and which dtype is the quicker, measured."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

# Rows, inputs and outputs of products as a step of SmolLM2-135M makes them: attention, and both ways through the MLP.
SHAPES = ((512, 576, 576), (512, 576, 1536), (512, 1536, 576))
_SECONDS = 0.05
# Below this, converting weights and activations costs more than the products save, and a busy machine could tip it.
_WORTH = 1.2


class ProcessorPace(NamedTuple):
    """How quickly products of a model's shapes run on `processor`, in GFLOP/s; 0 where a dtype cannot be had."""

    processor: str
    float32: float
    bfloat16: float

    @property
    def ratio(self) -> float:
        """The pace of bfloat16 over that of float32."""
        return self.bfloat16 / self.float32

    @property
    def dtype(self) -> str:
        """`bfloat16` where it is clearly quicker, else `float32`."""
        return "bfloat16" if self.ratio >= _WORTH else "float32"

    def __str__(self) -> str:
        return f"bfloat16 at {self.ratio:.2g} times the pace of float32 on {self.processor}, measured"


def vector_instructions() -> str:
    """Return the vector instructions that torch uses here, such as AVX2: with others, results round otherwise."""
    import torch

    return torch.backends.cpu.get_cpu_capability()


def processor_name() -> str:
    """Return the accelerator's name, or the processor's and its vector instructions."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if torch.accelerator.is_available():
        return str(torch.accelerator.current_accelerator())
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.processor() or platform.machine()} ({vector_instructions()})"


@cache
def measured_pace() -> ProcessorPace:
    """Measure products of `SHAPES` in both dtypes, in turns for about 50 ms each, where models run here; once.

    Instructions do not tell: of two processors with avx512_bf16 and without AMX, one was seen to run bfloat16 at 0.6
    times the pace of float32, the other at 2 to 2.5 times.
    """
    import torch

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    works = {dtype: _products(getattr(torch, dtype), device) for dtype in ("float32", "bfloat16")}
    best = _best_seconds({dtype: work for dtype, work in works.items() if work is not None})
    flops = sum(2 * math.prod(shape) for shape in SHAPES)
    return ProcessorPace(processor_name(), *(flops / best[dtype] / 1e9 if dtype in best else 0.0 for dtype in works))


def _products(dtype: Any, device: Any) -> Callable[[], None] | None:
    """One round of products, made once beforehand, since the first is slower; None where the device has no such."""
    import torch

    pairs = [(torch.rand(m, k).to(device, dtype), torch.rand(n, k).to(device, dtype)) for m, k, n in SHAPES]

    def work() -> None:
        for x, weight in pairs:
            torch.nn.functional.linear(x, weight)
        if device.type != "cpu":
            torch.accelerator.synchronize()

    try:
        work()
    except RuntimeError:
        return None
    return work


def _best_seconds(works: dict[str, Callable[[], None]]) -> dict[str, float]:
    """The least seconds of each, in turns, so that a machine that slows down does so for all of them."""
    best = dict.fromkeys(works, math.inf)
    end = time.perf_counter() + _SECONDS * len(works)
    while time.perf_counter() < end or math.inf in best.values():
        for name, work in works.items():
            began = time.perf_counter()
            work()
            best[name] = min(best[name], time.perf_counter() - began)
    return best
