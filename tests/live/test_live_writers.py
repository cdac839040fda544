import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from safemerge_callback.errors import AdapterError
from safemerge_callback.live import base_weights, live_factors, writer_for
from safemerge_callback.ops import LowRank

# FSDP1 advises against trained and frozen parameters in one unit, which is to be tested.
MIXED = "ignore:.*has both parameters with requires_grad:UserWarning"
Q0, Q1 = "layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"


@pytest.fixture
def model(tiny_llama):
    return adapt(tiny_llama())


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def adapt(model, **settings):
    settings = {"target_modules": ["q_proj", "embed_tokens"], "r": 4, "init_lora_weights": False, **settings}
    return get_peft_model(model, LoraConfig(**settings))


def randoms(factors, dtype=torch.float32):
    shapes = {name: (f.A.shape, f.B.shape) for name, f in factors.items()}
    return {n: LowRank(torch.randn(a, dtype=dtype), torch.randn(b, dtype=dtype)) for n, (a, b) in shapes.items()}


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def unchanged(model, before):
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_gather_gives_the_live_tensors_detached(model):
    live, gathered = live_factors(model), writer_for(model).gather()
    assert list(gathered) == list(live) == ["embed_tokens", Q0, Q1]
    for name, factors in gathered.items():
        assert factors.A.data_ptr() == live[name].A.data_ptr()
        assert factors.B.data_ptr() == live[name].B.data_ptr()
        assert not factors.A.requires_grad
        assert (factors.scaling, factors.transposed) == (live[name].scaling, live[name].transposed)


def test_write_changes_the_named_modules_in_place_and_nothing_else(model):
    writer, before = writer_for(model), snapshot(model)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    live = live_factors(model)
    new = randoms({Q1: live[Q1], "embed_tokens": live["embed_tokens"]})
    writer.write(new)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    for name, factors in new.items():
        assert torch.equal(live[name].A, factors.A)
        assert torch.equal(live[name].B, factors.B)
        assert live[name].A.requires_grad
        assert live[name].A.is_leaf
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert len(moved) == 4
    assert all("layers.1.self_attn.q_proj.lora_" in n or "embed_tokens.lora_embedding_" in n for n in moved)


def test_training_goes_on_from_the_written_factors(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    tokens = torch.arange(1, 9)[None]
    writer = writer_for(model)
    new = randoms(writer.gather())
    model(input_ids=tokens, labels=tokens).loss.backward()
    writer.write(new)
    optimizer.step()
    with torch.no_grad():
        after = model(input_ids=tokens).logits
    assert all(torch.equal(f.B, new[n].B) for n, f in writer.gather().items())
    model.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens).logits, after, rtol=1e-3, atol=1e-4)


def test_own_values_written_back_change_no_bit(model):
    writer, before = writer_for(model), snapshot(model)
    writer.write({name: factors.low_rank() for name, factors in writer.gather().items()})
    assert unchanged(model, before)


def test_modules_may_exchange_their_live_factors(model):
    writer, before = writer_for(model), snapshot(model)
    gathered = writer.gather()
    old = {name: gathered[name].B.clone() for name in (Q0, Q1)}
    writer.write({Q0: gathered[Q1].low_rank(), Q1: gathered[Q0].low_rank()})
    assert torch.equal(gathered[Q0].B, old[Q1])
    assert torch.equal(gathered[Q1].B, old[Q0])
    assert not unchanged(model, before)


def test_values_are_cast_once_to_the_live_dtype(tiny_llama):
    base = tiny_llama().to(torch.bfloat16)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=4), autocast_adapter_dtype=False)
    writer = writer_for(model)
    new = randoms(writer.gather(), torch.float64)
    writer.write(new)
    for name, factors in writer.gather().items():
        assert factors.A.dtype == torch.bfloat16
        assert torch.equal(factors.A, new[name].A.to(torch.bfloat16))
        assert torch.equal(factors.B, new[name].B.to(torch.bfloat16))


def test_a_value_that_overflows_the_live_dtype_is_refused(tiny_llama):
    base = tiny_llama().to(torch.float16)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=4), autocast_adapter_dtype=False)
    writer, before = writer_for(model), snapshot(model)
    new = randoms(writer.gather())
    new[Q1].B[0, 0] = 1e6
    with pytest.raises(AdapterError, match=rf"1 of 4 new factors are not finite in torch.float16, first '{Q1}.lora_B'"):
        writer.write(new)
    assert unchanged(model, before)


def wrong_name(new):
    new["layers.1.self_attn.q_prj"] = new[Q1]
    return r"first 'layers.1.self_attn.q_prj'; did you mean 'layers.1.self_attn.q_proj'"


def wrong_rank(new):
    new[Q1] = LowRank(torch.ones(5, 32), torch.ones(32, 5))
    return r"new A is \(5, 32\) but the live one \(4, 32\)"


def wrong_size(new):
    new[Q1] = LowRank(new[Q1].A, torch.ones(1, 4))
    return r"new B is \(1, 4\) but the live one \(32, 4\)"


def not_a_number(new):
    new[Q1].A[2, 3] = float("nan")
    return f"first '{Q1}.lora_A'"


def infinite(new):
    new[Q1].B[2, 3] = float("-inf")
    return f"first '{Q1}.lora_B'"


@pytest.mark.parametrize("spoil", [wrong_name, wrong_rank, wrong_size, not_a_number, infinite])
def test_wrong_values_are_refused_before_anything_is_written(model, spoil):
    writer, before = writer_for(model), snapshot(model)
    new = randoms(writer.gather())
    words = spoil(new)
    with pytest.raises(AdapterError, match=words + ".*Nothing was written"):
        writer.write(new)
    assert unchanged(model, before)


def test_a_copy_that_fails_midway_puts_everything_back(model):
    """The last target overlaps itself in memory, which torch refuses to write to."""
    writer = writer_for(model)
    last = live_factors(model)[Q1].B
    last.data = torch.zeros(1, 1).expand(last.shape)
    before, new = snapshot(model), randoms(writer.gather())
    with pytest.raises(AdapterError, match=rf"writing '{Q1}.lora_B' failed .*; everything was put back"):
        writer.write(new)
    assert unchanged(model, before)
    writer.write({n: new[n] for n in ("embed_tokens", Q0)})
    assert torch.equal(writer.gather()[Q0].B, new[Q0].B)


def test_writer_keeps_its_adapter_when_another_becomes_active(model):
    model.add_adapter("ref", LoraConfig(target_modules=["q_proj"], r=2))
    writer = writer_for(model)
    model.set_adapter("ref")
    assert {f.rank for f in writer.gather().values()} == {4}
    assert {f.rank for f in writer_for(model, adapter_name="ref").gather().values()} == {2}


def test_refused_adapters_are_refused_when_the_writer_is_made(tiny_llama):
    with pytest.raises(AdapterError, match="no LoRA module"):
        writer_for(tiny_llama())
    with pytest.raises(AdapterError, match="use_dora"):
        writer_for(adapt(tiny_llama(), use_dora=True))


def test_ddp_model_is_unwrapped_and_written(model, process_group):
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert dist.get_world_size() == 1
    writer = writer_for(wrapped)
    new = randoms(writer.gather())
    assert list(new) == ["embed_tokens", Q0, Q1]
    writer.write(new)
    tokens = torch.arange(1, 9)[None]
    wrapped(input_ids=tokens, labels=tokens).loss.backward()
    live = live_factors(model)
    assert all(torch.equal(live[n].A, f.A) and live[n].A.grad is not None for n, f in new.items())


def sharded_by_fsdp2(model):
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def assert_read_and_written_whole(writer, before):
    gathered = writer.gather()
    for name, factors in before.items():
        assert type(gathered[name].A) is torch.Tensor
        assert torch.equal(gathered[name].A, factors.A)
        assert torch.equal(gathered[name].B, factors.B)
    new = randoms({n: before[n] for n in (Q1, "embed_tokens")})
    writer.write(new)
    again = writer.gather()
    assert all(torch.equal(again[n].A, f.A) and torch.equal(again[n].B, f.B) for n, f in new.items())
    assert torch.equal(again[Q0].A, before[Q0].A)
    with pytest.raises(AdapterError, match=r"new A is \(5, 32\) but the live one \(4, 32\)"):
        writer.write({Q0: LowRank(torch.ones(5, 32), torch.ones(32, 5))})


def copied(model):
    return {n: f.low_rank()._make(t.clone() for t in f.low_rank()) for n, f in live_factors(model).items()}


def test_fsdp2_is_read_and_written_whole(model, process_group):
    before = copied(model)
    sharded_by_fsdp2(model)
    assert all(type(p).__name__ == "DTensor" for p in model.parameters())
    with pytest.raises(AdapterError, match=r"shared out over ranks.*writer_for\(model\)\.gather"):
        live_factors(model)
    assert base_weights(model) == {}
    writer = writer_for(model)
    assert_read_and_written_whole(writer, before)
    A, B = writer.parameters([Q1])[Q1]
    assert isinstance(A, nn.Parameter)
    assert type(B).__name__ == "DTensor"


def test_fsdp2_edits_survive_an_evaluation_that_left_the_root_gathered(model, process_group):
    writer = writer_for(sharded_by_fsdp2(model))
    with torch.no_grad():
        model(input_ids=torch.arange(1, 9)[None])
    embed = next(p for n, p in model.named_parameters() if "lora_embedding_B" in n)
    assert type(embed).__name__ != "DTensor"
    new = randoms(writer.gather())
    writer.write(new)
    tokens = torch.arange(1, 9)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(torch.equal(f.B, new[n].B) for n, f in writer.gather().items())


def test_an_adapter_added_after_sharding_is_refused(model, process_group):
    sharded_by_fsdp2(model)
    model.add_adapter("late", LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(AdapterError, match=r"q_proj\.lora_A' is a plain tensor .* FSDP2.*added after"):
        writer_for(model, adapter_name="late")
    assert set(writer_for(model, adapter_name="default").gather()) == {"embed_tokens", Q0, Q1}


def test_dtensors_of_tensor_parallelism_are_refused(model, process_group):
    from torch.distributed.tensor import DTensor, Partial

    mesh = init_device_mesh("cpu", (1,))
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            part = DTensor.from_local(p.detach(), mesh, [Partial()])
            setattr(module, name, nn.Parameter(part, requires_grad=p.requires_grad))
    with pytest.raises(AdapterError, match=r"placed as .*Partial.*shards and replicas"):
        writer_for(model)


@pytest.mark.filterwarnings("ignore:FSDP is switching:UserWarning", "ignore:.*NO_SHARD:FutureWarning", MIXED)
def test_fsdp1_is_read_and_written_whole(model, process_group):
    before = copied(model)
    layer = type(model.base_model.model.model.layers[0])
    policy = ModuleWrapPolicy({layer, type(model.base_model.model.model.embed_tokens)})
    cpu = torch.device("cpu")
    sharded = FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=cpu)
    assert_read_and_written_whole(writer_for(sharded), before)
    with torch.no_grad():
        sharded(input_ids=torch.arange(1, 9)[None])
    model.add_adapter("late", LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(AdapterError, match=r"is a plain tensor .* FSDP1 keeps: the adapter was added after"):
        writer_for(sharded, adapter_name="late")


@pytest.mark.parametrize(("mark", "engine"), [("ds_id", "ZeRO-3"), ("_hp_mapping", "ZeRO-1 or 2")])
def test_plain_factors_among_deepspeeds_are_refused(model, mark, engine):
    setattr(model.base_model.model.lm_head.weight, mark, 7)
    with pytest.raises(AdapterError, match=f"plain tensor in a model whose parameters DeepSpeed {engine} keeps"):
        writer_for(model)


class Unfused:
    """The part of DeepSpeed's ZeRO-0 optimizer that holds masters: lists of parameters, and of their masters."""

    def __init__(self, parameters):
        self.fp16_groups = [parameters]
        self.fp32_groups = [[p.detach().float().clone().requires_grad_() for p in parameters]]


class Fused:
    """Its other kind: masters flat, in one tensor a group."""

    def __init__(self, parameters):
        self.fp16_groups = [parameters]
        self.fp32_groups_flat = [torch.cat([p.detach().float().flatten() for p in parameters]).requires_grad_()]


class Wrapper:
    def __init__(self, optimizer):
        self.optimizer = optimizer


@pytest.mark.parametrize("kind", [Unfused, Fused])
def test_masters_that_only_the_optimizer_knows_are_read_and_written(tiny_llama, kind):
    model = adapt(tiny_llama().to(torch.bfloat16), init_lora_weights=False)
    model.to(torch.bfloat16)
    optimizer = kind([p for p in model.parameters() if p.requires_grad])
    masters = optimizer.fp32_groups[0] if kind is Unfused else optimizer.fp32_groups_flat
    with torch.no_grad():
        for master in masters:
            master.mul_(1 + 2**-12)
    writer = writer_for(model, optimizer=Wrapper(Wrapper(optimizer)))
    live = live_factors(model)
    for name, factors in writer.gather().items():
        assert factors.B.dtype == torch.float32
        assert torch.equal(factors.B, live[name].B.float() * (1 + 2**-12))
    new = randoms(live)
    writer.write(new)
    assert all(torch.equal(f.A, new[n].A) and torch.equal(f.B, new[n].B) for n, f in writer.gather().items())
    assert all(torch.equal(f.B, new[n].B.bfloat16()) for n, f in live_factors(model).items())
    total = sum(float(t.double().sum()) for pair in new.values() for t in pair)
    assert sum(float(m.detach().double().sum()) for m in masters) == pytest.approx(total)


def test_a_half_precision_adapter_in_deepspeed_needs_the_optimizer(tiny_llama):
    model = adapt(tiny_llama().to(torch.bfloat16))
    hook = type("Hook", (), {"__module__": "deepspeed.runtime.engine", "__call__": lambda *a: None})()
    model.register_forward_pre_hook(hook)
    writer_for(model)
    model.to(torch.bfloat16)
    with pytest.raises(AdapterError, match=r"is torch.bfloat16 in a DeepSpeed run.*optimizer=\.\.\."):
        writer_for(model)
    writer_for(model, optimizer=torch.optim.AdamW(model.parameters()))
    late = Unfused([model.base_model.model.lm_head.weight])
    with pytest.raises(AdapterError, match="whose parameters DeepSpeed keeps"):
        writer_for(model, optimizer=late)


def test_parameters_are_the_live_ones(model):
    live = live_factors(model)
    found = writer_for(model).parameters([Q1, Q0])
    assert list(found) == [Q1, Q0]
    assert all(A is live[n].A and B is live[n].B for n, (A, B) in found.items())
    with pytest.raises(AdapterError, match=r"no LoRA module 'layers\.0\.self_attn\.q_prj'; did you mean"):
        writer_for(model).parameters(["layers.0.self_attn.q_prj"])
