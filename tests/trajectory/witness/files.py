"""The runs without a trainer: merges of folders, sweeps, the command line, a live model, a loop of one's own."""

import copy
import json
from pathlib import Path

import torch

from safemerge_callback import (
    MergePlan,
    Subspace,
    apply,
    apply_safelora,
    apply_safemerge,
    live_factors,
    load_adapter,
    measure,
    merge_adapters,
    sweep_adapters,
    writer_for,
)
from tests.support.trainer import tokens

from . import evidence, training
from .world import INT8, SUBSPACE

# Settings that only a training has: a run with one of them is no merge of folders.
_TRAINING = {"rearm", "ema_every", "ema_decay", "spread_weights", "min_task_weight", "combination_type"}
_OFFLINE = {
    "cat": {"method": "cat"},
    "cat-several": {"method": "cat", "safety_adapter": ["safety", "second"], "weights": [0.7, 0.2, 0.1]},
    "soft-modules": {"gate": "threshold", "threshold": 0.8, "soft": True, "module_weights": {"q_proj": [0.5, 0.5]}},
    "int8": {"subspace": INT8, "gate": "threshold", "threshold": 0.74},
    "nothing": {"gate": "threshold", "threshold": 0.01},
    "baked": {"gate": "num_layers", "num_layers": 4, "bake": "aligned"},
    "baked-cat": {"method": "cat", "bake": "aligned"},
}


def merges():
    """Keywords of `merge_adapters` by name: those of the trainings that have a meaning there, and its own."""
    tables = {**training.GATES, **training.WEIGHTS, **training.METHODS, **_OFFLINE}
    found = {}
    for name, settings in tables.items():
        texts = isinstance(settings.get("module_weights"), str)
        if settings.keys() & _TRAINING or settings.get("gate") == "watch" or texts:
            continue
        found[name] = {k: v for k, v in settings.items() if k not in ("every", "quiet") and v is not None}
        found[name]["safety_adapter"] = settings.get("safety_adapter", "safety")
    return found


def merged(folder, settings):
    """A merge of the adapter `task`: the plan in words, and all that the new folder holds."""
    rest = {key: value for key, value in settings.items() if key not in ("safety_adapter", "subspace")}
    Path(folder).parent.mkdir(exist_ok=True)
    with evidence.listening() as said:
        plan = merge_adapters("task", settings["safety_adapter"], settings.get("subspace", SUBSPACE), folder, **rest)
    return {"said": said, "plan": _plan(plan), **folder_of(folder)}


def _plan(plan):
    return {"text": str(plan).splitlines(), "page": plan._repr_html_(), "selected": list(plan.selected)}


def folder_of(folder):
    """A folder's tensors and journal, and its other files, in words."""
    texts = sorted(p for p in Path(folder).rglob("*") if p.suffix in (".md", ".yaml", ".json"))
    found = {str(p.relative_to(folder)): evidence.words(p.read_text(encoding="utf-8")) for p in texts}
    (path,) = Path(folder).rglob("safemerge.jsonl")
    return {"saved": training.saved(folder), "texts": found, "journal": evidence.journal(path)}


def live(world, folder, settings):
    """The adapter `task` on a live model, and beside it what a merge makes of it."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(copy.deepcopy(world.aligned), "task")
    rest = {key: value for key, value in settings.items() if key not in ("safety_adapter", "subspace")}
    with evidence.listening() as said:
        plan = apply_safemerge(model, settings["safety_adapter"], settings.get("subspace", SUBSPACE), **rest)
        apply_safelora(model, SUBSPACE, num_layers=3, adapter_name="default")
    model.save_pretrained(folder)
    return {"said": said, "plan": _plan(plan), "factors": evidence.lora_digest(model), "saved": training.saved(folder)}


def sweeps():
    """Every method over several gates; the table, and the CSV file."""
    gates = ["all", "threshold", "calibrated", "reference", "opposed", "gap"]
    pairs = [(0.8, 0.2), (0.5, 0.5)]
    names = ["auto", "linear", "slerp", "orthogonal", "ties", "dare_linear", "dare_ties", "della", "magnitude_prune"]
    names += ["breadcrumbs", "pcb", "project", "pull", "cat"]
    found = {}
    for space, safety in (("delta", "safety"), ("factor", "even")):
        asked = {"gates": gates, "weights": pairs, "methods": names, "space": space, "density": 0.5}
        with evidence.listening() as said:
            sweep = sweep_adapters("task", safety, SUBSPACE, **asked, majority_sign_method="frequency")
        path = sweep.write_csv(f"sweep-{space}.csv")
        found[space] = {"csv": Path(path).read_text(encoding="utf-8").splitlines(), "said": said, "text": str(sweep)}
        found[space]["page"] = sweep._repr_html_()
    return found


def loop(world):
    """A training loop without a trainer, as docs/plain_loop.md has it."""
    torch.manual_seed(11)
    model, steps, plans = world.model(), {}, []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    writer, subspace = writer_for(model, optimizer=optimizer), Subspace.load(SUBSPACE)
    safety = load_adapter("safety")
    for step, row in enumerate(tokens(4), start=1):
        model(**{key: torch.tensor([value]) for key, value in row.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        readings = measure(live_factors(model), subspace)
        plan = MergePlan.decide(readings, gate="threshold", threshold=0.76, weights=(0.7, 0.3))
        edits = apply(plan, writer, safety, subspace)
        plans.append([_plan(plan), str(readings), [repr(edit) for edit in edits]])
        steps[str(step)] = evidence.lora_digest(model)
    return {"factors": steps, "plans": plans}


def commands():
    """The command line on what other runs have left, in an order of its own: a dict of what each call printed."""
    for name, lines in {"harm.csv": ["prompt", "a b", "c d e", "f"], "benign.csv": ["prompt", "x y", "z"]}.items():
        Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    s = ("-s", SUBSPACE, "--no-progress")
    asked = {
        "version": ["--version"],
        "describe": ["describe", SUBSPACE, "--verify"],
        "describe-json": ["describe", INT8, "--json"],
        "measure": ["measure", "task", *s],
        "measure-json": ["measure", "task", *s, "--json", "--threshold", 0.76],
        "merge": ["merge", "task", "safety", *s, "-o", "cli-merge", "--num-layers", 3, "--weights", 0.7, 0.3],
        "merge-again": ["merge", "--config", "cli-merge/safemerge.yaml", "-o", "cli-again"],
        "merge-ties": ["merge", "task", "safety", *s, "-o", "cli-ties", "--method", "ties", "--density", 0.5],
        "merge-nothing": ["merge", "task", "safety", *s, "-o", "cli-nothing", "--threshold", 0.01],
        "merge-refused": ["merge", "task", "safety", *s, "-o", "cli-refused", "--method", "ties"],
        "sweep": ["sweep", "task", "safety", *s, "--gates", "quantile=0.5,gap,num_layers=2", "-o", "cli-sweep.csv"],
        "sweep-thresholds": ["sweep", "task", "safety", *s, "--thresholds", "0.7,0.8", "--methods", "linear,pull"],
        "compress": ["compress", SUBSPACE, "-o", "cli-truncated.safetensors", "--kind", "truncated", s[-1]],
        "build": ["build", "--aligned", "aligned", "--adapter", "safety", "-o", "cli-low.safetensors", s[-1]],
        "eval": ["eval", "task", "--base", "aligned", "--probes", "harm:harm.csv,benign:benign.csv", *_EVAL],
    }
    found = {name: evidence.command(*words) for name, words in asked.items()}
    return found | {"files": _command_files()}


_EVAL = ["--max-new-tokens", 5, "-s", SUBSPACE, "-o", "eval.json", "--responses", "eval.jsonl", "--device", "cpu"]


def _command_files():
    whole = evidence.without_clocks(json.loads(Path("eval.json").read_text(encoding="utf-8")))
    texts = ("cli-sweep.csv", "eval.jsonl")
    return {
        "eval.json": whole,
        **{name: Path(name).read_text(encoding="utf-8").splitlines() for name in texts},
        **{name: folder_of(name) for name in ("cli-merge", "cli-again", "cli-ties")},
        **{name: evidence.file_digest(name) for name in ("cli-truncated.safetensors", "cli-low.safetensors")},
    }


def plots(folder):
    """The pictures that `report` draws of a run, each read as pixels."""
    import numpy
    from PIL import Image

    found = {}
    for plot in ("heatmap", "moved", "trajectories", "weights", "probe"):
        path = f"{folder}/{plot}.png"
        said = evidence.command("report", folder, "-o", path, "--plot", plot)
        found[plot] = {**said, "pixels": evidence.sha(numpy.asarray(Image.open(path)).tobytes())}
    return found
