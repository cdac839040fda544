"""`bake_adapter` against W_unaligned + c·V + s·B·A in float64, and what it refuses."""

import json

import pytest
import torch
from safetensors.torch import load_file

from safemerge_callback.adapters import canonical_name, load_adapter
from safemerge_callback.errors import ConfigError, SubspaceError
from safemerge_callback.offline import BaseModel, bake_adapter
from safemerge_callback.subspace import Subspace, compress_subspace


def tensors(folder):
    found = {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}
    return {canonical_name(key): value for key, value in found.items()}


def updates(folder):
    return {name: m.scaling * m.B.double() @ m.A.double() for name, m in load_adapter(folder).factors.items()}


def checkpoint_sum(world, coefficient, adapter=True, V=lambda matrix: matrix):
    """The formula, weight by weight; V between the two checkpoints, of the modules that the subspace has."""
    aligned, unaligned = tensors(world / "aligned"), tensors(world / "unaligned")
    added, known = updates(world / "task") if adapter else {}, Subspace.load(world / "s.safetensors").modules
    want = {}
    for name, weight in aligned.items():
        c = coefficient(name) if name in known else 1.0
        change = V(weight.double() - unaligned[name].double()) if name in known else 0.0
        want[name] = weight.double() + (c - 1) * change + added.get(name, 0.0)
    return want


def close(folder, want):
    found = tensors(folder)
    assert found.keys() == want.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), want[name], rtol=1e-5, atol=1e-6)


def test_it_is_the_formula(world):
    for c in (0.0, 0.5, 1.1, 2.25):
        folder = world / f"full{c}"
        bake_adapter(world / "task", world / "aligned", folder, align=c, subspace=world / "s.safetensors")
        close(folder, checkpoint_sum(world, lambda _, c=c: c))


def test_at_1_nothing_is_added_to_the_bit(world):
    bake_adapter(world / "task", world / "aligned", world / "full", align=1.0, subspace=world / "s.safetensors")
    (world / "plain").mkdir()
    BaseModel.find(world / "aligned").bake(world / "task", world / "plain")
    plain = tensors(world / "plain")
    assert all(torch.equal(value, plain[name]) for name, value in tensors(world / "full").items())
    bake_adapter(world / "task", world / "aligned", world / "without")
    assert all(torch.equal(value, plain[name]) for name, value in tensors(world / "without").items())


def test_by_pattern_with_a_rank_and_without_an_adapter(world):
    """LoX: along the leading directions of V alone, in the modules that are named."""
    settings = {"align": {"v_proj": 1.5}, "align_rank": 2, "subspace": world / "s.safetensors"}
    bake_adapter(None, world / "aligned", world / "start", **settings)

    def leading(V):
        U, S, Vh = torch.linalg.svd(V)
        return (U[:, :2] * S[:2]) @ Vh[:2]

    of_v = lambda name: 1.5 if name.endswith("v_proj") else 1.0  # noqa: E731
    close(world / "start", checkpoint_sum(world, of_v, adapter=False, V=leading))
    assert (
        "1.5 of the alignment vector, its 2 leading directions, in 2 modules" in (world / "start/README.md").read_text()
    )


def test_a_compressed_file_leads_to_the_exact_one_or_is_refused(world):
    compress_subspace(world / "s.safetensors", world / "small.safetensors", progress=False)
    settings = {"align": 1.5, "subspace": world / "small.safetensors"}
    bake_adapter(world / "task", world / "aligned", world / "full", **settings)
    close(world / "full", checkpoint_sum(world, lambda _: 1.5))
    (world / "s.safetensors").rename(world / "elsewhere")
    with pytest.raises(SubspaceError, match="the exact file it was made from is not beside it"):
        bake_adapter(world / "task", world / "aligned", world / "again", **settings)


def test_half_precision_is_rounded_once(tmp_path, tiny_llama, save_lora, save_base):
    save_lora(tiny_llama, tmp_path / "task", seed=5)
    save_base(lambda **how: tiny_llama(**how).bfloat16(), tmp_path)
    bake_adapter(
        tmp_path / "task", tmp_path / "aligned", tmp_path / "full", align=1.5, subspace=tmp_path / "s.safetensors"
    )
    want, found = checkpoint_sum(tmp_path, lambda _: 1.5), tensors(tmp_path / "full")
    wrong = sum(int((found[name] != want[name].bfloat16()).sum()) for name in want)
    assert wrong <= 2  # float32 before the cast may lie on the other side of a tie


REFUSED = [
    (ConfigError, "align was given without a subspace", {"subspace": None}),
    (ConfigError, "align is -1: give how often", {"align": -1}),
    (ConfigError, "align is nan", {"align": float("nan")}),
    (ConfigError, "align of 'v_proj' is 'much'", {"align": {"v_proj": "much"}}),
    (ConfigError, "align of 'w_proj' fits none of the", {"align": {"w_proj": 1.5}}),
    (ConfigError, "align_rank is 0", {"align_rank": 0}),
    (ConfigError, "nothing to bake", {"adapter": None, "align": 1.0}),
    (SubspaceError, "the base model is not the aligned checkpoint", {"base": "unaligned"}),
    (ConfigError, "is one of the inputs", {"output": "aligned"}),
]


def test_what_cannot_be_is_refused_and_nothing_is_written(world):
    for error, says, change in REFUSED:
        asked = {"adapter": "task", "base": "aligned", "output": "full", "align": 1.5, "subspace": "s.safetensors"}
        asked |= change
        paths = {key: asked[key] and world / asked[key] for key in ("adapter", "base", "output", "subspace")}
        with pytest.raises(error, match=says):
            bake_adapter(**(asked | paths))
        assert not (world / "full").exists()


def test_a_base_of_other_shapes_and_a_quantised_one_are_refused(world, tiny_llama):
    tiny_llama(seed=1, hidden_size=64).save_pretrained(world / "wider")
    asked = {"align": 1.5, "subspace": world / "s.safetensors"}
    with pytest.raises(SubspaceError, match=r"module .* is .* in base model"):
        bake_adapter(None, world / "wider", world / "full", **asked)
    tiny_llama(seed=1, num_hidden_layers=1).save_pretrained(world / "short")
    with pytest.raises(SubspaceError, match=r"has no module 'layers\.1"):
        bake_adapter(None, world / "short", world / "full", **asked)
    config = world / "aligned" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "fp8"}}))
    path = next((world / "aligned").glob("*.safetensors"))
    from safetensors.torch import save_file

    weights = load_file(path)
    packed = {k: v.to(torch.float8_e4m3fn) if k.endswith("v_proj.weight") else v for k, v in weights.items()}
    save_file(packed, path, metadata={"format": "pt"})
    with pytest.raises(SubspaceError, match="is quantised"):
        bake_adapter(None, world / "aligned", world / "full", **asked)
