"""The random subspace has the spectrum of its model and the overlap of chance."""

import pytest
import torch
from safetensors.torch import save_file

from method_comparison.random_subspace import random_subspace
from safemerge_callback import build_subspace
from safemerge_callback.ops import Factored
from safemerge_callback.subspace import Subspace

SHAPES = {"layers.0.q_proj": (96, 160), "layers.0.v_proj": (40, 160), "layers.1.q_proj": (96, 160)}


@pytest.fixture(params=["dense", "factor"])
def source(request, tmp_path):
    generator = torch.Generator().manual_seed(1)
    aligned = {f"model.{name}.weight": torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    unaligned = {}
    for name, W in aligned.items():
        if request.param == "dense":
            V = torch.randn(W.shape, generator=generator) * torch.linspace(2, 0.1, W.shape[1])
        else:
            V = torch.randn(W.shape[0], 5, generator=generator) @ torch.randn(5, W.shape[1], generator=generator)
        unaligned[name] = W - V
    for name, weights in (("a", aligned), ("u", unaligned)):
        save_file(weights, tmp_path / f"{name}.safetensors")
    return build_subspace(
        tmp_path / "s.safetensors", aligned=tmp_path / "a.safetensors", unaligned=tmp_path / "u.safetensors"
    )


def dense(subspace, name):
    V = subspace.stack([name])
    return ((V.U @ V.W) if isinstance(V, Factored) else V)[0].double()


def test_the_spectrum_and_all_that_follows_from_it_stay(source, tmp_path):
    made = random_subspace(source, tmp_path / "r.safetensors", seed=3)
    made.verify()
    assert list(made.modules) == list(source.modules)
    for name, header in source.modules.items():
        x, y = torch.linalg.svdvals(dense(source, name)), torch.linalg.svdvals(dense(made, name))
        assert torch.allclose(x, y, rtol=1e-4, atol=1e-4 * float(x[0]))
        other = made.modules[name]
        assert (other.kind, other.rank, other.shape) == (header.kind, header.rank, header.shape)
        assert other.norm == pytest.approx(header.norm, rel=1e-4)
        assert other.null_cosine == pytest.approx(header.null_cosine, rel=1e-3)
        assert other.null_std.keys() == header.null_std.keys()


def test_the_overlap_with_v_is_that_of_chance(source, tmp_path):
    """⟨X, V⟩² of random directions has the mean ‖X‖²·‖V‖²/(d_out·d_in): no V is found again."""
    made = random_subspace(source, tmp_path / "r.safetensors", seed=3)
    for name in source.modules:
        V, X = dense(source, name), dense(made, name)
        overlap = float((V * X).sum() / (V.norm() * X.norm()))
        assert abs(overlap) < 5 / (V.numel() ** 0.5)
        left = torch.linalg.svd(V).U[:, :5].T @ torch.linalg.svd(X).U[:, :5]
        assert float(left.square().sum()) == pytest.approx(25 / V.shape[0], abs=0.5)


def test_a_seed_repeats_itself_and_modules_differ(source, tmp_path):
    one, two, other = (
        random_subspace(source, tmp_path / f"{i}.safetensors", seed=seed) for i, seed in enumerate((1, 1, 2))
    )
    name, last = "model.layers.0.q_proj", "model.layers.1.q_proj"
    name, last = (next(n for n in source.modules if n.endswith(end[6:])) for end in (name, last))
    assert torch.equal(dense(one, name), dense(two, name))
    assert not torch.allclose(dense(one, name), dense(other, name))
    assert float((dense(one, name) * dense(one, last)).sum().abs()) < 0.2 * float(dense(one, name).norm()) ** 2


def test_it_opens_like_any_other_and_says_what_it_is(source, tmp_path):
    made = Subspace.load(random_subspace(source, tmp_path / "r.safetensors", seed=7).path)
    assert made.aligned == source.aligned
    assert made.unaligned == {"source": "random singular vectors, seed 7", "of": source.fingerprint}
    assert made.header.probed == source.header.probed
    assert "random singular vectors" in made.describe()
