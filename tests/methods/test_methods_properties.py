"""What holds for every method, whatever the adapters: no-ops, an adapter with itself, full rank, gauge, knobs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safemerge_callback.errors import ConfigError, PlanError
from safemerge_callback.methods import METHODS, How, get_method
from safemerge_callback.methods.registry import Keywords
from safemerge_callback.ops import Grams, LowRank

MERGES = sorted(name for name, method in METHODS.items() if "safety_adapter" in method.needs and method.keeps_rank)
PAIRS = [(name, space) for name in MERGES for space in METHODS[name].spaces]
PRUNING = sorted(name for name, method in METHODS.items() if "density" in method.takes)


def knobs(name, density=0.5):
    return {
        **({"density": density} if "density" in METHODS[name].takes else {}),
        **({"generator": torch.Generator().manual_seed(3)} if METHODS[name].random else {}),
    }


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def update(seed, d_out=9, d_in=12, rank=3, batch=(), dtype=torch.float64):
    A, B = (*batch, rank, d_in), (*batch, d_out, rank)
    return LowRank(normal(*A, seed=seed, dtype=dtype), normal(*B, seed=seed + 1000, dtype=dtype))


def product(merged):
    return merged.B @ merged.A


def gap(x, y):
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize(("name", "space"), PAIRS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), batch=st.sampled_from([(), (2,)]), density=st.floats(0.01, 1.0))
def test_weights_of_one_and_zero_change_nothing_to_the_bit(name, space, seed, batch, density):
    live, safety = update(seed, batch=batch, dtype=torch.float32), update(seed + 1, batch=batch, dtype=torch.float32)
    merged = get_method(name).merge(live, [safety], weights=(1.0, 0.0), space=space, **knobs(name, density))
    assert torch.equal(merged.A, live.A)
    assert torch.equal(merged.B, live.B)
    assert merged.residual.shape == batch
    assert not merged.residual.any()


# What a method makes of an update merged with itself, as a multiple of it, at density 1.
TO_ITSELF = {
    "linear": lambda f, s: f + s,
    "slerp": lambda f, s: f + s,
    "dare_linear": lambda f, s: f + s,
    "magnitude_prune": lambda f, s: f + s,
    "breadcrumbs": lambda f, s: f + s,
    # A mean over a count, as PEFT's: weights of (1, 1) give the update itself, and (.8, .2) half of it.
    "ties": lambda f, s: (f + s) / 2,
    "dare_ties": lambda f, s: (f + s) / 2,
    "della": lambda f, s: (f + s) / 2,
    "pcb": lambda f, s: (f + s) / 2,
    # No part of an update lies outside its own column space.
    "orthogonal": lambda f, s: f,
}


@pytest.mark.parametrize("name", sorted(TO_ITSELF))
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), weights=st.tuples(st.floats(0.1, 2.0), st.floats(0.1, 2.0)))
def test_an_adapter_with_itself_is_itself(name, seed, weights):
    assert set(TO_ITSELF) == set(MERGES)
    live = update(seed)
    merged = get_method(name).merge(live, [live], weights=weights, space="delta", **knobs(name, 1.0))
    assert gap(product(merged), TO_ITSELF[name](*weights) * product(live)) < 1e-6
    assert float(merged.residual) < 1e-6
    # The gauge as well: Adam's moments belong to these factors. Where the target is a multiple, A stays.
    assert gap(merged.A, live.A) < 1e-5


@pytest.mark.parametrize("name", ["linear", "ties", "slerp"])
def test_weights_that_sum_to_one_or_average_to_one(name):
    live = update(1)
    weights = (1.0, 1.0) if name == "ties" else (0.7, 0.3)
    for space in METHODS[name].spaces:
        if name == "linear" and space != "delta":  # (√.7 + √.3)², PEFT's cross terms
            continue
        merged = get_method(name).merge(live, [live], weights=weights, space=space, **knobs(name, 1.0))
        assert gap(product(merged), product(live)) < 1e-9


@pytest.mark.parametrize("name", MERGES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), density=st.floats(0.05, 0.95))
def test_full_rank_loses_nothing(name, seed, density):
    """At rank min(d_out, d_in) the merge is the dense formula's own matrix: nothing is truncated."""
    live, safety = update(seed, d_out=6, d_in=8, rank=6), update(seed + 1, d_out=6, d_in=8, rank=2)
    merged = get_method(name).merge(live, [safety], weights=(0.8, 0.3), space="delta", **knobs(name, density))
    assert float(merged.residual) < 1e-12
    # Any other factorisation of full rank gives the same matrix.
    other = LowRank(torch.eye(8, dtype=torch.float64)[:, :8], product(live) @ torch.eye(8, dtype=torch.float64))
    again = get_method(name).merge(other, [safety], weights=(0.8, 0.3), space="delta", **knobs(name, density))
    assert gap(product(merged), product(again)) < 1e-6


@pytest.mark.parametrize("name", MERGES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), density=st.floats(0.05, 1.0))
def test_delta_space_does_not_see_the_gauge(name, seed, density):
    """B·A = (B·Q)(Q⁻¹·A): the merged product is the same; in float64, since a mask may turn on the last bit."""
    live, safety = update(seed), update(seed + 1, rank=2)
    Q = normal(3, 3, seed=seed) + 3 * torch.eye(3, dtype=torch.float64)
    turned = LowRank(torch.linalg.solve(Q, live.A), live.B @ Q)
    both = [
        product(get_method(name).merge(x, [safety], weights=(0.7, 0.4), space="delta", **knobs(name, density)))
        for x in (live, turned)
    ]
    assert gap(both[1], both[0]) < 1e-5


@pytest.mark.parametrize(("name", "space"), [pair for pair in PAIRS if not METHODS[pair[0]].random])
def test_a_batch_is_its_modules(name, space):
    """Each matrix is pruned by itself; random methods are merged one by one, by who calls them."""
    live, safety = update(1, batch=(2, 3)), update(2, batch=(2, 3))
    whole = get_method(name).merge(live, [safety], weights=(0.8, 0.2), space=space, **knobs(name))
    assert whole.residual.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            own = LowRank(live.A[i, j], live.B[i, j]), [LowRank(safety.A[i, j], safety.B[i, j])]
            one = get_method(name).merge(*own, weights=(0.8, 0.2), space=space, **knobs(name))
            torch.testing.assert_close(product(whole)[i, j], product(one), rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(whole.residual[i, j], one.residual, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "space"), PAIRS)
def test_results_are_finite_for_adapters_that_never_moved(name, space):
    """B = 0, where every LoRA begins, on either side or both."""
    some = update(1)
    none = LowRank(some.A, torch.zeros_like(some.B))
    for live, safety in ((none, some), (some, none), (none, none)):
        merged = get_method(name).merge(live, [safety], weights=(0.8, 0.2), space=space, **knobs(name))
        assert torch.isfinite(merged.A).all()
        assert torch.isfinite(merged.B).all()
        assert merged.A.shape == live.A.shape
        assert merged.B.shape == live.B.shape


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_takes_every_keyword(name):
    live, V = update(1), normal(9, 12, seed=5)
    every = {"density": 0.5, "majority_sign_method": "total", "generator": torch.Generator(), "alignment_matrix": V}
    every["grams"] = Grams(normal(6, 12, seed=6), normal(4, 12, seed=7))
    merged = get_method(name).merge(live, [update(2)], weights=(0.8, 0.2), space="delta", **every)
    assert product(merged).shape == (9, 12)


@pytest.mark.parametrize("density", [0, 0.0, -0.1, 1.01, float("nan"), float("inf"), True, "0.5", None])
@pytest.mark.parametrize("name", PRUNING)
def test_a_density_outside_is_refused(name, density):
    with pytest.raises(ConfigError, match=r"density is .*above 0 and at most 1"):
        How(name, knobs={"density": density})
    with pytest.raises(ConfigError, match="density is"):
        get_method(name).merge(update(1), [update(2)], weights=(0.8, 0.2), density=density, generator=torch.Generator())


def test_a_knob_that_is_not_read_is_refused():
    assert How("linear", knobs={"density": None, "majority_sign_method": "total"}).knobs == {}
    assert How("ties", knobs={"density": 1}).knobs == {"density": 1.0, "majority_sign_method": "total"}
    with pytest.raises(ConfigError, match=r"density is 0.5, which method 'linear' does not read.*'ties'"):
        How("linear", knobs={"density": 0.5})
    with pytest.raises(ConfigError, match=r"'dare_linear' elects no sign.*'ties'"):
        How("dare_linear", knobs={"density": 0.5, "majority_sign_method": "frequency"})
    with pytest.raises(ConfigError, match=r"'totl' is unknown.*did you mean 'total'"):
        How("ties", knobs={"density": 0.5, "majority_sign_method": "totl"})


@pytest.mark.parametrize("name", sorted(name for name in METHODS if METHODS[name].random))
def test_random_methods_need_a_generator(name):
    with pytest.raises(PlanError, match=f"'{name}' draws masks from a generator on the CPU, got none"):
        get_method(name).merge(update(1), [update(2)], weights=(0.8, 0.2), density=0.5)


@pytest.mark.parametrize("name", sorted(name for name in METHODS if METHODS[name].random))
def test_random_methods_follow_their_generator(name):
    live, safety = update(1), update(2)

    def once(seed):
        source = torch.Generator().manual_seed(seed)
        merged = get_method(name).merge(live, [safety], weights=(0.8, 0.2), density=0.5, generator=source)
        return product(merged)

    torch.manual_seed(0)
    first = once(1)
    state = torch.get_rng_state()
    assert torch.equal(first, once(1))
    assert not torch.equal(first, once(2))
    # A training's own stream of random numbers is left alone.
    assert torch.equal(state, torch.get_rng_state())


def test_unequal_ranks_are_refused_in_factor_space():
    for name, space in PAIRS:
        if space == "factor":
            with pytest.raises(PlanError, match=r"\[3, 2\].*space 'delta'"):
                get_method(name).merge(update(1), [update(2, rank=2)], weights=(0.8, 0.2), space=space, **knobs(name))


def test_a_method_is_given_what_it_declares_and_a_keyword_that_none_has_is_refused():
    declared = {name: sorted(method.reads) for name, method in METHODS.items()}
    assert declared["linear"] == ["space", "weights"]
    assert declared["project"] == ["alignment_matrix"]
    assert all(m.reads <= {*Keywords.__annotations__, *(k.name for k in m.knobs)} for m in METHODS.values())
    live = LowRank(torch.randn(2, 5, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64))
    merged = get_method("linear").merge(live, [live], weights=(0.5, 0.5), density=0.3, alignment_matrix=torch.eye(4))
    torch.testing.assert_close(merged.B @ merged.A, live.B @ live.A)
    with pytest.raises(TypeError, match="no keywords \\['densty'\\]"):
        get_method("ties").merge(live, [live], weights=(0.5, 0.5), densty=0.3)
