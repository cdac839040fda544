"""What a gradient term adds on every engine, against one process in float64, over eight steps of plain SGD."""

import functools
import importlib.util
import json

import pytest
import torch

from safemerge_callback import live_factors
from tests.support.ranks import finish, run_on, started
from tests.support.versions import above_bound
from tests.trajectory.engines import gradient as engine_runs
from tests.trajectory.engines.gradient import AWAY, BAD, CLIP, RATE, STEPS, WEIGHT, inner, row_batch
from tests.trajectory.test_trajectory_engines import DEEPSPEED, TORCH, same_bits, skip_without_its_package

FP32 = 1e-5


class Reference:
    """The gradients at given factors, in float64 throughout: what transformers takes in float32 is written out."""

    def __init__(self, world):
        self.model = world.model(init_lora_weights=False).double().train()
        for module in self.model.modules():
            if type(module).__name__ == "LlamaRMSNorm":
                module.forward = functools.partial(rms_norm, module)

    def at(self, factors, batches, further=None):
        """The gradient of the mean loss over these batches, one flat vector; of factors that have so much more."""
        parameters = []
        with torch.no_grad():
            for name, (A, B) in factors.items():
                live = live_factors(self.model)[name]
                live.A.copy_(A)
                live.B.copy_(B)
                parameters += [live.A, live.B]
            if further is not None:
                now = torch.nn.utils.parameters_to_vector(parameters)
                torch.nn.utils.vector_to_parameters(now + further, parameters)
        self.model.zero_grad()
        torch.stack([loss(self.model, ids) for ids in batches]).mean().backward()
        return torch.cat([p.grad.flatten() for p in parameters])


def rms_norm(module, x):
    return module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)


def loss(model, ids):
    logits = model(input_ids=ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def flat(factors):
    return torch.cat([x.double().flatten() for pair in factors.values() for x in pair])


def read(out, job, rank=0):
    return torch.load(out / f"{job.replace(':', '-')}-rank{rank}.pt", weights_only=False)


def expected(what, step, task, term):
    """What the optimizer should get, of the two gradients."""
    if what == "apart":
        return 2 * term + task - inner([task], [term]) / inner([term], [term]) * term
    total = task if what == "bare" or (what == "nan" and step == BAD) else task + term
    return total * min(1.0, CLIP / (float(total.norm()) + 1e-6)) if what == "clipped" else total


class Steps:
    """A job's steps, and what the reference says of each; gradients are flat, of all factors."""

    def __init__(self, world, out, job, ranks):
        self.job, self.reference, self.ranks = job, Reference(world), ranks
        _, _, accumulation, what = job.split(":")
        self.each, self.what = int(accumulation), what.partition("+")[0]
        self.runs = [read(out, job, rank) for rank in range(ranks)]
        self.steps = self.runs[0]["steps"]
        assert list(self.steps) == list(range(STEPS + 1))

    def gradients(self, step):
        """The mean gradient of the task's batches at this step, and the term's, weighted."""
        batches = [run["batches"][self.each * (step - 1) + k] for run in self.runs for k in range(self.each)]
        rows = [row_batch(rank, step)["input_ids"] for rank in range(self.ranks)]
        before = self.steps[step - 1]
        task, term = self.reference.at(before, batches), WEIGHT * self.reference.at(before, rows)
        if self.what == "series":
            term = term - WEIGHT * self.reference.at(before, rows, -AWAY * term / term.norm())
        # At stage 0 DeepSpeed 0.19 divides by the accumulation once more a loss that it is given as the model gave it.
        return (task / self.each if self.job.startswith("zero0") else task), term

    def error(self):
        """The largest distance of a step from the reference, in norms of the term's gradient."""
        worst = 0.0
        for step in range(1, STEPS + 1):
            task, term = self.gradients(step)
            wanted = expected(self.what, step, task, term)
            taken = (flat(self.steps[step - 1]) - flat(self.steps[step])) / RATE
            # Where the gradient is cut, the term's share of it is, too.
            scale = float(wanted.norm() / (task + term).norm()) if self.what == "clipped" else 1.0
            assert taken.isfinite().all(), (self.job, step)
            worst = max(worst, float((taken - wanted).norm() / (scale * term.norm())))
        return worst


def error(world, out, job, ranks=2):
    worst = Steps(world, out, job, ranks).error()
    print(f"{job}: {worst:.1e}")
    return worst


def check_ranks_agree(out, job):
    assert same_bits(read(out, job)["steps"], read(out, job, 1)["steps"]), job


def check_figures(world, out, job):
    """At the steps that are logged, norm and cosine where gradients are seen, as the reference has them."""
    steps, logged = Steps(world, out, job, 2), entries(out, job, "gradient")
    assert [(e["step"], e["steps"]) for e in logged] == [(4, 3 if steps.what == "nan" else 4), (8, 4)]
    for entry in logged:
        task, term = steps.gradients(entry["step"])
        if job.startswith("zero"):
            assert {"norm", "cosine"}.isdisjoint(entry)
            continue
        assert entry["norm"] == pytest.approx(float(term.norm()), rel=1e-5)
        assert entry["cosine"] == pytest.approx(float(task @ term / (task.norm() * term.norm())), abs=1e-5)


def entries(out, job, kind):
    lines = [json.loads(line) for line in (out / job / "safemerge.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def check_dropped(out, job):
    """Where the loss of one rank was not finite, at one step, and nowhere else."""
    errors = entries(out, job, "error")
    assert [(e["step"], e["error"]) for e in errors] == [(BAD, "its loss is not finite on another process")], job


def check_exact(world, out, job):
    check_ranks_agree(out, job)
    check_figures(world, out, job)
    assert error(world, out, job) < FP32, job


REFUSED = {
    "zero2:fp32:1:unattached": "'rows' adds a gradient, which DeepSpeed takes only through its engine: keep the "
    "callback in a variable, say guard, and add the line guard.attach(trainer) before trainer.train(); or leave it out",
    "zero2:fp32:1:unmanaged": "'rows' adds a gradient, and DeepSpeed's managed_gradient_accumulation is false",
    "zero2:fp32:1:apart": "'rows_apart' keeps its gradient apart from the task's, and DeepSpeed shows neither",
    "zero2:fp32:1:series": "'rows_in_series' makes its gradient of several passes, and DeepSpeed shows none of them",
}


def test_an_engine_adds_the_mean_over_the_ranks(world, tmp_path):
    """And drops it on both ranks where the loss is NaN on one, without any trace in the steps after."""
    above_bound("transformers", "the task's gradient is the mean over the ranks' batches, as the reference has it")
    deepspeed = importlib.util.find_spec("deepspeed") is not None
    dropped = ["ddp:fp32:4:nan", "fsdp2:fp32:4:nan", *(["zero2:fp32:1:nan", "zero3:fp32:4:nan"] if deepspeed else [])]
    exact = [*dropped, "ddp:fp32:1:apart", "fsdp2:fp32:1:apart", "fsdp2:fp32:4:series", "ddp:fp32:4:clipped"]
    refused = REFUSED if deepspeed else {}
    # FSDP2 looks at what is trained once, and in mixed precision no gradient comes where it saw nothing.
    referred = "fsdp2:bf16:1:referred"
    run_on(2, engine_runs.main, world.folder, tmp_path, *exact, referred, *refused)
    assert error(world, tmp_path, referred) < 0.1
    for job in exact:
        check_exact(world, tmp_path, job)
    for job in dropped:
        check_dropped(tmp_path, job)
    for job, words in refused.items():
        check_refused(tmp_path, job, words)


def check_refused(out, job, words):
    for rank in (0, 1):
        refused = read(out, job, rank)
        assert words in refused["refused"]
        assert 1 not in refused["steps"]


WHOLE = {"fp32": ("added", "nan", "clipped", "referred"), "bf16": ("added", "bare", "referred")}
ACCUMULATIONS = (1, 4)


def jobs_of(engine, dtype):
    kinds = (*WHOLE[dtype], *(["apart", "series"] if dtype == "fp32" and engine not in DEEPSPEED else []))
    return [f"{engine}:{dtype}:{each}:{kind}" for each in ACCUMULATIONS for kind in kinds]


@pytest.mark.slow
@pytest.mark.parametrize("engines", [TORCH, DEEPSPEED], ids=["torch", "deepspeed"])
def test_every_engine_adds_what_one_process_does_in_float64(world, tmp_path, engines):
    """To 1e-5 in fp32; in bf16 no further off than twice the engine's own gradient of the task, or one process's."""
    skip_without_its_package(engines[0])
    absent = [f"{engine}:{dtype}:4:{kind}" for engine in engines for dtype in WHOLE for kind in ("zero", "none")]
    attached = [f"{engine}:fp32:4:added+attached" for engine in engines if engine in TORCH]
    work = [job for engine in engines for dtype in WHOLE for job in jobs_of(engine, dtype)]
    alone = [job for dtype in WHOLE for job in jobs_of("single", dtype)]
    with (
        started(2, engine_runs.main, world.folder, tmp_path, *work, *absent, *attached) as two,
        started(1, engine_runs.main, world.folder, tmp_path, *alone) as one,
    ):
        finish(one)
        finish(two, 1500)
    for job in alone:
        assert error(world, tmp_path, job, 1) < (FP32 if ":fp32:" in job else 0.05), job
    for job in work:
        if ":fp32:" in job:
            check_exact(world, tmp_path, job)
        if job.endswith("nan"):
            check_dropped(tmp_path, job)
    for engine in engines:
        for each in ACCUMULATIONS:
            own = [f"{engine}:bf16:{each}:{kind}" for kind in ("added", "bare")]
            added, bare = (error(world, tmp_path, job) for job in own)
            assert added < 2 * max(bare, error(world, tmp_path, f"single:bf16:{each}:added", 1)), own
    check_weight_0_is_absence(tmp_path, engines)
    for job in attached:
        plain = job.removesuffix("+attached")
        assert same_bits(read(tmp_path, job)["steps"], read(tmp_path, plain)["steps"]), job


def check_weight_0_is_absence(out, engines):
    for engine in engines:
        for dtype in WHOLE:
            zero, none = (read(out, f"{engine}:{dtype}:4:{kind}")["steps"] for kind in ("zero", "none"))
            assert same_bits(zero, none), (engine, dtype)
            assert not same_bits({1: none[1]}, {1: none[2]})
