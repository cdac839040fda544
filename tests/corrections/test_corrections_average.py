from dataclasses import replace

import pytest
import torch

from safemerge_callback.adapters import LoraFactors
from safemerge_callback.corrections.average import AVERAGE_FILE, ROOM, Average
from safemerge_callback.errors import AdapterError
from safemerge_callback.ops import LowRank


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(steps, rank=3, d_out=40, d_in=50, dtype=torch.float32, drift=0.1):
    """The factors of a module along a run: each step moves both by a little."""
    A, B = normal(rank, d_in, seed=1), normal(d_out, rank, seed=2)
    for step in range(steps):
        yield {"m": LoraFactors("m", A.to(dtype), B.to(dtype), 2.0)}
        A, B = A + drift * normal(rank, d_in, seed=10 + step), B + drift * normal(d_out, rank, seed=50 + step)


def dense(pair):
    return pair.B.double() @ pair.A.double()


def followed(steps, decay):
    average = Average(decay)
    for factors in steps:
        average.follow(factors)
    return average


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_it_is_the_moving_average_of_the_products(decay):
    """Four steps of rank 3 fit into rank 12, so that nothing is dropped; before the first the average is 0."""
    want = 0
    for factors in run(4):
        want = decay * want + (1 - decay) * dense(factors["m"])
    average = followed(run(4), decay)
    torch.testing.assert_close(dense(average.pairs["m"]), want, rtol=1e-5, atol=1e-5)
    assert average.pairs["m"].A.shape == (ROOM * 3, 50)
    assert average.pairs["m"].A.dtype == torch.float32
    assert average.residual < 1e-6
    assert average.followed == 4


def test_it_is_not_the_product_of_averaged_factors():
    A = B = want = 0
    for factors in run(4, drift=1.0):
        A, B = 0.5 * A + 0.5 * factors["m"].A, 0.5 * B + 0.5 * factors["m"].B
        want = 0.5 * want + 0.5 * dense(factors["m"])
    average = followed(run(4, drift=1.0), 0.5)
    torch.testing.assert_close(dense(average.pairs["m"]), want, rtol=1e-5, atol=1e-5)
    assert float((B @ A - want).norm() / want.norm()) > 0.1


def test_it_does_not_see_the_gauge():
    def turned(factors, seed):
        m, Q = factors["m"], normal(3, 3, seed=seed) + 3 * torch.eye(3)
        return {"m": replace(m, A=torch.linalg.solve(Q, m.A), B=m.B @ Q)}

    plain = followed(run(4), 0.8)
    other = followed((turned(factors, seed) for seed, factors in enumerate(run(4))), 0.8)
    torch.testing.assert_close(dense(plain.pairs["m"]), dense(other.pairs["m"]), rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_told():
    """Twenty unrelated updates of rank 3 are of rank 40 together, and 12 are kept."""
    steps = [{"m": LoraFactors("m", normal(3, 50, seed=s), normal(40, 3, seed=s + 99), 1.0)} for s in range(20)]
    average = followed(steps, 0.9)
    want = 0
    for factors in steps:
        want = 0.9 * want + 0.1 * dense(factors["m"])
    gap = float((dense(average.pairs["m"]) - want).norm() / want.norm())
    assert 0.05 < average.residual <= gap * 3
    assert gap < 0.9


def test_an_update_since_a_part_of_the_base_weight():
    """PiSSA: the average is of what training changed, B·A - B₀·A₀."""
    steps = list(run(3))
    first = LowRank(steps[0]["m"].A, steps[0]["m"].B)
    average = followed([{"m": replace(f["m"], initial=first)} for f in steps], 0.5)
    want = sum(
        0.5 ** (2 - i) * 0.5 * (dense(f["m"]) - first.B.double() @ first.A.double()) for i, f in enumerate(steps)
    )
    torch.testing.assert_close(dense(average.pairs["m"]), want, rtol=1e-4, atol=1e-4)


def test_as_an_adapter_it_has_the_live_units():
    steps = list(run(2))
    average = followed(steps, 0.0)
    adapter = average.adapter(steps[-1])
    module = adapter.factors["m"]
    torch.testing.assert_close(module.scaling * dense(module), 2.0 * dense(steps[-1]["m"]), rtol=1e-5, atol=1e-5)
    fresh = Average(0.9).adapter(steps[0]).factors["m"]
    assert torch.equal(fresh.A, steps[0]["m"].A)


def test_what_is_saved_goes_on_to_the_bit(tmp_path):
    steps = list(run(6, dtype=torch.bfloat16))
    whole = followed(steps, 0.7)
    half = followed(steps[:3], 0.7)
    half.save(tmp_path)
    half = Average.load(tmp_path, 0.7)
    for factors in steps[3:]:
        half.follow(factors)
    assert torch.equal(half.pairs["m"].A, whole.pairs["m"].A)
    assert torch.equal(half.pairs["m"].B, whole.pairs["m"].B)
    assert (half.followed, half.residual) == (whole.followed, whole.residual)


def test_none_and_a_broken_one(tmp_path):
    assert Average.load(tmp_path, 0.9) is None
    (tmp_path / AVERAGE_FILE).write_bytes(b"nothing")
    with pytest.raises(AdapterError, match="corrupt or truncated"):
        Average.load(tmp_path, 0.9)
