"""What a result is stamped with."""

import torch
from safetensors.torch import save_file

from method_comparison import stamp
from method_comparison.grid import make_grid
from method_comparison.stamp import differences, name_with_digest

RAW = {
    "model": "org/aligned",
    "unaligned": "org/unaligned",
    "target_modules": ["q_proj"],
    "seeds": [1],
    "output_dir": "runs",
    "tasks": ["sentiment"],
    "arms": {"plain": {"about": "plain"}},
}


def test_a_folder_is_told_by_its_weights_and_a_hub_id_by_its_name(tmp_path):
    names = []
    for value in (1.0, 1.0, 2.0):
        save_file({"weight": torch.full((2,), value)}, tmp_path / "model.safetensors")
        names.append(name_with_digest(str(tmp_path)))
    assert names[0] == names[1] != names[2]
    assert names[0].startswith(f"{tmp_path.name} ")
    assert name_with_digest("org/model") == "org/model"


def test_data_of_tasks_that_one_of_two_grids_lacks_is_no_difference():
    one = {"data": {"harmbench": "a", "sentiment": "b"}, "model": {"org/aligned": "org/aligned"}}
    grown = {**one, "data": {**one["data"], "cities": "c"}}
    assert differences(one, grown) == differences(grown, one) == []
    assert differences(one, {**grown, "data": {**grown["data"], "sentiment": "d"}}) == ["sentiment b and not d"]


def test_another_model_is_a_difference():
    one, other = ({"model": {name: name}} for name in ("org/aligned", "org/other"))
    assert differences(one, other) == ["org/aligned org/aligned and not None", "org/other None and not org/other"]


def test_data_of_tasks_that_some_arms_alone_have_is_stamped(monkeypatch):
    arms = {**RAW["arms"], "other": {"about": "other", "tasks": ["cities"]}}
    grid = make_grid({**RAW, "arms": arms, "more": [{"arms": ["plain"], "seeds": [2], "tasks": ["arithmetic"]}]})
    monkeypatch.setattr(stamp, "get_task", lambda name: name)
    monkeypatch.setattr(stamp, "rows_of", lambda task, split: [])
    monkeypatch.setattr(stamp, "prompts_of", lambda name, split: [])
    monkeypatch.setattr("recipes.data.load_examples", lambda name: [])
    monkeypatch.setattr("recipes.data.safety_prompts", lambda: [])
    assert stamp._data(grid).keys() == {*stamp.SETS, "safety", "sentiment", "cities", "arithmetic"}


def test_the_host_is_told_with_its_vector_instructions(monkeypatch):
    monkeypatch.setattr(stamp, "_data", lambda grid: {})
    monkeypatch.setattr(stamp, "vector_instructions", lambda: "AVX0")
    assert " AVX0, " in stamp.stamp_of(make_grid(RAW))["host"]


def test_all_code_that_makes_a_result_is_in_its_stamp():
    """A folder of the package that is new is either here or shows results alone."""
    shown = {"cli", "integrations", "reports"}
    package = stamp.ROOT / "safemerge_callback"
    assert set(stamp.FLOORS) == {path.parent.name for path in package.glob("*/__init__.py")} - shown
    assert [pattern for pattern in stamp.CODE if not any(stamp.ROOT.glob(pattern))] == []
