"""The runs that train: a name, the callback's settings, and what the run leaves."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from safemerge_callback import SafeMergeCallback, SafetyEvalCallback, undo_merge
from tests.support.judges import Says
from tests.support.trainer import defaults, tokens

from . import evidence
from .world import INT8, SUBSPACE, TRUNCATED

# Of the callback, over `knobs()`; `safety_adapter` None leaves it out.
GATES = {
    "all": {},
    "watch": {"gate": "watch"},
    "watch-alone": {"gate": "watch", "safety_adapter": None},
    "threshold": {"gate": "threshold", "threshold": 0.74},
    "num_layers": {"gate": "num_layers", "num_layers": 2},
    "calibrated": {"gate": "calibrated", "z_threshold": -0.6},
    "reference": {"gate": "reference", "reference_fraction": 1.0},
    "quantile": {"gate": "quantile", "quantile": 0.5},
    "gap": {"gate": "gap"},
    "random": {"gate": "random", "num_layers": 3, "seed": 7},
    "opposed": {"gate": "opposed", "z_threshold": 0.0},
    "by-its-knob": {"gate": None, "threshold": 0.74},
    "threshold-soft": {"gate": "threshold", "threshold": 0.8, "soft": True},
    "calibrated-soft": {"gate": "calibrated", "z_threshold": 2.0, "soft": True},
    "reference-soft": {"gate": "reference", "reference_fraction": 1.0, "soft": True},
    "threshold-rearm": {"gate": "threshold", "threshold": 0.76, "rearm": 0.02, "every": 1},
    "calibrated-rearm": {"gate": "calibrated", "z_threshold": -0.6, "rearm": 0.5, "every": 1},
    "quantile-rearm": {"gate": "quantile", "quantile": 0.5, "rearm": 0, "every": 1},
    "gap-rearm": {"gate": "gap", "rearm": 0, "every": 1},
}
WEIGHTS = {
    "module_weights": {"module_weights": {"v_proj": [0.5, 0.5], r"layers.1.*": [0.9, 0.1]}},
    "module_weights-text": {"module_weights": '{"q_proj": [0.6, 0.4]}'},
    "spread": {"spread_weights": True, "weights": [0.5, 0.5]},
    "spread-linear-modules": {"spread_weights": True, "module_weights": {"down_proj": [0.3, 0.7]}},
    "floor": {"min_task_weight": 0.6},
    "floor-modules": {"min_task_weight": 0.6, "module_weights": {"v_proj": [0.7, 0.3]}, "every": 1},
    "negative": {"weights": [1.0, -0.2]},
    "soft-floor": {"gate": "threshold", "threshold": 0.8, "soft": True, "min_task_weight": 0.97, "every": 1},
    "several": {"safety_adapter": ["safety", "second"], "weights": [0.7, 0.2, 0.1]},
    "several-ties": {
        "safety_adapter": ["safety", "second"],
        "weights": [0.7, 0.2, 0.1],
        "method": "ties",
        "density": 0.5,
    },
}
_PRUNED = {"density": 0.5, "seed": 3}
METHODS = {
    "linear-factor": {"method": "linear", "space": "factor", "safety_adapter": "even"},
    "slerp": {"method": "slerp"},
    "orthogonal": {"method": "orthogonal"},
    "ties": {"method": "ties", **_PRUNED},
    "ties-frequency": {"method": "ties", "majority_sign_method": "frequency", **_PRUNED},
    "ties-factor": {"method": "ties", "space": "factor", "safety_adapter": "even", **_PRUNED},
    "dare_linear": {"method": "dare_linear", **_PRUNED},
    "dare_linear-factor": {"method": "dare_linear", "space": "factor", "safety_adapter": "even", **_PRUNED},
    "dare_ties": {"method": "dare_ties", **_PRUNED},
    "dare_ties-frequency": {"method": "dare_ties", "majority_sign_method": "frequency", **_PRUNED},
    "della": {"method": "della", **_PRUNED},
    "magnitude_prune": {"method": "magnitude_prune", "density": 0.3},
    "magnitude_prune-factor": {
        "method": "magnitude_prune",
        "space": "factor",
        "safety_adapter": "even",
        "density": 0.3,
    },
    "breadcrumbs": {"method": "breadcrumbs", "density": 0.7},
    "pcb": {"method": "pcb", "density": 0.5},
    "project": {"method": "project", "safety_adapter": None, "every": 0},
    "project-orthogonal": {"method": "project", "safety_adapter": None, "operator": "orthogonal"},
    "project-orthogonal-rank": {
        "method": "project",
        "safety_adapter": None,
        "operator": "orthogonal",
        "operator_rank": 5,
    },
    "pull": {"safety_adapter": None},
    "pull-strength": {"method": "pull", "safety_adapter": None, "strength": 0.4},
    "pull-to-safety": {"method": "pull", "strength": 0.3},
    "pull-soft-spread": {"method": "pull", "strength": 0.3, "spread_weights": True, "safety_adapter": None},
    "ema": {"method": "ema", "safety_adapter": None, "ema_every": 2},
    "ema-knobs": {"method": "ema", "safety_adapter": None, "ema_decay": 0.5, "ema_every": 1, "strength": 0.5},
    "ema-gate": {"method": "ema", "safety_adapter": None, "ema_every": 1, "gate": "num_layers", "num_layers": 2},
    "combination_type": {"combination_type": "dare_ties_svd", **_PRUNED},
    "combination_type-plain": {"combination_type": "ties", "safety_adapter": "even", **_PRUNED},
}
WHEN = {
    "share": {"every": 0.34},
    "default": {"every": None},
    "between": {"every": 1, "from_step": 2, "until_step": 4, "at_train_end": False},
    "cooldown": {"every": 1, "cooldown": 1},
    "end-only": {"every": 0},
    "preset-safemerge": {"preset": "safemerge", "safety_adapter": "even", "gate": None, "every": None},
    "preset-safelora": {"preset": "safelora", "num_layers": 3, "gate": None, "every": None, "safety_adapter": None},
    "optimizer-reset": {"optimizer_state": "reset"},
    "optimizer-rescale": {"optimizer_state": "rescale"},
    "asynchronous": {"asynchronous": True},
    "asynchronous-ties": {"asynchronous": True, "every": 1, "cooldown": 1, "method": "ties", **_PRUNED},
    "asynchronous-ema": {"asynchronous": True, "method": "ema", "ema_every": 1, "safety_adapter": None},
    "placement-disk": {"placement": "disk"},
    "placement-host": {"placement": "host"},
    "disk-project": {"placement": "disk", "method": "project", "operator": "orthogonal", "safety_adapter": None},
    "disk-asynchronous": {"placement": "disk", "asynchronous": True},
    "int8": {"subspace": INT8, "gate": "threshold", "threshold": 0.74},
    "int8-ranked": {"subspace": INT8, "gate": "num_layers", "num_layers": 2},
    "int8-calibrated": {"subspace": INT8, "gate": "calibrated", "z_threshold": -0.6},
    "truncated": {"subspace": TRUNCATED, "gate": "threshold", "threshold": 0.74},
    "truncated-reference-project": {
        "subspace": TRUNCATED,
        "gate": "reference",
        "reference_fraction": 1.0,
        "method": "project",
        "operator": "orthogonal",
    },
    "loud": {"quiet": False, "gate": "threshold", "threshold": 0.74, "journal": "elsewhere.jsonl"},
}
# Resumed at step 2 of a run that saved at every second step.
RESUMED = {
    "linear": {"every": 1, "cooldown": 1},
    "dare_ties": {"method": "dare_ties", "gate": "random", "num_layers": 3, **_PRUNED},
    "ema": {"method": "ema", "safety_adapter": None, "ema_every": 1, "ema_decay": 0.5, "every": 3},
    "asynchronous": {"asynchronous": True, "every": 2},
    "rearm": {"gate": "threshold", "threshold": 0.76, "rearm": 0.02, "every": 1},
    "spread": {"spread_weights": True, "weights": [0.5, 0.5]},
    "rescale": {"optimizer_state": "rescale", "method": "pull", "safety_adapter": None},
}


def knobs(**changed):
    """Settings of a callback that merges every module every 2 steps; `None` leaves a default in place."""
    given = {"subspace": SUBSPACE, "safety_adapter": "safety", "gate": "all", "every": 2, "quiet": True, **changed}
    return {key: value for key, value in given.items() if value is not None}


class Recorder(TrainerCallback):
    """The factors' digest at the end of every step, and of training, after the callbacks before it."""

    def __init__(self):
        self.steps = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps[str(state.global_step)] = evidence.lora_digest(model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.steps["end"] = evidence.lora_digest(model)


def arguments(folder, **changed):
    """Six steps of two rows."""
    return TrainingArguments(**{**defaults(folder), **changed})


def trained(world, folder, *callbacks, model=None, resume=None, trainer=Trainer, **changed):
    """Train in `folder` and return the evidence by name; the callbacks in that order, then a recorder."""
    for draw in (torch.manual_seed, random.seed, numpy.random.seed):
        draw(11)
    recorder, data = Recorder(), tokens()
    with evidence.listening() as said:
        made = trainer(
            model if model is not None else world.model(lora_dropout=0.2),
            arguments(folder, **changed),
            train_dataset=data,
            eval_dataset=data[:2],
            callbacks=[*callbacks, recorder],
        )
        made.train(resume_from_checkpoint=resume)
        made.save_model()
    return {"factors": recorder.steps, "said": [line for line in said if "safemerge" in line], **_left(made, folder)}


def _left(trainer, folder):
    """What a finished run holds and has written."""
    states = enumerate(trainer.optimizer.state_dict()["state"].values())
    moments = {f"{i}.{k}": v for i, state in states for k, v in state.items() if isinstance(v, torch.Tensor)}
    folder = Path(folder)
    journals = sorted(folder.rglob("*.jsonl"))
    return {
        "moments": evidence.tensors_digest(moments),
        "random": evidence.sha(torch.get_rng_state().numpy().tobytes() + repr(random.getstate()).encode()),
        "history": evidence.history(trainer.state),
        "journal": {str(path.relative_to(folder)): evidence.journal(path) for path in journals},
        "saved": saved(folder),
        "card": evidence.words((folder / "README.md").read_text(encoding="utf-8")),
    }


def saved(folder):
    """Every file beneath, the tensors of those of ours and PEFT's, and what checkpoints hold of our state."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    names = [str(path.relative_to(folder)) for path in files]
    found = {"files": [name for name in names if "events" not in name]}
    for path, name in zip(files, names, strict=True):
        if path.suffix == ".safetensors":
            found[name] = evidence.file_digest(path)
        elif path.name == "trainer_state.json":
            whole = json.loads(path.read_text(encoding="utf-8"))
            found[name] = evidence.without_clocks(whole["stateful_callbacks"].get("safemerge", {}))
    return found


def guarded(world, folder, settings, **changed):
    """A run under the callback; what the callback says of itself is evidence, too."""
    callback = SafeMergeCallback(**settings)
    if "journal" in settings:
        callback.config.journal = f"{folder}/{settings['journal']}"
    found = trained(world, folder, callback, **changed)
    return {**found, "shown": [repr(callback), callback._repr_html_(), callback.config.words]}


SAVING = {"save_strategy": "steps", "save_steps": 2}


def resumed(world, folder, settings):
    """A run, and another that goes on from its checkpoint of step 2."""
    found = guarded(world, f"{folder}/whole", knobs(**settings), **SAVING)
    again = gone_on(world, f"{folder}/whole", f"{folder}/part", settings)
    return {**found, **{f"resumed-{name}": value for name, value in again.items()}}


def gone_on(world, whole, folder, settings):
    """A run that goes on, in `folder`, from the checkpoint of step 2 of another, with the journal that it left."""
    part = Path(folder)
    part.mkdir(parents=True)
    shutil.copytree(f"{whole}/checkpoint-2", part / "checkpoint-2")
    shutil.copy(f"{whole}/safemerge.jsonl", part)
    return guarded(world, folder, knobs(**settings), resume=f"{folder}/checkpoint-2", **SAVING)


def undone(world, folder, settings):
    """A run whose final merge is taken back."""
    guarded(world, folder, knobs(**settings))
    names = list(undo_merge(folder))
    return {"names": names, "saved": saved(folder), "journal": evidence.journal(f"{folder}/safemerge.jsonl")}


class Falling:
    """A task whose score falls whenever it is asked again."""

    def __init__(self):
        self.score = 1.0

    def __call__(self, model, tokenizer):
        self.score -= 0.1
        return self.score


def batches():
    """Evaluation batches of one row."""
    return [{key: torch.tensor([row[key]]) for key in row} for row in tokens()[:4]]


def probe(world, **changed):
    """A probe of three harmful prompts and two harmless ones at every second step."""
    sets = {"prompts": {"bad": ["a b", "c d e", "f"]}, "benign": {"good": ["x y", "z"]}}
    given = {"every": 2, "max_new_tokens": 4, "tokenizer": world.tokenizer, "quiet": False, **sets, **changed}
    return SafetyEvalCallback(**given)


PROBED: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "alone": (None, {"eval_batches": batches, "judge": lambda prompt, response: len(response) % 2 == 0}),
    "keywords": ({}, {}),
    "rollback-task": ({}, {"task": Falling, "rollback": {"task": 0.05}, "every": 0}),
    "rollback-loss": ({"optimizer_state": "rescale"}, {"eval_batches": batches, "rollback": {"eval_loss": 0.0}}),
    "rollback-ema": (
        {"method": "ema", "ema_every": 1, "safety_adapter": None, "every": 3},
        {"task": Falling, "rollback": {"task": 0.05}},
    ),
    "trigger": (
        {"every": 0, "gate": "num_layers", "num_layers": 2},
        {"judge": lambda: Says(3, 3, 1, 2, 1), "trigger": {"below": 0.5}, "every": 1},
    ),
    "trigger-asynchronous": (
        {"every": 3, "asynchronous": True},
        {"judge": lambda: Says(3, 1, 1), "trigger": {"below": 0.5, "cooldown": 2}},
    ),
    "stop": ({"every": 3}, {"judge": lambda: Says(3, 3, 0, 0), "stop": {"below": 0.5, "patience": 1}, "every": 1}),
    "unit": ({"gate": "watch"}, {"task": Falling, "task_unit": "share"}),
}


def probed(world, folder, settings, asked):
    """A run under the callback (None: none) and a probe."""
    made = {**asked, **({"task": asked["task"]()} if "task" in asked else {})}
    if getattr(made.get("judge"), "__code__", None) and made["judge"].__code__.co_argcount == 0:
        made["judge"] = made["judge"]()
    guards = [] if settings is None else [SafeMergeCallback(**knobs(**settings))]
    return trained(world, folder, *guards, probe(world, **made))
