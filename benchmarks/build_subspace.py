"""Building a safety subspace from two checkpoints on disk, against loading both models and subtracting.

python -m benchmarks.build_subspace [--layers 16] [--repeats 3] [--folder DIR] [--output FILE.json]

Writes two checkpoints of random bfloat16 weights in the shapes of Llama-3.2-1B (16 layers, 2048 wide, 8192 inside,
512 for keys and values, 128,256 tied embeddings; one shard a layer), and runs each side in its own process, in turn.
The peers load both models with `from_pretrained` and keep every linear layer's difference, as the released code does;
it also keeps V·Vᵀ of each, which is the second peer. Ours writes a file with V in full, and with its norm, null cosine
(whose ‖V·Vᵀ‖ is exact), spread, spectrum and checksums. Medians; the files are in the page cache for all alike; imports
are not counted in the seconds, but are in the peak of resident memory (VmHWM), which is also given without them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

HIDDEN, INNER, KEYS, VOCABULARY = 2048, 8192, 512, 128256

_PEAK = """
import json, pathlib, re, sys, time, torch
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
"""
_RUN = """
before, start = peak(), time.perf_counter()
work(*sys.argv[1:])
print(json.dumps([time.perf_counter() - start, peak(), before]))
"""
_OURS = """
from safemerge_callback.subspace import build_subspace
def work(folder):
    build_subspace(f"{folder}/v.safetensors", aligned=f"{folder}/aligned", unaligned=f"{folder}/unaligned",
                   device="cpu", progress=False)
"""
_PEER = """
from transformers import AutoModelForCausalLM
def work(folder):
    models = [AutoModelForCausalLM.from_pretrained(f"{folder}/{name}") for name in ("aligned", "unaligned")]
    found = []
    with torch.no_grad():
        for (name, a), (_, b) in zip(*(m.named_parameters() for m in models), strict=True):
            if name.endswith("_proj.weight"):
                found.append(%s)
"""
SIDES = {
    "ours: the file, statistics, checksums": _OURS,
    "peer: both models, V kept": _PEER % "a - b",
    "peer: both models, V·Vᵀ/‖V‖ kept": _PEER % "(lambda V: V @ V.mT / V.norm())(a - b)",
}


def write_checkpoint(folder, layers, seed):
    """One shard a layer, with index and configuration, without making the model."""
    folder.mkdir()
    torch.manual_seed(seed)
    square, narrow, up = (HIDDEN, HIDDEN), (KEYS, HIDDEN), (INNER, HIDDEN)
    attention = {"q_proj": square, "k_proj": narrow, "v_proj": narrow, "o_proj": square}
    mlp = {"gate_proj": up, "up_proj": up, "down_proj": (HIDDEN, INNER)}
    norms = {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
    layer = {f"self_attn.{k}": v for k, v in attention.items()} | {f"mlp.{k}": v for k, v in mlp.items()} | norms
    shards = [{f"layers.{i}.{name}": shape for name, shape in layer.items()} for i in range(layers)]
    shards.append({"embed_tokens": (VOCABULARY, HIDDEN), "norm": (HIDDEN,)})
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shards):
        file = f"model-{number:05}.safetensors"
        tensors = {f"model.{name}.weight": 0.02 * torch.randn(shape).bfloat16() for name, shape in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        dtype="bfloat16",
    ).save_pretrained(folder)


def measured(code, folder):
    """Seconds, peak bytes and bytes after the imports of one run in its own process."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    call = [sys.executable, "-c", _PEAK + code + _RUN, str(folder)]
    done = subprocess.run(call, check=True, capture_output=True, text=True, env=environment)
    (folder / "v.safetensors").unlink(missing_ok=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(folder, layers, repeats):
    """{side: [seconds, peak, after the imports]}, medians over `repeats` rounds in which each side runs once."""
    for seed, name in enumerate(("aligned", "unaligned")):
        write_checkpoint(folder / name, layers, seed)
    rounds = [{side: measured(code, folder) for side, code in SIDES.items()} for _ in range(repeats)]
    return {side: [statistics.median(r[side][i] for r in rounds) for i in range(3)] for side in SIDES}


def report(figures, title):
    """Print seconds and MiB, and how ours compares with each peer."""
    table = Table("side", "seconds", "peak MiB", "peak without imports", "our time", "our peak", "without", title=title)
    ours = figures["ours: the file, statistics, checksums"]
    for side, (seconds, peak, before) in figures.items():
        shares = (ours[0] / seconds, ours[1] / peak, (ours[1] - ours[2]) / (peak - before))
        ratios = [f"{share:.0%}" for share in shares] if seconds != ours[0] else ["", "", ""]
        table.add_row(side, f"{seconds:.1f}", f"{peak / 2**20:,.0f}", f"{(peak - before) / 2**20:,.0f}", *ratios)
    Console(width=140).print(table)


def main():
    """Write the checkpoints, run all sides and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written for the time being: 9 GiB")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        figures = compare(Path(folder), options.layers, options.repeats)
    hardware = f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    title = f"{options.layers} layers of Llama-3.2-1B, bfloat16, {hardware}, {versions}, {date.today()}"
    report(figures, title)
    if options.output:
        keys = ("seconds", "peak_bytes", "bytes_after_imports")
        sides = {side: dict(zip(keys, values, strict=True)) for side, values in figures.items()}
        options.output.write_text(json.dumps({"what": title, "sides": sides}, indent=1) + "\n")


if __name__ == "__main__":
    main()
