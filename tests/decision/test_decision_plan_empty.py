import math

import pytest

from safemerge_callback.decision import MergePlan, Reading, Readings, nothing_selected
from safemerge_callback.decision.plan import closest


def reading(name, cosine, signed=None, **rest):
    known = {"null_std": 0.01, "reference": 0.9, **rest}
    return Reading(name, cosine, 0.7, known.pop("norm", 1.0), 4, (10, 10), signed_cosine=signed, **known)


READINGS = Readings(
    [
        reading("far", 0.9, 0.5),
        # the lowest cosine of all, and no cosine decides it
        reading("still", 0.1, norm=0.0),
        reading("broken", math.nan, norm=math.nan),
        reading("low", 0.5, -0.1, reference=0.1),
        reading("near", 0.69, -0.15, reference=1.7),
    ]
)


@pytest.mark.parametrize(
    ("gate", "knobs", "name"),
    [
        ("threshold", {"threshold": 0.3}, "low"),
        ("calibrated", {"z_threshold": -30.0}, "low"),
        ("reference", {"reference_fraction": 0.4}, "near"),
        ("opposed", {"z_threshold": -5.0}, "near"),
        ("quantile", {"quantile": 0.1}, "low"),
    ],
)
def test_the_closest_module_is_the_gates_own(gate, knobs, name):
    plan = MergePlan.decide(READINGS, gate=gate, **knobs)
    assert plan.selected == ()
    assert closest(plan) == name
    words = nothing_selected(plan)
    assert (
        f"gate {plan.gate} selects none of 5 modules. The closest is {name!r} ({plan.verdicts[name].reason})" in words
    )


def test_no_modules_no_closest():
    plan = MergePlan.decide(Readings(()), gate="all")
    assert closest(plan) is None
    assert "had no module" in nothing_selected(plan)
