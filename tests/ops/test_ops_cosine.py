import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safemerge_callback.ops import (
    Factored,
    Int8,
    Known,
    LowRank,
    cosine_interval,
    moved,
    null_cosine,
    project,
    projected_cosine,
    turned,
)


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense_cosine(update, V):
    """SafeMERGE's formula as it is printed, in float64, with C formed."""
    dw = update.B.double() @ update.A.double()
    V = V.double()
    C = V @ V.mT / V.norm()
    x = C @ dw
    return float((x * dw).sum() / (x.norm() * dw.norm()))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 8), st.integers(0, 999))
@settings(max_examples=100, deadline=None)
def test_cosine_equals_float64_dense(d_out, d_in, r, seed):
    update = LowRank(rand(r, d_in, seed=seed), rand(d_out, r, seed=seed + 1))
    V = rand(d_out, d_in, seed=seed + 2)
    assert float(projected_cosine(update, V)) == pytest.approx(dense_cosine(update, V), abs=1e-5)


@pytest.mark.parametrize(("d_out", "d_in"), [(64, 64), (16, 64), (64, 16), (576, 192), (1, 9), (9, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("r", [1, 8])
def test_cosine_at_every_shape_and_dtype(d_out, d_in, dtype, r):
    """Inputs are rounded to dtype first, so only our arithmetic is compared."""
    update = LowRank(rand(r, d_in, seed=1, dtype=dtype), rand(d_out, r, seed=2, dtype=dtype))
    V = rand(d_out, d_in, seed=3, dtype=dtype)
    assert float(projected_cosine(update, V)) == pytest.approx(dense_cosine(update, V), abs=1e-5)


def test_narrow_V_is_widened_by_blocks(monkeypatch):
    from safemerge_callback.ops import cosine

    update = LowRank(rand(4, 50, seed=1), rand(70, 4, seed=2))
    V = rand(70, 50, seed=3, dtype=torch.bfloat16)
    whole = projected_cosine(update, V)
    monkeypatch.setattr(cosine, "_BLOCK", 50 * 8)
    torch.testing.assert_close(projected_cosine(update, V), whole, rtol=1e-6, atol=0)
    assert float(whole) == pytest.approx(dense_cosine(update, V), abs=1e-5)


@pytest.mark.parametrize(("scale_b", "scale_v"), [(1e-12, 1e-12), (1e15, 1e15), (1e-18, 1e12)])
def test_cosine_does_not_see_scale(scale_b, scale_v):
    A, B, V = rand(4, 30, seed=1), rand(20, 4, seed=2), rand(20, 30, seed=3)
    scaled = projected_cosine(LowRank(A, scale_b * B), scale_v * V)
    assert float(scaled) == pytest.approx(dense_cosine(LowRank(A, B), V), abs=1e-5)


def test_cosine_of_cancelling_factors():
    """Two nearly opposite rank-one parts: the update is a thousandth of its factors."""
    a, b = rand(1, 30, seed=1), rand(20, 1, seed=2)
    update = LowRank(torch.cat([a, a + 1e-3 * rand(1, 30, seed=3)]), torch.cat([b, -b], dim=1))
    V = rand(20, 30, seed=4)
    assert float(projected_cosine(update, V)) == pytest.approx(dense_cosine(update, V), abs=1e-5)


def test_degenerate_inputs():
    A, B, V = rand(4, 30, seed=1), rand(20, 4, seed=2), rand(20, 30, seed=3)
    assert float(projected_cosine(LowRank(A, torch.zeros_like(B)), V)) == 1.0
    assert float(projected_cosine(LowRank(torch.zeros_like(A), B), V)) == 1.0
    assert float(projected_cosine(LowRank(A, B), torch.zeros_like(V))) == 1.0
    for bad in (float("nan"), float("inf"), -float("inf")):
        broken = B.clone()
        broken[3, 1] = bad
        assert torch.isnan(projected_cosine(LowRank(A, broken), V))
        rho = projected_cosine(LowRank(torch.stack([A, A]), torch.stack([B, broken])), torch.stack([V, V]))
        assert torch.isfinite(rho[0])
        assert torch.isnan(rho[1])


def test_factored_equals_dense():
    U, W = rand(3, 20, 5, seed=1), rand(3, 5, 30, seed=2)
    update = LowRank(rand(3, 4, 30, seed=3), rand(3, 20, 4, seed=4))
    factored, dense = projected_cosine(update, Factored(U, W)), projected_cosine(update, U @ W)
    torch.testing.assert_close(factored, dense, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(null_cosine(Factored(U, W)), null_cosine(U @ W), rtol=1e-5, atol=1e-6)
    B = update.B
    torch.testing.assert_close(project(B, Factored(U, W)), project(B, U @ W), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("d_out", "d_in"), [(40, 30), (30, 40), (600, 20), (1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_null_cosine_equals_dense(d_out, d_in, dtype):
    V = rand(d_out, d_in, seed=1, dtype=dtype) * 1e-6
    wide = V.double()
    expected = wide.norm() ** 2 / (d_out**0.5 * (wide @ wide.mT).norm())
    assert float(null_cosine(V)) == pytest.approx(float(expected), abs=1e-5)
    assert float(null_cosine(torch.zeros_like(V))) == 1.0


def test_null_cosine_is_the_mean_of_unrelated_updates():
    V = rand(48, 32, seed=1)
    readings = [
        float(projected_cosine(LowRank(rand(16, 32, seed=10 + i), rand(48, 16, seed=900 + i)), V)) for i in range(100)
    ]
    assert sum(readings) / 100 == pytest.approx(float(null_cosine(V)), abs=0.01)


def test_project_is_safe_loras_formula():
    B, V = rand(20, 4, seed=1), rand(20, 30, seed=2)
    wide = V.double()
    expected = wide @ wide.mT @ B.double() / wide.norm()
    torch.testing.assert_close(project(B, V).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(project(B, torch.zeros_like(V)), B)


def eight_bits(*shape, seed=0):
    Q = (40 * rand(*shape, seed=seed)).round().clamp(-127, 127).to(torch.int8)
    return Int8(Q, rand(*shape[:-1], 1, seed=seed + 1).abs() + 0.1)


@pytest.mark.parametrize("turn", [False, True])
def test_eight_bits_equal_dense(turn, monkeypatch):
    from safemerge_callback.ops import cosine

    V = eight_bits(3, 30, 20)
    V = turned(V) if turn else V
    dense = V.Q * V.scale
    d_out, d_in = dense.shape[-2:]
    update = LowRank(rand(3, 4, d_in, seed=3), rand(3, d_out, 4, seed=4))
    for block in (1 << 22, 60):
        monkeypatch.setattr(cosine, "_BLOCK", block)
        torch.testing.assert_close(projected_cosine(update, V), projected_cosine(update, dense), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(null_cosine(V), null_cosine(dense), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(project(update.B, V), project(update.B, dense), rtol=1e-4, atol=1e-5)


def test_forms_move_and_turn_without_a_copy():
    U, W = rand(3, 20, 5), rand(3, 5, 30)
    for V in (rand(3, 20, 30), Factored(U, W), eight_bits(3, 20, 30)):
        for same in (turned(turned(V)), moved(V, torch.device("cpu"))):
            assert all(a.data_ptr() == b.data_ptr() for a, b in zip(parts(same), parts(V), strict=True))


def parts(V):
    return list(V) if isinstance(V, tuple) else [V]


def test_no_square_nor_dense_temporary(monkeypatch):
    """The largest tensor that the measure makes is thin: watched through every operator's outputs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from safemerge_callback.ops import cosine

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)]
            inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
            fresh = [t.numel() for t in made if t.untyped_storage().data_ptr() not in inputs]
            Largest.seen = max([Largest.seen, *fresh])
            return out

    d, r = 256, 4
    update, V = LowRank(rand(r, d, seed=1), rand(d, r, seed=2)), rand(d, d, seed=3)
    monkeypatch.setattr(cosine, "_BLOCK", d * r)
    known = Known(*(torch.tensor(x, dtype=torch.float64) for x in (1e-3, 1e-2, 10.0)))
    for matrix in (V, V.bfloat16(), eight_bits(d, d), turned(eight_bits(d, d))):
        Largest.seen = 0
        with Largest():
            projected_cosine(update, matrix)
            cosine_interval(update, matrix, known)
        # Thin factors and their float64 copies; a block that is widened, its integers and its product are as small.
        assert 0 < Largest.seen <= 2 * d * r
