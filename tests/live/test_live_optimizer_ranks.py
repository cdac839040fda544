"""Moments on two processes, on every engine: the step after an edit, against Adam in float64 on each rank's part."""

import importlib.util

import pytest
import torch
import torch.distributed as dist

from safemerge_callback.live import writer_for
from safemerge_callback.live.optimizer import check_optimizer, edit_optimizer_states
from tests.support.ranks import run_on
from tests.support.world import odd_model
from tests.support.zero import zero_config

LR, BETAS, EPS = 1e-2, (0.9, 0.999), 1e-8
ADAM = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": 0.0}
# Scales of A and B of the merged module; powers of two, so that scaling rounds nothing.
SCALES = (0.5, 4.0)
KEYS = ("exp_avg", "exp_avg_sq")


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


class Plain:
    """A model that torch shards, or nobody does, and its optimizer."""

    shared_step = False

    def __init__(self, model):
        self.model, self.optimizer = model, torch.optim.AdamW(trained(model), **ADAM)

    def step(self, seed):
        loss(self.model, seed, torch.float32).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def count(self):
        return max(int(state["step"]) for state in self.optimizer.state.values())

    def held(self, parameter):
        """This rank's part of value and moments; None where it holds nothing."""
        state = self.optimizer.state.get(parameter)
        if not state:
            return None
        return [own(tensor) for tensor in (parameter, *(state[key] for key in KEYS))]


class Zero:
    """DeepSpeed, whose own masters and moments are asked for by the ways that it documents."""

    def __init__(self, model, stage, half, **zero):
        import deepspeed

        base = torch.optim.AdamW(trained(model), **ADAM)
        self.engine = deepspeed.initialize(model=model, optimizer=base, config=zero_config(stage, half, **zero))[0]
        self.model, self.optimizer, self.base = model, self.engine.optimizer, base
        self.half, self.shared_step = half, stage > 0

    def step(self, seed):
        self.engine.backward(loss(self.engine, seed, torch.bfloat16 if self.half else torch.float32))
        self.engine.step()

    def count(self):
        return max(int(state["step"]) for state in self.base.state.values())

    def held(self, parameter):
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        if hasattr(parameter, "ds_id"):
            moments = [safe_get_local_optimizer_state(parameter, key) for key in KEYS]
            value, *moments = (own(t) for t in (safe_get_local_fp32_param(parameter), *moments))
            # The last rank's part of an odd size is filled up with memory as it was, NaN at times.
            filling = dist.get_world_size() * value.numel() - parameter.ds_numel
            if filling and dist.get_rank() == dist.get_world_size() - 1:
                value[-filling:] = 0.0
            return [value, *moments]
        if hasattr(parameter, "_hp_mapping"):
            mapping = parameter._hp_mapping
            return mapping and [own(t) for t in (mapping.hp_fragment, *map(mapping.optim_fragment.get, KEYS))]
        master = self.master(parameter)
        return [own(t) for t in (master, *(self.base.state[master][key] for key in KEYS))]

    def master(self, parameter):
        groups = [getattr(self.optimizer, f"{kind}_groups", []) for kind in ("fp16", "fp32")]
        for copies, masters in zip(*groups, strict=True):
            for copy, master in zip(copies, masters, strict=True):
                if copy is parameter:
                    return master
        return parameter


def own(tensor):
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return tensor.detach().double().flatten().clone()


def loss(model, seed, dtype):
    rng = torch.Generator().manual_seed(10 * seed + dist.get_rank())
    return model(torch.randn(4, 7, generator=rng).to(dtype)).float().pow(2).sum()


def adam(m, v, step):
    """The change that moments of this step make."""
    return -LR * (m / (1 - BETAS[0] ** step)) / ((v / (1 - BETAS[1] ** step)).sqrt() + EPS)


def check_engine(make):
    """What holds on every engine under `reset` and `rescale`: the merged module's moments, and no other's."""
    for policy in ("reset", "rescale"):
        run = make()
        check_optimizer(run.optimizer, policy)
        writer = writer_for(run.model, optimizer=run.optimizer)
        pairs = writer.parameters(["0", "1"])
        scales = dict(zip(pairs["0"], SCALES, strict=True))
        for seed in range(3):
            run.step(seed)
        parameters = [p for pair in pairs.values() for p in pair]
        before, count = [run.held(p) for p in parameters], run.count()
        edited = edit_optimizer_states(run.optimizer, scales.items(), policy)
        moments = 1 if policy == "reset" and run.shared_step else 2
        assert edited == moments * sum(held is not None for held in before[:2])
        after = [run.held(p) for p in parameters]
        run.step(9)
        stepped = [run.held(p) for p in parameters]
        rows = zip(parameters, before, after, stepped, strict=True)
        seen = [check_parameter(run, policy, count, scales.get(p), *row) for p, *row in rows]
        assert everyone(sum(seen)) == totals(run, parameters), seen


def check_parameter(run, policy, count, scale, before, after, stepped):
    """Whether moments were scaled as they should, and the next step is Adam's from them; return how many numbers."""
    if before is None:
        return 0
    fresh = policy == "reset" and scale is not None
    wanted = (1.0, 1.0) if scale is None else (scale, scale**2)
    if fresh:
        wanted = (0.0, 1.0 if run.shared_step else 0.0)
    value, m, v = after
    assert torch.equal(value, before[0])
    assert torch.equal(m, wanted[0] * before[1])
    assert torch.equal(v, wanted[1] * before[2])
    # What the engine did says which gradient it saw.
    gradient = (stepped[1] - BETAS[0] * m) / (1 - BETAS[0])
    torch.testing.assert_close(stepped[2], BETAS[1] * v + (1 - BETAS[1]) * gradient**2, rtol=1e-3, atol=1e-9)
    step = 1 if fresh and not run.shared_step else count + 1
    change = adam(stepped[1], BETAS[1] * v + (1 - BETAS[1]) * gradient**2, step)
    torch.testing.assert_close(stepped[0] - value, change, rtol=2e-3, atol=1e-6)
    if fresh:
        # Never longer than a first step of Adam's, whatever the count.
        assert float((stepped[0] - value).abs().max()) <= 1.01 * LR
    return value.numel()


def everyone(number):
    total = torch.tensor(number)
    dist.all_reduce(total)
    return int(total)


def totals(run, parameters):
    """How many numbers all ranks hold: each once where they are sharded, else twice; ZeRO-3 fills up odd ones."""
    sizes = [3 * 7, 5 * 3, 3 * 5, 3 * 3]
    if hasattr(parameters[0], "ds_id"):
        return sum(size + size % 2 for size in sizes)
    sharded = run.shared_step or hasattr(parameters[0], "to_local") or parameters[0].ndim == 1
    return sum(sizes) * (1 if sharded else 2)


def case_plain():
    check_engine(lambda: Plain(odd_model()))


def case_fsdp2():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    check_engine(lambda: Plain(fully_shard(odd_model(), mesh=mesh)))


def case_fsdp1():
    from torch.distributed.fsdp import FullyShardedDataParallel

    check_engine(
        lambda: Plain(FullyShardedDataParallel(odd_model(), device_id=torch.device("cpu"), use_orig_params=True))
    )


def case_zero():
    offload = {"offload_optimizer": {"device": "cpu"}}
    whole = {"stage3_param_persistence_threshold": 0}
    for stage, half, zero in (
        (0, False, {}),
        (0, True, {}),
        (1, True, {}),
        (2, False, {}),
        (2, True, offload),
        (3, False, whole),
        (3, True, {**whole, **offload}),
    ):
        check_engine(lambda stage=stage, half=half, zero=zero: Zero(odd_model(), stage, half, **zero))


@pytest.mark.parametrize("cases", [("plain", "fsdp2", "fsdp1"), ("zero",)], ids=["torch", "deepspeed"])
def test_on_every_engine_the_next_step_is_adams_from_the_edited_moments(cases):
    if "zero" in cases and not importlib.util.find_spec("deepspeed"):
        pytest.skip("deepspeed is not installed: pip install 'safemerge-callback[engines]'")
    run_on(2, run_cases, *cases)


def run_cases(*cases):
    """What each process runs."""
    dist.init_process_group("gloo")
    for case in cases:
        globals()[f"case_{case}"]()
