"""Several adapters fused by weights a module: the written folder against the dense sum, and what is refused."""

import pytest
import torch

from safemerge_callback.adapters import load_adapter
from safemerge_callback.errors import AdapterError, ConfigError
from safemerge_callback.offline import fuse_adapters


def updates(folder):
    return {name: m.scaling * m.B.double() @ m.A.double() for name, m in load_adapter(folder).factors.items()}


def weights_of(folder):
    names = list(load_adapter(folder).factors)
    return {name: (0.5 - 0.01 * i, 0.3, 0.2 + 0.01 * i) for i, name in enumerate(names)}


def test_it_is_the_sum_of_each_module(world):
    parts = [world / name for name in ("task", "safety", "other")]
    weights = weights_of(parts[0])
    fuse_adapters(parts, weights, world / "fused")
    fused, each = updates(world / "fused"), [updates(part) for part in parts]
    for name, row in weights.items():
        want = sum(w * update[name] for w, update in zip(row, each, strict=True))
        assert float((fused[name] - want).norm() / want.norm()) < 1e-6
    assert {one.rank for one in load_adapter(world / "fused").factors.values()} == {4 + 2 + 3}
    assert "| layers.0.self\\_attn.q\\_proj |" in (world / "fused" / "README.md").read_text()
    fuse_adapters(parts, weights, world / "thin", method="linear")
    thin = updates(world / "thin")
    assert {one.rank for one in load_adapter(world / "thin").factors.values()} == {4}
    u, s, v = torch.linalg.svd(fused[name])
    torch.testing.assert_close(thin[name], (u[:, :4] * s[:4]) @ v[:4], rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused(world, tiny_llama, save_lora):
    parts, weights = [world / "task", world / "safety"], weights_of(world / "task")
    two = {name: row[:2] for name, row in weights.items()}
    with pytest.raises(ConfigError, match=r"weights of .* give 2 numbers"):
        fuse_adapters(parts, weights, world / "out")
    with pytest.raises(ConfigError, match="give those of every module"):
        fuse_adapters(parts, dict(list(two.items())[1:]), world / "out")
    with pytest.raises(ConfigError, match="method 'ties' is unknown"):
        fuse_adapters(parts, two, world / "out", method="ties")
    save_lora(tiny_llama, world / "fewer", 8, ["q_proj"])
    with pytest.raises(AdapterError, match="lacks"):
        fuse_adapters([world / "task", world / "fewer"], two, world / "out")
    assert not (world / "out").exists()
