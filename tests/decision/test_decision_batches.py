"""Modules of one shape are computed together: the same numbers, a fixed number of decompositions, one host wait."""

import sys
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.model_shapes import Model, random_factors, random_subspace
from safemerge_callback.adapters import Adapter
from safemerge_callback.decision import MergePlan, measure
from safemerge_callback.decision.apply import merged_factors
from safemerge_callback.decision.batches import batches

RANK = 4
SHAPES = Model(layers=4, hidden=96, intermediate=160, kv=64).shapes()
# Rounding of a float32 sum of some hundred products; BLAS adds in another order in a batch than alone.
ULP = torch.finfo(torch.float32).eps
DECOMPOSITIONS = ("linalg_qr", "_linalg_svd", "_linalg_eigh")
# What makes the host wait for a device, in operators that one written in C++ calls as well.
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item")


class Calls(TorchDispatchMode):
    """Counts operators by name as they reach the device."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    def of(self, names):
        return {name: self.seen[name] for name in names if self.seen[name]}


@pytest.fixture
def factors():
    torch.manual_seed(0)
    return random_factors(SHAPES, RANK, "cpu")


@pytest.fixture
def safety():
    return Adapter("random", None, {}, random_factors(SHAPES, 6, "cpu"))


@pytest.fixture
def subspace(factors):
    found, _ = random_subspace(SHAPES, torch.float32)
    measure(factors, found)
    return found


class OneByOne:
    """The same matrices as `held`, a stack of one at a time."""

    def __init__(self, held):
        self._matrices = held

    def stacks(self, read, requests):
        for request in requests:
            yield torch.stack([self._matrices[name] for name in request.names])


@pytest.fixture
def alone(monkeypatch):
    """Calling it puts every module into a batch of its own."""
    return lambda: monkeypatch.setattr(sys.modules[batches.__module__], "_BATCH_BYTES", 1)


def plan_for(factors, subspace, **knobs):
    return MergePlan.decide(measure(factors, subspace), gate="all", **knobs)


def test_readings_of_a_batch_are_those_of_each_module_alone(factors, alone):
    subspace, held = random_subspace(SHAPES, torch.float32)
    together = measure(factors, subspace)
    assert len(batches(factors, subspace)) == 4
    subspace.place(OneByOne(held.matrices()))
    alone()
    assert len(batches(factors, subspace)) == len(SHAPES)
    for name, reading in measure(factors, subspace).items():
        assert abs(reading.cosine - together[name].cosine) <= ULP
        assert reading.update_norm == pytest.approx(together[name].update_norm, rel=2**-50)


@pytest.mark.parametrize("space", ["delta", "factor"])
def test_merges_of_a_batch_are_those_of_each_module_alone(factors, subspace, alone, space):
    safety = Adapter("random", None, {}, random_factors(SHAPES, RANK, "cpu"))
    plan = plan_for(factors, subspace, space=space)
    together, edits = merged_factors(plan, factors, safety)
    alone()
    each, edits_alone = merged_factors(plan, factors, safety)
    assert list(each) == list(SHAPES)
    for name, one in each.items():
        for found, expected in zip(one, together[name], strict=True):
            assert float((found - expected).abs().max()) <= 4 * ULP * float(expected.abs().max())
    for one, other in zip(edits_alone, edits, strict=True):
        assert one.residual == pytest.approx(other.residual, rel=4 * ULP)
        assert one.change == pytest.approx(other.change, rel=4 * ULP)


def test_decompositions_do_not_grow_with_the_number_of_modules(factors, subspace, safety, alone):
    """A batch takes two QR (of B and of A) and two small SVD (of the core, and of the turn into the live gauge)."""

    def decompositions():
        with Calls() as calls:
            merged_factors(plan, factors, safety)
        return calls.of(DECOMPOSITIONS)

    plan = plan_for(factors, subspace)
    assert decompositions() == {"linalg_qr": 2 * 4, "_linalg_svd": 2 * 4, "_linalg_eigh": 4}
    alone()
    assert decompositions() == {"linalg_qr": 2 * 28, "_linalg_svd": 2 * 28, "_linalg_eigh": 28}


def test_a_check_and_a_merge_wait_once_each(factors, subspace, safety, host_waits):
    with host_waits, Calls() as calls:
        plan = plan_for(factors, subspace)
    assert (host_waits.seen, calls.of(WAITS)) == (["tolist"], {})
    with host_waits, Calls() as calls:
        merged_factors(plan, factors, safety)
    assert (host_waits.seen, calls.of(WAITS)) == (["tolist", "tolist"], {})


def test_a_wait_for_every_module_is_seen(factors, host_waits):
    """So that the test above can fail: the published formula reads each cosine at once."""
    with host_waits, Calls() as calls:
        cosines = [torch.cosine_similarity(f.A.flatten(), f.A.flatten(), dim=0).item() for f in factors.values()]
    assert host_waits.seen == ["item"] * len(cosines)
    assert calls.of(WAITS) == {"_local_scalar_dense": len(cosines)}
