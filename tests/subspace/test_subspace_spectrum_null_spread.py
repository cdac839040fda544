"""The spread of the null cosine between the ranks drawn, and of the transposed matrix, against Monte Carlo."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safemerge_callback.subspace.spectrum import spread_at, turned_spread

DRAWN = {"4": 0.08, "8": 0.05, "16": 0.04, "32": 0.02, "64": 0.015}


@given(st.integers(1, 512))
def test_between_two_ranks_lies_between_their_spreads(rank):
    found, ranks = spread_at(rank, DRAWN), sorted(map(int, DRAWN))
    if str(rank) in DRAWN:
        assert found == DRAWN[str(rank)]
    elif rank < 4:
        assert found == pytest.approx(0.08 * math.sqrt(4 / rank))
    elif rank > 64:
        assert found == pytest.approx(0.015 * math.sqrt(64 / rank))
    else:
        low = max(r for r in ranks if r < rank)
        assert DRAWN[str(2 * low)] < found < DRAWN[str(low)]


def test_a_power_law_is_met_at_every_rank():
    drawn = {str(r): 0.3 * r**-0.5 for r in (4, 8, 16, 32, 64)}
    assert all(spread_at(r, drawn) == pytest.approx(0.3 * r**-0.5) for r in range(1, 300))
    assert spread_at(12, {"8": 0.0, "16": 0.1}) == spread_at(3, {"4": 0.0}) == 0.0


def drawn_cosines(V, rank, draws=600):
    rng = torch.Generator().manual_seed(3)
    B = torch.randn(draws, V.shape[0], rank, generator=rng, dtype=torch.float64)
    A = torch.randn(draws, rank, V.shape[1], generator=rng, dtype=torch.float64)
    update = B @ A
    through = V @ (V.mT @ update)
    return (through * update).sum((-2, -1)) / (through.flatten(1).norm(dim=1) * update.flatten(1).norm(dim=1))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(24, 120), (120, 24)])
@pytest.mark.parametrize("rank", [2, 6])
def test_the_transposed_spread_is_that_of_updates_drawn_there(power, shape, rank):
    """600 draws give a spread to 3 %. A flat V has no spread at all for its shorter side, which is not resolved."""
    torch.manual_seed(1)
    rows, columns = shape
    short = min(shape)
    values = torch.arange(1, short + 1, dtype=torch.float64) ** -power
    left = torch.linalg.qr(torch.randn(rows, short, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, short, dtype=torch.float64)).Q
    V = left * values @ right.mT
    stored, turned = drawn_cosines(V, rank), drawn_cosines(V.mT, rank)
    found = turned_spread(float(stored.std()), float(stored.mean()), float(turned.mean()), rank, shape)
    if power == 0.0 and rows > columns:
        assert float(turned.std()) < 1e-9 < found < float(stored.std())
    else:
        assert found == pytest.approx(float(turned.std()), rel=0.15)


def test_a_null_value_of_zero_has_no_spread():
    assert turned_spread(0.1, 0.0, 0.0, 4, (8, 16)) == 0.0
