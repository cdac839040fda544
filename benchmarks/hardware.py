"""What a figure was measured on, and how: the machine by name, seconds in turns, and bytes taken while working."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import date
from importlib.metadata import version
from typing import Any

import torch

from recipes.processor import processor_name

Work = Callable[[], Any]
# glibc settings that decide whether freed blocks go back to the kernel, on which large temporaries' cost depends.
ALLOCATOR = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")

# BENCHMARK_CLOCK=cpu counts this process's CPU seconds instead, which others on the machine disturb less. With many
# threads they add up, so give OMP_NUM_THREADS=1 too.
CLOCK = "cpu" if os.environ.get("BENCHMARK_CLOCK") == "cpu" and not torch.cuda.is_available() else "wall"


def hardware() -> dict[str, Any]:
    """Name what this process runs on: date, device, threads, memory, load, versions, clock, allocator settings."""
    cuda = torch.cuda.is_available()
    return {
        "date": str(date.today()),
        "device": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(_memory(cuda) / 2**30, 1),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "peft", "transformers")},
        "clock": CLOCK,
        "allocator": {name: os.environ[name] for name in ALLOCATOR if name in os.environ},
    }


def title(machine: Mapping[str, Any]) -> str:
    """Return `hardware()` as one line."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    kept = ", freed memory kept" if machine["allocator"] else ""
    where = f"{machine['device']}, {machine['cores']} cores, {machine['threads']} threads, {machine['memory_gib']} GiB"
    clock = ", CPU seconds" if machine["clock"] == "cpu" else ""
    return f"{machine['date']}: {where}{kept}{clock}, load {machine['load']}; {versions}"


def device() -> str:
    """Return the device that benchmarks run on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def timed(work: Work) -> tuple[float, Any]:
    """Return the seconds of one `work()`, waiting for the device before and after, and what it returned."""
    clock = time.process_time if CLOCK == "cpu" else time.perf_counter
    synchronize()
    start = clock()
    result = work()
    synchronize()
    return clock() - start, result


def alternated(works: Mapping[str, Work], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of `repeats` runs of each, taken in turns after one round that is not counted.

    In turns, so that a machine that slows down does so for all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            took, result = timed(work)
            del result
            if turn:
                seconds[name].append(took)
    return seconds


def medians(works: Mapping[str, Work], repeats: int) -> dict[str, float]:
    """Return the median seconds of each of `alternated`."""
    return {name: statistics.median(taken) for name, taken in alternated(works, repeats).items()}


def extra_bytes(work: Work) -> int:
    """Return the most bytes that `work()` held at once in tensors, above those that were there before."""
    if torch.cuda.is_available():
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    allocated = peak = 0
    for size in allocations(work):
        allocated += size
        peak = max(peak, allocated)
    return peak


def allocations(work: Work) -> list[int]:
    """Return every block that torch's CPU allocator gave (> 0) or took back (< 0) during `work()`, in order, in bytes.

    From torch's profiler, so blocks that an operator takes for itself are among them; those of BLAS and LAPACK are not.
    """
    from torch._C._profiler import _EventType

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    sizes_by_time = []
    events = list(profiler.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            sizes_by_time.append((event.start_time_ns, event.extra_fields.alloc_size))
    return [size for _, size in sorted(sizes_by_time, key=lambda pair: pair[0])]


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _memory(cuda: bool) -> int:
    if cuda:
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
