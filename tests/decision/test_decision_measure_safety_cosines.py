"""The safety adapter's own cosines, and the spread of the null cosine, as readings have them."""

import math
import statistics

import pytest
import torch

from safemerge_callback.decision import measure, own_cosines
from safemerge_callback.errors import AdapterError
from safemerge_callback.live import live_factors
from safemerge_callback.subspace import compress_subspace


def dense_cosine(V, update):
    through = V @ (V.mT @ update)
    return float((through * update).sum() / (through.norm() * update.norm()))


def test_own_cosines_are_the_formulas(make_case, safety_for, tmp_path):
    case = make_case("llama")
    safety, updates = safety_for(case, rank=3)
    factors = live_factors(case.model)
    small = compress_subspace(case.subspace, tmp_path / "small.safetensors", progress=False)
    for subspace in (case.subspace, small):
        own = own_cosines(safety, factors, subspace)
        assert list(own) == list(factors)
        for name, cosine in own.items():
            assert cosine == pytest.approx(dense_cosine(case.V[name], updates[name]), abs=1e-6)
    readings = measure(factors, case.subspace, gate="reference", reference=own)
    assert {name: reading.reference for name, reading in readings.items()} == own


def test_what_the_safety_adapter_has_not_moved_is_nan_and_what_it_lacks_is_refused(make_case, safety_for):
    case = make_case("llama")
    safety, _ = safety_for(case)
    factors = live_factors(case.model)
    first = next(iter(factors))
    safety.factors[first].B.zero_()
    own = own_cosines(safety, factors, case.subspace)
    assert [name for name, cosine in own.items() if math.isnan(cosine)] == [first]
    other, _ = safety_for(case, targets=["q_proj"])
    with pytest.raises(AdapterError, match="lacks"):
        own_cosines(other, factors, case.subspace)


@pytest.mark.parametrize(
    ("family", "targets"), [("llama", ["q_proj", "k_proj", "up_proj"]), ("gpt2", ["c_attn", "c_fc"])]
)
def test_unrelated_updates_lie_as_far_from_the_null_value_as_the_spread_says(make_case, family, targets):
    """Of 60 Gaussian updates a module, z has spread 1 to 9 % by chance; the header's own spread is drawn to 10 %."""
    case = make_case(family, targets=targets, **({"fan_in_fan_out": True} if family == "gpt2" else {}))
    factors, found = live_factors(case.model), {}
    torch.manual_seed(0)
    for _ in range(60):
        for module in factors.values():
            torch.nn.init.normal_(module.A), torch.nn.init.normal_(module.B)
        for name, r in measure(factors, case.subspace).items():
            found.setdefault(name, []).append((r.cosine - r.null_cosine) / r.null_std)
    for z in found.values():
        assert abs(statistics.fmean(z)) < 1
        assert 0.6 < statistics.stdev(z) < 1.4
