"""Methods that prune, through plans and writers: the formula on dense updates, and masks that repeat."""

from dataclasses import replace

import pytest
import torch

from safemerge_callback.decision import MergePlan, apply, measure, merged_factors
from safemerge_callback.errors import ConfigError
from safemerge_callback.live import live_factors, writer_for
from safemerge_callback.methods import METHODS, get_method
from safemerge_callback.ops import LowRank, mask_seed
from safemerge_callback.record import merge_entry

ELEMENTWISE = sorted(name for name, method in METHODS.items() if method.dense)
RANDOM = sorted(name for name, method in METHODS.items() if method.random)


def decided(case, **knobs):
    return MergePlan.decide(measure(writer_for(case.model).gather(), case.subspace), gate="all", **knobs)


def apart(x, y):
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize("name", [*ELEMENTWISE, "slerp", "orthogonal"])
def test_a_method_meets_the_updates_whatever_their_ranks_and_scalings(make_case, safety_for, name):
    """The method on the dense updates at full rank, cut to the live rank, is what the model holds afterwards."""
    case = make_case("llama", rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 7})
    safety, theirs = safety_for(case, rank=3, alpha=5, use_rslora=True)
    ours = case.updates()
    ranks = {n: f.rank for n, f in live_factors(case.model).items()}
    knobs = {"density": 0.5} if "density" in METHODS[name].takes else {}
    edits = apply(decided(case, method=name, seed=3, step=8, **knobs), writer_for(case.model), safety)
    now = case.updates()
    for edit in edits:
        live, other = (
            LowRank(torch.eye(x.shape[1]).double(), x.double()) for x in (ours[edit.name], theirs[edit.name])
        )
        if METHODS[name].random:
            knobs["generator"] = torch.Generator().manual_seed(mask_seed(3, 8, edit.name))
        whole = get_method(name).merge(live, [other], weights=(0.8, 0.2), **knobs)
        u, s, v = torch.linalg.svd(whole.B @ whole.A)
        rank = ranks[edit.name]
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        if not METHODS[name].random:  # float64 odds are other draws than float32 ones
            assert apart(now[edit.name].double(), best) < 1e-4
            assert edit.residual == pytest.approx(float(s[rank:].norm() / s.norm()), abs=1e-4)
        assert 0 < edit.change < 10


@pytest.mark.parametrize("name", RANDOM)
def test_masks_are_those_of_seed_step_and_module(make_case, safety_for, name):
    case = make_case("llama")
    safety, _ = safety_for(case)
    plan = decided(case, method=name, density=0.5, seed=1, step=10)
    factors = writer_for(case.model).gather()

    def merged(plan):
        new, _ = merged_factors(plan, factors, safety)
        return new

    first = merged(plan)
    torch.manual_seed(99)
    again = merged(plan)
    assert all(torch.equal(first[module].B, again[module].B) for module in first)
    for other in (replace(plan, gate=replace(plan.gate, seed=2)), replace(plan, gate=replace(plan.gate, step=11))):
        changed = merged(other)
        assert not any(torch.equal(first[module].B, changed[module].B) for module in first)
    # A module's masks are its own, whatever else is merged beside it.
    few = {name: v if i == 1 else v._replace(merge=False) for i, (name, v) in enumerate(plan.verdicts.items())}
    (module, alone), *none = merged(replace(plan, verdicts=few)).items()
    assert not none
    assert torch.equal(alone.B, first[module].B)
    assert torch.equal(alone.A, first[module].A)


def test_a_plan_refuses_what_its_method_does_not_read(make_case):
    readings = measure(writer_for(make_case("llama").model).gather(), make_case("llama").subspace)
    for knobs, says in [
        ({"method": "ties"}, "density is missing"),
        ({"method": "ties", "density": 0}, "density is 0"),
        ({"method": "ties", "density": 1.5}, "density is 1.5"),
        ({"density": 0.5}, "'linear' does not read"),
        ({"majority_sign_method": "frequency"}, "elects no sign"),
        ({"method": "ties", "density": 0.5, "majority_sign_method": "most"}, "'most' is unknown"),
        ({"method": "orthogonal", "space": "factor"}, "'factor' is not one that method 'orthogonal' works in"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": True}, "seed=True"),
    ]:
        with pytest.raises(ConfigError, match=says):
            MergePlan.decide(readings, **knobs)


def test_a_plan_tells_the_knobs_that_count(make_case):
    case = make_case("llama")
    plan = decided(case, method="dare_ties", density=0.5, majority_sign_method="frequency", seed=4)
    assert plan.taken == {"density": 0.5, "majority_sign_method": "frequency", "seed": 4}
    assert "density 0.5, majority_sign_method frequency, seed 4" in str(plan)
    assert merge_entry(3, plan, [], {}, 0.1).items() >= plan.taken.items()
    plain = decided(case)
    assert plain.taken == {}
    assert "density" not in str(plain)
