"""A method with its knobs: checked and normalised when made, and what it hands to the method's function."""

import pytest
import torch

from safemerge_callback.errors import ConfigError
from safemerge_callback.methods import METHODS, How, as_how, get_method
from safemerge_callback.ops import LowRank


def update(seed):
    source = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(2, 5, generator=source), torch.randn(4, 2, generator=source))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_it_has_every_knob_of_its_method_and_no_other(name):
    how = How(name, knobs={"density": 1} if "density" in METHODS[name].takes else {})
    assert [*how.knobs] == [knob.name for knob in METHODS[name].knobs]
    assert (how.space, how.weights) == ("delta", (0.8, 0.2))
    assert (how.strength is None) == (METHODS[name].strength is None)
    assert how == How(name, knobs=how.knobs)
    assert hash(how) == hash(How(name, knobs=how.knobs))


def test_settings_by_name_make_one():
    assert as_how("linear", {"weights": [1, 0.5], "density": None}) == How("linear", weights=(1.0, 0.5))
    assert as_how("pull", {"strength": 0.25}).weights == (0.75, 0.25)
    assert as_how(How("linear"), {}) == How("linear")
    with pytest.raises(ConfigError, match=r"knobs \['space'\] were given beside a How"):
        as_how(How("linear"), {"space": "factor"})
    with pytest.raises(ConfigError, match="knob 'densty' of a merge is unknown; did you mean 'density'"):
        How("ties", knobs={"densty": 0.5})
    with pytest.raises(ConfigError, match=r"weights are missing with 2 safety adapters"):
        as_how("linear", {}, adapters=2)


def test_it_merges_as_its_method_with_its_knobs():
    live, safety = update(1), update(2)
    how = as_how("ties", {"density": 0.5, "majority_sign_method": "frequency", "space": "factor"})
    asked = {"weights": (0.8, 0.2), "space": "factor", "density": 0.5, "majority_sign_method": "frequency"}
    expected = get_method("ties").merge(live, [safety], **asked)
    assert torch.equal(how.merge(live, [safety]).B, expected.B)
    other = get_method("ties").merge(live, [safety], **{**asked, "weights": (0.5, 0.5)})
    assert torch.equal(how.merge(live, [safety], weights=(0.5, 0.5)).B, other.B)


def test_orthogonal_has_a_strength_beside_its_weights():
    how = as_how("orthogonal", {"strength": 0.1, "weights": [0.5, 0.5]}, adapters=1)
    assert (how.strength, how.weights, how.taken) == (0.1, (0.5, 0.5), {"strength": 0.1})
    live, safety = update(1), update(2)
    expected = get_method("orthogonal").merge(live, [safety], weights=(0.5, 0.5), strength=0.1)
    assert torch.equal(how.merge(live, [safety]).B, expected.B)
    assert as_how("orthogonal", {"strength": None}).taken == {}
    for strength in (0, 1.5, True, "half"):
        with pytest.raises(ConfigError, match=r"strength is .*method 'orthogonal' goes this share"):
            as_how("orthogonal", {"strength": strength})
    with pytest.raises(ConfigError, match=r"'linear' does not read: give weights, or choose one of .*'orthogonal'"):
        as_how("linear", {"strength": 0.5})
