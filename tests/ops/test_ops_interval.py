import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from safemerge_callback.ops import (
    Factored,
    Int8,
    Known,
    LowRank,
    cosine_interval,
    interval,
    projected_cosine,
    spectral_bound,
)


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense_cosine(update, V):
    dw = update.B.double() @ update.A.double()
    x = V.double() @ (V.double().mT @ dw)
    return float((x * dw).sum() / (x.norm() * dw.norm()))


def known(V, near):
    """The true bounds, from dense decompositions in float64."""
    E = V.double() - near.double()
    cross = max(torch.linalg.matrix_norm(m, 2) for m in (near.double() @ E.mT, near.double().mT @ E))
    return Known(torch.linalg.matrix_norm(E, 2), cross, V.double().norm())


def decaying(d_out, d_in, power, seed):
    """A matrix with singular values k^-power."""
    left, _ = torch.linalg.qr(rand(d_out, min(d_out, d_in), seed=seed))
    right, _ = torch.linalg.qr(rand(d_in, min(d_out, d_in), seed=seed + 1))
    return left * torch.arange(1, left.shape[1] + 1).double() ** -power @ right.mT


def adversary(kind, V, update, seed):
    """Errors of norm 1 that mean harm: along the update, along V's own directions, of rank one, or plain noise."""
    dw = update.B @ update.A
    u, _, vh = torch.linalg.svd(V, full_matrices=False)
    found = {
        "noise": rand(*V.shape, seed=seed),
        "update": dw @ dw.mT @ V,
        "leading": u[:, :1] @ vh[:1],
        "crossed": u[:, -1:] @ vh[:1],
        "meets": (dw @ rand(dw.shape[1], 1, seed=seed)) @ vh[:1],
        "cancels": -V,
    }[kind]
    return found / torch.linalg.matrix_norm(found, 2).clamp_min(1e-300)


@given(
    st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(1, 5)),
    st.sampled_from([0.0, 0.5, 2.0]),
    st.sampled_from(["noise", "update", "leading", "crossed", "meets", "cancels"]),
    st.floats(-9, 0.3),
    st.booleans(),
    st.integers(0, 9999),
)
@example((1, 1, 2), 0.0, "noise", -0.015625, True, 5949)
@settings(max_examples=400, deadline=None)
def test_the_true_cosine_is_inside(sizes, power, kind, exponent, negative, seed):
    d_out, d_in, r = sizes
    update = LowRank(rand(r, d_in, seed=seed), rand(d_out, r, seed=seed + 1))
    near = decaying(d_out, d_in, power, seed + 2)
    E = (-1 if negative else 1) * 10.0**exponent * adversary(kind, near, update, seed + 3)
    V = near + E
    assume(V.norm() > 1e-9)
    bounds = known(V, near)
    # A touch more, for the rounding of the bounds themselves.
    bounds = bounds._replace(error=bounds.error * (1 + 1e-12))
    rho, lower, upper = cosine_interval(update, near, bounds).tolist()
    assert 0 <= lower <= rho <= upper <= 1
    assert lower <= min(1.0, dense_cosine(update, V)) <= upper
    _each_norm_is_inside(update, V, near, bounds)


def _each_norm_is_inside(update, V, near, bounds):
    """Both bounds alone: in their ratio one that is too tight hides behind the other."""
    sizes = interval._sizes(update, near, bounds)
    low, high = interval._overlap(sizes)
    shortest, longest = interval._length(sizes, low)
    # As `_sizes` has them: factors of largest entry 1, V of norm 1.
    X, W = (update.B / update.B.abs().max()) @ (update.A / update.A.abs().max()), V / V.norm()
    n, p = float((W.mT @ X).norm() ** 2), float((W @ (W.mT @ X)).norm())
    assert low - 1e-14 <= n <= high + 1e-14 + 1e-12 * n
    assert shortest - 1e-14 <= p <= longest + 1e-14 + 1e-12 * p


@pytest.mark.parametrize(
    ("near", "E"),
    [
        # V̂ᵀX is small and E turns it into V̂'s leading direction: n stays, p does not.
        (torch.diag(torch.tensor([1.0, 0.01])), torch.tensor([[0.0, 0.0], [1e-4, 0.0]])),
        # A truncated SVD, X half in what was cut: no cross term, only ‖EᵀX‖² and ‖EEᵀX‖.
        (torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 0.3]))),
        (torch.zeros(2, 2), torch.eye(2)),
    ],
)
@pytest.mark.parametrize("b", [[0.0, 1.0], [1.0, 1.0], [1e-3, 1.0]])
def test_each_term_is_needed(near, E, b):
    update = LowRank(torch.ones(1, 1).double(), torch.tensor(b).double()[:, None])
    near, V = near.double(), near.double() + E.double()
    bounds = known(V, near)
    _, lower, upper = cosine_interval(update, near, bounds).tolist()
    assert lower <= min(1.0, dense_cosine(update, V)) <= upper
    _each_norm_is_inside(update, V, near, bounds)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_a_small_error_leaves_a_small_interval(power):
    update = LowRank(rand(4, 60, seed=1), rand(50, 4, seed=2))
    V = decaying(50, 60, power, 3)
    widths = []
    for size in (1e-3, 1e-4, 1e-5):
        near = V + size * adversary("noise", V, update, 5)
        rho, lower, upper = cosine_interval(update, near, known(V, near)).tolist()
        assert lower < rho < upper
        widths.append((upper - lower) / size)
    # Proportional to the error, and no more than a few times what it does to the two norms.
    assert widths[0] == pytest.approx(widths[2], rel=0.3)
    assert widths[2] < {0.0: 8, 0.5: 25, 1.0: 120}[power]


def test_without_error_only_rounding_is_left():
    update, V = LowRank(rand(4, 60, seed=1), rand(50, 4, seed=2)), rand(50, 60, seed=3)
    for dtype, width in ((torch.float64, 1e-12), (torch.float32, 2e-4)):
        pair = LowRank(*(t.to(dtype) for t in update))
        rho, lower, upper = cosine_interval(pair, V.to(dtype), known(V, V)).tolist()
        assert lower < rho < upper
        assert upper - lower < width
        assert rho == pytest.approx(float(projected_cosine(pair, V.to(dtype))), abs=1e-6)


@given(st.integers(0, 9999), st.sampled_from([1.0, 1e-3]))
@settings(max_examples=60, deadline=None)
def test_float32_and_cancelling_factors_stay_inside(seed, apart):
    """Two nearly opposite rank-one parts, so that rounding is large beside the update."""
    a, b = rand(1, 40, seed=seed), rand(30, 1, seed=seed + 1)
    A, B = torch.cat([a, a + apart * rand(1, 40, seed=seed + 2)]), torch.cat([b, -b], dim=1)
    update = LowRank(A.float(), B.float())
    V = decaying(30, 40, 0.5, seed + 3).float()
    _, lower, upper = cosine_interval(update, V, known(V, V)).tolist()
    assert lower <= dense_cosine(update, V) <= upper
    assert upper - lower < (0.2 if apart < 1 else 2e-4)


def test_batches_forms_and_orientations_agree():
    update = LowRank(rand(3, 2, 30, seed=1), rand(3, 20, 2, seed=2))
    Q = (40 * rand(3, 20, 30, seed=3)).round().clamp(-127, 127).to(torch.int8)
    scale = rand(3, 20, 1, seed=4).abs() + 0.1
    dense = Q.double() * scale
    bounds = Known(*(torch.full((3,), v, dtype=torch.float64) for v in (0.5, 4.0, 900.0)))
    expected = cosine_interval(update, dense, bounds)
    torch.testing.assert_close(cosine_interval(update, Int8(Q, scale), bounds), expected)
    turned = LowRank(update.B.mT, update.A.mT)
    torch.testing.assert_close(
        cosine_interval(turned, Int8(Q.mT, scale.mT), bounds), cosine_interval(turned, dense.mT, bounds)
    )
    U, W = rand(3, 20, 5, seed=5), rand(3, 5, 30, seed=6)
    torch.testing.assert_close(cosine_interval(update, Factored(U, W), bounds), cosine_interval(update, U @ W, bounds))


def test_conventions():
    A, B, V = rand(4, 30, seed=1), rand(20, 4, seed=2), rand(20, 30, seed=3)
    bounds = known(V, V)
    assert cosine_interval(LowRank(A, torch.zeros_like(B)), V, bounds).tolist() == [1.0, 1.0, 1.0]
    assert cosine_interval(LowRank(A, B), torch.zeros_like(V), known(V, torch.zeros_like(V))).tolist() == [
        1.0,
        0.0,
        1.0,
    ]
    B[3, 1] = torch.nan
    assert torch.isnan(cosine_interval(LowRank(A, B), V, bounds)).all()


@given(
    st.integers(1, 40), st.integers(1, 40), st.sampled_from([0.0, 0.5, 3.0]), st.floats(-12, 12), st.integers(0, 999)
)
@settings(max_examples=100, deadline=None)
def test_the_spectral_bound_is_above_and_close(rows, columns, power, exponent, seed):
    E = 10.0**exponent * decaying(rows, columns, power, seed)
    true = float(torch.linalg.matrix_norm(E, 2))
    bound = spectral_bound(E.split(7))
    assert true * (1 - 1e-13) <= bound <= 1.05 * true
    assert spectral_bound([torch.zeros(3, 4, dtype=torch.float64)]) == 0.0
    assert spectral_bound([]) == 0.0


def test_the_spectral_bound_of_noise_is_far_below_its_frobenius_norm():
    E = rand(300, 300, seed=1)
    true = float(torch.linalg.matrix_norm(E, 2))
    assert true < spectral_bound([E]) < 1.03 * true < E.norm() / 5
