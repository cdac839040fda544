"""What is refused before the first step, on every rank alike; run by two processes, this file runs the checks."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from transformers import TrainerState

from safemerge_callback import SafeMergeConfig
from safemerge_callback.errors import JournalError
from safemerge_callback.training.probe.opening import connect
from safemerge_callback.training.run.opening import _records
from safemerge_callback.training.run.state import Past

ROOT = Path(__file__).parents[2]


def check_guard(state, journal):
    config = SafeMergeConfig(subspace="s", gate="watch", journal=str(journal))
    _records(config, Past(None, None, []), SimpleNamespace(output_dir=str(journal.parent)), state)


def check_probe(state, journal):
    args = SimpleNamespace(output_dir=str(journal.parent))
    rules = SimpleNamespace(rollback=None, trigger=None)
    connect(SimpleNamespace(rules=rules, args=args, state=state), None, str(journal))


def check(folder):
    state = TrainerState(is_world_process_zero=dist.get_rank() == 0)
    for opened in (check_guard, check_probe):
        for name in ("a text", "a folder"):
            with pytest.raises(JournalError, match="on rank 0 of 2"):
                opened(state, folder / name)


def test_a_journal_that_the_first_rank_refuses_leaves_no_rank_waiting(tmp_path):
    (tmp_path / "a text").write_text("hello\n")
    (tmp_path / "a folder").mkdir()
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"]
    command = [sys.executable, *launcher, "--rdzv-endpoint", "localhost:0", __file__, str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


if __name__ == "__main__":
    dist.init_process_group("gloo")
    check(Path(sys.argv[1]))
    dist.destroy_process_group()
