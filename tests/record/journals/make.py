"""Make `v1.jsonl`, `v2.jsonl`: one training that was resumed twice and undone, as the package writes it when this runs.

`python -m tests.record.journals.make PATH`. The runs are the same for every version of the format, on one machine to
the bit; a stored file is made once, by the last commit that wrote its version (f33821b for version 1), and never again.
Between them the three runs write every kind of line: gates `threshold`, `calibrated` and `reference`, an average, a
compressed subspace, a check beside the training, a probe with all its rules, a failure, a best model, an undoing.
"""

import argparse
import os
import shutil
import tempfile
import warnings
from pathlib import Path

from safemerge_callback import SafeMergeCallback, undo_merge
from tests.support.judges import Says
from tests.trajectory.witness.training import Falling, batches, knobs, probe, trained
from tests.trajectory.witness.world import INT8, make_world


def make(output):
    """Train, resume, resume, undo; put the journal at `output`."""
    output = Path(output).resolve()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = Path.cwd()
        os.chdir(folder)
        try:
            world = make_world()
            first(world, "run")
            second(world, "run")
            third(world, "run")
            undo_merge("run")
            shutil.copy("run/safemerge.jsonl", output)
        finally:
            os.chdir(before)


def first(world, folder):
    """Steps 1 and 2: soft weights below a threshold, merges that a probe takes back, a score that is no share."""
    settings = {"gate": "threshold", "threshold": 0.9, "soft": True, "every": 1, "at_train_end": False}
    task = Falling()
    task.score = 0.25
    asked = {"every": 1, "task": task, "task_unit": "share", "rollback": {"task": 0.05}}
    run(world, folder, settings, asked, max_steps=2)


def second(world, folder):
    """Steps 3 and 4: z below the null cosine by a compressed subspace, the run's own average, merges by a trigger."""
    settings = {
        "subspace": INT8,
        "safety_adapter": None,
        "gate": "calibrated",
        "z_threshold": -0.6,
        "method": "ema",
        "ema_every": 1,
        "every": 4,
        "at_train_end": False,
    }
    asked = {"judge": Says(3, 1, 3), "every": 1, "trigger": {"below": 0.5}}
    run(world, folder, settings, asked, max_steps=4, resume=f"{folder}/checkpoint-2")


def third(world, folder):
    """Steps 5 to 8, where a probe stops it: the safety adapter's own cosines, checks beside the training."""
    settings = {
        "gate": "reference",
        "reference_fraction": 1.0,
        "method": "dare_ties",
        "density": 0.5,
        "seed": 3,
        "weights": [0.95, 0.05],
        "module_weights": {"v_proj": [0.9, 0.1]},
        "every": 2,
        "asynchronous": True,
    }
    asked = {"judge": Says(3, 3, 3, 3, 3, 0), "every": 1, "eval_batches": batches, "stop": {"below": 0.5}}
    # The highest loss is the best, so that the last step's weights are not what is left.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    run(world, folder, settings, asked, max_steps=10, resume=f"{folder}/checkpoint-4", **best)


def run(world, folder, settings, asked, **changed):
    """One call of `trainer.train()`, which saves and evaluates at every step."""
    callbacks = [SafeMergeCallback(**knobs(**settings)), probe(world, **asked)]
    at_every_step = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trained(world, folder, *callbacks, **at_every_step, **changed)


if __name__ == "__main__":
    words = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    words.add_argument("output", help="where the journal goes")
    make(words.parse_args().output)
