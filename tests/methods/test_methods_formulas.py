"""Methods that PEFT lacks, against their papers' formulas written out in float64 numpy."""

import math

import numpy as np
import pytest
import torch

from safemerge_callback.errors import PlanError
from safemerge_callback.methods import get_method
from safemerge_callback.methods.breadcrumbs import OUTLIERS
from safemerge_callback.ops import LowRank


def matrices(d_out=7, d_in=11, count=2, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((d_out, d_in)) for _ in range(count)]


def full(matrix):
    """A matrix as factors of full rank, so that nothing is truncated."""
    t = torch.from_numpy(matrix)
    return LowRank(torch.eye(t.shape[1], dtype=t.dtype), t)


def merged(name, xs, weights, **knobs):
    live, *safety = (full(x) for x in xs)
    out = get_method(name).merge(live, safety, weights=weights, space="delta", **knobs)
    return (out.B @ out.A).numpy()


def minmax(x):
    return (x - x.min()) / (x.max() - x.min())


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_pcb(density, count):
    xs, weights = matrices(count=count), (0.8, 0.5, 1.2)[:count]
    top = bottom = 0
    for x, w in zip(xs, weights, strict=True):
        balance = softmax(count * minmax(x * x)) * sum(softmax(minmax(x * y)) for y in xs)
        cut = np.sort(balance, axis=None)[::-1][int(density * balance.size) - 1]
        kept = balance * (balance >= cut)
        top, bottom = top + kept * w * x, bottom + kept
    want = np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)
    np.testing.assert_allclose(merged("pcb", xs, weights, density=density), want, atol=1e-10)


@pytest.mark.parametrize("density", [0.3, 0.9, 0.995, 1.0])
def test_breadcrumbs(density):
    xs, weights = matrices(20, 30), (0.8, 0.2)
    want = 0
    for x, w in zip(xs, weights, strict=True):
        order = np.argsort(-np.abs(x), axis=None)
        keep = int(density * x.size)
        skip = min(int(OUTLIERS * x.size), x.size - keep)
        mask = np.zeros(x.size)
        mask[order[skip : skip + keep]] = 1
        want = want + w * x * mask.reshape(x.shape)
    assert np.count_nonzero(mask) == keep
    np.testing.assert_allclose(merged("breadcrumbs", xs, weights, density=density), want, atol=1e-10)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.95])
def test_della_on_its_own_masks(density):
    """MagPrune written out, with the uniform numbers that the mask's generator draws."""
    xs, weights = matrices(), (0.8, 0.6)
    window = min(0.2, 2 * (1 - density), density)
    g = torch.Generator().manual_seed(4)
    kept = []
    for x in xs:
        ranks = np.argsort(np.argsort(np.abs(x), axis=1), axis=1)
        odds = density - window / 2 + window * ranks / (x.shape[1] - 1)
        assert odds.mean() == pytest.approx(density)
        kept.append(x * torch.bernoulli(torch.from_numpy(odds), generator=g).numpy() / odds)
    majority = np.where(sum(kept) >= 0, 1, -1)
    agree = [np.sign(k) == majority for k in kept]
    want = sum(w * k * a for w, k, a in zip(weights, kept, agree, strict=True)) / np.maximum(sum(agree), 1)
    got = merged("della", xs, weights, density=density, generator=torch.Generator().manual_seed(4))
    np.testing.assert_allclose(got, want, atol=1e-10)


@pytest.mark.parametrize("method", ["dare_linear", "della"])
def test_rescaling_keeps_the_mean(method):
    """Over many draws the pruned update is the update: what the division by the odds is for."""
    xs = matrices(3, 5)
    g, n = torch.Generator().manual_seed(0), 3000
    weights = (1.0, 1e-9)
    live, other = full(xs[0]), full(0 * xs[1])
    total = 0
    for _ in range(n):
        out = get_method(method).merge(live, [other], weights=weights, space="delta", density=0.5, generator=g)
        total = total + (out.B @ out.A).numpy()
    spread = np.abs(xs[0]) / math.sqrt(n)
    assert (np.abs(total / n - xs[0]) < 8 * spread + 1e-6).all()


@pytest.mark.parametrize("weights", [(0.8, 0.2), (0.5, 0.5), (0.3, 0.9)])
def test_slerp(weights):
    x, y = matrices(seed=3)
    t = weights[1] / sum(weights)
    angle = np.arccos((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
    want = sum(weights) * (np.sin((1 - t) * angle) * x + np.sin(t * angle) * y) / np.sin(angle)
    np.testing.assert_allclose(merged("slerp", [x, y], weights), want, atol=1e-9)


def test_slerp_keeps_the_norm_where_linear_loses_it():
    x, y = matrices(seed=5)
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    assert np.linalg.norm(merged("slerp", [x, y], (0.5, 0.5))) == pytest.approx(1.0)
    assert np.linalg.norm(merged("linear", [x, y], (0.5, 0.5))) < 0.85


@pytest.mark.parametrize("factor", [1.0, 1.0001, -1.0])
def test_slerp_of_parallel_updates_is_the_line(factor):
    x = matrices()[0]
    y = factor * x
    np.testing.assert_allclose(merged("slerp", [x, y], (0.6, 0.4)), 0.6 * x + 0.4 * y, atol=1e-9)


def test_slerp_in_factor_space_turns_each_factor():
    live, other = (LowRank(torch.randn(3, 9).double(), torch.randn(6, 3).double()) for _ in range(2))
    out = get_method("slerp").merge(live, [other], weights=(1.4, 0.6), space="factor")
    for got, x, y in zip((out.A, out.B), live, other, strict=True):
        angle = torch.arccos((x * y).sum() / x.norm() / y.norm())
        want = (torch.sin(0.7 * angle) * x + torch.sin(0.3 * angle) * y) / torch.sin(angle)
        # Weights of 2 in all: √2 on either factor.
        torch.testing.assert_close(got, 2**0.5 * want)


def test_slerp_goes_to_one_other():
    live = full(matrices()[0])
    with pytest.raises(PlanError, match="got 2 safety adapters"):
        get_method("slerp").merge(live, [live, live], weights=(0.6, 0.2, 0.2))
    with pytest.raises(PlanError, match=r"\(1.0, -1.0\)"):
        get_method("slerp").merge(live, [live], weights=(1.0, -1.0))


def low(seed, d_out=30, d_in=20, rank=3):
    g = torch.Generator().manual_seed(seed)
    draw = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((rank, d_in), (d_out, rank)))
    return LowRank(*draw)


def test_orthogonal():
    """Against a dense projector, with a rank that holds the whole sum."""
    task, safety = low(1), low(2)
    live = LowRank(torch.cat([task.A, low(3).A]), torch.cat([task.B, torch.zeros_like(task.B)], 1))
    Q = torch.linalg.qr(task.B).Q
    delta = task.B @ task.A
    outside = safety.B @ safety.A - Q @ Q.T @ safety.B @ safety.A
    want = 0.8 * delta + 0.4 * outside
    out = get_method("orthogonal").merge(live, [safety], weights=(0.8, 0.4))
    torch.testing.assert_close(out.B @ out.A, want, rtol=1e-9, atol=1e-9)
    assert float(out.residual) < 1e-12
    assert float((outside.T @ delta).norm()) < 1e-10


@pytest.mark.parametrize("strength", [0.0, 0.1, 0.7, 1.0])
def test_the_strength_of_orthogonal_is_the_share_of_the_overlap_that_is_taken_out(strength):
    """From `linear` at 0 to the whole projection, to the bit, at 1; in whatever gauge the task's update is written."""
    task, safety = low(1), low(2)
    turn = torch.randn(3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    Q = torch.linalg.qr(task.B).Q
    left = safety.B @ safety.A - strength * Q @ Q.T @ safety.B @ safety.A
    want = torch.linalg.svd(0.8 * task.B @ task.A + 0.4 * left)
    for live in (task, LowRank(torch.linalg.solve(turn, task.A), task.B @ turn)):
        out = get_method("orthogonal").merge(live, [safety], weights=(0.8, 0.4), strength=strength)
        kept = (want.U[:, :3] * want.S[:3]) @ want.Vh[:3]
        torch.testing.assert_close(out.B @ out.A, kept, rtol=1e-9, atol=1e-9)
    merged = get_method("orthogonal").merge(task, [safety], weights=(0.8, 0.4), strength=strength)
    same = {0.0: get_method("linear"), 1.0: get_method("orthogonal")}.get(strength)
    if same:
        other = same.merge(task, [safety], weights=(0.8, 0.4))
        assert torch.equal(merged.A, other.A)
        assert torch.equal(merged.B, other.B)


def test_orthogonal_truncates_the_sum_to_the_live_rank():
    task, safety = low(1), low(2)
    Q = torch.linalg.qr(task.B).Q
    want = task.B @ task.A + (safety.B - Q @ (Q.T @ safety.B)) @ safety.A
    u, s, v = torch.linalg.svd(want)
    out = get_method("orthogonal").merge(task, [safety], weights=(1.0, 1.0))
    torch.testing.assert_close(out.B @ out.A, (u[:, :3] * s[:3]) @ v[:3], rtol=1e-9, atol=1e-9)
    assert float(out.residual) == pytest.approx(float(s[3:].norm() / s.norm()))


def test_orthogonal_to_nothing_adds_the_safety_update_whole():
    task, safety = low(1), low(2)
    out = get_method("orthogonal").merge(LowRank(task.A, 0 * task.B), [safety], weights=(0.8, 0.5))
    torch.testing.assert_close(out.B @ out.A, 0.5 * safety.B @ safety.A)
