"""What a merge needs, and who says so."""

import pytest

from safemerge_callback.decision import GATES, Gate, needs_of
from safemerge_callback.methods import METHODS, How, as_how
from safemerge_callback.signals.check_data import DATA_NEEDS
from safemerge_callback.signals.module_signals import MODULE_SIGNALS

MERGES = {"subspace", "bases", "one_merge", "safety_adapter", "safety_cosines", "average"}
KNOWN = {*MERGES, *DATA_NEEDS, *MODULE_SIGNALS}


@pytest.mark.parametrize(
    ("how", "gate", "needs"),
    [
        (None, "threshold", {}),
        ("pull", "all", {}),
        ("linear", "all", {"safety_adapter": "method 'linear'"}),
        ("linear", "reference", {"safety_adapter": "method 'linear'", "safety_cosines": "gate 'reference'"}),
        ("pull", "reference", {"safety_adapter": "gate 'reference'", "safety_cosines": "gate 'reference'"}),
        ("project", "all", dict.fromkeys(("subspace", "one_merge"), "method 'project'")),
        ("ema", "watch", {"average": "method 'ema'"}),
    ],
)
def test_gate_and_method_say_what_they_need(how, gate, needs):
    assert needs_of(None if how is None else as_how(how, {}), Gate(gate)) == needs


def test_a_value_of_a_knob_needs_more():
    assert How("project", knobs={"operator": "orthogonal"}).needs == {"subspace", "bases"}


def test_nothing_needs_what_nobody_opens():
    assert {need for method in METHODS.values() for need in method.needs | method.optional} <= KNOWN
    assert {need for gate in GATES.values() for need in gate.needs} <= KNOWN
