"""The folder of a merge: it never takes the place of what goes into it."""

import pytest

from safemerge_callback.errors import ConfigError
from safemerge_callback.offline.output import free_output


@pytest.mark.parametrize("name", ["base", "link", "base/../base"])
def test_a_folder_that_goes_in_is_no_output_by_any_name(tmp_path, name):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "link").symlink_to("base")
    with pytest.raises(ConfigError, match="is one of the inputs"):
        free_output(tmp_path / name, ["org/name", None, tmp_path / "base"], True, {"model.safetensors"})
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == b"weights"


def test_the_base_model_of_a_bake_goes_in(tmp_path, monkeypatch):
    from safemerge_callback.offline import merge, merge_adapters

    asked = []
    monkeypatch.setattr(merge, "free_output", lambda output, inputs, *_: asked.extend(inputs) or 1 / 0)
    monkeypatch.setattr(merge.BaseModel, "find", lambda source: merge.BaseModel(tmp_path, {}))
    with pytest.raises(ZeroDivisionError):
        merge_adapters("task", "safety", "subspace", "out", bake="base")
    assert asked == ["task", "safety", "subspace", "base"]
