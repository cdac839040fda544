import shutil

import pytest
import torch
from safetensors.torch import save_file

from safemerge_callback.errors import ConfigError, SubspaceError
from safemerge_callback.ops import Factored, Int8
from safemerge_callback.subspace import Subspace, build_subspace, compress_subspace
from safemerge_callback.subspace.approximate import proven, quantised, truncated


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spiked(rows, columns, seed=0):
    """Rank 3 plus a little noise, as an adapter that was merged and rounded leaves."""
    return rand(rows, 3, seed=seed) @ rand(3, columns, seed=seed + 1) + 1e-3 * rand(rows, columns, seed=seed + 2)


@pytest.fixture
def exact(tmp_path):
    base = {"a": rand(40, 60, seed=1), "b": rand(40, 60, seed=2), "tall": rand(60, 40, seed=3), "low": rand(40, 60)}
    base["still"] = rand(40, 60, seed=9)
    aligned = {name: base[name] + spiked(*base[name].shape, seed=20) for name in ("a", "tall")}
    aligned["b"] = base["b"] + rand(40, 60, seed=30)
    aligned["low"] = base["low"] + rand(40, 2, seed=31) @ rand(2, 60, seed=32)
    aligned["still"] = base["still"]
    for name, tensors in (("aligned", aligned), ("unaligned", base)):
        (tmp_path / name).mkdir()
        save_file({f"model.{k}.weight": t for k, t in tensors.items()}, tmp_path / name / "model.safetensors")
    return build_subspace(
        tmp_path / "v.safetensors", aligned=tmp_path / "aligned", unaligned=tmp_path / "unaligned", progress=False
    )


def dense(matrix):
    if isinstance(matrix, Factored):
        return matrix.U[0].double() @ matrix.W[0].double()
    return (matrix.Q.double() * matrix.scale)[0] if isinstance(matrix, Int8) else matrix[0].double()


@pytest.mark.parametrize(("kind", "rank"), [("int8", None), ("truncated", 3)])
def test_a_companion_is_smaller_and_says_how_far_off_it_is(exact, tmp_path, kind, rank):
    small = compress_subspace(exact, tmp_path / "small.safetensors", kind, rank, progress=False)
    assert small.compressed
    assert not exact.compressed
    assert {n: m.kind for n, m in small.modules.items()} == {"a": kind, "b": kind, "tall": kind, "low": "factor"}
    for name, module in small.modules.items():
        V, near = dense(exact.stack([name])), dense(small.stack([name]))
        E = V - near
        assert float(torch.linalg.matrix_norm(E, 2)) <= module.error or module.exact
        if not module.exact:
            assert module.error < 1.06 * float(torch.linalg.matrix_norm(E, 2))
            assert max(float(torch.linalg.matrix_norm(m, 2)) for m in (near @ E.mT, near.mT @ E)) <= module.cross
            assert module.bytes(name) < 0.4 * exact.modules[name].bytes(name)
        for field in ("shape", "norm", "null_cosine", "null_std", "energy"):
            assert getattr(module, field) == getattr(exact.modules[name], field)
    assert (small.unmoved, small.aligned, small.unaligned) == (exact.unmoved, exact.aligned, exact.unaligned)
    small.verify()
    assert small.exact().path == exact.path
    turned = small.stack(["a", "b"], transposed=True)
    first = type(turned)(*(t[:1] for t in turned))
    assert torch.equal(dense(first), dense(small.stack(["a"])).mT)


def test_truncation_at_singular_vectors_leaves_next_to_no_cross_term(exact, tmp_path):
    small = compress_subspace(exact, tmp_path / "small.safetensors", "truncated", 3, progress=False)
    module = small.modules["a"]
    # ‖V̂‖₂·‖E‖₂ is what would have to be assumed without looking.
    assert module.cross < 1e-2 * module.norm * module.error


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 1), (17, 50), (50, 17)])
@pytest.mark.parametrize("make", [quantised, lambda V: truncated(V, min(4, *V.shape))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bounds_hold_at_every_shape(shape, make, dtype):
    V = rand(*shape, seed=5).to(dtype)
    V[-1] = 0 if shape[0] > 1 else V[-1]
    stored = make(V)
    bounds = proven(V, stored)
    near = stored.Q.double() * stored.scale if isinstance(stored, Int8) else stored.U.double() @ stored.W.double()
    E = V.double() - near
    assert float(torch.linalg.matrix_norm(E, 2)) <= bounds.error
    for product in (near @ E.mT, near.mT @ E):
        assert float(torch.linalg.matrix_norm(product, 2)) <= bounds.cross * (1 + 1e-12)


def test_eight_bits_are_the_nearest():
    V = torch.tensor([[1.27, -0.63, 0.005, 0.015], [0.0, 0.0, 0.0, 0.0]])
    Q, scale = quantised(V)
    assert scale[:, 0].tolist() == [pytest.approx(0.01), 0.0]
    # 0.5 and 1.5 steps, up to float32, are ties: to even.
    assert Q.tolist()[0][:2] == [127, -63]
    assert Q.tolist()[1] == [0, 0, 0, 0]
    W = rand(30, 40)
    Q, scale = quantised(W)
    assert bool(((Q.double() * scale - W.double()).abs() <= scale.double() / 2 * (1 + 1e-6)).all())


def test_the_file_does_not_depend_on_the_run(exact, tmp_path):
    for kind in ("int8", "truncated"):
        files = [compress_subspace(exact.path, tmp_path / f"{i}.{kind}", kind, progress=False).path for i in range(2)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_blocks_change_nothing(monkeypatch):
    from safemerge_callback.subspace import approximate

    V = spiked(50, 30)
    before = [proven(V, make) for make in (quantised(V), truncated(V, 3))]
    monkeypatch.setattr(approximate, "_BLOCK", 30 * 7)
    after = [proven(V, make) for make in (quantised(V), truncated(V, 3))]
    for x, y in zip(before, after, strict=True):
        assert y == pytest.approx(x, rel=1e-3)


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"kind": "int4"}, "kind 'int4' is unknown.*'int8'"),
        ({"kind": "int8", "rank": 4}, "for 'truncated' only"),
        ({"kind": "truncated", "rank": 0}, "rank=0"),
        ({"kind": "truncated", "rank": True}, "rank=True"),
    ],
)
def test_knobs_without_meaning_are_refused(exact, tmp_path, knobs, says):
    with pytest.raises(ConfigError, match=says):
        compress_subspace(exact, tmp_path / "small", **knobs, progress=False)
    assert not (tmp_path / "small").exists()


def test_what_is_compressed_already_and_the_source_itself_are_refused(exact, tmp_path):
    small = compress_subspace(exact, tmp_path / "small.safetensors", progress=False)
    with pytest.raises(SubspaceError, match="compressed already"):
        compress_subspace(small, tmp_path / "smaller.safetensors", progress=False)
    with pytest.raises(SubspaceError, match="is one of the inputs"):
        compress_subspace(exact, exact.path, progress=False)


def test_the_exact_file_must_be_beside_it_and_the_same(exact, tmp_path):
    (tmp_path / "other").mkdir()
    small = compress_subspace(exact, tmp_path / "other" / "small.safetensors", progress=False)
    with pytest.raises(SubspaceError, match=r"looked for .*other/v\.safetensors"):
        small.exact()
    shutil.copy(exact.path, tmp_path / "other")
    assert small.exact().fingerprint == exact.fingerprint
    build_subspace(
        tmp_path / "other" / "v.safetensors",
        aligned=tmp_path / "unaligned",
        unaligned=tmp_path / "aligned",
        progress=False,
    )
    with pytest.raises(SubspaceError, match="is not the file that"):
        Subspace.load(small.path).exact()


def test_describe_tells_of_the_bounds_and_of_the_exact_file(exact, tmp_path):
    small = compress_subspace(exact, tmp_path / "small.safetensors", progress=False)
    text = small.describe()
    assert "exact:     v.safetensors" in text
    assert "3 int8" in text
    assert f"{small.modules['a'].error / small.modules['a'].norm:.1e}" in text
    assert "error" not in exact.describe()
