"""What a build costs in memory, seen from outside: another process's peak."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")

ROWS, COLUMNS = 128, 16384  # 8 MiB of float32
TENSOR = ROWS * COLUMNS * 4

# VmHWM and not getrusage: the latter's maximum is inherited from the process that started this one.
MEASURE = r"""
import json, pathlib, re, sys, torch
from safemerge_callback.subspace import build_subspace
peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
torch.set_num_threads(1)
peaks = [peak()]
for i, targets in enumerate(sys.argv[2:]):
    build_subspace(f"{sys.argv[1]}/v{i}", aligned=f"{sys.argv[1]}/aligned", unaligned=f"{sys.argv[1]}/unaligned",
        target_modules=targets, device="cpu", progress=False)
    peaks.append(peak())
print(json.dumps(peaks))
"""


def peaks(folder, *targets, **environment):
    """Bytes: after the imports, and after a build of each of these targets."""
    call = [sys.executable, "-c", MEASURE, str(folder), *targets]
    done = subprocess.run(call, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    return json.loads(done.stdout)


def write(folder, shards, dtype=torch.float32):
    """Two checkpoints; a shard is {module: shape}."""
    for seed, name in enumerate(("aligned", "unaligned")):
        torch.manual_seed(seed)
        (folder / name).mkdir()
        for number, shapes in enumerate(shards):
            tensors = {f"model.{key}.weight": torch.randn(shape).to(dtype) for key, shape in shapes.items()}
            save_file(tensors, folder / name / f"model-{number}.safetensors")
        weight_map = {
            f"model.{key}.weight": f"model-{n}.safetensors" for n, shapes in enumerate(shards) for key in shapes
        }
        (folder / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_peak_memory_is_a_few_tensors_whatever_the_number_of_layers(tmp_path):
    shards = [{f"layers.{shard * 5 + i}.a": (ROWS, COLUMNS) for i in range(5)} for shard in range(2)]
    write(tmp_path, [{**shards[0], "small": (64, 64)}, shards[1]])
    # glibc keeps freed blocks of this size for itself unless told to give them back at once.
    targets = ("small", r"layers\.0\.a", r"layers\.[0-3]\.a", r"layers\.\d\.a")
    _, small, one, four, ten = peaks(tmp_path, *targets, MALLOC_MMAP_THRESHOLD_="1000000")
    # Two weights and V are 3; |V| to find the probes, or a block in float64 to sum in, 1 to 4 more.
    assert one - small < 8 * TENSOR
    # With more than one layer, two weights are read ahead.
    assert four - one < 4 * TENSOR
    assert ten - four < TENSOR
    assert (tmp_path / "v3").stat().st_size > 10 * TENSOR


def test_a_model_of_1b_shapes_stays_under_three_tensors_and_300_mib(tmp_path):
    hidden, inner, kv = 2048, 8192, 512
    attention = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden)}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    layer = {**{f"self_attn.{k}": v for k, v in attention.items()}, **{f"mlp.{k}": v for k, v in mlp.items()}}
    write(tmp_path, [{f"layers.{i}.{key}": shape for key, shape in layer.items()} for i in range(2)], torch.bfloat16)
    baseline, peak = peaks(tmp_path, r"layers\..*")
    assert peak - baseline < 3 * hidden * inner * 2 + 300 * 2**20
