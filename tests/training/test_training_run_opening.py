"""What is refused before the first step, on every rank alike."""

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
from tests.support.ranks import run_on


def check_guard(state, journal):
    config = SafeMergeConfig(subspace="s", gate="watch", journal=str(journal))
    _records(config, None, Past(None, None, []), SimpleNamespace(output_dir=str(journal.parent)), state)


def check_probe(state, journal):
    args = SimpleNamespace(output_dir=str(journal.parent))
    rules = SimpleNamespace(rollback=None, trigger=None)
    connect(SimpleNamespace(rules=rules, args=args, state=state), None, str(journal))


def check(folder):
    """What each process runs."""
    dist.init_process_group("gloo")
    state = TrainerState(is_world_process_zero=dist.get_rank() == 0)
    for opened in (check_guard, check_probe):
        for name in ("a text", "a folder"):
            with pytest.raises(JournalError, match="on rank 0 of 2"):
                opened(state, Path(folder) / name)


def test_a_journal_that_the_first_rank_refuses_leaves_no_rank_waiting(tmp_path):
    (tmp_path / "a text").write_text("hello\n")
    (tmp_path / "a folder").mkdir()
    run_on(2, check, tmp_path)
