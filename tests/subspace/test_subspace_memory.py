"""What a build costs, seen from outside: another process's peak memory, and what a kill leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROWS, COLUMNS = 128, 16384  # 8 MiB of float32
TENSOR = ROWS * COLUMNS * 4

# VmHWM and not getrusage: the latter's maximum is inherited from the process that started this one.
MEASURE = r"""
import json, pathlib, re, sys, torch
from safemerge_callback.subspace import build_subspace
peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
peaks = []
for i, targets in enumerate(("small", r"layers\.0\.a", r"layers\.\d\.a")):
    build_subspace(f"{sys.argv[1]}/v{i}", aligned=f"{sys.argv[1]}/aligned", unaligned=f"{sys.argv[1]}/unaligned",
        target_modules=targets, progress=False)
    peaks.append(peak())
print(json.dumps(peaks))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    for seed, name in enumerate(("aligned", "unaligned")):
        torch.manual_seed(seed)
        (folder / name).mkdir()
        for shard in range(2):
            tensors = {f"model.layers.{shard * 5 + i}.a.weight": torch.randn(ROWS, COLUMNS) for i in range(5)}
            if shard == 0:
                tensors["model.small.weight"] = torch.randn(64, 64)
            save_file(tensors, folder / name / f"model-{shard}.safetensors")
        weight_map = {f"model.layers.{i}.a.weight": f"model-{i // 5}.safetensors" for i in range(10)}
        weight_map["model.small.weight"] = "model-0.safetensors"
        (folder / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_is_a_few_tensors_whatever_the_number_of_layers(checkpoints):
    # glibc keeps freed blocks of this size for itself unless told to give them back at once.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    call = [sys.executable, "-c", MEASURE, str(checkpoints)]
    done = subprocess.run(call, capture_output=True, text=True, check=True, env=environment)
    small, one_layer, ten_layers = json.loads(done.stdout)
    # Two weights and V are 3; |V| to find the probes, or a block in float64 to sum in, 1 to 4 more.
    assert one_layer - small < 8 * TENSOR
    # Ten layers of two checkpoints are 20 tensors; the larger build must cost less than 1 more than the smaller.
    assert ten_layers - one_layer < TENSOR
    assert (checkpoints / "v2").stat().st_size > 10 * TENSOR


def test_a_kill_in_the_middle_leaves_no_half_file(checkpoints, tmp_path):
    output = tmp_path / "v"
    output.write_text("old")
    call = (
        "import sys; from safemerge_callback.subspace import build_subspace as b\n"
        "b(sys.argv[2], aligned=sys.argv[1] + '/aligned', unaligned=sys.argv[1] + '/unaligned', progress=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", call, str(checkpoints), str(output)])
    while process.poll() is None and not any(p.stat().st_size > TENSOR for p in tmp_path.glob(".v.*.partial")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert output.read_text() == "old"
