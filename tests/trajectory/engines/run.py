"""What each process of an engine test runs: short trainings of the real Trainer, one after the other.

    main(WORLD, OUT, JOB...)      where a JOB is engine:dtype:what, or engine:dtype:what:order

`what` is `plain` (12 steps), `merge` (12 steps, merges after 4, 8 and 12, by a loop's own verbs), `guard` (the same by
SafeMergeCallback, stopped after 8), `reset` (the same, moments reset, stopped after 5) or `survive` (3 steps: a merge
that fails on one rank after the first, an edit after the second), of a LoRA, or with `+pissa` behind it of a PiSSA.
`order` is the seed of the data's order, 3 if not given.
Each process writes OUT/<job, with dashes>-rank<n>.pt.
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

from safemerge_callback.adapters import load_adapter
from safemerge_callback.decision import MergePlan, apply, measure
from safemerge_callback.errors import PlanError
from safemerge_callback.live import writer_for
from safemerge_callback.live.ranks import ProcessesError
from safemerge_callback.subspace import Subspace
from tests.support.world import World
from tests.support.zero import zero_config
from tests.trajectory.engines.cpu_fsdp import allow_fsdp_on_cpu

FSDP = {"min_num_params": 0, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
# Its syncing of states at the start asks for an accelerator; both ranks load the same model here.
FSDP1 = {**FSDP, "version": 1, "sync_module_states": False, "cpu_ram_efficient_loading": False}
ENGINES = {
    "single": {},
    "ddp": {"ddp_find_unused_parameters": False},
    "fsdp1": {"fsdp": True, "fsdp_config": {**FSDP1, "use_orig_params": True}},
    "fsdp1flat": {"fsdp": True, "fsdp_config": {**FSDP1, "use_orig_params": False}},
    "fsdp2": {"fsdp": True, "fsdp_config": {**FSDP, "version": 2}},
}
# What the registered factors must look like, so that no engine falls back silently.
MARKS = {
    "single": lambda p: type(p) is torch.nn.Parameter,
    "ddp": lambda p: type(p) is torch.nn.Parameter,
    "fsdp1": lambda p: p.ndim == 1,
    "fsdp1flat": lambda p: type(p) is not torch.nn.Parameter,
    "fsdp2": lambda p: type(p).__name__ == "DTensor",
    "zero0": lambda p: not hasattr(p, "_hp_mapping") and not hasattr(p, "ds_id"),
    "zero1": lambda p: hasattr(p, "_hp_mapping"),
    "zero2": lambda p: hasattr(p, "_hp_mapping"),
    "zero3": lambda p: hasattr(p, "ds_id") and p.numel() == 0,
}
EVERY = 4
KNOBS = {"gate": "num_layers", "num_layers": 2, "weights": [0.7, 0.3], "every": EVERY}
STATES = {"guard": "keep", "reset": "reset"}
STOPS = {"guard": 2 * EVERY, "reset": EVERY + 1}
RANK, WORLD_SIZE = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))


def settings(engine, dtype):
    changed = {"per_device_train_batch_size": 2 // WORLD_SIZE, "bf16": dtype == "bf16"}
    if engine.startswith("zero"):
        more = {"stage3_param_persistence_threshold": 0} if engine == "zero3" else {}
        automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
        config = zero_config(int(engine[-1]), dtype == "bf16", **more) | dict.fromkeys(automatic, "auto")
        return {**changed, "deepspeed": config}
    return {**changed, **ENGINES[engine]}


class Stop(transformers.TrainerCallback):
    """Ends a training whose schedule is a longer one's."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


class Verbs(transformers.TrainerCallback):
    """A plain loop's verbs at each event, and what they decided; no part of the package's own callback."""

    def __init__(self, world, what):
        self.world, self.what = world, what
        self.decisions, self.before, self.steps, self.seen, self.initial = {}, {}, {}, {}, None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.initial = writer_for(model, optimizer=optimizer, initial="now").initial

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        writer, step = writer_for(model, optimizer=optimizer, initial=self.initial), state.global_step
        self.model, self.optimizer = model, optimizer
        if self.what == "merge" and step % EVERY == 0:
            self.merge(writer, step)
        if self.what == "survive" and step == 1:
            self.seen["refusal"] = self.fail(writer)
            self.seen["disagreement"] = self.disagree(writer)
        if self.what == "survive" and step == 2:
            new = {name: f.low_rank() for name, f in writer.gather().items()}
            self.seen["before"] = max(float(f.B.abs().max()) for f in new.values())
            writer.write({name: f._replace(B=torch.full_like(f.B, 0.25)) for name, f in new.items()})
            self.seen["visible"] = visible(model)
        self.steps[step] = copies(writer)

    def merge(self, writer, step):
        plan, self.before[step] = self.decide(writer), copies(writer)
        edits = apply(plan, writer, load_adapter(self.world.safety))
        self.decisions[step] = {n: (plan.verdicts[n].merge, r.cosine) for n, r in plan.readings.items()}
        assert len(edits) == 2

    def decide(self, writer, num_layers=2):
        readings = measure(writer.gather(), Subspace.load(self.world.subspace))
        return MergePlan.decide(readings, gate="num_layers", num_layers=num_layers, weights=(0.7, 0.3))

    def fail(self, writer):
        """What the last rank's broken safety adapter makes this rank raise; the factors must stay."""
        before = {n: (f.A.clone(), f.B.clone()) for n, f in writer.gather().items()}
        plan, safety = self.decide(writer), load_adapter(self.world.safety)
        if RANK == WORLD_SIZE - 1:
            safety.factors[plan.selected[0]].B[0, 0] = float("nan")
        try:
            apply(plan, writer, safety)
        except PlanError as error:
            after = writer.gather()
            assert all(torch.equal(after[n].A, A) and torch.equal(after[n].B, B) for n, (A, B) in before.items())
            return str(error)
        return None

    def disagree(self, writer):
        """What ranks raise that would merge another number of modules each; one plan selects nothing."""
        plan = self.decide(writer, num_layers=1)
        if RANK == 1:
            plan = MergePlan.decide(plan.readings, gate="watch")
        try:
            edits = apply(plan, writer, load_adapter(self.world.safety))
            return len(edits)
        except ProcessesError as error:
            return str(error)


def copies(writer):
    return {n: (f.A.float().clone(), f.B.float().clone()) for n, f in writer.gather().items()}


def visible(model):
    """The B that the next forward pass uses, of one module: what an evaluation and a checkpoint would see."""
    parameter = next(p for n, p in model.named_parameters() if "lora_B" in n or "flat_param" in n)
    if hasattr(parameter, "full_tensor"):
        return parameter.full_tensor().float()
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().float().clone()
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        with torch.distributed.fsdp.FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return next(p for n, p in model.named_parameters() if "lora_B" in n).detach().float().clone()
    return parameter.detach().float().clone()


def check_marks(model, engine):
    """All four factors B are registered as this engine does it, so it is the one that trains."""
    sites = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "scaling")]
    factor = [getattr(m.lora_B["default"], "_fsdp_wrapped_module", m.lora_B["default"]).weight for m in sites]
    assert len(factor) == 4
    assert all(MARKS[engine](p) for p in factor), (engine, [type(p) for p in factor], [p.shape for p in factor])


def run(world, job, out):
    engine, dtype, what, *order = job.split(":")
    what, _, start = what.partition("+")
    steps = 3 if what == "survive" else 12
    rate = {"learning_rate": 1e-3} if what == "survive" else {}
    verbs = Verbs(world, what)
    guards = [Stop(STOPS[what]), world.guard(**KNOBS, optimizer_state=STATES[what])] if what in STATES else []
    transformers.set_seed(3)
    changed = {"max_steps": steps, "average_tokens_across_devices": False, **rate, **settings(engine, dtype)}
    changed |= {"model": world.model(init_lora_weights=start or True), "seed": int(order[0]) if order else 3}
    trainer = world.trainer(out / job, *guards, verbs, **changed)
    trainer.train()
    check_marks(verbs.model, engine)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    assert world_size == WORLD_SIZE
    found = {name: getattr(verbs, name) for name in ("decisions", "before", "steps", "seen")}
    found["initial"] = {name: tuple(pair) for name, pair in verbs.initial.items()}
    torch.save(found, out / f"{job.replace(':', '-')}-rank{RANK}.pt")
    trainer.accelerator.free_memory()
    forget()


def forget():
    """Let the next training choose its engine anew."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._reset_state()
    unset_hf_deepspeed_config()
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_MIXED_PRECISION", "FSDP_VERSION"):
        os.environ.pop(name, None)


def each_of(run, folder, out, jobs):
    """Run the jobs, one after the other; the first rank says which is done."""
    allow_fsdp_on_cpu()
    for job in jobs:
        run(World.load(folder), job, Path(out))
        if RANK == 0:
            print("done", job, flush=True)


def main(folder, out, *jobs):
    """What each process runs."""
    each_of(run, folder, out, jobs)
