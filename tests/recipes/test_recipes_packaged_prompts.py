"""The prompts that the package brings are on no evaluation set at hand."""

import pytest

from recipes.data.benign import benign_pairs, edgy_prompts
from recipes.data.near_duplicates import groups, without_near
from safemerge_callback.errors import ConfigError
from safemerge_callback.evaluation.prompts import PACKAGED, load_prompts


def evaluated():
    try:
        sets = {name: list(load_prompts(name).prompts) for name in ("advbench", "harmbench", "strongreject")}
        sets["benign"] = [pair["prompt"] for half in benign_pairs() for pair in half]
        sets["benign_edgy"] = edgy_prompts()
    except ConfigError:
        pytest.skip("the data packages are absent; `make demo` installs them")
    return sets


@pytest.mark.parametrize("name", PACKAGED)
def test_none_is_a_near_duplicate_of_a_prompt_that_is_evaluated(name):
    prompts = load_prompts(name).prompts
    for others in evaluated().values():
        assert without_near(prompts, others) == list(prompts)


@pytest.mark.parametrize("name", PACKAGED)
def test_none_is_a_near_duplicate_of_another(name):
    """In Latin letters: of other scripts the measure sees no word."""
    prompts = [prompt for prompt in load_prompts(name).prompts if prompt.isascii()]
    assert len(prompts) > 100
    assert len(groups(prompts)) == len(prompts)
