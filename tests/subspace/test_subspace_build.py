import copy
import json
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from safemerge_callback.errors import ConfigError, SubspaceError
from safemerge_callback.live import base_weights, live_factors
from safemerge_callback.ops import Factored
from safemerge_callback.subspace import VERSION, Subspace, build_subspace
from tests.support.terminal import Terminal


def perturbed(model, seed=7, scale=0.01):
    other = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape).to(parameter.dtype) * scale)
    return other


def weights(model):
    """Canonical name -> weight, of every linear layer and embedding, from the live model."""
    named = {n: m.weight.detach() for n, m in model.named_modules() if getattr(m, "weight", None) is not None}
    return {n.removeprefix("model.").removeprefix("transformer."): w for n, w in named.items() if w.ndim == 2}


def build(tmp_path, aligned, unaligned, **knobs):
    for name, model in (("aligned", aligned), ("unaligned", unaligned)):
        model.save_pretrained(tmp_path / name)
    return build_from(tmp_path, **knobs)


def build_from(tmp_path, **knobs):
    knobs = {"aligned": tmp_path / "aligned", "unaligned": tmp_path / "unaligned", "progress": False, **knobs}
    return build_subspace(tmp_path / "v.safetensors", **knobs)


def save_pair(tmp_path, aligned, unaligned):
    for name, tensors in (("aligned", aligned), ("unaligned", unaligned)):
        (tmp_path / name).mkdir(exist_ok=True)
        tensors = {f"model.layers.0.{key}.weight": tensor.clone() for key, tensor in tensors.items()}
        save_file(tensors, tmp_path / name / "model.safetensors")


def dense(subspace, name, **knobs):
    matrix = subspace.stack([name], **knobs)
    matrix = matrix.U.double() @ matrix.W.double() if isinstance(matrix, Factored) else matrix
    return matrix[0].double()


def dense_null(V):
    """‖V‖² / (√d_out·‖VVᵀ‖), formed."""
    V = V.double()
    return float(V.norm() ** 2 / (V.shape[0] ** 0.5 * (V @ V.mT).norm()))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2, n_inner=80))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen2", "tiny_gemma"])
def test_v_is_the_float64_difference(request, tmp_path, family, dtype):
    aligned = request.getfixturevalue(family)().to(dtype)
    unaligned = perturbed(aligned)
    aligned.save_pretrained(tmp_path / "aligned", max_shard_size="20KB")
    unaligned.save_pretrained(tmp_path / "unaligned")
    subspace = build_from(tmp_path)
    live, other = weights(aligned), weights(unaligned)
    assert set(subspace.modules) == {n for n in live if n not in ("embed_tokens", "lm_head")}
    assert len(subspace.modules) == 14
    for name, module in subspace.modules.items():
        expected = live[name].double() - other[name].double()
        assert module.kind == "dense"
        assert module.shape == tuple(expected.shape)
        assert torch.equal(dense(subspace, name), expected.float().double())
        assert (dense(subspace, name) - expected).abs().max() <= 2**-23 * expected.abs().max()
        assert module.norm == pytest.approx(float(expected.norm()), rel=1e-6)
        assert module.null_cosine == pytest.approx(dense_null(expected), rel=1e-5)
        assert subspace.null_cosine(name, transposed=True) == pytest.approx(dense_null(expected.mT), rel=1e-5)


def test_embeddings_and_tied_heads_can_be_asked_for(tiny_gemma, tmp_path):
    aligned = tiny_gemma()
    unaligned = perturbed(aligned)
    subspace = build(tmp_path, aligned, unaligned, target_modules=["embed_tokens", "lm_head"])
    expected = aligned.lm_head.weight - unaligned.lm_head.weight
    assert set(subspace.modules) == {"embed_tokens", "lm_head"}
    assert torch.equal(subspace.stack(["lm_head"])[0], expected)
    assert torch.equal(subspace.stack(["embed_tokens"], transposed=True)[0], expected.mT)


def test_conv1d_weights_are_kept_as_the_checkpoint_has_them_and_turned_on_reading(tmp_path):
    aligned = gpt2()
    unaligned = perturbed(aligned)
    subspace = build(tmp_path, aligned, unaligned)
    assert set(subspace.modules) == {f"h.0.{m}" for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    live, other = weights(aligned), weights(unaligned)
    name = "h.0.mlp.c_fc"
    V = live[name] - other[name]
    assert subspace.modules[name].shape == (32, 80)
    assert torch.equal(subspace.stack([name], transposed=True), V.mT[None])
    assert subspace.null_cosine(name, transposed=True) == pytest.approx(dense_null(V.mT), rel=1e-5)
    assert subspace.null_cosine(name) == pytest.approx(dense_null(V), rel=1e-5)


def test_the_dtype_is_the_checkpoints_only_where_that_is_exact(tmp_path):
    a = torch.randn(24, 40, dtype=torch.bfloat16)
    inexact = a + torch.randn(24, 40).bfloat16() * 5
    assert not torch.equal((a.float() - inexact.float()).bfloat16().float(), a.float() - inexact.float())
    wide = torch.randn(24, 40, dtype=torch.float64)
    aligned = {"exact": a, "inexact": a, "half": a.half(), "single": a.float(), "double": wide, "mixed": a}
    unaligned = {"exact": -a, "inexact": inexact, "half": -a.half(), "single": inexact.float()}
    unaligned |= {"double": torch.randn_like(wide), "mixed": a.float() * 3}
    save_pair(tmp_path, aligned, unaligned)
    subspace = build_from(tmp_path)
    found = {name.rpartition(".")[2]: module.dtype for name, module in subspace.modules.items()}
    expected = {"exact": "bfloat16", "inexact": "float32", "half": "float16", "single": "float32"}
    assert found == {**expected, "double": "float64", "mixed": "bfloat16"}
    for name in aligned:
        assert torch.equal(dense(subspace, f"layers.0.{name}"), aligned[name].double() - unaligned[name].double())


def with_lora(model, **config):
    config = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj"], **config}
    peft_model = get_peft_model(copy.deepcopy(model), LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name or "lora_embedding" in name:
                parameter.normal_(std=0.1)
    return peft_model


def test_a_merged_lora_becomes_factors_of_its_rank(tiny_llama, tmp_path):
    base = tiny_llama()
    subspace = build(tmp_path, with_lora(base).merge_and_unload(), base)
    moved = {f"layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.up_proj")}
    assert set(subspace.modules) == moved
    assert len(subspace.unmoved) == 14 - 4
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("aligned", "unaligned")]
    for name, module in subspace.modules.items():
        expected = files[0][f"model.{name}.weight"].double() - files[1][f"model.{name}.weight"].double()
        assert (module.kind, module.rank, module.dtype) == ("factor", 4, "float32")
        assert (dense(subspace, name) - expected).norm() <= 1e-5 * expected.norm()
        assert module.null_cosine == pytest.approx(dense_null(expected), rel=1e-4)
        assert subspace.null_cosine(name, transposed=True) == pytest.approx(dense_null(expected.mT), rel=1e-4)


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], ["v_proj", "embed_tokens"]])
def test_an_alignment_adapter_equals_pefts_delta(tiny_llama, tmp_path, targets):
    model = with_lora(tiny_llama(), use_rslora=True, target_modules=targets)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    subspace = build_subspace(tmp_path / "v", alignment_adapter=tmp_path / "adapter", progress=False)
    layers = {n.removeprefix("base_model.model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert set(subspace.modules) == set(layers)
    for name, layer in layers.items():
        delta = layer.get_delta_weight("default").detach().double()
        assert (subspace.modules[name].kind, subspace.modules[name].rank) == ("factor", 4)
        assert subspace.modules[name].shape == tuple(layer.get_base_layer().weight.shape)
        torch.testing.assert_close(dense(subspace, name), delta, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(dense(subspace, name, transposed=True), delta.mT, rtol=1e-5, atol=1e-8)
        assert subspace.modules[name].norm == pytest.approx(float(delta.norm()), rel=1e-6)
        assert subspace.null_cosine(name) == pytest.approx(dense_null(delta), rel=1e-5)
    assert subspace.unaligned["alignment_adapter"] == "adapter"
    assert subspace.aligned == {}


def test_an_alignment_adapter_on_conv1d(tmp_path):
    model = with_lora(gpt2(), target_modules=["c_fc"], fan_in_fan_out=True)
    model.save_pretrained(tmp_path / "adapter")
    subspace = build_subspace(tmp_path / "v", alignment_adapter=tmp_path / "adapter", progress=False)
    delta = model.base_model.model.transformer.h[0].mlp.c_fc.get_delta_weight("default").detach().double()
    assert subspace.modules["h.0.mlp.c_fc"].shape == (32, 80)
    torch.testing.assert_close(dense(subspace, "h.0.mlp.c_fc"), delta, rtol=1e-5, atol=1e-8)


def test_an_alignment_adapter_of_another_size_than_aligned_is_refused(tiny_llama, tmp_path):
    with_lora(tiny_llama()).save_pretrained(tmp_path / "adapter")
    tiny_llama(intermediate_size=40).save_pretrained(tmp_path / "other")
    with pytest.raises(SubspaceError, match=r"up_proj' is \(48, 32\) in the alignment adapter but \(40, 32\)"):
        build_subspace(
            tmp_path / "v", aligned=tmp_path / "other", alignment_adapter=tmp_path / "adapter", progress=False
        )


def test_the_written_file_is_plain_safetensors_without_machine_paths(tiny_llama, tmp_path):
    aligned = tiny_llama()
    build(tmp_path, aligned, perturbed(aligned), target_modules=["q_proj"])
    tensors = load_file(tmp_path / "v.safetensors")
    assert {k for k in tensors if k.endswith(".V")} == {f"layers.{i}.self_attn.q_proj.V" for i in (0, 1)}
    with safe_open(tmp_path / "v.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"]) == ("safemerge.subspace", VERSION)
    assert str(tmp_path) not in json.dumps(metadata)
    assert json.loads(metadata["header"])["aligned"]["source"] == "aligned"


def test_modules_that_did_not_move_are_noted_and_not_stored(tmp_path):
    a, b = torch.randn(8, 6), torch.randn(8, 6)
    save_pair(tmp_path, {"q_proj": a, "v_proj": a}, {"q_proj": b, "v_proj": a})
    subspace = build_from(tmp_path)
    assert (list(subspace.modules), subspace.unmoved) == (["layers.0.q_proj"], ("layers.0.v_proj",))
    with pytest.raises(SubspaceError, match=r"'layers.0.v_proj' has no alignment matrix: aligned and unaligned are"):
        subspace.null_cosine("layers.0.v_proj")


def nan_at(tensor):
    tensor = tensor.clone()
    tensor[3, 2] = torch.nan
    return tensor


W = torch.arange(48.0).reshape(8, 6).sin()


@pytest.mark.parametrize(
    ("aligned", "unaligned", "says"),
    [
        ({"a": W, "b": W}, {"a": -W}, r"1 of 2 modules are missing in checkpoint 'unaligned'.* first 'layers\.0\.b'"),
        ({"a": W}, {"a": -W, "b": W}, r"missing in checkpoint 'aligned'.* first 'layers\.0\.b'"),
        ({"a": W}, {"a": W[:4]}, r"'layers\.0\.a' is \(8, 6\) in 'aligned' but \(4, 6\) in 'unaligned'"),
        ({"z": -W, "a": nan_at(W)}, {"z": W, "a": W}, r"checkpoint 'aligned': module 'layers\.0\.a' has 1 values"),
        ({"a": W, "z": W}, {"a": -W, "z": W / 0}, r"checkpoint 'unaligned': module 'layers\.0\.z' has 48 values"),
        ({"a": W * 3e38}, {"a": -W * 3e38}, "overflows"),
        ({"a": W, "b": W}, {"a": W, "b": W}, r"equal at all 2 modules, first 'layers\.0\.a'"),
        (
            {"a": W.to(torch.int8)},
            {"a": W.to(torch.int8)},
            r"checkpoint 'aligned' is quantised \(int8\): use the unquantised",
        ),
    ],
)
def test_unusable_pairs_are_refused_by_name_and_leave_no_file(tmp_path, aligned, unaligned, says):
    save_pair(tmp_path, aligned, unaligned)
    with pytest.raises(SubspaceError, match=says):
        build_from(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["aligned", "unaligned"]


@pytest.mark.parametrize(
    ("sources", "says"),
    [
        ({}, "aligned and unaligned not given"),
        ({"aligned": "x"}, "unaligned not given"),
        ({"unaligned": "x"}, "aligned not given"),
        ({"aligned": "x", "unaligned": "y", "alignment_adapter": "z"}, "exclude each other"),
    ],
)
def test_contradicting_sources_are_refused(tmp_path, sources, says):
    with pytest.raises(ConfigError, match=says):
        build_subspace(tmp_path / "v", **sources)


def test_it_is_built_the_same_twice_and_a_bar_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    torch.manual_seed(3)
    V = torch.randn(40, 2) @ torch.randn(2, 50)
    save_pair(tmp_path, {"a": V, "b": W}, {"a": torch.zeros(40, 50), "b": W * 2})
    build_from(tmp_path)
    first = (tmp_path / "v.safetensors").read_bytes()
    subspace = build_from(tmp_path, progress=True)
    assert (tmp_path / "v.safetensors").read_bytes() == first
    assert subspace.modules["layers.0.a"].rank == 2
    assert "building subspace" in terminal.getvalue()


def test_load_is_what_build_returns(tmp_path):
    save_pair(tmp_path, {"a": W}, {"a": -W})
    built = build_from(tmp_path)
    loaded = Subspace.load(tmp_path / "v.safetensors")
    assert dict(loaded.modules) == dict(built.modules)
    assert (loaded.aligned, loaded.unaligned, loaded.version) == (built.aligned, built.unaligned, VERSION)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_live_peft_model_on_aligned_passes_and_on_unaligned_does_not(tiny_llama, tmp_path, dtype):
    aligned = tiny_llama()
    unaligned = perturbed(aligned)
    subspace = build(tmp_path, aligned, unaligned, target_modules=["q_proj", "up_proj", "embed_tokens"])
    targets = ["q_proj", "up_proj", "embed_tokens"]
    live = with_lora(aligned.to(dtype), target_modules=targets)
    assert set(base_weights(live)) == set(live_factors(live)) == set(subspace.modules)
    subspace.check(live_factors(live), base_weights(live))
    live = with_lora(unaligned.to(dtype), target_modules=targets)
    with pytest.raises(SubspaceError, match="5 of 5 modules differ"):
        subspace.check(live_factors(live), base_weights(live))
    live = with_lora(aligned, target_modules=["v_proj"])
    with pytest.raises(SubspaceError, match=r"lacks 2 of 2 LoRA modules, first 'layers\.0\.self_attn\.v_proj'"):
        subspace.check(live_factors(live))
