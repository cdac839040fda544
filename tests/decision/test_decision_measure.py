import math
import sys
import weakref
from dataclasses import replace

import pytest
import torch

from safemerge_callback.adapters import LoraFactors
from safemerge_callback.decision import Reading, Readings, measure
from safemerge_callback.decision.batches import batches
from safemerge_callback.errors import SubspaceError
from safemerge_callback.live import live_factors
from safemerge_callback.ops import cosines
from safemerge_callback.subspace.placement import Device

FAMILIES = {
    "llama": {},
    "qwen2": {},
    "gemma": {"targets": ["q_proj", "v_proj", "down_proj", "embed_tokens"]},
    "gpt2": {"targets": ["c_attn", "c_fc"], "fan_in_fan_out": True},
}


def dense_cosine(V, update):
    """The papers' formula, every matrix formed, in float64."""
    C = V @ V.T / V.norm()
    return float(torch.nn.functional.cosine_similarity((C @ update).flatten(), update.flatten(), dim=0))


def dense_null(V):
    return float(V.norm() ** 2 / (V.shape[0] ** 0.5 * (V @ V.T).norm()))


def by_peft(model):
    """Canonical name -> dense float64 update, from PEFT's own matrices."""
    found = {}
    for name, f in live_factors(model).items():
        found[name] = f.scaling * f.B.detach().double() @ f.A.detach().double()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_readings_equal_the_dense_formula(make_case, family):
    case = make_case(family, **FAMILIES[family])
    readings = measure(live_factors(case.model), case.subspace)
    dense = by_peft(case.model)
    assert list(readings) == list(dense)
    assert len(readings) == {"llama": 12, "qwen2": 12, "gemma": 7, "gpt2": 4}[family]
    for name, reading in readings.items():
        V, update = case.V[name], dense[name]
        assert reading.cosine == pytest.approx(dense_cosine(V, update), abs=1e-5)
        assert reading.null_cosine == pytest.approx(dense_null(V), abs=1e-5)
        assert reading.update_norm == pytest.approx(float(update.norm()), rel=1e-5)
        assert (reading.rank, reading.shape, reading.drift) == (4, tuple(V.shape), 1 - reading.cosine)


def test_the_scaling_enters_the_norm_but_not_the_cosine(make_case):
    case = make_case("llama")
    factors = live_factors(case.model)
    other = measure({n: replace(f, scaling=-3 * f.scaling) for n, f in factors.items()}, case.subspace)
    for name, reading in measure(factors, case.subspace).items():
        assert other[name].cosine == reading.cosine
        assert other[name].update_norm == pytest.approx(3 * reading.update_norm)


def test_unequal_ranks_and_dtypes_are_measured_as_each_alone(make_case):
    case = make_case("qwen2", rank_pattern={"v_proj": 2, "layers.1.self_attn.q_proj": 7})
    factors = {n: replace(f, A=f.A.bfloat16(), B=f.B.bfloat16()) for n, f in live_factors(case.model).items()}
    readings = measure(factors, case.subspace)
    assert {r.rank for r in readings.values()} == {2, 4, 7}
    for name in readings:
        alone = measure({name: factors[name]}, case.subspace)[name]
        assert alone.cosine == pytest.approx(readings[name].cosine, abs=1e-6)
        update = factors[name].B.detach().double() @ factors[name].A.detach().double()
        assert readings[name].cosine == pytest.approx(dense_cosine(case.V[name], update), abs=1e-5)


def test_a_check_waits_for_the_device_once(make_case, host_waits):
    case = make_case("qwen2", rank_pattern={"v_proj": 2})
    factors = live_factors(case.model)
    with host_waits:
        measure(factors, case.subspace)
    assert host_waits.seen == ["tolist"]


def test_measuring_changes_nothing_and_records_no_graph(make_case):
    case = make_case("llama")
    factors = live_factors(case.model)
    before = {n: (f.A.detach().clone(), f.A._version, f.B.detach().clone(), f.B._version) for n, f in factors.items()}
    assert measure(factors, case.subspace) == measure(factors, case.subspace)
    for name, (A, a, B, b) in before.items():
        f = factors[name]
        assert torch.equal(f.A, A)
        assert torch.equal(f.B, B)
        assert (f.A._version, f.B._version) == (a, b)
        assert f.A.grad is None


def test_batches_hold_one_shape_and_stay_within_the_budget(make_case, monkeypatch):
    case = make_case("llama")
    factors = live_factors(case.model)
    whole = measure(factors, case.subspace)
    assert sorted(len(b.names) for b in batches(factors, case.subspace)) == [2, 2, 8]
    budget = 3 * 4 * (32 * 32 + 4 * 64)
    monkeypatch.setattr(sys.modules["safemerge_callback.decision.batches"], "_BATCH_BYTES", budget)
    assert sorted(len(b.names) for b in batches(factors, case.subspace)) == [2, 2, 2, 3, 3]
    in_parts = measure(factors, case.subspace)
    for name in whole:
        assert in_parts[name].cosine == pytest.approx(whole[name].cosine, abs=1e-6)
    monkeypatch.setattr(sys.modules["safemerge_callback.decision.batches"], "_BATCH_BYTES", 1)
    assert [len(b.names) for b in batches(factors, case.subspace)] == [1] * 12


def test_no_result_of_a_batch_outlives_it(make_case, monkeypatch):
    # A small tensor kept after each batch splits the large blocks that were given back: memory grew with the modules.
    case, module = make_case("llama"), sys.modules["safemerge_callback.decision.measure"]
    of_a_batch, results = module._measure_batch, []

    def watched(*given):
        assert [ref() for ref in results] == [None] * len(results)
        found = of_a_batch(*given)
        results.append(weakref.ref(found))
        return found

    monkeypatch.setattr(module, "_measure_batch", watched)
    assert len(measure(live_factors(case.model), case.subspace, batch_bytes=1)) == len(results) == 12


def test_kept_on_a_device_nothing_is_read_again(make_case):
    case = make_case("llama")
    factors = live_factors(case.model)
    case.subspace.place(Device())
    first = measure(factors, case.subspace)
    case.subspace.path.unlink()
    assert measure(factors, case.subspace) == first


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_that_is_not_finite_reads_nan_and_spoils_no_other(make_case, bad):
    case = make_case("llama")
    factors = live_factors(case.model)
    clean = measure(factors, case.subspace)
    broken = "layers.1.self_attn.q_proj"
    with torch.no_grad():
        factors[broken].B[3, 1] = bad
    readings = measure(factors, case.subspace)
    assert math.isnan(readings[broken].cosine)
    assert not readings[broken].finite
    assert broken not in readings.below(2.0)
    assert {n: r for n, r in readings.items() if n != broken} == {n: r for n, r in clean.items() if n != broken}


def test_an_update_of_zero_has_cosine_one_and_norm_zero(make_case):
    case = make_case("llama")
    factors = live_factors(case.model)
    with torch.no_grad():
        factors["layers.0.self_attn.v_proj"].B.zero_()
    reading = measure(factors, case.subspace)["layers.0.self_attn.v_proj"]
    assert (reading.cosine, reading.update_norm, reading.finite) == (1.0, 0.0, True)


def test_where_both_checkpoints_are_equal_there_is_nothing_to_compare(make_case):
    case = make_case("llama", equal={"layers.0.self_attn.q_proj"})
    factors = live_factors(case.model)
    reading = measure(factors, case.subspace)["layers.0.self_attn.q_proj"]
    assert (reading.cosine, reading.null_cosine, reading.comparable) == (1.0, 1.0, False)
    assert reading.update_norm > 0
    with torch.no_grad():
        factors["layers.0.self_attn.q_proj"].A[0, 0] = math.nan
    reading = measure(factors, case.subspace)["layers.0.self_attn.q_proj"]
    assert math.isnan(reading.cosine)
    assert not reading.finite


def test_a_subspace_of_another_model_is_refused(make_case):
    case = make_case("llama")
    factors = live_factors(case.model)
    stranger = replace(factors["layers.0.self_attn.q_proj"], name="layers.7.self_attn.q_proj")
    with pytest.raises(SubspaceError, match=r"layers\.7\.self_attn\.q_proj"):
        measure({**factors, stranger.name: stranger}, case.subspace)
    wide = LoraFactors("layers.0.self_attn.q_proj", torch.ones(2, 32), torch.ones(40, 2), 1.0)
    with pytest.raises(SubspaceError, match=r"\(40, 32\).*\(32, 32\)"):
        measure({wide.name: wide}, case.subspace)


def test_no_modules_give_no_readings(make_case):
    assert len(measure({}, make_case("llama").subspace)) == 0


def test_readings_print_every_module_and_compare_strictly():
    readings = Readings(
        [Reading("layers.0.q", 0.35, 0.71, 2.5, 4, (32, 48)), Reading("layers.1.[q]", 0.3499999, 0.7, 0.0, 4, (8, 8))]
    )
    assert readings.below(0.35) == ["layers.1.[q]"]
    text = str(readings)
    assert "2 modules" in text
    assert "layers.0.q" in text
    assert "layers.1.[q]" in text
    assert "32 x 48" in text
    assert "0.7100" in text
    with pytest.raises(TypeError):
        readings["layers.0.q"] = None


@pytest.mark.parametrize("chosen", ["high", "medium"])
def test_a_trainings_low_precision_changes_no_reading(make_case, chosen):
    """`high` is TF32 on a GPU; `medium` multiplies in bfloat16 on a CPU that can, from some size on."""
    case = make_case("llama")
    expected = measure(live_factors(case.model), case.subspace)
    seen = []

    def product(*args):
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return cosines(*args)

    torch.set_float32_matmul_precision(chosen)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules[measure.__module__], "cosines", product)
            found = measure(live_factors(case.model), case.subspace)
        assert set(seen) == {"ieee"}
        assert {n: r.cosine for n, r in found.items()} == {n: r.cosine for n, r in expected.items()}
        assert torch.get_float32_matmul_precision() == chosen
    finally:
        torch.set_float32_matmul_precision("highest")
