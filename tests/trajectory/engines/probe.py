"""What each process of a probe's engine test runs: short trainings, with and without a probe, one after the other.

    main(WORLD, TOKENIZER, OUT, JOB...)      where a JOB is engine:dtype:what

`what` is `plain`, `guarded` (merges at 2 and 4, moments rescaled), `both` (the same, probed in every step) or `undone`
(the merges taken back). Each process writes OUT/<engine>-<dtype>-<what>-rank<n>.pt.
"""

from pathlib import Path

import torch
import torch.distributed as dist
import transformers

from safemerge_callback import SafetyEvalCallback
from safemerge_callback.live import writer_for
from safemerge_callback.training import Rollback
from tests.support.world import World
from tests.trajectory.engines.cpu_fsdp import allow_fsdp_on_cpu
from tests.trajectory.engines.run import MARKS, RANK, WORLD_SIZE, forget, settings

SETS = {"prompts": {"bad": ["a b", "c d e", "f"]}, "benign": {"good": ["x y", "z q w e r"]}}


class Letters:
    """A judge of one's own: what it says depends on the response, and only the first process may ask it."""

    def refuses(self, prompt, response):
        assert RANK == 0
        return sum(map(ord, response)) % 2 == 0


class Falls:
    """A score that falls at every merge."""

    score = 1.0

    def __call__(self, model, tokenizer):
        Falls.score -= 0.1
        return Falls.score


class Steps(transformers.TrainerCallback):
    def __init__(self):
        self.steps = {}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.model = model
        factors = writer_for(model, optimizer=optimizer).gather()
        self.steps[state.global_step] = {n: (f.A.float().clone(), f.B.float().clone()) for n, f in factors.items()}


def callbacks(world, what, tokenizer):
    found = []
    if what in ("guarded", "both", "undone"):
        found.append(world.guard(every=2, at_train_end=False, optimizer_state="rescale"))
    if what == "both":
        found.append(probe(tokenizer, every=1))
    if what == "undone":
        found.append(probe(tokenizer, every=0, task=Falls(), rollback=Rollback(task=0.05)))
    return found


def probe(tokenizer, **changed):
    sizes = {"max_new_tokens": 5, "batch_size": 2, "quiet": True, "judge": Letters()}
    return SafetyEvalCallback(**SETS, **sizes, tokenizer=tokenizer, **changed)


def run(world, job, out, tokenizer):
    engine, dtype, what = job.split(":")
    steps = Steps()
    transformers.set_seed(3)
    changed = {"max_steps": 4, "average_tokens_across_devices": False, **settings(engine, dtype)}
    model = world.model(lora_dropout=0.3)
    trainer = world.trainer(out / job, *callbacks(world, what, tokenizer), steps, model=model, **changed)
    trainer.train()
    factor = next(p for n, p in steps.model.named_parameters() if "lora_B" in n)
    assert MARKS[engine](factor), (engine, type(factor))
    assert (dist.get_world_size() if dist.is_initialized() else 1) == WORLD_SIZE
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    torch.save({"steps": steps.steps, "losses": losses}, out / f"{job.replace(':', '-')}-rank{RANK}.pt")
    trainer.accelerator.free_memory()
    forget()


def main(folder, tokenizer, out, *jobs):
    """The jobs, one after the other; the first rank says which is done."""
    allow_fsdp_on_cpu()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer)
    for job in jobs:
        run(World.load(folder), job, Path(out), tokenizer)
        if RANK == 0:
            print("done", job, flush=True)
