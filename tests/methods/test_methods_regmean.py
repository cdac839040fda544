"""`regmean` against the formula, on updates; what it keeps, and what it cannot do without."""

import pytest
import torch

from safemerge_callback.errors import ConfigError, PlanError
from safemerge_callback.methods import METHODS, as_how
from safemerge_callback.ops import Grams, LowRank

D_OUT, D_IN, RANK = 10, 16, 3


def low_rank(seed, n=(), rank=RANK):
    source = torch.Generator().manual_seed(seed)
    shapes = ((*n, rank, D_IN), (*n, D_OUT, rank))
    return LowRank(*(torch.randn(shape, generator=source, dtype=torch.float64) for shape in shapes))


def grams(n=(), seed=0, rows=(9, 5)):
    source = torch.Generator().manual_seed(seed)
    return Grams(*(torch.randn((*n, k, D_IN), generator=source, dtype=torch.float64) / k**0.5 for k in rows))


def regression_of(updates, G, mu, ridge):
    """Σ ΔW_k·G_k·(Σ G_k)⁻¹ of dense updates, the task's Gram with its ridge."""
    F, S = (x.mT @ x for x in G)
    F = F + ridge * F.diagonal().mean() * torch.eye(D_IN, dtype=torch.float64)
    task, safety = updates
    return (task @ F + mu * safety @ S) @ torch.linalg.inv(F + mu * S)


def test_with_the_aligned_model_only_A_is_changed():
    live, G = low_rank(1), grams()
    merged = METHODS["regmean"].merge(live, [], grams=G, mu=3.0, ridge=0.3)
    assert torch.equal(merged.B, live.B)
    assert float(merged.residual) == 0.0
    wanted = regression_of([live.B @ live.A, 0 * live.B @ live.A], G, 3.0, 0.3)
    assert torch.allclose(merged.B @ merged.A, wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()))


def test_with_a_safety_update_it_is_regmean_of_both_at_the_live_rank():
    live, other, G = low_rank(1), low_rank(2, rank=2), grams()
    merged = METHODS["regmean"].merge(live, [other], grams=G, mu=1.5, ridge=0.3)
    wanted = regression_of([live.B @ live.A, other.B @ other.A], G, 1.5, 0.3)
    U, S, V = torch.linalg.svd(wanted)
    best = (U[:, :RANK] * S[:RANK]) @ V[:RANK]
    assert torch.allclose(merged.B @ merged.A, best, rtol=0, atol=1e-10)
    assert float(merged.residual) == pytest.approx(float(S[RANK:].norm() / S.norm()))


def test_where_the_grams_agree_it_is_pull():
    live, F = low_rank(1), grams(rows=(40, 5)).task
    merged = METHODS["regmean"].merge(live, [], grams=Grams(F, F), mu=3.0, ridge=1e-6)
    pulled = METHODS["pull"].merge(live, [], weights=(0.25, 0.75))
    assert float((merged.B @ merged.A - pulled.B @ pulled.A).abs().max()) < 1e-4 * float(
        (pulled.B @ pulled.A).abs().max()
    )


def test_the_gauge_of_the_factors_does_not_matter():
    live, G = low_rank(1), grams()
    M = torch.randn(RANK, RANK, dtype=torch.float64) + 3 * torch.eye(RANK, dtype=torch.float64)
    turned = LowRank(M @ live.A, live.B @ torch.linalg.inv(M))
    one, other = (METHODS["regmean"].merge(x, [], grams=G) for x in (live, turned))
    assert torch.allclose(one.B @ one.A, other.B @ other.A, rtol=1e-10)


def test_a_batch_is_its_modules():
    live, G = low_rank(1, (4,)), grams((4,))
    merged = METHODS["regmean"].merge(live, [], grams=G)
    for i in range(4):
        alone = METHODS["regmean"].merge(LowRank(live.A[i], live.B[i]), [], grams=Grams(G.task[i], G.safety[i]))
        assert torch.allclose(merged.A[i], alone.A, rtol=1e-12)


def test_knobs_have_defaults_and_refusals():
    how = as_how("regmean", {})
    assert how.knobs == {"mu": 3.0, "ridge": 0.3, "off_diagonal": 1.0}
    assert how.needs == {"grams", "gram_cosine", "unused_features"}
    for knob, value, says in [
        ("mu", 0, "mu is 0: give a weight, above 0"),
        ("ridge", -1, "ridge is -1: give a share of the mean diagonal, above 0"),
        ("off_diagonal", 2, "off_diagonal is 2: give what the Grams' off-diagonals are scaled by, 0 to 1"),
        ("strength", 0.5, "strength is 0.5, which method 'regmean' does not read"),
    ]:
        with pytest.raises(ConfigError, match=says):
            as_how("regmean", {knob: value})


def test_what_cannot_be_is_refused():
    with pytest.raises(PlanError, match="by the Grams of the modules' inputs, got none"):
        METHODS["regmean"].merge(low_rank(1), [])
    with pytest.raises(PlanError, match="one second expert, got 2"):
        METHODS["regmean"].merge(low_rank(1), [low_rank(2), low_rank(3)], grams=grams())
