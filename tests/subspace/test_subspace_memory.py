"""What a build costs, seen from outside: another process's peak memory, and what a kill leaves behind."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

ROWS, COLUMNS = 128, 16384  # 8 MiB of float32
TENSOR = ROWS * COLUMNS * 4

MEASURE = """
import json, resource, sys, torch
from safemerge_callback.subspace import build_subspace
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.randn(256, 256) @ torch.randn(256, 256)
peaks = [peak()]
for i in sys.argv[2:]:
    build_subspace(f"{sys.argv[1]}/v{i}", aligned=f"{sys.argv[1]}/aligned", unaligned=f"{sys.argv[1]}/unaligned",
        target_modules=rf"layers\\.[0-{i}]\\.a", progress=False)
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
            save_file(tensors, folder / name / f"model-{shard}.safetensors")
        weight_map = {f"model.layers.{i}.a.weight": f"model-{i // 5}.safetensors" for i in range(10)}
        (folder / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_peak_memory_is_a_few_tensors_whatever_the_number_of_layers(checkpoints):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(checkpoints), "0", "9"], capture_output=True, text=True, check=True
    )
    imported, one_layer, ten_layers = json.loads(done.stdout)
    assert one_layer - imported < 12 * TENSOR  # two weights, V, a block in float64, and the libraries' workspace
    # Ten layers of two checkpoints are 20 tensors; the larger build must cost less than 3 more than the smaller.
    assert ten_layers - one_layer < 3 * TENSOR
    assert (checkpoints / "v9").stat().st_size > 10 * TENSOR


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
