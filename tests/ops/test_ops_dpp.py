from itertools import combinations

import pytest
import torch

from safemerge_callback.ops.dpp import greedy_dpp


def kernel(vectors, quality):
    units = torch.nn.functional.normalize(vectors.double(), dim=1)
    return quality[:, None].double() * (units @ units.T) * quality[None].double()


def by_determinants(K, count):
    """The greedy mode by determinants alone."""
    chosen = []
    for _ in range(count):
        gains = {i: float(torch.linalg.det(K[[*chosen, i]][:, [*chosen, i]])) for i in range(len(K)) if i not in chosen}
        chosen.append(max(gains, key=lambda i: gains[i]))
    return chosen


@pytest.mark.parametrize("seed", range(5))
def test_each_step_makes_the_determinant_largest(seed):
    generator = torch.Generator().manual_seed(seed)
    vectors, quality = torch.randn(14, 8, generator=generator), torch.rand(14, generator=generator) + 0.2
    K = kernel(vectors, quality)
    found = greedy_dpp(vectors, quality, 6)
    assert [i for i, _ in found] == by_determinants(K, 6)
    product = torch.tensor([new * float(quality[i]) ** 2 for i, new in found], dtype=torch.float64).prod()
    chosen = [i for i, _ in found]
    assert float(product) == pytest.approx(float(torch.linalg.det(K[chosen][:, chosen])), rel=1e-9)
    assert found[0][1] == pytest.approx(1.0)


def test_quality_decides_where_all_are_orthogonal_and_diversity_where_all_are_as_good():
    quality = torch.tensor([0.3, 0.9, 0.1, 0.5])
    assert [i for i, _ in greedy_dpp(torch.eye(4), quality, 3)] == [1, 3, 0]
    vectors = torch.tensor([[1.0, 0.0], [1.0, 0.05], [0.0, 1.0]])
    assert [i for i, _ in greedy_dpp(vectors, torch.ones(3), 2)] == [0, 2]


def test_duplicates_are_never_both_chosen_and_nothing_new_ends_it():
    vectors = torch.randn(4, 16).repeat(3, 1)
    found = greedy_dpp(vectors, torch.ones(12), 10)
    assert len(found) == 4
    assert all(i % 4 != j % 4 for (i, _), (j, _) in combinations(found, 2))
    assert greedy_dpp(vectors, torch.zeros(12), 3) == []
    assert greedy_dpp(torch.zeros(3, 4), torch.ones(3), 3) == []
    assert greedy_dpp(vectors, torch.ones(12), 0) == []
