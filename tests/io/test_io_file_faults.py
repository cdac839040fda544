"""What the system refuses to give is told as that, and never as damage, by every reader of files."""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from safemerge_callback import load_adapter
from safemerge_callback.adapters.snapshot import SNAPSHOT_FILE, SNAPSHOT_FOLDER, Snapshot, load_snapshot, save_snapshot
from safemerge_callback.corrections.average import AVERAGE_FILE, Average
from safemerge_callback.errors import SafeMergeError
from safemerge_callback.io.file_faults import reading_fault
from safemerge_callback.live.initial import INITIAL_FILE, load_initial, save_initial
from safemerge_callback.offline import BaseModel
from safemerge_callback.ops import LowRank
from safemerge_callback.subspace import Subspace, build_subspace
from safemerge_callback.subspace.checkpoints import CheckpointShards

PAIRS = {"q": LowRank(torch.ones(1, 2), torch.ones(2, 1))}
# Name of the file or folder in the world below -> what reads it.
READERS = {
    "adapter/adapter_model.safetensors": lambda at: load_adapter(at / "adapter"),
    "adapter/adapter_config.json": lambda at: load_adapter(at / "adapter"),
    "adapter": lambda at: load_adapter(at / "adapter"),
    "aligned/model.safetensors": lambda at: CheckpointShards.open(at / "aligned"),
    "aligned/config.json": lambda at: CheckpointShards.open(at / "aligned"),
    "aligned": lambda at: BaseModel.find(at / "aligned"),
    "s.safetensors": lambda at: Subspace.load(at / "s.safetensors"),
    INITIAL_FILE: load_initial,
    f"{SNAPSHOT_FOLDER}/{SNAPSHOT_FILE}": load_snapshot,
    AVERAGE_FILE: lambda at: Average.load(at, 0.5),
}


@pytest.fixture(scope="module")
def world():
    """A folder that every user may enter; pytest's own is closed to others."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        at = Path(name)
        at.chmod(0o755)
        for side in ("aligned", "unaligned"):
            LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(at / side)
        build_subspace(at / "s.safetensors", aligned=at / "aligned", unaligned=at / "unaligned", progress=False)
        model = LlamaForCausalLM.from_pretrained(at / "aligned")
        get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(at / "adapter")
        save_initial(at, PAIRS)
        save_snapshot(at, Snapshot(1, PAIRS, {"q": (1.0, 1.0)}))
        Average(0.5, PAIRS).save(at)
        for path in at.rglob("*"):  # safetensors writes files that only their owner may read
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield at


@contextmanager
def another_user():
    """Whoever runs the tests, root included, is nobody here: root reads everything."""
    mine = os.geteuid()
    if mine == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(mine)


@pytest.mark.skipif(os.name != "posix", reason="permissions of another kind")
@pytest.mark.parametrize("name", READERS)
def test_a_file_without_the_right_to_read_is_told_as_that(world, name):
    path = world / name
    READERS[name](world)  # whatever is imported on the way is imported now
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        with another_user(), pytest.raises(SafeMergeError, match=r"cannot be read: permission denied\. ") as refused:
            READERS[name](world)
    finally:
        path.chmod(mode)
    assert path.name in str(refused.value)
    assert "corrupt" not in str(refused.value)
    READERS[name](world)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file here that opens and gives no byte")
@pytest.mark.parametrize("name", [name for name in READERS if name.endswith((".safetensors", ".json"))])
def test_a_disk_that_fails_is_told_as_that(world, name):
    """/proc/self/mem opens, and answers the first byte with EIO, as a disk that dies does."""
    path = world / name
    kept = path.rename(path.with_name("kept"))
    path.symlink_to("/proc/self/mem")
    try:
        with pytest.raises(SafeMergeError, match=r"cannot be read: (input/output error|no such device)\. ") as refused:
            READERS[name](world)
    finally:
        path.unlink()
        kept.rename(path)
    assert "corrupt" not in str(refused.value)


def test_what_the_system_gives_is_damaged_in_itself(tmp_path):
    (tmp_path / "f").write_bytes(b"x")
    assert reading_fault(tmp_path / "f", ValueError("header")) == (
        "is corrupt or truncated (header). Fetch or save it again."
    )
    os.mkfifo(tmp_path / "pipe")
    assert reading_fault(tmp_path / "pipe", ValueError("header")).startswith("cannot be read: it is no regular file.")
    assert "no such file" in reading_fault(tmp_path / "gone", ValueError("header"))
