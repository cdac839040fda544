"""Runs of the real Trainer on a model made on the spot; tests/trajectory uses the same fixtures."""

import copy
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

TARGETS = ["q_proj", "v_proj"]


@dataclass
class World:
    """Two checkpoints, their subspace, a safety adapter, and a way to train on the aligned one."""

    folder: Path
    aligned: torch.nn.Module

    @property
    def subspace(self):
        return str(self.folder / "subspace.safetensors")

    @property
    def safety(self):
        return str(self.folder / "safety")

    def model(self, seed=1, targets=TARGETS, **lora):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM", **lora})
        return get_peft_model(copy.deepcopy(self.aligned), config)

    def knobs(self, **changed):
        """Settings of a callback that merges every module every 2 steps; `None` leaves a default in place."""
        knobs = {"subspace": self.subspace, "safety_adapter": self.safety, "gate": "all", "every": 2, **changed}
        return {key: value for key, value in knobs.items() if value is not None}

    def guard(self, **changed):
        from safemerge_callback import SafeMergeCallback

        return SafeMergeCallback(**self.knobs(**changed))

    def trainer(self, output, *callbacks, model=None, **changed):
        from transformers import Trainer

        settings = self.settings(output, **changed)
        data = tokens()
        model = model if model is not None else self.model()
        return Trainer(model, settings, train_dataset=data, eval_dataset=data[:2], callbacks=list(callbacks))

    def settings(self, output, **changed):
        from transformers import TrainingArguments

        return TrainingArguments(**{**defaults(output), **changed})


def defaults(output):
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


def tokens(rows=16, length=8):
    rng = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 64, (rows, length), generator=rng).tolist()
    return [{"input_ids": row, "labels": row, "attention_mask": [1] * length} for row in ids]


def lora_weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def saved_weights(folder):
    from safetensors.torch import load_file

    return load_file(Path(folder) / "adapter_model.safetensors")


def updates(weights, scaling):
    """Dense float64 updates s·B·A of an adapter's weights, live or saved, by the module's path."""
    found = {}
    for name, A in weights.items():
        if "lora_A" in name:
            module = name.split("layers.")[1].split(".lora_A")[0]
            B = weights[name.replace("lora_A", "lora_B")]
            found[module] = scaling * B.double() @ A.double()
    return found


def merged(live, safety, rank, weights=(0.8, 0.2)):
    """The best approximation of that rank of the weighted sum, module by module: SVD of the dense sum."""
    best = {}
    for name, update in live.items():
        U, S, Vh = torch.linalg.svd(weights[0] * update + weights[1] * safety[name], full_matrices=False)
        best[name] = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    return best


def distance(x, y):
    """Largest relative Frobenius distance over the modules; 0 for equal sets of updates."""
    assert x.keys() == y.keys()
    return max(float((x[n] - y[n]).norm() / max(float(y[n].norm()), 1e-12)) for n in x)


def entries(output, kind=None, name="safemerge.jsonl"):
    found = [json.loads(line) for line in (Path(output) / name).read_text().splitlines()]
    return [e for e in found if kind is None or e["kind"] == kind]


def stored(folder, part="run"):
    """What a checkpoint holds of ours: a run's counts, or where a probe's rules stand."""
    values = json.loads((Path(folder) / "trainer_state.json").read_text())["stateful_callbacks"]["safemerge"][part]
    return values["progress"] if part == "run" else values


def as_older(folder, **changed):
    """Turn a checkpoint into one of before the state was in the trainer's file: a file of its own, and no id."""
    path = Path(folder) / "trainer_state.json"
    whole = json.loads(path.read_text())
    progress = whole["stateful_callbacks"].pop("safemerge")["run"]["progress"]
    path.write_text(json.dumps(whole))
    (Path(folder) / "safemerge_state.json").write_text(json.dumps({"version": 1, **progress, **changed}))


def leave():
    """End one of a test's several processes, whose work is done and written, without the interpreter's own end.

    torch's DDP holds gloo's threads past `destroy_process_group` (pytorch#190489). One that frees a collective's
    tensors late asks for the interpreter's lock while it ends, and torch aborts the process; DeepSpeed's threads may do
    the same. An exception before this is raised as ever.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class Recorder(TrainerCallback):
    """Remember the adapter's weights at the end of every step and of training; `act(step, model)` may interfere."""

    def __init__(self, act=None):
        self.act = act
        self.steps = {}
        self.end = None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.act:
            self.act(state.global_step, model)
        self.steps[state.global_step] = lora_weights(model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.end = lora_weights(model)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    import transformers
    from peft import LoraConfig, get_peft_model

    from safemerge_callback import build_subspace

    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    aligned = transformers.LlamaForCausalLM(config)
    aligned.save_pretrained(folder / "aligned")
    unaligned = copy.deepcopy(aligned)
    with torch.no_grad():
        for parameter in unaligned.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    unaligned.save_pretrained(folder / "unaligned")
    build_subspace(
        folder / "subspace.safetensors", aligned=folder / "aligned", unaligned=folder / "unaligned", progress=False
    )
    lora = LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM")
    safety = get_peft_model(copy.deepcopy(aligned), lora)
    with torch.no_grad():
        for name, parameter in safety.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    safety.save_pretrained(folder / "safety")
    return World(folder, aligned)


@pytest.fixture
def runs():
    """The functions of this file, for test files: they cannot import a conftest."""
    import types

    verbs = (as_older, defaults, distance, entries, lora_weights, merged, saved_weights, stored, tokens, updates)
    return types.SimpleNamespace(Recorder=Recorder, **{verb.__name__: verb for verb in verbs})
