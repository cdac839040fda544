"""What each process of a gradient term's engine test runs: short trainings by plain SGD, one after the other.

    main(WORLD, OUT, JOB...)      where a JOB is engine:dtype:accumulation:what

`what` is `added` (rows of this rank's own in every step), `clipped` (the same, and the gradient's norm bounded), `nan`
(the loss is NaN on the last rank at step 3), `apart` (the gradient joins by a rule of its own), `series` (it is made of
two passes, the second at another point), `referred` (the model is first asked with its adapter off), `zero` (weight 0)
or `none` (no term), these two with dropout, or `bare` (no term, no dropout). With `+attached` behind it the trainer is
handed over, as it always is under DeepSpeed. Each process writes OUT/<job, with dashes>-rank<n>.pt: the factors before
the first step and after each, and the batches that it was given.

What is refused before the first step, `unattached` (no trainer), `unmanaged` (DeepSpeed's accumulation is its
caller's), `apart` or `series` under DeepSpeed, writes the words.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import transformers

from safemerge_callback.corrections.protocol import TermPass
from safemerge_callback.corrections.registry import correction
from safemerge_callback.corrections.schedule import Schedule
from safemerge_callback.errors import ConfigError
from safemerge_callback.live import writer_for
from safemerge_callback.signals.adapter_off import adapter_off
from safemerge_callback.signals.model_state import preserve_state
from tests.trajectory.engines.run import RANK, WORLD_SIZE, check_marks, copies, each_of, forget, settings

STEPS, RATE, WEIGHT, CLIP, BAD = 8, 0.5, 0.75, 0.25, 3
# How far the second pass of `series` is from the first.
AWAY = 1.0


@dataclass(frozen=True, kw_only=True)
class RowSettings(Schedule):
    weight: float = WEIGHT
    bad: bool = False


class Rows:
    """The model's loss on two rows, others on each rank and in each step; it remembers what it was told of them."""

    name = "rows"

    def __init__(self, settings):
        self.schedule, self.weight, self.bad = settings, settings.weight, settings.bad
        self.seen = {}

    def loss(self, at, model):
        loss = model(**row_batch(RANK, at.step + 1)).loss
        bad = self.bad and at.step + 1 == BAD and RANK == WORLD_SIZE - 1
        return loss * float("nan") if bad else loss

    def observe(self, step, loss):
        self.seen[step] = loss

    def figures(self):
        return {"seen": float(len(self.seen))}


class RowsReferred(Rows):
    """The same, after the model was asked with its adapter off, before any pass with it."""

    name = "rows_referred"

    def prepare(self, start):
        with adapter_off(start.model), preserve_state(start.model):
            start.model(**row_batch(RANK, 0))


class RowsApart(Rows):
    name = "rows_apart"

    def combine(self, task, own):
        """Twice its own, and of the task's what does not lie along it."""
        share = inner(task, own) / inner(own, own)
        return [2 * o + t - share * o for t, o in zip(task, own, strict=True)]


class RowsInSeries:
    """The gradient of those rows, less the one that they have further down it."""

    name = "rows_in_series"

    def __init__(self, settings):
        self.schedule, self.weight = settings, settings.weight

    def passes(self, at, model, trained):
        def loss(model):
            return model(**row_batch(RANK, at.step + 1)).loss

        gradient = yield TermPass(1.0, loss)
        yield TermPass(-1.0, loss, gradient * (-AWAY / trained.norm(gradient)))


def inner(left, right):
    return sum((x * y).sum() for x, y in zip(left, right, strict=True))


def row_batch(rank, step):
    start = torch.tensor([[3], [30]]) + 9 * rank + step
    ids = start + torch.arange(8)
    return {"input_ids": ids, "labels": ids}


@correction(RowSettings, cost="one pass each way")
def rows(settings):
    return Rows(settings)


@correction(RowSettings, cost="one pass each way")
def rows_apart(settings):
    return RowsApart(settings)


@correction(RowSettings, cost="one pass each way, and one pass")
def rows_referred(settings):
    return RowsReferred(settings)


@correction(RowSettings, cost="two passes each way")
def rows_in_series(settings):
    return RowsInSeries(settings)


LISTED = {
    "added": [{"rows": {}}],
    "clipped": [{"rows": {}}],
    "nan": [{"rows": {"bad": True}}],
    "apart": [{"rows_apart": {}}],
    "series": [{"rows_in_series": {}}],
    "referred": [{"rows_referred": {}}],
    "zero": [{"rows": {"weight": 0}}],
    "none": None,
    "bare": None,
    "unattached": [{"rows": {}}],
    "unmanaged": [{"rows": {}}],
}


class Steps(transformers.TrainerCallback):
    def __init__(self):
        self.steps = {}

    def note(self, step, model, optimizer):
        self.model = model
        self.steps[step] = copies(writer_for(model, optimizer=optimizer))

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.note(0, model, optimizer)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.note(state.global_step, model, optimizer)


class Batches:
    """The trainer's collator, and what it made, in order."""

    def __init__(self, collate):
        self.collate, self.made = collate, []

    def __call__(self, rows):
        batch = self.collate(rows)
        self.made.append(batch["input_ids"].clone())
        return batch


def run(world, job, out):
    engine, dtype, accumulation, what = job.split(":")
    what, _, attached = what.partition("+")
    steps = Steps()
    transformers.set_seed(3)
    guard = world.guard(gate="watch", safety_adapter=None, every=0, corrections=LISTED[what])
    plain_sgd = {"optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    changed = {**plain_sgd, "max_steps": STEPS, "average_tokens_across_devices": False, **settings(engine, dtype)}
    changed |= {"gradient_accumulation_steps": int(accumulation), "logging_steps": 4}
    changed |= {"max_grad_norm": CLIP} if what == "clipped" else {}
    if what == "unmanaged":
        changed["deepspeed"] = {**changed["deepspeed"], "managed_gradient_accumulation": False}
    dropout = 0.3 if what in ("zero", "none") else 0.0
    model = world.model(init_lora_weights=False, lora_dropout=dropout)
    trainer = world.trainer(out / job, guard, steps, model=model, **changed)
    trainer.data_collator = batches = Batches(trainer.data_collator)
    if attached or (engine.startswith("zero") and what != "unattached"):
        assert guard.attach(trainer) is guard
    try:
        trainer.train()
        check_marks(steps.model, engine)
        result = {"steps": steps.steps, "batches": batches.made}
    except ConfigError as error:
        result = {"refused": str(error), "steps": steps.steps}
    assert (dist.get_world_size() if dist.is_initialized() else 1) == WORLD_SIZE
    torch.save(result, out / f"{job.replace(':', '-')}-rank{RANK}.pt")
    trainer.accelerator.free_memory()
    forget()


def main(folder, out, *jobs):
    """What each process runs."""
    each_of(run, folder, out, jobs)
