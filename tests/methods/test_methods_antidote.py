"""`antidote` against its formula on whole matrices, and against magnitude pruning where all inputs are alike."""

import pytest
import torch

from safemerge_callback.errors import ConfigError, PlanError
from safemerge_callback.methods import METHODS, as_how
from safemerge_callback.ops import Grams, LowRank, PrunedRows, trimmed
from safemerge_callback.ops import pruned_rows as blocks

D_OUT, D_IN, RANK = 14, 20, 3


def low_rank(seed, n=(), rank=RANK):
    source = torch.Generator().manual_seed(seed)
    shapes = ((*n, rank, D_IN), (*n, D_OUT, rank))
    return LowRank(*(torch.randn(shape, generator=source, dtype=torch.float64) for shape in shapes))


def harmful(n=(), rows=6, constant=False):
    source = torch.Generator().manual_seed(7)
    X = torch.ones((*n, rows, D_IN)) if constant else torch.randn((*n, rows, D_IN), generator=source)
    return Grams(X.double()[..., :2, :], X.double())


def pruned(update, norms, share):
    """The formula, row by row."""
    whole = update.B @ update.A
    scores = whole.abs() * norms
    count = max(1, int(share * D_IN))
    top = scores.topk(count, dim=-1).indices
    return whole.scatter(-1, top, 0.0)


def best(matrix, rank=RANK):
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    return (U[..., :rank] * S[..., None, :rank]) @ V[..., :rank, :], S[..., rank:].norm(dim=-1) / S.norm(dim=-1)


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_it_is_the_best_approximation_of_the_masked_update(share):
    live, G = low_rank(1, (2,)), harmful((2,))
    merged = METHODS["antidote"].merge(live, [], grams=G, prune_share=share)
    wanted, lost = best(pruned(live, G.safety.norm(dim=-2)[:, None], share))
    assert torch.allclose(merged.B @ merged.A, wanted, rtol=0, atol=1e-9)
    assert merged.residual.tolist() == pytest.approx(lost.tolist(), rel=1e-6)


def test_where_all_inputs_are_alike_it_removes_what_magnitude_pruning_of_each_row_keeps():
    live, G = low_rank(1), harmful(constant=True)
    left = PrunedRows(live, G.safety.norm(dim=-2), 0.25) @ torch.eye(D_IN).double()
    whole = live.B @ live.A
    kept = torch.stack([trimmed(row[None], 0.25)[0] for row in whole])
    assert torch.equal(left, whole - kept)
    # One row is a matrix whose best entries `magnitude_prune` keeps.
    row = LowRank(live.A, live.B[:1])
    few = METHODS["magnitude_prune"].merge(row, [row], weights=(0.5, 0.5), density=0.25)
    rest = METHODS["antidote"].merge(row, [], grams=G, prune_share=0.25)
    assert torch.allclose(few.B @ few.A + rest.B @ rest.A, row.B @ row.A, rtol=0, atol=1e-12)


def test_a_share_of_0_changes_nothing_to_the_bit():
    live = low_rank(1)
    merged = METHODS["antidote"].merge(live, [], grams=harmful(), prune_share=0.0)
    assert torch.equal(merged.A, live.A)
    assert torch.equal(merged.B, live.B)
    assert float(merged.residual) == 0.0


def test_the_gauge_of_the_factors_does_not_matter():
    live, G = low_rank(1), harmful()
    turn = torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    turned = LowRank(torch.linalg.inv(turn) @ live.A, live.B @ turn)
    one, other = (METHODS["antidote"].merge(x, [], grams=G, prune_share=0.2) for x in (live, turned))
    assert torch.allclose(one.B @ one.A, other.B @ other.A, rtol=0, atol=1e-9)


def test_how_many_rows_are_formed_at_once_does_not_matter(monkeypatch):
    live, norms = low_rank(1, (2,)), harmful((2,)).safety.norm(dim=-2)
    unit = torch.eye(D_OUT).double().expand(2, D_OUT, D_OUT)
    whole = unit @ PrunedRows(live, norms, 0.2)
    monkeypatch.setattr(blocks, "_BLOCK_ENTRIES", 3 * 2 * D_IN)
    parts = PrunedRows(live, norms, 0.2)
    assert max(block.shape[-2] for _, block in parts.blocks()) == 3
    assert torch.allclose(unit @ parts, whole, rtol=0, atol=1e-13)
    assert torch.allclose(parts.mT @ unit, whole.mT, rtol=0, atol=1e-13)
    assert parts.norm().tolist() == pytest.approx(whole.norm(dim=(-2, -1)).tolist())


def test_an_update_of_0_stays_0():
    live = low_rank(1)
    merged = METHODS["antidote"].merge(LowRank(live.A, 0 * live.B), [], grams=harmful())
    assert not (merged.B @ merged.A).any()
    assert float(merged.residual) == 0.0


def test_its_share_is_checked_and_rows_are_needed():
    assert as_how("antidote", {}).knobs == {"prune_share": 0.05}
    assert as_how("antidote", {}).needs == {"grams"}
    for bad in (1.0, -0.1, "a", True, float("nan")):
        with pytest.raises(ConfigError, match=r"prune_share is .*: give the share of each row's entries to remove"):
            as_how("antidote", {"prune_share": bad})
    with pytest.raises(PlanError, match="method 'antidote' goes by the inputs of the modules on harmful rows"):
        METHODS["antidote"].merge(low_rank(1), [])
