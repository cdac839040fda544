"""The norm of a gradient as far as an update of its rank can follow it, against dense projections in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safemerge_callback.ops import LowRank
from safemerge_callback.ops.tangent import tangent_norms, tangent_products


@given(st.integers(1, 4), st.integers(0, 4), st.floats(0.1, 4.0), st.integers(0, 10**6))
def test_it_is_the_norm_of_the_projected_gradient(rank, moved, scaling, seed):
    """At any rank, also where B holds fewer directions than it has columns, or none."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    A, B, G = draw(rank, 7), draw(6, min(moved, rank)) @ draw(min(moved, rank), rank), draw(6, 7)
    gradient = LowRank(scaling * B.T @ G, scaling * G @ A.T)
    norm = tangent_norms(tangent_products(LowRank(A, B), gradient)[None], torch.tensor([scaling], dtype=torch.float64))
    rows, columns = torch.linalg.pinv(A) @ A, B @ torch.linalg.pinv(B)
    dense = columns @ G + G @ rows - columns @ G @ rows
    assert float(norm) == pytest.approx(float(dense.norm()), rel=1e-6)


def test_without_a_gradient_it_is_0():
    zeros = LowRank(torch.zeros(2, 5), torch.zeros(4, 2))
    products = tangent_products(LowRank(torch.ones(2, 5), torch.zeros(4, 2)), zeros)
    assert tangent_norms(products[None], torch.ones(1)).tolist() == [0.0]
