"""Runs of the real Trainer: what they start with, what is remembered of them, and what they left in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

Weights = dict[str, Tensor]


def defaults(output: str | Path) -> dict[str, Any]:
    """Keywords of `TrainingArguments`: six short steps on the CPU, which report to nobody."""
    return {
        "output_dir": str(output),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
    }


def tokens(rows: int = 16, length: int = 8) -> list[dict[str, list[int]]]:
    """Training rows of random tokens, always the same."""
    rng = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 64, (rows, length), generator=rng).tolist()
    return [{"input_ids": row, "labels": row, "attention_mask": [1] * length} for row in ids]


def lora_weights(model: nn.Module) -> Weights:
    """A copy of the adapter's weights."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def saved_weights(folder: str | Path) -> Weights:
    """The adapter's weights as they were saved."""
    from safetensors.torch import load_file

    return load_file(Path(folder) / "adapter_model.safetensors")


def updates(weights: Weights, scaling: float) -> Weights:
    """Dense float64 updates s·B·A of an adapter's weights, live or saved, by the module's path."""
    dense = {}
    for name, A in weights.items():
        if "lora_A" in name:
            module = name.split("layers.")[1].split(".lora_A")[0]
            B = weights[name.replace("lora_A", "lora_B")]
            dense[module] = scaling * B.double() @ A.double()
    return dense


def merged(live: Weights, safety: Weights, rank: int, weights: tuple[float, float] = (0.8, 0.2)) -> Weights:
    """The best approximation of that rank of the weighted sum, module by module: SVD of the dense sum."""
    best = {}
    for name, update in live.items():
        U, S, Vh = torch.linalg.svd(weights[0] * update + weights[1] * safety[name], full_matrices=False)
        best[name] = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    return best


def distance(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> float:
    """Largest relative Frobenius distance over the modules; 0 for equal sets of updates."""
    assert x.keys() == y.keys()
    return max(float((x[n] - y[n]).norm() / max(float(y[n].norm()), 1e-12)) for n in x)


def entries(output: str | Path, kind: str | None = None, name: str = "safemerge.jsonl") -> list[dict[str, Any]]:
    """The lines of a run's journal, all or of one kind."""
    lines = [json.loads(line) for line in (Path(output) / name).read_text().splitlines()]
    return [line for line in lines if kind is None or line["kind"] == kind]


def stored(folder: str | Path, part: str = "run") -> dict[str, Any]:
    """What a checkpoint holds of ours: a run's counts, or where a probe's rules stand."""
    values = json.loads((Path(folder) / "trainer_state.json").read_text())["stateful_callbacks"]["safemerge"][part]
    return values["progress"] if part == "run" else values


def as_older(folder: str | Path, **changed: Any) -> None:
    """Turn a checkpoint into one of before the state was in the trainer's file: a file of its own, and no id."""
    path = Path(folder) / "trainer_state.json"
    whole = json.loads(path.read_text())
    progress = whole["stateful_callbacks"].pop("safemerge")["run"]["progress"]
    path.write_text(json.dumps(whole))
    (Path(folder) / "safemerge_state.json").write_text(json.dumps({"version": 1, **progress, **changed}))


class Recorder(TrainerCallback):
    """Remember the adapter's weights at the end of every step and of training; `act(step, model)` may interfere."""

    def __init__(self, act: Callable[[int, Any], Any] | None = None) -> None:
        self.act = act
        self.steps: dict[int, Weights] = {}
        self.end: Weights | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.act:
            self.act(state.global_step, model)
        self.steps[state.global_step] = lora_weights(model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.end = lora_weights(model)
