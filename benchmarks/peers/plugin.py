"""A pytest plugin: every trainer that a test makes gets a callback that watches, where the model has LoRA.

PEERS_REPORT: file for the outcomes, one JSON object. PEERS_WATCH: 1 to put the callback in, 0 to leave it out.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
import transformers

from benchmarks.peers.stand_ins import load_stand_in
from safemerge_callback import SafeMergeCallback, SafeMergeError, build_subspace
from safemerge_callback.live import base_weights, live_factors

datasets.load_dataset = load_stand_in(datasets.load_dataset)
SEEN: dict[str, dict] = {}
NOW: Counter[str] = Counter()


class Watch(transformers.TrainerCallback):
    """Passes every hook to a SafeMergeCallback made for the model at hand."""

    def __init__(self):
        self.guard = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.guard = None
        try:
            subspace = subspace_for(model)
        except SafeMergeError as error:
            NOW["no LoRA" if "no LoRA" in str(error) else "refused"] += 1
            return
        journal = str(Path(tempfile.mkdtemp()) / "safemerge.jsonl")
        self.guard = SafeMergeCallback(subspace=str(subspace), gate="watch", every=1, journal=journal)
        self.guard.on_train_begin(args, state, control, model=model, **kwargs)
        NOW["watched"] += 1

    def on_step_end(self, args, state, control, **kwargs):
        if self.guard:
            self.guard.on_step_end(args, state, control, **kwargs)
            NOW["checks"] += 1

    def on_save(self, args, state, control, **kwargs):
        if self.guard:
            self.guard.on_save(args, state, control, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        if self.guard:
            self.guard.on_train_end(args, state, control, **kwargs)


def subspace_for(model) -> Path:
    """A subspace of a random V for the LoRA modules of `model`; what it is does not matter to one that watches."""
    from safetensors.torch import save_file

    names = list(live_factors(model))
    weights = {name: w.detach().cpu().float() for name, w in base_weights(model).items() if name in names}
    folder = Path(tempfile.mkdtemp())
    rng = torch.Generator().manual_seed(0)
    for which, scale in (("aligned", 0.0), ("unaligned", 0.1)):
        (folder / which).mkdir()
        tensors = {
            f"{n}.weight": (w + scale * torch.randn(w.shape, generator=rng)).contiguous() for n, w in weights.items()
        }
        save_file(tensors, folder / which / "model.safetensors")
    aligned, unaligned = folder / "aligned", folder / "unaligned"
    built = build_subspace(folder / "s.safetensors", aligned=aligned, unaligned=unaligned, target_modules=names)
    return Path(built.path)


if os.environ.get("PEERS_WATCH") == "1":
    _init = transformers.Trainer.__init__

    def _with_watch(self, *args, **kwargs):
        _init(self, *args, **kwargs)
        self.add_callback(Watch())

    transformers.Trainer.__init__ = _with_watch


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Note the outcome of each test, and how many trainings were watched in it."""
    report = (yield).get_result()
    entry = SEEN.setdefault(item.nodeid, {"outcome": "passed", "why": ""})
    if report.outcome != "passed":
        entry["outcome"] = report.outcome
        entry["why"] = str(call.excinfo.value).strip().splitlines()[:1] if call.excinfo else ""
    if call.when == "teardown":
        entry.update(NOW)
        NOW.clear()


def pytest_sessionfinish():
    """Write the outcomes; each worker of a parallel run its own file."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if SEEN:
        Path(f"{os.environ['PEERS_REPORT']}.{worker or 'main'}").write_text(json.dumps(SEEN, indent=1))
