"""A sweep over thresholds × weights on adapter folders at a model's size, V on the disk, no model.

python -m benchmarks.sweep [--modules 224] [--size 4096] [--rank 16] [--folder DIR] [--output FILE.json]

Writes a subspace file with a dense bfloat16 V for every module (7.5 GB at the default size) and two float32 adapters,
unless `--folder` holds them already, and sweeps 8 thresholds × 5 weights, method linear, twice, each in a process of
its own: first with the file out of the page cache, so that it is read from the disk, then from the cache. Seconds are
those of the sweep, without imports; the peak of resident memory (VmHWM) is the whole process's, pages of mapped files
included.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from benchmarks.hardware import hardware, title
from safemerge_callback.subspace import ModuleHeader
from safemerge_callback.subspace.header import FileHeader
from safemerge_callback.subspace.stream import SafetensorsStream, reserve_for

PEAK = """
import json, pathlib, re, sys, time, torch
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
def report(work):
    before, start, used = peak(), time.perf_counter(), time.process_time()
    figures = work()
    times = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - used}
    print(json.dumps({**times, "peak_bytes": peak(), "bytes_before": before, **figures}))
"""
_SWEEP = """
from safemerge_callback.decision import Gate
from safemerge_callback.offline import sweep_adapters
def work():
    gates = [Gate(threshold=0.2 + 0.05 * i) for i in range(8)] + [Gate("all")]
    weights = [(1 - 0.1 * i, 0.1 * i) for i in range(1, 6)]
    cells = sweep_adapters("task", "safety", "subspace.safetensors", gates=gates, weights=weights)
    return {"cells": len(cells), "modules": cells[-1].modules, "residual": cells[-1].residual}
report(work)
"""
LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def names_of(modules):
    """Names of as many modules, seven a layer."""
    return [f"layers.{i // 7}.self_attn.{LEAVES[i % 7]}" for i in range(modules)]


def write_subspace(path, modules, size, seed=0):
    """A dense bfloat16 V a module, size x size; the null cosine is that of a flat spectrum."""
    torch.manual_seed(seed)
    header = FileHeader({"source": "aligned"}, {"source": "unaligned"})
    for name in names_of(modules):
        header.modules[name] = ModuleHeader((size, size), "dense", None, "bfloat16", float(size), math.sqrt(0.5))
    metadata = header.to_metadata()
    with SafetensorsStream(path, reserve_for(metadata, [f"{name}.V" for name in header.modules])) as stream:
        for name in header.modules:
            stream.append(f"{name}.V", torch.randn(size, size).bfloat16())
        stream.finish(metadata)


def write_adapter(folder, modules, size, rank, seed):
    """A float32 adapter of `rank` with random factors on the same modules."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    tensors = {}
    for name in names_of(modules):
        key = f"base_model.model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, size) / size**0.5
        tensors[f"{key}.lora_B.weight"] = torch.randn(size, rank) / size**0.5
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(LEAVES), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_world(folder, modules, size, rank):
    """Write `subspace.safetensors`, `task` and `safety` into `folder`, unless a finished set of that size is there."""
    folder, wanted = Path(folder), f"{modules} {size} {rank}"
    mark = folder / "made"
    if mark.exists() and mark.read_text() == wanted:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    write_subspace(folder / "subspace.safetensors", modules, size)
    write_adapter(folder / "task", modules, size, rank, 1)
    write_adapter(folder / "safety", modules, size, rank, 2)
    mark.write_text(wanted)
    return folder


def forget(path):
    """Take a file out of the page cache, which needs no rights where none of it is dirty."""
    with Path(path).open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_new_process(script, folder):
    """Run a script in `folder` and return what it reports."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", PEAK + script], cwd=folder, check=True, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def measured(scripts, folder):
    """Name -> figures of each script; where the name says disk, V is not in the page cache when it begins."""
    figures = {}
    for name, script in scripts.items():
        if "disk" in name:
            forget(folder / "subspace.safetensors")
        figures[name] = in_new_process(script, folder)
    return figures


def report(about, rows):
    """Print the figures as a table."""
    table = Table("run", "seconds", "CPU seconds", "peak MiB", "of it before the work MiB")
    for name, row in rows.items():
        sizes = (f"{row[key] / 2**20:.0f}" for key in ("peak_bytes", "bytes_before"))
        table.add_row(name, f"{row['seconds']:.2f}", f"{row['cpu_seconds']:.2f}", *sizes)
    Console(width=132).print(about, table, sep="\n")


def arguments(description):
    """The command line that both benchmarks on files have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", type=int, default=224)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where the files are, or are written and kept")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def run(description, scripts):
    """Make the files, run the scripts on them, print and write the figures."""
    options, machine = arguments(description), hardware()
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_world(options.folder or Path(scratch), options.modules, options.size, options.rank)
        rows = measured(scripts, folder)
    sizes = {"modules": options.modules, "size": options.size, "rank": options.rank}
    report(f"{options.modules} modules of {options.size} x {options.size}, r {options.rank}. {title(machine)}", rows)
    if options.output:
        options.output.write_text(json.dumps({"hardware": machine, **sizes, "runs": rows}, indent=1) + "\n")


def main():
    """Run the benchmark."""
    run(__doc__, {"V from the disk": _SWEEP, "V from the page cache": _SWEEP})


if __name__ == "__main__":
    main()
