"""Writers on two processes: odd shapes, ranks that differ, ranks that fail, a rank that dies."""

import importlib.util
import os
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from safemerge_callback.adapters import load_adapter
from safemerge_callback.errors import AdapterError
from safemerge_callback.live import writer_for
from safemerge_callback.live.ranks import ProcessesError
from safemerge_callback.live.writers import commit, fsdp1
from safemerge_callback.ops import LowRank
from tests.support.ranks import run_on, started
from tests.support.world import odd_model
from tests.support.zero import zero_config


def own_values(factors, seed):
    rng = torch.Generator().manual_seed(seed)
    return {n: LowRank(*(torch.randn(t.shape, generator=rng) for t in (f.A, f.B))) for n, f in factors.items()}


def holds(writer, values):
    found = writer.gather()
    assert found.keys() >= values.keys()
    return all(torch.equal(found[n].A, v.A) and torch.equal(found[n].B, v.B) for n, v in values.items())


def refused(kind, action):
    """The words of what `action` raised, alike on all ranks."""
    try:
        action()
    except kind as error:
        said = [None, None]
        dist.all_gather_object(said, str(error))
        assert said[0] == said[1], said
        return said[0]
    raise AssertionError("nothing was raised")


def check_writer(writer, start):
    """What holds on every engine, of a writer of the odd model that `start` was gathered from before it was sharded."""
    assert holds(writer, start)
    mine, first = (own_values(start, seed) for seed in (dist.get_rank(), 0))
    writer.write(mine)
    assert holds(writer, first)
    broken = own_values(start, 5)
    if dist.get_rank() == 1:
        broken["1"].B[0, 0] = float("nan")
    words = refused(AdapterError, lambda: writer.write(broken))
    assert "first '1.lora_B'" in words
    assert "(on rank 1 of 2)" in words
    names = ("0", "1") if dist.get_rank() else ("0",)
    words = refused(ProcessesError, lambda: writer.write({n: first[n] for n in names}))
    assert "2 factors, first 0.lora_A" in words
    assert "4 factors, first 0.lora_A" in words
    assert "on rank 1" in words
    with failing_second_write(on=1):
        words = refused(AdapterError, lambda: writer.write(own_values(start, 6)))
    assert words == "writing '0.lora_B' failed (no room) on rank 1; everything was put back."
    assert holds(writer, first)


class failing_second_write:  # noqa: N801  read as a verb
    """One rank's second write fails after it has written; its later ones, and the putting back, do not."""

    def __init__(self, on):
        self.on = on

    def __enter__(self):
        self.store = commit._store
        if dist.get_rank() == self.on:
            commit._store = self.failing

    def failing(self, changes, values):
        commit._store = self.store
        write = changes[1].slot.write

        def once(value):
            changes[1].slot.write = write
            write(value)
            raise OSError("no room")

        changes[1].slot.write = once
        return self.store(changes, values)

    def __exit__(self, *_):
        commit._store = self.store


def originals(model):
    return {n: LowRank(f.A.clone(), f.B.clone()) for n, f in writer_for(model).gather().items()}


def case_plain():
    model = odd_model()
    check_writer(writer_for(model), originals(model))


def case_fsdp2():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for rank in (1, 3):
        model = odd_model(rank)
        start, mesh = originals(model), init_device_mesh("cpu", (2,))
        fully_shard(model, mesh=mesh)
        local = [p.to_local().numel() for n, p in model.named_parameters() if "lora_A" in n]
        assert all(n in (0, 7, 5) for n in local) if rank == 1 else min(local) > 0
        check_writer(writer_for(model), start)


def case_fsdp1():
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    for kept in (True, False):
        model = odd_model()
        start = originals(model)
        # Flat parameters that are not kept apart must be all trained or all frozen: a unit for each linear map.
        policy = ModuleWrapPolicy({type(model.base_model.model[0])}) if kept else leaf
        sharded = FullyShardedDataParallel(
            model, device_id=torch.device("cpu"), use_orig_params=kept, auto_wrap_policy=policy
        )
        writer = writer_for(sharded)
        check_writer(writer, start)
        assert one_unit_at_a_time(writer)
        # A unit that was summoned before the first forward pass must not have taken itself for the root.
        sharded(torch.ones(2, 7)).sum().backward()
        assert holds(writer, own_values(start, 0))
        if kept:
            assert {p.ndim for pair in writer.parameters(["0", "1"]).values() for p in pair} == {1}
        else:
            with pytest.raises(AdapterError, match="use_orig_params"):
                writer.parameters(["0"])


def leaf(module, recurse, **_):
    return recurse or (isinstance(module, nn.Linear) and not list(module.children()))


def one_unit_at_a_time(writer):
    """Whether a gather summons unit after unit, each of the model's once."""
    opened, most, units, original = [], [], [], fsdp1.summoned

    def counting(root, unit, *, write):
        opened.append(unit)
        units.append(id(unit))
        most.append(len(opened))
        return Closing(original(root, unit, write=write), opened)

    fsdp1.summoned = counting
    try:
        writer.gather()
    finally:
        fsdp1.summoned = original
    return max(most) == 1 and len(units) == len(set(units)) and len(units) >= 2


class Closing:
    def __init__(self, inner, opened):
        self.inner, self.opened = inner, opened

    def __enter__(self):
        return self.inner.__enter__()

    def __exit__(self, *args):
        self.opened.pop()
        return self.inner.__exit__(*args)


def engine_of(model, stage, half, **zero):
    import deepspeed

    # At ZeRO-0 DeepSpeed takes a first step of its own, with no gradient: a decay would move the masters.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=zero_config(stage, half, **zero))[0]


def case_zero():
    for stage, half, zero in (
        (0, False, {}),
        (0, True, {}),
        (1, True, {}),
        (2, False, {}),
        (2, True, {"offload_optimizer": {"device": "cpu"}}),
        (3, False, {"stage3_param_persistence_threshold": 0}),
        (3, True, {}),
        (3, True, {"stage3_param_persistence_threshold": 0, "offload_optimizer": {"device": "cpu"}}),
    ):
        model = odd_model()
        model.add_adapter("ref", model.peft_config["default"])
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(p.bfloat16())
        start = originals(model)
        frozen = {n: f.low_rank() for n, f in writer_for(model, adapter_name="ref").gather().items()}
        frozen = {n: LowRank(f.A.clone(), f.B.clone()) for n, f in frozen.items()}
        engine = engine_of(model, stage, half, **zero)
        check_writer(writer_for(engine), start)
        check_writer(writer_for(model, optimizer=engine.optimizer), {n: f.low_rank() for n, f in gathered(engine)})
        reference = writer_for(engine, adapter_name="ref")
        assert all(torch.equal(f.A.float(), frozen[n].A) for n, f in reference.gather().items())
        reference.write(own_values(frozen, 0))
        expected = {n: f.B.bfloat16().float() if half else f.B for n, f in own_values(frozen, 0).items()}
        assert all(torch.equal(f.B.float(), expected[n]) for n, f in reference.gather().items())
        if (stage, half) == (0, True):
            with pytest.raises(AdapterError, match="in a DeepSpeed run"):
                writer_for(model)


def gathered(engine):
    return writer_for(engine).gather().items()


def case_dies(folder):
    """Rank 1 leaves while the values are on their way; a checkpoint was written before."""
    model = odd_model()
    writer = writer_for(model)
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    if dist.get_rank() == 1:
        commit.copy_from_first = lambda values: os._exit(7)
    writer.write(own_values(writer.gather(), 0))


def run_cases(*cases):
    """What each process runs: cases by name, each with its argument behind a `=`."""
    dist.init_process_group("gloo")
    for case in cases:
        name, _, argument = case.partition("=")
        globals()[f"case_{name}"](*([argument] if argument else []))


@pytest.mark.parametrize("case", ["plain,fsdp2,fsdp1", "zero"])
def test_all_ranks_write_the_same_or_nothing(case):
    if case == "zero" and not importlib.util.find_spec("deepspeed"):
        pytest.skip("deepspeed is not installed: pip install 'safemerge-callback[engines]'")
    run_on(2, run_cases, *case.split(","))


def test_when_a_rank_dies_in_a_merge_the_other_stops_and_the_checkpoint_is_whole(tmp_path):
    began = time.monotonic()
    with started(2, run_cases, f"dies={tmp_path}") as (first, second):
        code, other = first.wait(100), second.wait(100)
        said = first.said()
    assert other == 7
    assert code not in (0, 7), said
    assert "Connection closed" in said or "Connection reset" in said, said
    assert time.monotonic() - began < 60
    torch.manual_seed(0)
    saved = load_adapter(tmp_path).factors
    assert {n: (f.A.shape, f.rank) for n, f in saved.items()} == {"0": ((3, 7), 3), "1": ((3, 5), 3)}
    expected = writer_for(odd_model()).gather()
    assert all(torch.equal(f.A, saved[n].A) and torch.equal(f.B, saved[n].B) for n, f in expected.items())
